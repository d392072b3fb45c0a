"""What a conversion reads: a run, a training checkpoint or a model directory, as whole parameters by canonical name."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stagdist.checkpoint.model_directory import CHECKSUMS, stored_name
from stagdist.checkpoint.reading import ModelReader
from stagdist.checkpoint.safetensors_writer import tensor_sha256
from stagdist.checkpoint.training_directory import COMPLETE, STATE, candidates
from stagdist.checkpoint.training_reader import TrainingReader
from stagdist.config import ModelConfig
from stagdist.data.tokenizer import Tokenizer, load_tokenizer
from stagdist.errors import CheckpointError, DataError
from stagdist.parallel.layout import ParameterSpec, model_parameters

STEP_FOLDER = re.compile(r"step_(\d{8,})")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TAMPERED = f"take the directory from where it came again, or remove {CHECKSUMS} if the change was meant"


class WeightSource(Protocol):
    """Whole parameters of a model."""

    @property
    def directory(self) -> Path:
        """Where they lie."""

    @property
    def model(self) -> ModelConfig:
        """Their model."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One of `model_parameters`, whole."""


@dataclass(frozen=True)
class Found:
    """What lies under a path.

    Attributes:
        kind: `training` or `model`.
        directory: the checkpoint or model directory itself.
    """

    kind: str
    directory: Path


def find(path: str | Path) -> Found:
    """What a path means: a run's folder (or its `checkpoints`) stands for its newest complete checkpoint.

    Raises:
        CheckpointError: nothing of ours is there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no directory; give a run's folder, a checkpoint or a model directory")
    if (folder / STATE).is_file() or (folder / COMPLETE).is_file():
        return Found("training", folder)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = candidates(checkpoints)
    whole = [checkpoint for checkpoint in found if (checkpoint / COMPLETE).is_file()]
    if whole:
        return Found("training", whole[0])
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {checkpoints} is complete")
    if (folder / "config.json").is_file():
        return Found("model", folder)
    raise CheckpointError(f"{folder} holds neither checkpoints nor a model directory (there is no config.json)")


def open_training(path: str | Path, *, trust_pickle: bool = False, files_checked: bool = False) -> TrainingReader:
    """A training checkpoint whose files match their records and the model.

    Args:
        files_checked: the files were just compared with their records.

    Raises:
        CheckpointError: it is none, incomplete, or damaged, by name.
    """
    found = find(path)
    if found.kind != "training":
        raise CheckpointError(f"{found.directory} is a model directory; a run's folder or checkpoint is needed here")
    if not (found.directory / COMPLETE).is_file():
        raise CheckpointError(f"{found.directory} has no {COMPLETE}: it is not a complete checkpoint")
    reader = TrainingReader(found.directory, trust_pickle=trust_pickle)
    if not files_checked:
        reader.check_files()
    reader.check_layout()
    return reader


def open_model(path: str | Path) -> "ModelSource":
    """A model directory whose tensors match their records and `config.json`.

    Raises:
        CheckpointError: it is none, or damaged, by name.
    """
    found = find(path)
    if found.kind != "model":
        raise CheckpointError(f"{found.directory} is a training checkpoint; a model directory is needed here")
    source = ModelSource(found.directory)
    source.check()
    return source


def open_weights(path: str | Path, *, trust_pickle: bool = False) -> "WeightSource":
    """Either of both."""
    if find(path).kind == "model":
        return open_model(path)
    return open_training(path, trust_pickle=trust_pickle)


class ModelSource:
    """A model directory as a source of weights.

    Raises:
        CheckpointError: see `ModelReader`; or the model is one that a StagFormer cannot be, by the key.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._body: dict[str, Any] = read_json(directory / "config.json")
        refuse_unsupported(self._body, directory)
        self._reader = ModelReader(directory)
        self.model = self._reader.model
        self.dtype = self._declared_dtype()
        path = directory / CHECKSUMS
        record = read_json(path) if path.is_file() else {}
        self._checksums: dict[str, str] = record.get("sha256", {})
        self._written_config: dict[str, Any] = record.get("config", {})

    @property
    def end_of_document(self) -> int | None:
        """The token that ends a document, as `config.json` says."""
        token = self._body.get("eos_token_id")
        return token[0] if isinstance(token, list) else token

    @property
    def recorded(self) -> bool:
        """Whether the directory says what its tensors must be."""
        return bool(self._checksums)

    def weight(self, spec: ParameterSpec) -> Tensor:
        """A whole parameter."""
        return self._reader.whole(spec)

    def check(self, report: Callable[[str], None] = lambda name: None) -> None:
        """Compare `config.json` and type and content of every tensor with what the directory says was written.

        Raises:
            CheckpointError: by name.
        """
        for key, written in self._written_config.items():
            if self._body.get(key) != written:
                raise CheckpointError(
                    f"{self.directory}/config.json says {key} {self._body.get(key)!r}, the weights were written for "
                    f"{written!r} ({CHECKSUMS}); {_TAMPERED}"
                )
        for spec in model_parameters(self.model):
            name, tensor = stored_name(spec.name, self.model), self.weight(spec)
            if tensor.dtype != self.dtype:
                raise CheckpointError(f"{name} in {self.directory} is {tensor.dtype}, config.json says {self.dtype}")
            if self._checksums and tensor_sha256(tensor) != self._checksums.get(name):
                raise CheckpointError(
                    f"{name} in {self.directory} has other values than were written ({CHECKSUMS}); {_TAMPERED}"
                )
            report(name)

    def _declared_dtype(self) -> torch.dtype:
        name = self._body.get("dtype") or self._body.get("torch_dtype")
        if name is None:
            return self.weight(model_parameters(self.model)[0]).dtype
        if name not in _DTYPES:
            raise CheckpointError(f"{self.directory}/config.json says dtype {name!r}; one of {list(_DTYPES)} is read")
        return _DTYPES[name]


_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, 1, None),
}
"""Keys of a Llama's config that a StagFormer has only these values for."""


def refuse_unsupported(body: dict[str, Any], directory: Path) -> None:
    """Refuse what a StagFormer lacks.

    Raises:
        CheckpointError: naming the key.
    """
    for key, allowed in _PLAIN.items():
        if body.get(key) not in allowed:
            raise CheckpointError(
                f"{directory}/config.json: {key} is {body[key]!r}; a StagFormer has {allowed[0]!r} only"
            )
    for key in ("rope_parameters", "rope_scaling"):
        rope = body.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise CheckpointError(
                f"{directory}/config.json: {key} has rope_type {kind!r}; a StagFormer has default and llama3 only"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return body


def source_tokenizer(source: WeightSource, given: str | None) -> Tokenizer:
    """The tokenizer of a source: as given, else beside a model's weights, else that of the run's configuration.

    Raises:
        CheckpointError: there is none, with the option that names one.
    """
    place = given or (source.config.data.tokenizer if isinstance(source, TrainingReader) else str(source.directory))
    try:
        return load_tokenizer(place)
    except DataError as error:
        raise CheckpointError(
            f"{source.directory}: its tokenizer is needed: {error}; name it with --tokenizer"
        ) from error
