"""`checksums.json`: what a model directory held when it was written, so that a change is seen."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.published.model_json import model_of, read_json
from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.files import file_record
from stagdist.model.precision import STORED_DTYPES

CHECKSUMS = "checksums.json"
"""sha256 of every tensor's bytes, by stored name, the weights' type, the model's shape, sha256 of small files."""

TAMPERED = f"take the directory from where it came again, or remove {CHECKSUMS} if the change was meant"


@dataclass(frozen=True)
class WrittenRecord:
    """What was written.

    Attributes:
        config: keys of `config.json` that decide what the weights compute.
        sha256: of every tensor's bytes, by stored name.
        dtype: of the weights; None in a record from before it was kept.
        files: sha256 of the tokenizer's files and of the code; empty in a record from before they were kept.
    """

    directory: Path
    config: dict[str, Any]
    sha256: dict[str, str]
    dtype: torch.dtype | None
    files: dict[str, str] = field(default_factory=dict)

    def changed_files(self, *, but: Collection[str] = ()) -> Iterator[str]:
        """What is wrong with each small file that is not as it was written.

        Args:
            but: names that are not looked at.
        """
        for name, written in self.files.items():
            path = self.directory / name
            if name in but:
                continue
            if not path.is_file():
                yield f"{name} is missing"
            elif file_record(path).sha256 != written:
                yield (
                    f"{name} has other content than was written ({CHECKSUMS}); take it from where it came again, or "
                    f"remove its line from {CHECKSUMS} if the change was meant"
                )

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
    if not _are_sums(sums) or not sums:
        raise CheckpointError(f"{path} is damaged: sha256 must hold the sum of every tensor; {TAMPERED}")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: config must hold keys of config.json; {TAMPERED}")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in STORED_DTYPES):
        raise CheckpointError(f"{path} says dtype {dtype!r}; one of {list(STORED_DTYPES)} is read; {TAMPERED}")
    files = body.get("files", {})
    if not _are_sums(files) or any(Path(name).name != name or name in ("", "..") for name in files):
        raise CheckpointError(f"{path} is damaged: files must hold the sums of files of the directory; {TAMPERED}")
    return WrittenRecord(directory, config, sums, None if dtype is None else STORED_DTYPES[dtype], files)


def _are_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
