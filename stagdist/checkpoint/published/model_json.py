"""Read `config.json` of a model directory, in all spellings that Llama directories use."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.complete import refuse_undownloaded
from stagdist.checkpoint.published.other_formats import save_as_utf8, weights_there
from stagdist.checkpoint.text_tokens import GENERATION, TOKEN_KEYS, TextTokens, check_tokens
from stagdist.config.loading import validate_model
from stagdist.config.parts import ModelConfig, RopeScaling
from stagdist.errors import CheckpointError
from stagdist.model.precision import STORED_DTYPES

CONFIG = "config.json"
_CONNECTIONS = {"stagformer": "staggered", "llama": "sequential", "mistral": "sequential"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "stagformer": {},
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8},
}
"""Defaults of `LlamaConfig` and `MistralConfig` in transformers that differ from ours or that we do not have."""
_MISTRAL_WINDOW = 4096
"""`sliding_window` of a Mistral whose `config.json` does not have it."""
_LACKS = {
    "qwen": "biases or norms of queries and keys",
    "gemma": "scaled embeddings, norms with an offset and GELU",
    "phi": "fused projections",
    "mixtral": "experts",
    "deepseek": "experts and latent attention",
}
"""What families of models have and a StagFormer lacks, by the beginning of `model_type`."""
_DEFAULT_THETA = 10000.0
_SCALING_KEYS = tuple(key for key in RopeScaling.model_fields if key != "rope_type")
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALING_KEYS}
_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, 1, None),
}
"""Keys of a Llama configuration with the only values that a StagFormer supports."""

Rope = tuple[Any, dict[str, Any] | None]
"""`rope_theta`, and the keys of `RopeScaling` or None."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    refuse_undownloaded(path)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}{save_as_utf8(path)}") from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return body


def read_body(directory: str | Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(directory) / CONFIG
    if not os.path.isfile(path):  # also for a name that is too long
        there = os.path.isdir(directory) and weights_there(Path(directory))
        there = there or f"is {directory} a model directory?"
        raise CheckpointError(f"{path} cannot be read: there is none; {there}")
    return read_json(path)


def model_of(body: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model configuration that the content of a `config.json` describes.

    Args:
        path: path of the file, for error messages.

    Raises:
        CheckpointError: the content is of another architecture or contradicts itself.
    """
    kind = body.get("model_type")
    if not isinstance(kind, str) or kind not in _CONNECTIONS:
        lacks = next((text for family, text in _LACKS.items() if str(kind).startswith(family)), "another architecture")
        raise CheckpointError(
            f"{path} says model_type {kind!r}; stagformer, llama and mistral are read, and this one has {lacks}; "
            "choose a model of the Llama architecture"
        )
    _refuse_contradictions(body, path)
    keys = {key: body[key] for key in ModelConfig.model_fields if key in body}
    keys["connection"] = _CONNECTIONS[kind]
    keys["rope_theta"], keys["rope_scaling"] = rope_of(body, path)
    if kind != "stagformer":
        layers = body.get("num_hidden_layers")
        if "section_layers" not in keys and (type(layers) is not int or layers < 1):
            raise CheckpointError(f"{path}: num_hidden_layers is {layers!r}; give the number of layers")
        keys = _DEFAULTS[kind] | {"section_layers": [layers]} | keys
    if isinstance(keys.get("section_layers"), list):
        keys["section_layers"] = tuple(keys["section_layers"])
    model, problems = validate_model(keys)
    if model is None or problems:
        listed = "; ".join(problems).replace("model.", "")
        raise CheckpointError(f"{path} does not describe a model that can be built: {listed}")
    return model


def _refuse_contradictions(body: Mapping[str, Any], path: Path) -> None:
    """Refuse keys that contradict each other: programs differ in which one they read."""
    connection, expected = body.get("connection"), _CONNECTIONS[body["model_type"]]
    if connection not in (None, expected):
        raise CheckpointError(
            f"{path} says model_type {body['model_type']} and connection {connection!r}, which is {expected!r} there; "
            "correct the wrong one"
        )
    layers, sections = body.get("num_hidden_layers"), body.get("section_layers")
    if layers is not None and isinstance(sections, list) and all(isinstance(n, int) for n in sections):
        if sum(sections) != layers:
            raise CheckpointError(
                f"{path} says num_hidden_layers {layers} and section_layers {sections}, which are {sum(sections)}; "
                "correct the wrong one"
            )


def rope_of(body: Mapping[str, Any], path: Path) -> Rope:
    """The rotary embedding, from `rope_parameters` or the older `rope_scaling` and `rope_theta`.

    Raises:
        CheckpointError: two spellings disagree, or the type is not supported; the message names the key.
    """
    keys = ("rope_parameters", "rope_scaling")
    found = {key: _one_rope(body, key, path) for key in keys if body.get(key) not in (None, {})}
    ropes = list(found.values())
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        raise CheckpointError(
            f"{path} says {' and '.join(f'{key} {body[key]}' for key in found)}, which programs read differently; "
            "remove the wrong one"
        )
    return ropes[0] if ropes else (body.get("rope_theta", _DEFAULT_THETA), None)


def _one_rope(body: Mapping[str, Any], key: str, path: Path) -> Rope:
    """The rotary embedding in one of the two spellings."""
    rope = body[key]
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: {key} is {rope!r}; it must be an object such as {{'rope_type': 'default'}}")
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise CheckpointError(f"{path}: {key} has rope_type {kinds[0]!r} and type {kinds[1]!r}; remove the wrong one")
    scaled = [name for name in _SCALING_KEYS if name in rope]
    if not kinds and scaled:
        raise CheckpointError(f"{path}: {key} has {scaled[0]} but no rope_type; add it, default or llama3")
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{path}: {key} has rope_type {kind!r}; a StagFormer has default and llama3 only")
    odd = [name for name in rope if name not in _ROPE_KEYS]
    if odd or rope.get("partial_rotary_factor") not in (None, 1):
        name = odd[0] if odd else "partial_rotary_factor"
        raise CheckpointError(f"{path}: {key} has {name} {rope[name]!r}, which a StagFormer lacks")
    inner, outer = rope.get("rope_theta"), body.get("rope_theta")
    if None not in (inner, outer) and inner != outer:
        raise CheckpointError(f"{path} says rope_theta {outer} and in {key} {inner}; remove the wrong one")
    theta = inner if inner is not None else body.get("rope_theta", _DEFAULT_THETA)
    return theta, _scaling(body, rope, key, path) if kind == "llama3" else None


def _scaling(body: Mapping[str, Any], rope: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    absent = [name for name in _SCALING_KEYS if name not in rope]
    if absent:
        raise CheckpointError(f"{path}: {key} has rope_type 'llama3' but no {absent[0]}; add it")
    name = "original_max_position_embeddings"
    if body.get(name) not in (None, rope[name]):
        raise CheckpointError(f"{path} says {name} {body[name]!r} and in {key} {rope[name]!r}; remove the wrong one")
    return {name: rope[name] for name in _SCALING_KEYS}


def refuse_unsupported(body: Mapping[str, Any], directory: Path) -> None:
    """Refuse keys with values that a StagFormer does not support.

    Raises:
        CheckpointError: there is one; the message names it.
    """
    for key, allowed in _PLAIN.items():
        if body.get(key) not in allowed:
            raise CheckpointError(
                f"{directory}/config.json: {key} is {body[key]!r}; a StagFormer has {allowed[0]!r} only"
            )
    mistral = body.get("model_type") == "mistral"
    window = body.get("sliding_window", _MISTRAL_WINDOW if mistral else None)
    context = body.get("max_position_embeddings", _DEFAULTS["mistral"]["max_position_embeddings"])
    if window is not None and not (mistral and type(window) is int and window >= context):
        reach = f"; to use its first {window} positions only, set max_position_embeddings to {window}" * mistral
        raise CheckpointError(
            f"{directory}/config.json: sliding_window is {window!r}; a StagFormer has no such window{reach}"
        )
    if body.get("quantization_config"):
        raise CheckpointError(f"{directory}/config.json has a quantization_config; use the model before quantization")


def declared_dtype(body: Mapping[str, Any], path: Path) -> torch.dtype | None:
    """The dtype of the weights in a `config.json`; None if it has no such key.

    Raises:
        CheckpointError: the dtype is not supported, or the two spellings disagree.
    """
    names = [body[key] for key in ("dtype", "torch_dtype") if body.get(key) is not None]
    for name in names:
        if not isinstance(name, str) or name not in STORED_DTYPES:
            raise CheckpointError(f"{path} says dtype {name!r}; say that of the weights, one of {list(STORED_DTYPES)}")
    if len(set(names)) == 2:
        raise CheckpointError(f"{path} says dtype {names[0]!r} and torch_dtype {names[1]!r}; remove the wrong one")
    return STORED_DTYPES[names[0]] if names else None


def read_text_tokens(directory: Path, rows: int | None = None) -> TextTokens | None:
    """The special tokens of a model directory; None if it defines no end token.

    Args:
        rows: number of ids that the model has; None does not compare with it.

    Raises:
        CheckpointError: a file is damaged, or a value is not a token id; the message names the key.
    """
    body = read_body(directory)
    config = {key: body[key] for key in TOKEN_KEYS if key in body}
    path = directory / GENERATION
    generation = read_json(path) if path.is_file() else dict(config)
    check_tokens(config, str(directory / "config.json"), rows)
    check_tokens(generation, str(path if path.is_file() else directory / "config.json"), rows)
    ends = config.get("eos_token_id") is not None or generation.get("eos_token_id") is not None
    return TextTokens(config, generation) if ends else None
