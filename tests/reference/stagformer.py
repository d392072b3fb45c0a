"""The StagFormer and its sequential baseline as plain functions of named tensors.

Every parity test compares against this file, so it favours the letter of the formulas over speed: attention is
explicit scores, mask and softmax over full sequences; nothing is cached, fused, or shared with stagdist. A
configuration is anything with the model keys as attributes or items. Parameters are a dictionary by canonical,
unsharded names.

Shapes: `B` batch, `S` sequence, `H` hidden, `N` heads, `K` key/value heads, `D` head dim, `V` vocabulary, `p` sections.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The model keys with every default resolved."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    cross_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: Any
    eps: float
    tied: bool
    section_layers: tuple[int, ...]
    staggered: bool
    stagger: int
    window: int | None
    shared: bool
    combined: bool


def read(config: Any, key: str, default: Any = None) -> Any:
    """Value of `key` in a mapping or object; `default` where it is missing or None."""
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


def shape_of(config: Any) -> Shape:
    """Resolve a configuration given as mapping or object."""
    heads = read(config, "num_attention_heads")
    key_value_heads = read(config, "num_key_value_heads", heads)
    return Shape(
        vocab_size=read(config, "vocab_size"),
        hidden_size=read(config, "hidden_size"),
        intermediate_size=read(config, "intermediate_size"),
        heads=heads,
        key_value_heads=key_value_heads,
        cross_key_value_heads=read(config, "cross_attention_key_value_heads", key_value_heads),
        head_dim=read(config, "head_dim", read(config, "hidden_size") // heads),
        rope_theta=read(config, "rope_theta", 10000.0),
        rope_scaling=read(config, "rope_scaling"),
        eps=read(config, "rms_norm_eps", 1e-5),
        tied=read(config, "tie_word_embeddings", False),
        section_layers=tuple(read(config, "section_layers")),
        staggered=read(config, "connection", "staggered") == "staggered",
        stagger=read(config, "stagger", 1),
        window=read(config, "cross_attention_window"),
        shared=read(config, "share_section_weights", False),
        combined=read(config, "combine_sections", False),
    )


# --- parameters -------------------------------------------------------------------------------------------------


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Canonical name and unsharded shape of every parameter that the model owns."""
    shape = shape_of(config)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (shape.vocab_size, shape.hidden_size)}
    for section, layers in enumerate(shape.section_layers):
        for layer in range(layers):
            prefix = f"sections.{section}.layers.{layer}"
            if section == 0 or not shape.shared:
                shapes |= _own_shapes(shape, prefix)
            if section > 0 and shape.staggered:
                shapes[f"{prefix}.cross_attention_norm.weight"] = (shape.hidden_size,)
                shapes |= _attention_shapes(shape, f"{prefix}.cross_attention", shape.cross_key_value_heads)
        if section > 0 and shape.staggered:
            shapes[f"sections.{section}.memory_norm.weight"] = (shape.hidden_size,)
            if shape.stagger:
                shapes[f"sections.{section}.null_memory"] = (shape.hidden_size,)
    shapes["output_norm.weight"] = (shape.hidden_size,)
    if not shape.tied:
        shapes["head.weight"] = (shape.vocab_size, shape.hidden_size)
    if shape.combined:
        shapes["section_mix"] = (len(shape.section_layers),)
    return shapes


def _own_shapes(shape: Shape, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return {
        f"{prefix}.self_attention_norm.weight": (hidden,),
        **_attention_shapes(shape, f"{prefix}.self_attention", shape.key_value_heads),
        f"{prefix}.mlp_norm.weight": (hidden,),
        f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}.mlp.up_proj.weight": (inner, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, inner),
    }


def _attention_shapes(shape: Shape, prefix: str, key_value_heads: int) -> dict[str, tuple[int, ...]]:
    queries, keys = shape.heads * shape.head_dim, key_value_heads * shape.head_dim
    return {
        f"{prefix}.q_proj.weight": (queries, shape.hidden_size),
        f"{prefix}.k_proj.weight": (keys, shape.hidden_size),
        f"{prefix}.v_proj.weight": (keys, shape.hidden_size),
        f"{prefix}.o_proj.weight": (shape.hidden_size, queries),
    }


def initial_deviation(config: Any, name: str) -> float:
    """Standard deviation that the initialisation rule gives a parameter; 0 for those that start constant."""
    shape = shape_of(config)
    if not name.endswith("_proj.weight") and name not in ("embedding.weight", "head.weight"):
        return 0.0
    deviation = shape.hidden_size**-0.5
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        deviation /= math.sqrt(2 * sum(shape.section_layers))
    return deviation


def random_parameters(
    config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, perturb: bool = False
) -> Parameters:
    """Parameters by the initialisation rule, drawn in fp64 in the order of names and then cast.

    The same values for every dtype. `perturb` moves norms, null memory and section mix away from their constant
    starts, so that a comparison notices when one of them is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, size in sorted(parameter_shapes(config).items()):
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        if deviation := initial_deviation(config, name):
            value = noise * deviation
        else:
            value = torch.full(size, _constant_start(name, size), dtype=torch.float64) + 0.3 * perturb * noise
        parameters[name] = value.to(dtype)
    return parameters


def _constant_start(name: str, size: tuple[int, ...]) -> float:
    if name.endswith("null_memory"):
        return 0.0
    return 1.0 / size[0] if name == "section_mix" else 1.0


# --- the pieces of a layer --------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in fp32 at least, as Llama does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


def rotary_frequencies(shape: Shape) -> Tensor:
    """Angle per position of each pair, fp32. Shape: [D/2]. Source: RoFormer, and Llama 3.1 for the scaling."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None or read(scaling, "rope_type", "llama3") != "llama3":
        return frequencies
    factor, original = read(scaling, "factor"), read(scaling, "original_max_position_embeddings")
    low, high = read(scaling, "low_freq_factor"), read(scaling, "high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    # 0 where the wavelength is stretched by the full factor, 1 where it is kept, linear in 1/wavelength between.
    kept = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies


def rotate(x: Tensor, shape: Shape) -> Tensor:
    """Rotary embedding of positions 0..S-1. Shape: [B, N, S, D].

    Angles, cosines and sines are fp32 and then cast to the dtype of `x`; element i turns with element i + D/2.
    """
    positions = torch.arange(x.shape[-2], dtype=torch.float32)
    angles = positions[:, None] * rotary_frequencies(shape)
    cosines, sines = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def visible(length: int, window: int | None) -> Tensor:
    """Which slot j position i may attend to: j <= i, and j > i - window. Shape: [S, S], True = visible."""
    behind = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (behind >= 0) & (behind < (window or length))


def attention(
    parameters: Parameters, prefix: str, shape: Shape, query: Tensor, key_value: Tensor, heads: int, mask: Tensor
) -> Tensor:
    """Grouped-query attention with rotary embeddings on queries and keys.

    Shapes: query and key_value [B, S, H]; heads is K; mask [S, S], True = visible; result [B, S, H].
    """

    def project(x: Tensor, name: str, count: int) -> Tensor:
        projected = x @ parameters[f"{prefix}.{name}.weight"].T
        return projected.unflatten(-1, (count, shape.head_dim)).transpose(1, 2)

    queries = rotate(project(query, "q_proj", shape.heads), shape)
    keys = rotate(project(key_value, "k_proj", heads), shape).repeat_interleave(shape.heads // heads, dim=1)
    values = project(key_value, "v_proj", heads).repeat_interleave(shape.heads // heads, dim=1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(shape.head_dim)
    scores = scores.masked_fill(~mask.to(scores.device), float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.exp(scores.to(wide) - torch.logsumexp(scores.to(wide), dim=-1, keepdim=True)).to(scores.dtype)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    return mixed @ parameters[f"{prefix}.o_proj.weight"].T


def swiglu(parameters: Parameters, prefix: str, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)). Shape: [B, S, H]."""
    gate = x @ parameters[f"{prefix}.gate_proj.weight"].T
    up = x @ parameters[f"{prefix}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ parameters[f"{prefix}.down_proj.weight"].T


# --- sections ---------------------------------------------------------------------------------------------------


def memory(parameters: Parameters, shape: Shape, section: int, previous: Tensor) -> Tensor:
    """What a section attends to: the previous output, normalised and shifted right by `stagger`. Shape: [B, S, H]."""
    normalised = rms_norm(previous, parameters[f"sections.{section}.memory_norm.weight"], shape.eps)
    if shape.stagger == 0:
        return normalised
    batch, length, _ = previous.shape
    gap = min(shape.stagger, length)
    null = parameters[f"sections.{section}.null_memory"].expand(batch, gap, -1)
    return torch.cat([null, normalised[:, : length - gap]], dim=1)


def run_section(
    parameters: Parameters, shape: Shape, section: int, hidden_states: Tensor, previous: Tensor | None
) -> Tensor:
    """Output of one section. Shapes: [B, S, H].

    hidden_states is what its first layer reads; previous is the output of the section before it, attended to as
    memory, or None where there is no cross-attention.
    """
    slots = None if previous is None else memory(parameters, shape, section, previous)
    causal = visible(hidden_states.shape[1], None)
    windowed = visible(hidden_states.shape[1], shape.window)
    for layer in range(shape.section_layers[section]):
        prefix = f"sections.{section}.layers.{layer}"
        own = f"sections.0.layers.{layer}" if shape.shared else prefix
        x = rms_norm(hidden_states, parameters[f"{own}.self_attention_norm.weight"], shape.eps)
        hidden_states = hidden_states + attention(
            parameters, f"{own}.self_attention", shape, x, x, shape.key_value_heads, causal
        )
        if slots is not None:
            x = rms_norm(hidden_states, parameters[f"{prefix}.cross_attention_norm.weight"], shape.eps)
            hidden_states = hidden_states + attention(
                parameters, f"{prefix}.cross_attention", shape, x, slots, shape.cross_key_value_heads, windowed
            )
        x = rms_norm(hidden_states, parameters[f"{own}.mlp_norm.weight"], shape.eps)
        hidden_states = hidden_states + swiglu(parameters, f"{own}.mlp", x)
    return hidden_states


def section_outputs(parameters: Parameters, config: Any, input_ids: Tensor) -> list[Tensor]:
    """Output of every section. Shapes: input_ids [B, S]; each output [B, S, H]."""
    shape = shape_of(config)
    embeddings = parameters["embedding.weight"][input_ids]
    outputs: list[Tensor] = []
    for section in range(len(shape.section_layers)):
        if shape.staggered:
            stream, previous = embeddings, (outputs[-1] if outputs else None)
        else:
            stream, previous = (outputs[-1] if outputs else embeddings), None
        outputs.append(run_section(parameters, shape, section, stream, previous))
    return outputs


def logits_of(parameters: Parameters, config: Any, outputs: list[Tensor]) -> Tensor:
    """Logits from the outputs of all sections. Shape: [B, S, V]."""
    shape = shape_of(config)
    hidden_states = outputs[-1]
    if shape.combined:
        mix = parameters["section_mix"]
        hidden_states = torch.stack([mix[section] * output for section, output in enumerate(outputs)]).sum(0)
    normalised = rms_norm(hidden_states, parameters["output_norm.weight"], shape.eps)
    return normalised @ parameters["embedding.weight" if shape.tied else "head.weight"].T


def forward(parameters: Parameters, config: Any, input_ids: Tensor) -> Tensor:
    """Logits of every position, for every variant. Shapes: input_ids [B, S]; result [B, S, V]."""
    return logits_of(parameters, config, section_outputs(parameters, config, input_ids))


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all positions, in the dtype of the logits. Shapes: [..., V] and [...]."""
    chosen = logits.gather(-1, labels[..., None]).squeeze(-1)
    return (torch.logsumexp(logits, dim=-1) - chosen).mean()
