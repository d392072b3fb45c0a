"""The model directory: `config.json`, safetensors with canonical unsharded names, the tokenizer.

A StagFormer says `model_type: stagformer` and carries the code by which `transformers` loads it; the sequential
baseline is a Llama directory with two extra keys. Written tensor by tensor into a hidden folder beside and renamed at
the end.
"""

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stagdist.checkpoint.llama_names import llama_name
from stagdist.checkpoint.safetensors_writer import SafetensorsWriter
from stagdist.checkpoint.training_directory import sync_path
from stagdist.config import ModelConfig
from stagdist.errors import CheckpointError, ConfigError
from stagdist.parallel.layout import ParameterSpec, model_parameters

MAX_SHARD_BYTES = 4 * 10**9
CODE_FILES = ("configuration_stagformer.py", "modeling_stagformer.py")
"""What `transformers` loads a StagFormer with; copied from `stagdist/hf` into every directory of one."""

_CODE_FOLDER = Path(__file__).resolve().parent.parent / "hf"
_AUTO_MAP = {
    "AutoConfig": "configuration_stagformer.StagFormerConfig",
    "AutoModelForCausalLM": "modeling_stagformer.StagFormerForCausalLM",
}
_INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"
"""sha256 of every tensor's bytes, by stored name, and the model's shape: what was written, so that a swapped tensor
or a changed key is seen."""
_NOT_OF_THE_FUNCTION = ("architectures", "auto_map", "torch_dtype", "bos_token_id", "eos_token_id")
"""Keys of `config.json` that do not change what the weights compute."""
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STAGFORMER_KEYS = (
    "section_layers",
    "connection",
    "stagger",
    "cross_attention_window",
    "cross_attention_key_value_heads",
    "share_section_weights",
    "combine_sections",
)


def stored_name(name: str, model: ModelConfig) -> str:
    """Name of a canonical parameter inside the directory."""
    return name if model.staggered else llama_name(name, model)


def shard_plan(specs: Iterable[ParameterSpec], element_bytes: int, limit: int) -> list[list[ParameterSpec]]:
    """Parameters of each file, in order; a file holds at most `limit` bytes unless one tensor is larger."""
    shards: list[list[ParameterSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = spec.numel * element_bytes
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += size
    return shards


def config_json(model: ModelConfig, dtype: torch.dtype, end_of_document: int) -> dict[str, Any]:
    """The content of `config.json`."""
    body: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        **_rope_keys(model),
        "rms_norm_eps": model.rms_norm_eps,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "bos_token_id": None,
        "eos_token_id": end_of_document,
    }
    keys = _STAGFORMER_KEYS if model.staggered else ("section_layers", "connection")
    extra = {key: getattr(model, key) for key in keys}
    if model.staggered:
        extra["cross_attention_key_value_heads"] = model.cross_key_value_heads
    kind = ("stagformer", "StagFormerForCausalLM") if model.staggered else ("llama", "LlamaForCausalLM")
    code = {"auto_map": _AUTO_MAP} if model.staggered else {}
    return {"model_type": kind[0], "architectures": [kind[1]], **code, **body, **extra}


def _rope_keys(model: ModelConfig) -> dict[str, Any]:
    """Every reader of Llamas knows the older spelling; what transformers 5 makes of a stranger's fails with it."""
    scaling = None if model.rope_scaling is None else model.rope_scaling.model_dump()
    if not model.staggered:
        return {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta, **(scaling or {})}}


def generation_config_json(end_of_document: int) -> dict[str, Any]:
    """The content of `generation_config.json`: rows of a batch that have ended are filled up with the same token."""
    return {"eos_token_id": end_of_document, "pad_token_id": end_of_document}


def read_model_config(directory: str | Path) -> ModelConfig:
    """The shape of the model in a directory; a Llama without our keys is one section.

    Raises:
        CheckpointError: `config.json` is missing, damaged, of another architecture or contradicts itself.
    """
    path = Path(directory) / "config.json"
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is {directory} a model directory?") from error
    if body.get("model_type") not in ("stagformer", "llama"):
        raise CheckpointError(f"{path} says model_type {body.get('model_type')!r}; stagformer and llama are read")
    rope = body.get("rope_parameters") or {}
    _refuse_contradictions(body, rope, path)
    keys = {key: body[key] for key in ModelConfig.model_fields if key in body}
    keys["rope_theta"] = rope.get("rope_theta", body.get("rope_theta", 10000.0))
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    keys.setdefault("section_layers", [body.get("num_hidden_layers")])
    keys.setdefault("connection", "staggered" if body["model_type"] == "stagformer" else "sequential")
    try:
        return ModelConfig(**keys)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a model that can be built: {error}") from error


def _refuse_contradictions(body: dict[str, Any], rope: dict[str, Any], path: Path) -> None:
    """Both spellings of one thing must say the same: programs differ in which they read."""
    theta = (body.get("rope_theta"), rope.get("rope_theta"))
    if None not in theta and theta[0] != theta[1]:
        raise CheckpointError(
            f"{path} says rope_theta {theta[0]} and in rope_parameters {theta[1]}; remove the wrong one"
        )
    layers, sections = body.get("num_hidden_layers"), body.get("section_layers")
    if layers is not None and isinstance(sections, list) and all(isinstance(n, int) for n in sections):
        if sum(sections) != layers:
            raise CheckpointError(
                f"{path} says num_hidden_layers {layers} and section_layers {sections}, which are {sum(sections)}; "
                "mend the wrong one"
            )


class ModelDirectoryWriter:
    """Takes whole tensors in the order of `model_parameters` and leaves a finished directory.

    As a context manager an error inside leaves nothing behind; an existing directory is replaced at the end.
    Everything that the file system refuses is an OSError.
    """

    def __init__(self, directory: str | Path, model: ModelConfig, dtype: torch.dtype, end_of_document: int):
        self.final = Path(directory)
        self.folder = self.final.with_name(f".{self.final.name}.part")
        self.model, self.dtype, self.end_of_document = model, dtype, end_of_document
        element = torch.empty((), dtype=dtype).element_size()
        self._shards = shard_plan(model_parameters(model), element, MAX_SHARD_BYTES)
        self._file: SafetensorsWriter | None = None
        self._checksums: dict[str, str] = {}
        self._index: dict[str, str] = {}
        self._total = 0

    def open(self) -> None:
        """Make the hidden folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next parameter, given by canonical name."""
        if self._file is None:
            self._begin_file()
        assert self._file is not None
        stored = stored_name(name, self.model)
        self._checksums[stored] = self._file.add(stored, tensor)
        self._index[stored] = self._file.path.name
        if self._file.full:
            self._file.close()
            self._total += self._file.data_bytes
            self._file = None

    def _begin_file(self) -> None:
        count, number = len(self._shards), len(set(self._index.values()))
        name = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        entries = [(stored_name(spec.name, self.model), spec.shape) for spec in self._shards[number]]
        self._file = SafetensorsWriter(self.folder / name, entries, self.dtype)

    def discard(self) -> None:
        """Remove the hidden folder; what stood under the final name stays."""
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses what is still in the buffer
                self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(self) -> None:
        """Write what describes the tensors and give the folder its name."""
        assert self._file is None and len(self._checksums) == sum(map(len, self._shards)), "tensors are missing"
        body = config_json(self.model, self.dtype, self.end_of_document)
        shape = {key: value for key, value in body.items() if key not in _NOT_OF_THE_FUNCTION}
        _write_json(self.folder / CHECKSUMS, {"config": shape, "sha256": self._checksums})
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._index}
            _write_json(self.folder / _INDEX, index)
        _write_json(self.folder / "config.json", body)
        _write_json(self.folder / "generation_config.json", generation_config_json(self.end_of_document))
        for name in CODE_FILES if self.model.staggered else ():
            shutil.copyfile(_CODE_FOLDER / name, self.folder / name)
        for path in self.folder.iterdir():
            if path.is_file():
                sync_path(path)
        replaced = self.final.with_name(f".{self.final.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.final.exists():
            self.final.rename(replaced)
        self.folder.rename(self.final)
        shutil.rmtree(replaced, ignore_errors=True)
        sync_path(self.final.parent)

    def __enter__(self) -> "ModelDirectoryWriter":
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n")


def weight_map(folder: Path) -> list[tuple[str, str]]:
    """Name of every stored tensor with the name of its file.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    index = folder / _INDEX
    path = index if index.is_file() else folder / "model.safetensors"
    try:
        if path == index:
            return list(json.loads(index.read_text())["weight_map"].items())
        with safe_open(path, framework="pt") as stream:
            return [(name, path.name) for name in stream.keys()]  # noqa: SIM118 - not a dict
    except Exception as error:  # the library raises bare exceptions for damaged files
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
