"""The staggered step as a plain loop: what an engine without an engine would do, to price the engine.

One request, stagger 1, one section per rank. No schedule, no requests, no control messages; sections and messages are
those of the engine, so the tokens must be the same.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from stagdist.decode.layers.cells import Angles, AnyCells, ChunkCells, DeviceCells
from stagdist.decode.layers.runner import LayerMath, SectionMath, SectionRunner
from stagdist.decode.native.layer_math import NativeMath
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
    native, rank, last = stage.setup.native, dist.get_rank(), dist.get_world_size() - 1
    model, weights, (section,) = stage.model, stage.weights, stage.weights.sections.values()
    (cache,) = stage.caches.values()
    sharded = stage.topology.head == "sharded"
    angles = Angles(model, stage.device)
    math: SectionMath = NativeMath(model, 1, None, stage.device.dtype) if native else LayerMath(model, 1, None)
    runner = SectionRunner(math, section, cache)
    shape, options = (1, 1, model.hidden_size), {"dtype": stage.device.dtype, "device": stage.device.name}
    buffers = [torch.empty(shape, **options), torch.empty(shape, **options)]  # type: ignore[call-overload]
    previous = stage.prompt_memory() if rank else None
    arriving = sending = None
    token, tokens, times = first.clone(), [], []
    published: list[dist.Work | None] = []
    assert weights.embedding is not None and section.layers
    for step in range(steps):
        here = position + step
        cells: AnyCells = ChunkCells(angles, 0, here, 1)
        if native:
            cells = DeviceCells(angles, torch.tensor([here]))
        due = torch.empty(shape, **options) if sharded else torch.empty_like(first)  # type: ignore[call-overload]
        published_token = _receive(stage, due, last, edges) if rank < last else None
        if rank:
            expected = _receive(stage, buffers[step % 2], rank - 1, edges)
        hidden = runner.begin(F.embedding(token[None], weights.embedding), cells)
        if rank:
            if arriving is not None:
                arriving()
                previous = buffers[(step + 1) % 2]
            arriving = expected
        hidden = runner.finish(hidden, cells, previous, None)
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


def _likeliest(stage: Stage, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Best logit of this rank's slice of the vocabulary and its place there."""
    logit, token = stage.readout.project(hidden[0]).max(-1)
    return logit, token


def _gathered(stage: Stage, hidden: Tensor) -> Tensor:
    """The likeliest token over the slices of all ranks."""
    logit, token = _likeliest(stage, hidden)
    mine = torch.stack((logit.double(), (token + stage.weights.first_token).double()))
    slices = mine.new_empty(dist.get_world_size(), 2, 1)
    dist.all_gather(list(slices), mine)
    return slices[slices[:, 0, 0].argmax(), 1].long()
