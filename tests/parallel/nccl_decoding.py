"""Programs of decoding: the real engine, stages and transport of every rank, recorded one after the other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import DecodePlan, EngineOptions, build_stage, plan_decoding
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.runtime.warm_up import dry_pass
from stagdist.decode.topology import HeadLayout
from stagdist.parallel.layout import ParameterSpec
from stagdist.parallel.link import NCCL, Rules
from stagdist.telemetry.clocks import EventClock
from stagdist.telemetry.spans import SpanRecorder
from tests.parallel.nccl_rules import Launch, Program
from tests.parallel.recorded_graphs import RecordedGraph, recorded_graphs
from tests.parallel.recording import KEYS, Mailbox, Recorder

DryPass = Callable[[Recorder, Stage], None]


@dataclass(frozen=True)
class Layout:
    """A model on stages, and how it is decoded.

    Attributes:
        stages: pipeline stages.
        each: sections of a stage.
        stagger: positions of lag; None: sequential.
        traced: with a recorder of spans.
        chunk: positions of a prefill chunk.
        slots: requests decoded together.
        captured: every step is a graph.
    """

    stages: int
    stagger: int | None = 1
    head: HeadLayout = "last"
    combined: bool = False
    tensor: int = 1
    each: int = 1
    traced: bool = False
    chunk: int = 4
    slots: int = 3
    captured: bool = False

    def __str__(self) -> str:
        kind = "sequential" if self.stagger is None else f"stagger {self.stagger}"
        more = [
            word
            for word, holds in (("combined", self.combined), ("traced", self.traced), ("captured", self.captured))
            if holds
        ]
        return f"{self.stages}x{self.tensor} {kind} {self.head} {' '.join(more)}".strip()

    def plan(self) -> DecodePlan:
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
            tensor_parallel_size=self.tensor,
            head=self.head,
            num_slots=self.slots,
            chunk_size=self.chunk,
            graphs=self.captured,
            kernels=False,  # each operation of torch stands for a kernel
        )
        return plan_decoding(ModelConfig(**keys), options, self.stages * self.tensor)


def request(name: str, prompt_length: int, new_tokens: int, **params: Any) -> Request:
    """A request that ends by its length; greedy by default."""
    params = {"temperature": 0.0, **params}
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_end_of_document=True, **params)
    return Request(name, tuple(range(1, prompt_length + 1)), sampling)


REQUESTS = (
    request("long", 7, 5),
    request("short", 1, 2, temperature=0.8, top_k=3),
    request("late", 2, 2),
    request("again", 3, 3),
    request("scored", 6, 2, prompt_logprobs=1),
)
"""Prefill of several chunks, the last one shorter; admission while another request runs; a slot that is used again;
every number of rows; prefixes in place and copied; a prompt that is scored; an idle engine at the end."""


def recorded(layout: Layout, rules: Rules = NCCL, *, dry_pass: DryPass) -> list[Recorder]:
    """What every rank enqueues from its start to its end.

    Args:
        dry_pass: in place of the one that loads kernels, where the rules ask for one.
    """
    plan, mailbox = layout.plan(), Mailbox()
    size = plan.grid.world_size
    recorders = [Recorder(rank, size, mailbox) for rank in range(size)]
    for recorder in recorders:
        patched = mock.patch("stagdist.decode.runtime.build.dry_pass", partial(dry_pass, recorder))
        graphs: AbstractContextManager[list[RecordedGraph]] = nullcontext([])
        if layout.captured:
            graphs = recorded_graphs(recorder)
        with patched, recorder.recording(), graphs as made:
            _run(layout, plan, rules, recorder)
        assert bool(made) == layout.captured == any(graph.replays > 1 for graph in made)
    return recorders


@cache
def programs(layout: Layout, rules: Rules = NCCL, *, dry: bool = True) -> list[Program]:
    """What the ranks of a layout enqueue for `REQUESTS`. Recorded once; not to be written."""
    dry_pass = partial(_dry_pass_once, layout) if dry else _nothing
    return [recorder.program for recorder in recorded(layout, rules, dry_pass=dry_pass)]


def alike(layout: Layout, stage: int) -> tuple[Layout, int]:
    """A layout and a kind of stage (0 first, 1 between, 2 last) whose dry pass launches the same kernels.

    The dry pass takes longer than everything after it. `test_stages_that_are_alike_have_the_same_dry_pass` compares.
    """
    place = 0 if stage == 0 else 2 if stage == layout.stages - 1 else 1
    layout = replace(layout, traced=False)
    if (place == 0 and layout.each == 1) or layout.stagger == 2:  # the first section has no memory
        layout = replace(layout, stagger=1)
    if layout.stages == 1 or layout.head == "last":
        layout = replace(layout, head="last", stages=min(layout.stages, 2))
    elif place == 2:  # every stage has its part of the head
        place = 1
    return layout, place


_DRY_PASSES: dict[tuple[Layout, int], list[str]] = {}
"""Kernels that a dry pass launches."""


def _dry_pass_once(layout: Layout, recorder: Recorder, stage: Stage) -> None:
    """The real dry pass, recorded once for stages that are alike."""
    kind = alike(layout, stage.index)
    if kind not in _DRY_PASSES:
        begin = len(recorder.program)
        dry_pass(stage)
        _DRY_PASSES[kind] = [action.name for action in recorder.program[begin:] if isinstance(action, Launch)]
    for name in _DRY_PASSES[kind]:
        recorder.launch(name)


def _nothing(recorder: Recorder, stage: Stage) -> None:
    """No dry pass."""


def any_keys(ranks: Sequence[Program]) -> list[Program]:
    """The same with kernels of attention that serve any number of keys."""
    return [
        [Launch(action.name.partition(KEYS)[0]) if isinstance(action, Launch) else action for action in each]
        for each in ranks
    ]


def _run(layout: Layout, plan: DecodePlan, rules: Rules, recorder: Recorder) -> None:
    transport = Transport(plan.grid, "cpu", 60.0, combined=plan.topology.combined, rules=rules)
    spans = SpanRecorder(rank=recorder.rank, clock=EventClock(Mark)) if layout.traced else None
    stage = build_stage(plan, read_constant, "cpu", transport, recorder=spans)
    if recorder.rank:
        operate(stage, transport, None)
        return
    Engine(stage, transport).generate(REQUESTS)


class Mark:
    """An event of a tracer: recorded, and never waited for while tokens flow."""

    def record(self) -> None:
        """No work for the device."""

    def synchronize(self) -> None:
        """Wait for the device, as the clock does once when it is created."""
        torch.cuda.synchronize()

    def query(self) -> bool:
        """Not passed yet."""
        return False


def read_constant(spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
    """Weights of one constant."""
    shape = list(spec.shape)
    shape[dim] = stop - start
    return torch.full(shape, 0.1)
