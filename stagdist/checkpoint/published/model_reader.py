"""Read a model directory slice by slice: a rank loads only what it needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stagdist.checkpoint.published.model_json import (
    declared_dtype,
    model_of,
    read_body,
    read_text_tokens,
    refuse_unsupported,
)
from stagdist.checkpoint.published.model_writer import CODE_FILES, stored_name, weight_map
from stagdist.checkpoint.published.other_formats import converted, refuse_undownloaded, unfinished_download
from stagdist.checkpoint.published.record import CHECKSUMS, TAMPERED, WrittenRecord, read_record
from stagdist.checkpoint.safetensors_writer import tensor_sha256
from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer_files import holds_tokenizer
from stagdist.errors import CheckpointError
from stagdist.model.precision import SAFETENSORS_DTYPES, STORED_DTYPES
from stagdist.parallel.layout import ParameterSpec, model_parameters

_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
"""Names of tensors that old Llama directories contain and no program reads."""

_ROWS = 4096
"""Rows of a matrix that are compared at a time."""

_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library for the header of a file."""

SINGLE_FILE = "model.safetensors"
"""Name of the weights file of an unsharded directory."""

ReadSlice = Callable[[ParameterSpec, int, int, int], Tensor]
"""Entries `start` to `stop` of dimension `dim` of a parameter: (spec, dim, start, stop) -> tensor on the CPU."""


class ChangedTokenizerError(CheckpointError):
    """The tokenizer is not the one that was written, or not the one that the weights were trained with."""


class ModelReader:
    """An open model directory. Its files are memory-mapped.

    The constructor checks everything except the values of the tensors, which `check` compares with their checksums.

    Raises:
        CheckpointError: a file or tensor is missing, unknown, or has another shape or dtype than `config.json`
            requires (the message names it); the model is not supported, or is not the one that was written (the
            message names the key).
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        body = read_body(directory)
        self.model: ModelConfig = model_of(body, self.directory / "config.json")
        refuse_unsupported(body, self.directory)
        self.record: WrittenRecord = read_record(self.directory)
        self._files: dict[str, Any] = {}
        cut = _first_cut_tensor(self.directory / SINGLE_FILE)
        if cut is not None:
            raise CheckpointError(f"{self.directory / SINGLE_FILE} is cut off: it lacks the tensor {cut} and all after")
        self._where = dict(weight_map(self.directory))
        if self.model.num_layers > len(self._where):  # before every one of them is named
            raise CheckpointError(
                f"{self.directory}/config.json says {self.model.num_layers} layers, the weights are "
                f"{len(self._where)} tensors; get the directory from its source again"
            )
        self._expected = {stored_name(spec.name, self.model): spec for spec in model_parameters(self.model)}
        self._check_names_and_shapes()
        self._refuse_unknown()
        self.record.check_config(body, self.model)
        self.dtype: torch.dtype = self._checked_dtype(declared_dtype(body, self.directory / "config.json"))
        self.record.check_dtype(self.dtype)
        self.record.check_names(list(self._expected))
        self.tokens: TextTokens | None = read_text_tokens(self.directory, self.model.vocab_size)

    def read(self, spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        """A slice of one parameter, in the dtype of the file."""
        view = self._slice(stored_name(spec.name, self.model))
        part: Tensor = view[(slice(None),) * dim + (slice(start, stop),)]
        return part

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One global parameter, in the dtype of the file."""
        return self.read(spec, 0, 0, spec.shape[0])

    def check(self) -> None:
        """Compare the values of every tensor with the checksums of the directory, if it has any.

        Raises:
            CheckpointError: a tensor differs; the message names it.
        """
        for name, spec in self._expected.items() if self.record.sha256 else ():
            if tensor_sha256(self.weight(spec)) != self.record.sha256[name]:
                raise CheckpointError(
                    f"{name} in {self.directory} has other values than were written ({CHECKSUMS}); {TAMPERED}"
                )

    def _slice(self, name: str) -> Any:
        return self._open(self._where[name], name).get_slice(name)

    def _open(self, file: str, name: str) -> Any:
        """Open the file that should contain the tensor `name`."""
        path = self.directory / file
        if file not in self._files:
            refuse_undownloaded(path)
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                advice = unfinished_download(self.directory) or "get it from the source of the model"
                raise CheckpointError(
                    f"{self.directory} lacks the tensor {name}: there is no {file}; {advice}"
                ) from error
            except Exception as error:  # the library raises bare exceptions for damaged files
                if (cut := _first_cut_tensor(path)) is not None:
                    raise CheckpointError(f"{path} is cut off: it lacks the tensor {cut} and all after") from error
                raise CheckpointError(f"{path}, which should hold {name}, cannot be read: {error}") from error
        return self._files[file]

    def _check_names_and_shapes(self) -> None:
        for name, spec in self._expected.items():
            if name not in self._where:
                raise CheckpointError(
                    f"{self.directory} lacks the tensor {name}; its first ones are {sorted(self._where)[:2]}; save the "
                    "causal language model with transformers again"
                )
            if name not in self._open(self._where[name], name).keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(f"{self.directory / self._where[name]} lacks the tensor {name} of the index")
            shape = tuple(self._slice(name).get_shape())
            if shape != spec.shape:
                file = self.directory / self._where[name]
                raise CheckpointError(f"{name} in {file} has shape {list(shape)}, config.json asks {list(spec.shape)}")

    def _refuse_unknown(self) -> None:
        """Refuse tensors that the model does not have: another program could read them."""
        copied = self._tied_copy()
        unknown = [name for name in sorted(self._where) if name not in self._expected and name not in copied]
        unknown = [name for name in unknown if not name.endswith(_IGNORED_ENDINGS)]
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
        head = "lm_head.weight"
        if not self.model.tie_word_embeddings or self.model.staggered or head not in self._where:
            return set()
        embedding = stored_name("embedding.weight", self.model)
        views = [self._slice(embedding), self._open(self._where[head], head).get_slice(head)]
        same = len({(view.get_dtype(), *view.get_shape()) for view in views}) == 1
        rows = range(0, views[0].get_shape()[0], _ROWS) if same else ()
        if not same or not all(torch.equal(*(view[row : row + _ROWS] for view in views)) for row in rows):
            raise CheckpointError(
                f"{self.directory} has tie_word_embeddings true, but {head} and {embedding} are both there and differ; "
                "say tie_word_embeddings false in config.json, or remove the wrong one"
            )
        return {head}

    def _checked_dtype(self, declared: torch.dtype | None) -> torch.dtype:
        """The dtype of all tensors: that of `config.json`, else that of the first tensor."""
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
            remedy = TAMPERED if self.record.sha256 else converted(self.directory, most)
            raise CheckpointError(f"{holds}, but tensors of one type are read; {remedy}")
        if declared not in (None, STORED_DTYPES[most]):
            raise CheckpointError(
                f"{holds}, config.json says {_short(declared)}; set dtype or torch_dtype there to {most}"
            )
        return STORED_DTYPES[most]


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def check_tokenizer(place: str | Path, remedy: str = "") -> None:
    """Compare the tokenizer files of a model directory with what was written.

    Args:
        place: the directory, or a file in it.
        remedy: a further remedy, appended to the error message.

    Raises:
        ChangedTokenizerError: a file differs; the message names it.
    """
    folder = Path(place).parent if Path(place).is_file() else Path(place)
    if folder.is_dir() and holds_tokenizer(folder):
        for problem in read_record(folder).changed_files(but=CODE_FILES):
            raise ChangedTokenizerError(f"{folder}: {problem}{remedy}")


def _first_cut_tensor(path: Path) -> str | None:
    """The first tensor that extends past the end of a safetensors file; None if the file is complete or unreadable."""
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            room = path.stat().st_size - 8 - header_bytes
            if room < 0 or header_bytes > _MAX_HEADER_BYTES:
                return None
            header = json.loads(stream.read(header_bytes))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        cut = [name for name, end in ends.items() if end > room]
        return min(cut, key=ends.__getitem__) if cut else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
