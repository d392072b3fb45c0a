"""Runs the instructions of the schedule on one rank, and times them."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagdist.decode.runtime.hosted_sections import Call, StageSections
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.schedule import Instruction, Kind, Work, WorkPart
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.topology import Topology
from stagdist.telemetry.pulse import Phase, Pulse
from stagdist.telemetry.spans import SpanRecorder

CATEGORIES = {
    Kind.ASK: "send",
    Kind.EXPECT: "send",
    Kind.BEGIN: "compute",
    Kind.WAIT: "wait for memory",
    Kind.FINISH: "compute",
    Kind.SEND: "send",
    Kind.COMBINE: "combine",
    Kind.SHARE: "wait for last section",
    Kind.HEAD: "head",
    Kind.CHOOSE: "sampling",
    Kind.HOST: "host work",
    Kind.PUBLISH: "send",
    Kind.TOKEN: "wait for token",
}
"""Category of each instruction's span in a trace."""

_WAITS = {Kind.WAIT, Kind.SHARE, Kind.TOKEN}
"""Instructions that can wait for a peer."""

_NO_SPAN = nullcontext()
HostWork = Callable[[], None]
Program = Callable[[Topology, int, Work], tuple[Instruction, ...]]
"""A function of `schedule`."""


class Executor:
    """Runs programs: the instructions of a step and of the chunks on their way.

    Args:
        recorder: records a span for every instruction.

    Attributes:
        chunks: on their way through the stages, the newest first; None where an operation had none.
        step_number: number of the present or next step.
        spent_s: time of this rank by category of instructions, waits included.
    """

    def __init__(
        self,
        setup: StageSetup,
        sections: StageSections,
        readout: Readout,
        recorder: SpanRecorder | None,
        pulse: Pulse,
    ):
        self.setup, self.sections, self.readout, self._recorder, self._pulse = setup, sections, readout, recorder, pulse
        self.topology = setup.topology
        stages = self.topology.num_stages
        self.chunks: deque[Call | None] = deque([None] * stages, stages)
        self.step_number = 0
        self.spent_s = dict.fromkeys(CATEGORIES.values(), 0.0)
        self._programs: dict[tuple[Any, ...], tuple[Instruction, ...]] = {}
        self._shifts: dict[WorkPart, int] = {}

    def run(self, program: Program, work: Work, step: Call | None = None, host_work: HostWork | None = None) -> None:
        """Run the instructions of this stage in order.

        Args:
            step: call of the step, if the work has one.
            host_work: called on rank 0 while later stages compute.
        """
        for instruction in self._instructions(program, work):
            kind = instruction.kind
            self._pulse.beat(Phase.RECEIVE if kind in _WAITS else Phase.FORWARD)
            began_s = time.perf_counter()
            with self.span(instruction):
                if kind is Kind.HOST:
                    if host_work is not None:
                        host_work()
                else:
                    call = step if instruction.part is WorkPart.STEP else self.chunks[-instruction.number]
                    assert call is not None
                    self.perform(call, instruction)
            self.spent_s[CATEGORIES[kind]] += time.perf_counter() - began_s

    def perform(self, call: Call, instruction: Instruction) -> None:
        """Run one instruction other than host work."""
        _METHODS[instruction.part][instruction.kind](self, call, instruction)

    def _instructions(self, program: Program, work: Work) -> tuple[Instruction, ...]:
        """Return instructions whose numbers are relative: to `_shifts` of their part.

        So they are few: steps differ after the first `lag` ones in nothing else.
        """
        young = None if work.step is None else min(work.step - work.first, self.topology.lag)
        self._shifts = {WorkPart.STEP: self.step_number - (young or 0), WorkPart.CHUNK: work.number}
        key = program, young, work.entered, work.ends, work.scored
        if key not in self._programs:
            relative = replace(work, number=0, step=young, first=0)
            self._programs[key] = program(self.topology, self.setup.index, relative)
        return self._programs[key]

    def span(self, instruction: Instruction) -> AbstractContextManager[None]:
        """Record a span of an instruction, if there is a recorder."""
        if self._recorder is None:
            return _NO_SPAN
        name = instruction.kind.value
        if instruction.kind in (Kind.BEGIN, Kind.FINISH):
            name = f"{name} {instruction.index + 1}"
        return self._recorder.span(name, CATEGORIES[instruction.kind], step=self.step_number)

    def _number_of(self, instruction: Instruction) -> int:
        return instruction.number + self._shifts[instruction.part]

    def _receive_hand_off(self, call: Call, instruction: Instruction) -> None:
        assert self.sections.received is not None
        step = self._number_of(instruction)
        buffer = self.sections.received.of_step(call.rows, step)
        self.setup.link.hand_offs_in.expect((WorkPart.STEP, step), buffer)

    def _receive_chunk(self, call: Call, instruction: Instruction) -> None:
        shape = (1, call.length, self.setup.model.hidden_size)
        buffer = torch.empty(shape, dtype=self.setup.device.dtype, device=self.setup.device.name)
        self.setup.link.hand_offs_in.expect((WorkPart.CHUNK, self._number_of(instruction)), buffer)

    def _wait_for_hand_off(self, call: Call, instruction: Instruction) -> None:
        key = instruction.part, self._number_of(instruction)
        (call.carried,) = self.setup.link.hand_offs_in.take(key)

    def _send(self, call: Call, _: Instruction) -> None:
        output = call.outputs[self.sections.last].contiguous()
        self.setup.link.hand_offs_out.send(output, in_flight=self.topology.lag + 1)

    def _last_output(self, call: Call) -> Tensor | None:
        """Output of the model's last section at the last position, if this rank has it."""
        output = call.outputs.get(self.topology.num_sections - 1)
        return None if output is None else output[:, -1:]

    def _combine(self, call: Call, instruction: Instruction) -> None:
        outputs = call.outputs
        if instruction.part is not WorkPart.SCORES:
            outputs = {section: output[:, -1:] for section, output in outputs.items()}
        self.readout.combine(outputs, None if instruction.index < 0 else instruction.index)

    def _share_all(self, call: Call, _: Instruction) -> None:
        self.readout.share(call.outputs.get(self.topology.num_sections - 1))

    def _score(self, call: Call, _: Instruction) -> None:
        self.readout.score(call.outputs.get(self.topology.num_sections - 1), *_scored(call))


def _scored(call: Call) -> tuple[Tensor, int]:
    """Tokens to score, and how many of the likeliest ones to report."""
    assert call.targets is not None and call.count is not None
    return call.targets, call.count


Methods = Mapping[Kind, Callable[[Executor, Call, Instruction], None]]

_BOTH: Methods = {
    Kind.ASK: lambda executor, call, _: executor.readout.ask(call.slots),
    Kind.WAIT: Executor._wait_for_hand_off,
    Kind.SEND: Executor._send,
    Kind.COMBINE: Executor._combine,
    Kind.SHARE: lambda executor, call, _: executor.readout.share(executor._last_output(call)),
    Kind.HEAD: lambda executor, call, _: executor.readout.head(executor._last_output(call)),
    Kind.CHOOSE: lambda executor, call, _: executor.readout.choose(call.slots, call.next_positions),
    Kind.PUBLISH: lambda executor, call, _: executor.readout.publish(),
    Kind.TOKEN: lambda executor, call, _: executor.readout.receive(),
}
"""What a step and a chunk do alike. `run` handles `Kind.HOST`."""

_STEP: Methods = {
    **_BOTH,
    Kind.EXPECT: Executor._receive_hand_off,
    Kind.BEGIN: lambda executor, call, instruction: executor.sections.begin(call, instruction.index),
    Kind.FINISH: lambda executor, call, instruction: executor.sections.finish(call, instruction.index),
}

_CHUNK: Methods = {
    **_BOTH,
    Kind.EXPECT: Executor._receive_chunk,
    Kind.FINISH: lambda executor, call, instruction: executor.sections.run_chunk(call, instruction.index),
}

_SCORES: Methods = {
    Kind.ASK: lambda executor, call, _: executor.readout.ask_scores(call.length, *_scored(call)),
    Kind.COMBINE: Executor._combine,
    Kind.SHARE: Executor._share_all,
    Kind.HEAD: lambda executor, call, _: None,  # by parts, with the scores
    Kind.CHOOSE: Executor._score,
    Kind.PUBLISH: lambda executor, call, _: executor.readout.publish_scores(),
    Kind.TOKEN: lambda executor, call, _: executor.readout.receive_scores(_scored(call)[0]),
}
_METHODS = {WorkPart.STEP: _STEP, WorkPart.CHUNK: _CHUNK, WorkPart.SCORES: _SCORES}
