"""The model directory: `config.json`, safetensors with canonical unsharded names, the tokenizer, `complete.json`.

A StagFormer has `model_type: stagformer` and contains the code with which `transformers` loads it; the sequential
baseline is a Llama directory with two extra keys. Tensors are written one by one into the given folder, which
`stagdist.checkpoint.complete.publish` renames when it is complete and proved.
"""

import json
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import checkpoint_files, write_complete
from stagdist.checkpoint.safetensors_writer import SafetensorsWriter
from stagdist.checkpoint.text_tokens import GENERATION, TextTokens, tokens_of
from stagdist.config.parts import STAGGERED_ONLY, ModelConfig
from stagdist.files import FileRecord, file_record
from stagdist.model.precision import STORED_DTYPES
from stagdist.parallel.layout import ParameterSpec, model_parameters

MAX_SHARD_BYTES = 4 * 10**9
CODE_FILES = ("configuration_stagformer.py", "layers_stagformer.py", "modeling_stagformer.py")
"""The code with which `transformers` loads a StagFormer; copied from `stagdist/hf` into its directories."""

_CODE_FOLDER = Path(__file__).resolve().parents[2] / "hf"
_AUTO_MAP = {
    "AutoConfig": "configuration_stagformer.StagFormerConfig",
    "AutoModelForCausalLM": "modeling_stagformer.StagFormerForCausalLM",
}
SINGLE_FILE = "model.safetensors"
"""Name of the weights file of an unsharded directory."""

INDEX_FILE = "model.safetensors.index.json"
"""Names the file of every tensor of a sharded directory."""

_DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LLAMA_PARTS = {
    "self_attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "self_attention": "self_attn",
    "mlp": "mlp",
}
_OF_LAYER = re.compile(r"sections\.(\d+)\.layers\.(\d+)\.(\w+)\.(.+)")


def stored_name(name: str, model: ModelConfig) -> str:
    """Name of a canonical parameter in the files of the directory. A Llama counts layers through all sections."""
    if model.staggered:
        return name
    if name in _LLAMA_NAMES:
        return _LLAMA_NAMES[name]
    match = _OF_LAYER.fullmatch(name)
    assert match, f"{name} has no place in a Llama"
    section, layer, part, rest = int(match[1]), int(match[2]), match[3], match[4]
    return f"model.layers.{sum(model.section_layers[:section]) + layer}.{_LLAMA_PARTS[part]}.{rest}"


def shard_plan(specs: Iterable[ParameterSpec], element_bytes: int, limit: int) -> list[list[ParameterSpec]]:
    """Parameters of each file, in order. A file has at most `limit` bytes unless one tensor is larger."""
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


def config_json(
    model: ModelConfig, dtype: torch.dtype, end_of_document: int, tokens: TextTokens | None = None
) -> dict[str, Any]:
    """The content of `config.json`; `tokens` take precedence over `end_of_document`."""
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
        **(tokens or tokens_of(end_of_document)).config,
    }
    keys = ("section_layers", "connection", *(STAGGERED_ONLY if model.staggered else ()))
    extra = {key: getattr(model, key) for key in keys}
    if model.staggered:
        extra["cross_attention_key_value_heads"] = model.cross_key_value_heads
    kind = ("stagformer", "StagFormerForCausalLM") if model.staggered else ("llama", "LlamaForCausalLM")
    code = {"auto_map": _AUTO_MAP} if model.staggered else {}
    return {"model_type": kind[0], "architectures": [kind[1]], **code, **body, **extra}


def _rope_keys(model: ModelConfig) -> dict[str, Any]:
    """The rotary keys: the older spelling for a Llama, since all programs read it. Custom models of transformers 5 need
    the newer one."""
    scaling = None if model.rope_scaling is None else model.rope_scaling.model_dump()
    if not model.staggered:
        return {"rope_theta": model.rope_theta, "rope_scaling": scaling}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta, **(scaling or {})}}


class ModelDirectoryWriter(AbstractContextManager["ModelDirectoryWriter"]):
    """Writes global tensors in the order of `model_parameters` into a folder, and hashes what it writes.

    As a context manager it calls `commit`, or closes an unfinished file after an error. Every failure of the file
    system is an OSError. Files that others put into the folder before `commit`, such as the tokenizer, are recorded in
    `complete.json`.

    Args:
        folder: is created if it does not exist; must not hold another model.
        dtype: of the stored weights; tensors of another one are rounded.
        end_of_document: token id of the tokenizer.
        tokens: special tokens of the directory that this one is converted from; they are written instead.
    """

    def __init__(
        self,
        folder: str | Path,
        model: ModelConfig,
        dtype: torch.dtype,
        end_of_document: int,
        tokens: TextTokens | None = None,
    ):
        self.folder = Path(folder)
        self.model, self.dtype, self.end_of_document, self.tokens = model, dtype, end_of_document, tokens
        self._shards = shard_plan(model_parameters(model), dtype.itemsize, MAX_SHARD_BYTES)
        self._file: SafetensorsWriter | None = None
        self._index: dict[str, str] = {}
        self._records: dict[str, FileRecord] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next parameter; `name` is its canonical name."""
        if self._file is None:
            count, number = len(self._shards), len(self._records)
            file = SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            entries = [(stored_name(spec.name, self.model), spec.shape) for spec in self._shards[number]]
            self._file = SafetensorsWriter(self.folder / file, entries, self.dtype)
        stored = stored_name(name, self.model)
        self._file.add(stored, tensor)
        self._index[stored] = self._file.path.name
        if self._file.full:
            self._records[self._file.path.name] = self._file.finish()
            self._file = None

    def commit(self) -> None:
        """Write the files that describe the tensors, and `complete.json` when all files have reached the disk.

        `generation_config.json` is not recorded, because users edit it.
        """
        assert len(self._records) == len(self._shards), "tensors are missing"
        for name in CODE_FILES if self.model.staggered else ():
            shutil.copyfile(_CODE_FOLDER / name, self.folder / name)
        if len(self._shards) > 1:
            total = sum(spec.numel for spec in model_parameters(self.model)) * self.dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            _write_json(self.folder / INDEX_FILE, index)
        body = config_json(self.model, self.dtype, self.end_of_document, self.tokens)
        _write_json(self.folder / "config.json", body)
        _write_json(self.folder / GENERATION, (self.tokens or tokens_of(self.end_of_document)).generation)
        small = {
            name: file_record(self.folder / name, sync=True)
            for name in checkpoint_files(self.folder)
            if name not in self._records
        }
        del small[GENERATION]
        write_complete(self.folder, self._records | small)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        elif self._file is not None:
            with suppress(OSError):  # a full disk refuses what is still in the buffer
                self._file.close()


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n")
