"""`checksums.json`: a record of the content of a model directory, with which later changes are detected."""

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
"""File with the sha256 of every tensor and small file, the dtype, and the keys of `config.json`."""

TAMPERED = f"get the directory from its source again, or remove {CHECKSUMS} if the change is intended"


@dataclass(frozen=True)
class WrittenRecord:
    """The content of `checksums.json`.

    Attributes:
        config: the keys of `config.json` that change what the weights compute.
        sha256: hash of the bytes of every tensor, by stored name.
        dtype: dtype of the weights; None in records of earlier releases.
        files: sha256 of tokenizer and code files; empty in records of earlier releases.
    """

    directory: Path
    config: dict[str, Any]
    sha256: dict[str, str]
    dtype: torch.dtype | None
    files: dict[str, str] = field(default_factory=dict)

    def changed_files(self, *, but: Collection[str] = ()) -> Iterator[str]:
        """One message for each small file that was changed; the names `but` are not checked."""
        for name, written in self.files.items():
            path = self.directory / name
            if name in but:
                continue
            if not path.is_file():
                yield f"{name} is missing"
            elif file_record(path).sha256 != written:
                yield (
                    f"{name} has other content than was written ({CHECKSUMS}); get it from its source again, or "
                    f"remove its line from {CHECKSUMS} if the change is intended"
                )

    def check_config(self, body: dict[str, Any], model: ModelConfig) -> None:
        """Compare `config.json` with the record: key by key, and the resulting model configuration.

        Raises:
            CheckpointError: a key differs; the message names it.
        """
        for key, written in self.config.items():
            if body.get(key) != written:
                raise self._other(key, body.get(key), written)
        if self.config:
            was = model_of(self.config, self.directory / CHECKSUMS)
            for key, (written, now) in differences(was, model).items():
                raise self._other(key, now, written)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Compare the dtype of the weights with the record.

        Raises:
            CheckpointError: it differs.
        """
        if self.dtype is not None and dtype != self.dtype:
            raise CheckpointError(
                f"the weights in {self.directory} are {dtype}, {self.dtype} was written ({CHECKSUMS}); {TAMPERED}"
            )

    def check_names(self, names: list[str]) -> None:
        """Check that every tensor has a checksum.

        Raises:
            CheckpointError: one has none; the message names it.
        """
        absent = [name for name in names if self.sha256 and name not in self.sha256]
        if absent:
            raise CheckpointError(f"{self.directory / CHECKSUMS} has no checksum of the tensor {absent[0]}; {TAMPERED}")

    def _other(self, key: str, now: Any, written: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}/config.json says {key} {now!r}, the weights were written for {written!r} "
            f"({CHECKSUMS}); {TAMPERED}"
        )


def read_record(directory: Path) -> WrittenRecord:
    """The record of a directory; an empty record if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return WrittenRecord(directory, {}, {}, None)
    body = read_json(path)
    config, sums, dtype = body.get("config", {}), body.get("sha256"), body.get("dtype")
    if not _are_sums(sums) or not sums:
        raise CheckpointError(f"{path} is damaged: sha256 must have the checksum of every tensor; {TAMPERED}")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: config must have keys of config.json; {TAMPERED}")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in STORED_DTYPES):
        raise CheckpointError(f"{path} says dtype {dtype!r}; one of {list(STORED_DTYPES)} is read; {TAMPERED}")
    files = body.get("files", {})
    if not _are_sums(files) or any(Path(name).name != name or name in ("", "..") for name in files):
        raise CheckpointError(f"{path} is damaged: files must have checksums of files of the directory; {TAMPERED}")
    return WrittenRecord(directory, config, sums, None if dtype is None else STORED_DTYPES[dtype], files)


def _are_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
