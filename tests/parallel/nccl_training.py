"""Programs of training: the real exchange and schedules with stand-ins for compute, and complete real ranks."""

import tempfile
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.parallel.grid import Grid
from stagdist.parallel.link import NCCL, Rules
from stagdist.telemetry.pulse import Pulse
from stagdist.training.engine.exchange import Exchange
from stagdist.training.engine.pipeline import HandOff
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.engine.train_schedule import InferenceSchedule, TrainSchedule
from stagdist.training.saving.save import save_checkpoint
from tests.parallel.live_recording import LiveRecorder
from tests.parallel.nccl_rules import Drain, Program
from tests.parallel.recording import Group, Mailbox, Recorder
from tests.training.parity_cases import Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

LATE = Rules(early_receives=False, wait_blocks=True)
"""NCCL's posting on gloo."""
HAND_OFF = HandOff(torch.empty(1, 2, device="meta"), torch.empty(1, 1, dtype=torch.int64, device="meta"))


@dataclass(frozen=True)
class Layout:
    """A grid and the micro-batches of a step."""

    pipe: int
    micro_batches: int
    data: int = 1
    tensor: int = 1


def programs(layout: Layout, rules: Rules = NCCL, *, dry: bool = True) -> list[Program]:
    """Two steps, an evaluation and a save on every rank of a layout.

    Args:
        dry: kernels of a micro-batch are loaded before the first hand-off.
    """
    grid, mailbox = Grid(layout.pipe, layout.data, layout.tensor), Mailbox()
    recorders = [Recorder(rank, grid.world_size, mailbox) for rank in range(grid.world_size)]
    for recorder in recorders:
        with recorder.recording():
            engine = StandIn(recorder, grid, layout.micro_batches, rules)
            if dry:
                engine.forward()
                engine.backward()
            engine.train()
            engine.train()
            engine.evaluate()
            engine.save()
    return [recorder.program for recorder in recorders]


class StandIn:
    """DeepSpeed's engine without tensors. The executor of instructions, hand-offs and waits are the real ones.

    What DeepSpeed itself enqueues is imitated; `test_nccl_training.py` compares it with real ranks.
    """

    def __init__(self, recorder: Recorder, grid: Grid, num_micro_batches: int, rules: Rules):
        self.recorder, self.grid, self.num_micro_batches = recorder, grid, num_micro_batches
        self.place = grid.coordinate(recorder.rank)
        self.device = torch.device("cpu")
        self.pulse = Pulse()
        ends = [("tensor", grid.tensor_groups()), ("data", grid.data_groups()), ("pipe", grid.pipe_groups())]
        self.groups = {name: self._own(groups) for name, groups in ends}
        self.groups["norm"] = self._own(_model_groups(grid))
        self.exchange = Exchange(grid, HAND_OFF, "cpu", 60.0, rules=rules)
        self.pipe_buffers: dict[str, list[Any]] = {}
        self._INSTRUCTION_MAP = SectionEngine._INSTRUCTION_MAP | {
            schedule.LoadMicroBatch: StandIn.load,
            schedule.ForwardPass: StandIn.forward,
            schedule.BackwardPass: StandIn.backward,
            schedule.ReduceTiedGrads: StandIn.reduce_tied,
            schedule.ReduceGrads: StandIn.reduce,
            schedule.OptimizerStep: StandIn.update,
        }

    def train(self) -> None:
        """One step, as `train_batch` does it."""
        self._run(TrainSchedule(self.num_micro_batches, self.grid.pipe, self.place.pipe))
        self._all("data") if self.place.pipe == self.grid.pipe - 1 else None
        self._all("pipe")
        self._wait_for_device()

    def evaluate(self) -> None:
        """One evaluation, as `eval_batch` does it."""
        dist.barrier()
        self._run(InferenceSchedule(self.num_micro_batches, self.grid.pipe, self.place.pipe))
        self.train_loss() if self.place.pipe == self.grid.pipe - 1 else None
        self._all("pipe")
        self._wait_for_device()

    def save(self) -> None:
        """Copies to the host, and an agreement of the hosts."""
        self.recorder.launch("copy to host")
        self.recorder.program.append(Drain())
        self._meet()

    def load(self, buffer_id: int) -> None:
        """A micro-batch on its way to the device."""
        self.recorder.launch("copy to device")

    def forward(self, buffer_id: int = 0) -> None:
        """A section, with the sum of its tensor ranks inside."""
        self._compute("forward")
        if self.pipe_buffers:
            tensors = tuple(torch.empty(part.shape, dtype=part.dtype) for part in HAND_OFF.to_tuple())
            self.pipe_buffers["outputs"][buffer_id] = tensors

    def backward(self, buffer_id: int = 0) -> None:
        """Its gradients."""
        self._compute("backward")
        inputs = self.pipe_buffers["inputs"][buffer_id] if self.pipe_buffers else None
        if inputs is not None:
            inputs[0].grad = torch.empty(HAND_OFF.memory.shape)

    def reduce_tied(self) -> None:
        """Gradients of tied weights."""
        self.recorder.launch("tied gradients")
        self._all("pipe")

    def reduce(self) -> None:
        """Gradients of the replicas."""
        self.recorder.launch("gradients")
        self._all("data")

    def update(self) -> None:
        """The gate and the optimizer."""
        self.recorder.launch("finite")
        self._wait_for_device()
        self._meet()
        self.recorder.launch("norm")
        self._all("data")
        self._all("norm")
        self.recorder.launch("optimizer")
        self._all("data")

    def train_loss(self) -> None:
        """The loss of all replicas."""
        self.recorder.launch("loss")
        self._all("data")

    def _run(self, steps: schedule.PipeSchedule) -> None:
        SectionEngine._exec_schedule(self, steps)  # type: ignore[arg-type]

    def _reserve_pipe_buffers(self, number: int) -> None:
        self.pipe_buffers = {name: [None] * number for name in ("inputs", "outputs", "labels")}

    def _wait_for_device(self) -> None:
        SectionEngine._wait_for_device(self)  # type: ignore[arg-type]

    def _compute(self, name: str) -> None:
        self.recorder.launch(name)
        self._all("tensor")
        self.recorder.launch(f"{name}, after the sum")

    def _all(self, axis: str) -> None:
        self.recorder.all_reduce(torch.empty(0), group=self.groups[axis])

    def _meet(self) -> None:
        self.recorder.all_reduce(torch.empty(0), group=Group(-1, tuple(range(self.grid.world_size)), gloo=True))

    def _own(self, groups: list[list[int]]) -> Group:
        made = [self.recorder.new_group(ranks) for ranks in groups]
        return next(group for group in made if self.recorder.rank in group.ranks)


def _model_groups(grid: Grid) -> list[list[int]]:
    """Ranks of one replica."""
    return [
        [grid.rank(pipe, data, tensor) for pipe in range(grid.pipe) for tensor in range(grid.tensor)]
        for data in range(grid.data)
    ]


def real_program(case: Case) -> Program:
    """What one real rank enqueues over gloo with NCCL's posting: start, two steps, an evaluation and a save."""
    groups = World(60.0).groups(case.grid)
    folder: list[str] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, group=groups.control)
    config = case.config().model_copy(update={"runs_directory": folder[0]})
    with (
        mock.patch("stagdist.training.engine.exchange.rules_of", lambda _: LATE),
        LiveRecorder(groups.control).open() as live,
    ):
        engine = build_engine(config, groups)
        with mock.patch.object(engine.exchange, "wait_for_device", lambda doing: live.device_waits()):
            for tokens, labels in case.batches()[:2]:
                engine.train_batch(micro_batches(case, groups, tokens, labels))
            engine.eval_batch(micro_batches(case, groups, *case.batches()[0]))
            save_checkpoint(engine, groups, config, TrainingState(2, 16, 800, case.grid))
    dist.barrier(group=groups.control)
    return live.program
