"""`checksums.json`: what a model directory held when it was written, so that a change is seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.model_config import DTYPES, model_of, read_json
from stagdist.config import ModelConfig
from stagdist.config_loading import differences
from stagdist.errors import CheckpointError

CHECKSUMS = "checksums.json"
"""sha256 of every tensor's bytes, by stored name, the weights' type and the model's shape."""

TAMPERED = f"take the directory from where it came again, or remove {CHECKSUMS} if the change was meant"


@dataclass(frozen=True)
class WrittenRecord:
    """What was written.

    Attributes:
        config: keys of `config.json` that decide what the weights compute.
        sha256: of every tensor's bytes, by stored name.
        dtype: of the weights; None in a record from before it was kept.
    """

    directory: Path
    config: dict[str, Any]
    sha256: dict[str, str]
    dtype: torch.dtype | None

    def check_config(self, body: dict[str, Any], model: ModelConfig) -> None:
        """Compare `config.json` with what was written: key by key, and in what all keys together mean.

        Raises:
            CheckpointError: naming the key.
        """
        for key, written in self.config.items():
            if body.get(key) != written:
                raise self._other(key, body.get(key), written)
        if self.config:
            was = model_of(self.config, self.directory / CHECKSUMS)
            for key, (written, now) in differences(was, model).items():
                raise self._other(key, now, written)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Compare the type of the weights with the one that was written.

        Raises:
            CheckpointError: it is another.
        """
        if self.dtype is not None and dtype != self.dtype:
            raise CheckpointError(
                f"the weights in {self.directory} are {dtype}, {self.dtype} was written ({CHECKSUMS}); {TAMPERED}"
            )

    def check_names(self, names: list[str]) -> None:
        """Every tensor must have its sum.

        Raises:
            CheckpointError: naming one without.
        """
        absent = [name for name in names if self.sha256 and name not in self.sha256]
        if absent:
            raise CheckpointError(f"{self.directory / CHECKSUMS} has no sum of the tensor {absent[0]}; {TAMPERED}")

    def _other(self, key: str, now: Any, written: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}/config.json says {key} {now!r}, the weights were written for {written!r} "
            f"({CHECKSUMS}); {TAMPERED}"
        )


def read_record(directory: Path) -> WrittenRecord:
    """The record of a directory; an empty one where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return WrittenRecord(directory, {}, {}, None)
    body = read_json(path)
    config, sums, dtype = body.get("config", {}), body.get("sha256"), body.get("dtype")
    if not isinstance(sums, dict) or not sums or not all(isinstance(one, str) for one in sums.values()):
        raise CheckpointError(f"{path} is damaged: sha256 must hold the sum of every tensor; {TAMPERED}")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: config must hold keys of config.json; {TAMPERED}")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise CheckpointError(f"{path} says dtype {dtype!r}; one of {list(DTYPES)} is read; {TAMPERED}")
    return WrittenRecord(directory, config, sums, None if dtype is None else DTYPES[dtype])
