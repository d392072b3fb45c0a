"""Read a model directory slice by slice: a rank loads only what it needs."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stagdist.checkpoint.complete import COMPLETE, RunningHashes, damage, read_complete, refuse_undownloaded
from stagdist.checkpoint.published.model_json import (
    CONFIG,
    declared_dtype,
    model_of,
    read_body,
    read_text_tokens,
    refuse_unsupported,
)
from stagdist.checkpoint.published.model_writer import INDEX_FILE, SINGLE_FILE, stored_name
from stagdist.checkpoint.published.other_formats import converted, save_as_utf8, unfinished_download, weights_there
from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.files import FileRecord
from stagdist.model.precision import SAFETENSORS_DTYPES, STORED_DTYPES
from stagdist.parallel.layout import ParameterSpec, model_parameters

_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
"""Names of tensors that old Llama directories contain and no program reads."""

_HEAD = "lm_head.weight"  # of a Llama

_ROWS = 4096
"""Rows of a matrix that are compared at a time."""

CHANGED = f"get the directory from its source again, or remove {COMPLETE} if the change is intended"

ReadSlice = Callable[[ParameterSpec, int, int, int], Tensor]
"""Entries `start` to `stop` of dimension `dim` of a parameter: (spec, dim, start, stop) -> tensor on the CPU."""


class ModelReader:
    """An open model directory. Its files are memory-mapped.

    The constructor checks everything except the values of the tensors, which `check` compares with `complete.json`. A
    directory of another program has none; it is checked for what `config.json` requires.

    Args:
        hashing: hash the weights while they are read, so that `check` reads only the rest.

    Raises:
        CheckpointError: a file or tensor is missing, unknown, was changed, or has another shape or dtype than
            `config.json` requires (the message names it); or the model is not supported.
    """

    def __init__(self, directory: str | Path, *, hashing: bool = False):
        self.directory, self._hashing = Path(directory), hashing
        records = self._checked_records()
        body = read_body(directory)
        self.model: ModelConfig = model_of(body, self.directory / "config.json")
        refuse_unsupported(body, self.directory)
        self._files: dict[str, Any] = {}
        self._where = self._weight_map()
        if records and (unrecorded := sorted(self._files.keys() - records.keys())):
            raise CheckpointError(f"{self.directory}: {COMPLETE} has no record of {unrecorded[0]}; {CHANGED}")
        self._hashes = RunningHashes(self.directory, {file: records[file] for file in self._files if records})
        if self.model.num_layers > len(self._where):  # before every one of them is named
            raise CheckpointError(
                f"{self.directory}/config.json says {self.model.num_layers} layers, the weights are "
                f"{len(self._where)} tensors; get the directory from its source again"
            )
        self._expected = {self._stored(spec): spec for spec in model_parameters(self.model)}
        self._check_names_and_shapes()
        self._refuse_unknown()
        self.dtype: torch.dtype = self._checked_dtype(declared_dtype(body, self.directory / "config.json"))
        self.tokens: TextTokens | None = read_text_tokens(self.directory, self.model.vocab_size)

    @property
    def weight_files(self) -> set[str]:
        """Names of the files with weights."""
        return set(self._files)

    def read(self, spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        """A slice of one parameter, in the dtype of the file."""
        name = self._stored(spec)
        if self._hashing:
            self._hashes.reading(self._where[name], name)
        part: Tensor = self._slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        return part

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One global parameter, in the dtype of the file."""
        return self.read(spec, 0, 0, spec.shape[0])

    def check(self) -> None:
        """Compare the weights with `complete.json`, if there is one.

        Raises:
            CheckpointError: a file differs; the message names it.
        """
        if reason := self._hashes.damage():
            raise CheckpointError(f"{self.directory}: {reason}; {CHANGED}")

    def _checked_records(self) -> dict[str, FileRecord]:
        """All records; the small files, and the sizes of the others, are compared with them."""
        if not os.path.isfile(self.directory / COMPLETE):  # also for a name that is too long
            return {}
        records = read_complete(self.directory)
        if CONFIG not in records and not os.path.isfile(self.directory / CONFIG):
            return {}  # no model directory; `read_body` says what it is
        small = sorted(name for name in records if not name.endswith(".safetensors"))
        reason = None if CONFIG in records else f"{COMPLETE} has no record of {CONFIG}"
        reason = reason or damage(self.directory, sorted(records), records, contents=False)
        if reason := reason or damage(self.directory, small, records):
            raise CheckpointError(f"{self.directory}: {reason}; {CHANGED}")
        return records

    def _weight_map(self) -> dict[str, str]:
        """The file of every stored tensor."""
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if index.is_file() and single.is_file():
            raise CheckpointError(
                f"{self.directory} holds {SINGLE_FILE} and {INDEX_FILE}, which programs read differently; remove the "
                "wrong one"
            )
        if single.is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        if not index.is_file():
            there = weights_there(self.directory) or "get the model with model*.safetensors from its source"
            raise CheckpointError(f"{self.directory} has no {SINGLE_FILE} nor {INDEX_FILE}: {there}")
        refuse_undownloaded(index)
        try:
            where = _checked_index(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(index, error) from error
        for file in set(where.values()):
            self._open(file)
        return where

    def _open(self, file: str) -> Any:
        path = self.directory / file
        if file not in self._files:
            refuse_undownloaded(path)
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                advice = unfinished_download(self.directory) or "get it from the source of the model"
                raise CheckpointError(f"{self.directory} lacks weights: there is no {file}; {advice}") from error
            except Exception as error:  # the library raises bare exceptions for damaged files
                raise _unreadable(path, error) from error
        return self._files[file]

    def _stored(self, spec: ParameterSpec) -> str:
        """The name of a parameter in the files; a tied Llama may store its embedding as the head alone."""
        name = stored_name(spec.name, self.model)
        tied = self.model.tie_word_embeddings and not self.model.staggered and spec.name == "embedding.weight"
        return _HEAD if tied and name not in self._where and _HEAD in self._where else name

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def _check_names_and_shapes(self) -> None:
        names = {file: set(stream.keys()) for file, stream in self._files.items()}
        for name, file in self._where.items():
            if name not in names[file]:
                raise CheckpointError(f"{self.directory / file} lacks the tensor {name} of the index")
        for name, spec in self._expected.items():
            if name not in self._where:
                raise CheckpointError(
                    f"{self.directory} lacks the tensor {name}; its first ones are {sorted(self._where)[:2]}; save the "
                    "causal language model with transformers again"
                )
            shape = self._slice(name).get_shape()
            if tuple(shape) != spec.shape:
                raise CheckpointError(
                    f"{name} in {self.directory / self._where[name]} has shape {shape}, config.json asks "
                    f"{list(spec.shape)}"
                )

    def _refuse_unknown(self) -> None:
        """Refuse tensors that the model does not have: another program could read them."""
        known = self._expected.keys() | self._tied_copy()
        unknown = [name for name in sorted(self._where) if name not in known and not name.endswith(_IGNORED_ENDINGS)]
        if unknown:
            raise CheckpointError(
                f"{self.directory} holds tensors that a model of its config.json does not have: "
                f"{', '.join(unknown[:3])}{' and more' if len(unknown) > 3 else ''}"
            )
        for file, stream in self._files.items():
            for name in sorted(stream.keys()):
                if self._where.get(name) != file and not name.endswith(_IGNORED_ENDINGS):
                    raise CheckpointError(
                        f"{self.directory / file} holds the tensor {name}, which the index does not have there; "
                        "remove it"
                    )

    def _tied_copy(self) -> set[str]:
        """The stored head of a Llama with tied embeddings, if there is one; it must equal the embedding."""
        embedding = stored_name("embedding.weight", self.model)
        if not self.model.tie_word_embeddings or self.model.staggered or not {embedding, _HEAD} <= self._where.keys():
            return set()
        views = [self._slice(embedding), self._slice(_HEAD)]
        same = len({(view.get_dtype(), *view.get_shape()) for view in views}) == 1
        rows = range(0, views[0].get_shape()[0], _ROWS) if same else ()
        if not same or not all(torch.equal(*(view[row : row + _ROWS] for view in views)) for row in rows):
            raise CheckpointError(
                f"{self.directory} has tie_word_embeddings true, but {_HEAD} and {embedding} are both there and "
                "differ; say tie_word_embeddings false in config.json, or remove the wrong one"
            )
        return {_HEAD}

    def _checked_dtype(self, declared: torch.dtype | None) -> torch.dtype:
        """The dtype of all tensors, which must be that of `config.json` if it has one."""
        stored: dict[str, list[str]] = {}
        for name in self._expected:
            kind = self._slice(name).get_dtype()
            stored.setdefault(_short(SAFETENSORS_DTYPES[kind]) if kind in SAFETENSORS_DTYPES else kind, []).append(name)
        kinds = ", ".join(f"{len(names)} {kind} such as {names[0]}" for kind, names in stored.items())
        holds, most = f"{self.directory} holds {kinds}", max(stored, key=lambda kind: len(stored[kind]))
        if unread := sorted(stored.keys() - STORED_DTYPES.keys()):
            remedy = converted(self.directory, "float32") if unread[0] == "F64" else "use the model before quantization"
            raise CheckpointError(f"{holds}, but {unread[0]} is not read; {remedy}")
        if len(stored) > 1:
            raise CheckpointError(f"{holds}, but tensors of one type are read; {converted(self.directory, most)}")
        if declared not in (None, STORED_DTYPES[most]):
            raise CheckpointError(
                f"{holds}, config.json says {_short(declared)}; set dtype or torch_dtype there to {most}"
            )
        return STORED_DTYPES[most]


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    remedy = save_as_utf8(path) or "; get the file from its source again"
    return CheckpointError(f"the weights in {path} cannot be read: {error}{remedy}")


def _checked_index(where: Any) -> dict[str, str]:
    """The entries of an index, which must name files of the same folder."""
    if not isinstance(where, dict):
        raise ValueError("weight_map is no object")
    for name, file in where.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file) or not file.isprintable():
            raise ValueError(f"weight_map has {name} in {file!r}, which is not a safetensors file of the directory")
    return where
