"""Programs of decoding: the real engine, stages and transport of every rank, recorded one after the other."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagdist.config import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.loading import EngineOptions, Placement, build_stage, place_model
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.topology import HeadLayout
from stagdist.decode.transport import Transport
from stagdist.parallel.layout import ParameterSpec
from stagdist.parallel.link import NCCL, Rules
from stagdist.telemetry.clocks import EventClock
from stagdist.telemetry.spans import SpanRecorder
from tests.parallel.recording import Mailbox, Recorder

EARLY = Rules(early_receives=True, wait_blocks=False)
"""What was done before: gloo's early posting on NCCL."""


@dataclass(frozen=True)
class Layout:
    """A model on stages, and how it is decoded.

    Attributes:
        stages: pipeline stages.
        each: sections of a stage.
        stagger: positions of lag; None: sequential.
        traced: with a recorder of spans.
        chunk: positions of a prefill chunk.
    """

    stages: int
    stagger: int | None = 1
    head: HeadLayout = "last"
    combined: bool = False
    tensor: int = 1
    each: int = 1
    traced: bool = False
    chunk: int = 2

    def __str__(self) -> str:
        kind = "sequential" if self.stagger is None else f"stagger {self.stagger}"
        more = [word for word, holds in (("combined", self.combined), ("traced", self.traced)) if holds]
        return f"{self.stages}x{self.tensor} {kind} {self.head} {' '.join(more)}".strip()

    def placement(self) -> Placement:
        """The model on its ranks."""
        keys: dict[str, Any] = {
            "vocab_size": 36,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "section_layers": [1] * (self.stages * self.each),
        }
        if self.stagger is None:
            keys["connection"] = "sequential"
        else:
            keys |= {"stagger": self.stagger, "combine_sections": self.combined}
        options = EngineOptions(
            tensor_parallel_size=self.tensor, head=self.head, num_slots=2, chunk_size=self.chunk, graphs=False
        )
        return place_model(ModelConfig(**keys), options, self.stages * self.tensor)


REQUESTS = (
    Request("long", (1, 2, 3, 4, 5), SamplingParams(max_new_tokens=5, temperature=0.0, ignore_end_of_document=True)),
    Request("short", (1,), SamplingParams(max_new_tokens=2, temperature=0.8, top_k=3, ignore_end_of_document=True)),
    Request("late", (1, 2), SamplingParams(max_new_tokens=2, temperature=0.0, ignore_end_of_document=True)),
)
"""Prefill of several chunks, admission while another request runs, slots that are filled again, rest at the end."""


def recorded(layout: Layout, rules: Rules = NCCL, *, dry: bool = False, by_shape: bool = False) -> list[Recorder]:
    """What every rank enqueues from its start to its end.

    Args:
        dry: with the dry pass that loads kernels.
        by_shape: matrix products of another number of rows are other kernels.
    """
    placement, mailbox = layout.placement(), Mailbox()
    size = placement.grid.world_size
    recorders = [Recorder(rank, size, mailbox, by_shape=by_shape) for rank in range(size)]
    for recorder in recorders:
        with recorder.recording():
            _run(layout, placement, rules, recorder, dry=dry)
    return recorders


def _run(layout: Layout, placement: Placement, rules: Rules, recorder: Recorder, *, dry: bool) -> None:
    combined = placement.topology.combined
    transport = Transport(placement.grid, "cpu", 60.0, combined=combined, rules=rules)
    if not dry:
        transport.rules = EARLY  # only `build_stage` looks at it from here on
    spans = SpanRecorder(rank=recorder.rank, clock=EventClock(Mark)) if layout.traced else None
    stage = build_stage(placement, read_constant, "cpu", transport, recorder=spans)
    if recorder.rank:
        operate(stage, transport, None)
        return
    Engine(stage, transport).generate(REQUESTS)


class Mark:
    """An event of a tracer: recorded, and never waited for while tokens flow."""

    def record(self) -> None:
        """No work for the device."""

    def synchronize(self) -> None:
        """Wait for the device, as the clock does once when it is made."""
        torch.cuda.synchronize()

    def query(self) -> bool:
        """Not passed yet."""
        return False


def read_constant(spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
    """Weights that are all alike."""
    shape = list(spec.shape)
    shape[dim] = stop - start
    return torch.full(shape, 0.1)
