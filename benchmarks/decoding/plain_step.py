"""The staggered step as plain functional torch code: what an engine without an engine would do, to price the engine.

One request, stagger 1, one section per rank. No classes, no schedule, no control messages; the weights are the fused
ones of a stage and the messages are the same, so the tokens must be the engine's too.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.cells import Angles
from stagdist.decode.layers.matrix import Matrix, linear
from stagdist.decode.layers.weights import Device, LayerWeights, SectionWeights
from stagdist.decode.runtime.stage import Stage
from stagdist.parallel.device import on_cuda

Edges = dict[tuple[int, int], ProcessGroup]


def rank_edges(world_size: int) -> Edges:
    """One communicator for each (from, to): to the next rank, and from the last to all; every rank calls this."""
    last = world_size - 1
    pairs = [(rank, rank + 1) for rank in range(last)] + [(last, rank) for rank in range(last)]
    return {pair: dist.new_group(sorted(pair)) for pair in pairs}


@torch.inference_mode()
def plain_steps(stage: Stage, edges: Edges, first: Tensor, position: int, steps: int) -> tuple[list[int], list[float]]:
    """Decode `steps` tokens after a prompt that the stage has just prefilled; every rank calls this.

    Args:
        first: token chosen by the prefill, int64 [1].
        position: of that token, the number of tokens in the prompt.

    Returns: tokens and the time (`time.perf_counter`) at which each was known; on rank 0, empty on the others.
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, weights, (section,) = stage.model, stage.weights, stage.weights.sections.values()
    (cache,) = stage.caches.values()
    sharded = stage.topology.head == "sharded"
    angles = Angles(model, Device(stage.device.name, stage.device.dtype))
    shape, options = (1, 1, model.hidden_size), {"dtype": stage.device.dtype, "device": stage.device.name}
    buffers = [torch.empty(shape, **options), torch.empty(shape, **options)]  # type: ignore[call-overload]
    previous = stage.prompt_memory() if rank else None
    arriving = sending = None
    token, tokens, times = first.clone(), [], []
    published: list[dist.Work | None] = []
    assert weights.embedding is not None and section.layers
    for step in range(steps):
        here = position + step
        cos, sin = angles.cos[here], angles.sin[here]
        due = torch.empty(shape, **options) if sharded else torch.empty_like(first)  # type: ignore[call-overload]
        published_token = _receive(stage, due, last, edges) if rank < last else None
        if rank:
            expected = _receive(stage, buffers[step % 2], rank - 1, edges)
        hidden = F.embedding(token[None], weights.embedding)
        hidden = _self_attention(model, section.layers[0], hidden, cos, sin, cache.self_kv[0], here)
        entries = 0
        if rank:
            if arriving is not None:
                arriving()
                previous = buffers[(step + 1) % 2]
            arriving = expected
            assert previous is not None and cache.memory_kv is not None
            entries = _store_memory(model, section, previous, cos, sin, cache.memory_kv, here)
        for index, layer in enumerate(section.layers):
            if index:
                hidden = _self_attention(model, layer, hidden, cos, sin, cache.self_kv[index], here)
            if cache.memory_kv is not None:
                hidden = _cross_attention(model, layer, hidden, cos, sin, cache.memory_kv[index, :, :, :, :entries])
            normed = F.rms_norm(hidden, layer.mlp_norm.shape, layer.mlp_norm, model.rms_norm_eps)
            gate, up = linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + linear(F.silu(gate) * up, layer.down)
        if rank < last:
            _wait(sending)
            sent = hidden  # must live until it has left
            sending = dist.isend(sent, rank + 1, group=edges[rank, rank + 1])
        _wait(*published)
        if published_token is None:
            due = hidden if sharded else _likeliest(stage, hidden)[1]
            published = [dist.isend(due, peer, group=edges[last, peer]) for peer in range(last)]
        else:
            published_token()
        token = _gathered(stage, due) if sharded else due
        if rank == 0:
            tokens.append(int(token))
            times.append(time.perf_counter())
    if arriving is not None:
        arriving()
    _wait(sending, *published)
    return tokens, times


def _wait(*sends: dist.Work | None) -> None:
    for work in sends:
        if work is not None:
            work.wait()


def _receive(stage: Stage, tensor: Tensor, peer: int, edges: Edges) -> Callable[[], object]:
    """A receive, as a function that waits for it.

    On gloo it is posted at once, because a message without a posted receive delays its sender. On nccl it is posted
    where it is waited for, because a posted receive occupies the device until the message comes.
    """

    def post() -> dist.Work:
        work = dist.irecv(tensor, peer, group=edges[peer, dist.get_rank()])
        assert work is not None, "this rank is in the group"
        return work

    return (lambda: post().wait()) if on_cuda(stage.device.name) else post().wait


def _self_attention(
    model: ModelConfig, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, here: int
) -> Tensor:
    heads, turning = model.num_attention_heads, model.num_attention_heads + model.key_value_heads
    normed = F.rms_norm(hidden, layer.self_attention_norm.shape, layer.self_attention_norm, model.rms_norm_eps)
    states = linear(normed, layer.qkv).view(turning + model.key_value_heads, model.head_width)
    turned = _rotate(states[:turning], cos, sin)
    cache[0, 0, :, here], cache[1, 0, :, here] = turned[heads:], states[turning:]
    return hidden + _attend(turned[:heads], cache[0, :, :, : here + 1], cache[1, :, :, : here + 1], layer.o)


def _store_memory(
    model: ModelConfig, section: SectionWeights, previous: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, here: int
) -> int:
    """Keys and values of the memory, for all layers; how many entries may be seen."""
    assert section.memory_norm is not None and section.memory_kv is not None
    memory = F.rms_norm(previous, section.memory_norm.shape, section.memory_norm, model.rms_norm_eps)
    states = linear(memory, section.memory_kv).view(len(section.layers), 2, -1, model.head_width)
    window = cache.shape[4] - 1
    cache[:, 0, 0, :, here % window] = _rotate(states[:, 0], cos, sin)
    cache[:, 1, 0, :, here % window] = states[:, 1]
    return min(here + 1, window)


def _cross_attention(
    model: ModelConfig, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor, memory: Tensor
) -> Tensor:
    assert layer.cross_attention_norm is not None and layer.cross_q is not None and layer.cross_o is not None
    normed = F.rms_norm(hidden, layer.cross_attention_norm.shape, layer.cross_attention_norm, model.rms_norm_eps)
    query = linear(normed, layer.cross_q).view(model.num_attention_heads, model.head_width)
    return hidden + _attend(_rotate(query, cos, sin), memory[0], memory[1], layer.cross_o)


def _attend(query: Tensor, keys: Tensor, values: Tensor, output: Matrix) -> Tensor:
    grouped = query.shape[0] != keys.shape[1]
    mixed = F.scaled_dot_product_attention(query[None, :, None], keys, values, enable_gqa=grouped)
    return linear(mixed.reshape(1, 1, -1), output)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def _likeliest(stage: Stage, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Best logit of this rank's slice of the vocabulary and its place there."""
    weights = stage.weights
    assert weights.head is not None and weights.output_norm is not None
    normed = F.rms_norm(hidden[0], weights.output_norm.shape, weights.output_norm, stage.model.rms_norm_eps)
    logit, token = linear(normed, weights.head).max(-1)
    return logit, token


def _gathered(stage: Stage, hidden: Tensor) -> Tensor:
    """The likeliest token over the slices of all ranks."""
    logit, token = _likeliest(stage, hidden)
    mine = torch.stack((logit.double(), (token + stage.weights.first_token).double()))
    slices = mine.new_empty(dist.get_world_size(), 2, 1)
    dist.all_gather(list(slices), mine)
    return slices[slices[:, 0, 0].argmax(), 1].long()
