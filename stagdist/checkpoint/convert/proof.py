"""Logits of a stored model by an independent, plain forward pass.

The forward pass shares only the formula of the rotary angles with the model. It reads one parameter at a time, so it
can check a model that is larger than the memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.checkpoint.weight_source import Track, WeightSource
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError, ConfigError
from stagdist.model.rotary import inverse_frequencies
from stagdist.parallel.layout import model_parameters

TEXT = (
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species, that mystery of mysteries, as "
    "it has been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that "
    "something might perhaps be made out on this question by patiently accumulating and reflecting on all sorts of "
    "facts which could possibly have any bearing on it."
)
"""The default text for comparing logits. Source: Darwin, On the Origin of Species, 1859."""

MAX_TOKENS = 128
_VOCABULARY_BLOCK = 8192

Read = Callable[[str], Tensor]
"""Global parameter by canonical name."""


def text_ids(tokenizer: Tokenizer, model: ModelConfig, text: str = TEXT, limit: int = MAX_TOKENS) -> Tensor:
    """Encode a text: at most `limit` tokens, and at most the context of the model. Shapes: int64 [1, S].

    Raises:
        ConfigError: the text is empty.
    """
    input_ids = tokenizer.encode(text)[: min(limit, model.max_position_embeddings)]
    if not input_ids:
        raise ConfigError("the text is empty; give a longer one")
    return torch.tensor([input_ids])


def any_ids(model: ModelConfig) -> Tensor:
    """Token ids that need no tokenizer: the bytes of the text. Any ids can show that two models are equal.

    Shapes: int64 [1, S].
    """
    length = min(MAX_TOKENS, model.max_position_embeddings)
    return torch.tensor([[byte % model.vocab_size for byte in TEXT.encode()[:length]]])


def reader(source: WeightSource) -> Read:
    """Read the parameters of a source by name."""
    specs = {spec.name: spec for spec in model_parameters(source.model)}
    return lambda name: source.weight(specs[name])


@contextmanager
def _shown_reader(source: WeightSource, track: Track[Any]) -> Iterator[Read]:
    """Read parameters and advance the progress bar at the first read of each."""
    read, seen = reader(source), set[str]()
    steps = iter(track([spec.name for spec in model_parameters(source.model)], f"computing {source.directory.name}"))

    def shown(name: str) -> Tensor:
        if name not in seen:
            seen.add(name)
            next(steps, None)
        return read(name)

    yield shown
    for _ in steps:  # completes the progress bar
        pass


def plain_logits(model: ModelConfig, read: Read, input_ids: Tensor) -> Tensor:
    """Compute logits in fp32; each parameter is read when it is needed. Shapes: int64 [B, S] -> [B, S, V].

    Source: Cutler et al., "StagFormer", COLM 2025, arXiv 2501.15665.
    """
    embedded = F.embedding(input_ids, read("embedding.weight")).float()
    angles = torch.outer(torch.arange(input_ids.shape[1], dtype=torch.float32), inverse_frequencies(model))
    angles = torch.cat((angles, angles), dim=-1)  # [S, D]
    rotary = angles.cos(), angles.sin()
    mix = read("section_mix").float() if model.combine_sections else None
    output, combined = embedded, torch.zeros_like(embedded)
    for section in range(model.num_sections):
        memory = _memory(model, read, section, output) if model.staggered and section else None
        states = embedded if model.staggered else output
        for layer in range(model.section_layers[section]):
            states = _layer(model, read, section, layer, states, memory, rotary)
        output = states
        if mix is not None:
            combined = combined + mix[section] * output
    final = _norm(model, output if mix is None else combined, read("output_norm.weight"))
    head = read("embedding.weight" if model.tie_word_embeddings else "head.weight")
    return torch.cat([F.linear(final, block.float()) for block in head.split(_VOCABULARY_BLOCK)], dim=-1)


def _norm(model: ModelConfig, states: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(states, (model.hidden_size,), weight.float(), model.rms_norm_eps)


def _memory(model: ModelConfig, read: Read, section: int, previous: Tensor) -> Tensor:
    memory = _norm(model, previous, read(f"sections.{section}.memory_norm.weight"))
    if model.stagger == 0:
        return memory
    gap = read(f"sections.{section}.null_memory").float().expand(len(memory), model.stagger, -1)
    return torch.cat((gap, memory), dim=1)[:, : previous.shape[1]]


def _layer(
    model: ModelConfig,
    read: Read,
    section: int,
    layer: int,
    states: Tensor,
    memory: Tensor | None,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    own = f"sections.{section}.layers.{layer}."
    core = f"sections.0.layers.{layer}." if model.share_section_weights else own
    normed = _norm(model, states, read(core + "self_attention_norm.weight"))
    states = states + _attention(model, read, core + "self_attention.", normed, normed, rotary, None)
    if memory is not None:
        normed = _norm(model, states, read(own + "cross_attention_norm.weight"))
        window = model.cross_attention_window
        states = states + _attention(model, read, own + "cross_attention.", normed, memory, rotary, window)
    normed = _norm(model, states, read(core + "mlp_norm.weight"))
    gate, up = (F.linear(normed, read(f"{core}mlp.{name}_proj.weight").float()) for name in ("gate", "up"))
    return states + F.linear(F.silu(gate) * up, read(core + "mlp.down_proj.weight").float())


def _attention(
    model: ModelConfig,
    read: Read,
    prefix: str,
    states: Tensor,
    source: Tensor,
    rotary: tuple[Tensor, Tensor],
    window: int | None,
) -> Tensor:
    def heads(name: str, inputs: Tensor) -> Tensor:
        projected = F.linear(inputs, read(f"{prefix}{name}_proj.weight").float())
        return projected.unflatten(-1, (-1, model.head_width)).transpose(1, 2)  # [B, N, S, D]

    query, key, value = _rotate(heads("q", states), rotary), _rotate(heads("k", source), rotary), heads("v", source)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    positions = torch.arange(states.shape[1])
    distance = positions[:, None] - positions[None, :]
    allowed = (distance >= 0) & (distance < (window or len(positions)))
    scores = (query @ key.transpose(-1, -2)) / model.head_width**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return F.linear((weights @ value).transpose(1, 2).flatten(2), read(prefix + "o_proj.weight").float())


def _rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]


def source_logits(source: WeightSource, input_ids: Tensor, track: Track[Any]) -> Tensor:
    """`plain_logits` of a source; `track` shows the parameters that were read."""
    with torch.no_grad(), _shown_reader(source, track) as read:
        return plain_logits(source.model, read, input_ids)


def prove_logits(source: WeightSource, written: WeightSource, input_ids: Tensor, track: Track[Any]) -> str:
    """Compare the logits of two models on the same tokens; returns what was proved, as text for the user.

    Raises:
        CheckpointError: the logits are not bit-equal.
    """
    one, other = (source_logits(model, input_ids, track) for model in (source, written))
    difference = float((one - other).abs().max())
    if difference != 0.0:
        raise CheckpointError(f"the logits on {input_ids.shape[1]} tokens of text differ by {difference:.3g}")
    return f", so are the logits on {input_ids.shape[1]} tokens of text"
