"""DeepSpeed's pipeline engine with a gate before the update and a clock on every instruction."""

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor

from stagdist.config.run_config import RunConfig
from stagdist.data.loader import Loader, on_device
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import fill_parameters
from stagdist.parallel.groups import Groups
from stagdist.parallel.lean_imports import without_compiler
from stagdist.telemetry.pulse import Phase, Pulse
from stagdist.training.engine.deepspeed_config import deepspeed_config
from stagdist.training.engine.exchange import Exchange, hand_off_kinds
from stagdist.training.engine.kernel_warm_up import dry_pass
from stagdist.training.engine.optimizer import build_optimizer
from stagdist.training.engine.pipeline import SectionPipeline
from stagdist.training.engine.train_schedule import InferenceSchedule, TrainSchedule

with without_compiler(), suppress(ImportError):  # a release without it does not ask for it
    # The engine imports this optimizer, which nobody chose, to see that ours is another.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

MicroBatches = Iterator[tuple[Tensor, Tensor]]
Gate = Callable[[bool], bool]
"""Told whether this rank's loss and gradients are finite, answers whether all ranks update."""

COMPUTE = (schedule.ForwardPass, schedule.BackwardPass)
UPDATE = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)

PHASES = {
    schedule.LoadMicroBatch: Phase.LOAD,
    schedule.ForwardPass: Phase.FORWARD,
    schedule.BackwardPass: Phase.BACKWARD,
    schedule.RecvActivation: Phase.RECEIVE,
    schedule.RecvGrad: Phase.RECEIVE,
    schedule.SendActivation: Phase.SEND,
    schedule.SendGrad: Phase.SEND,
} | dict.fromkeys(UPDATE, Phase.UPDATE)
"""What a rank is seen to do from outside while it runs an instruction."""


@dataclass
class StepTimes:
    """Seconds that this rank spent in one training step.

    Attributes:
        compute_s: forward and backward passes.
        pipeline_s: from the first instruction to the last one before gradients are reduced.
        load_s: waiting for micro-batches.
        update_s: reduction of gradients, gate and optimizer.
    """

    compute_s: float = 0.0
    pipeline_s: float = 0.0
    load_s: float = 0.0
    update_s: float = 0.0


class SectionEngine(PipelineEngine):
    """DeepSpeed's 1F1B over sections.

    Set `gate` before training; `pulse` tells a watcher what this rank does. `times` describes the latest step. On a
    GPU, compute is timed by events on the stream, so the clock does not make the device wait inside a step.
    """

    gate: Gate
    pulse: Pulse
    times: StepTimes
    exchange: Exchange
    control: dist.ProcessGroup

    def train_batch(self, data_iter: MicroBatches | None = None) -> Tensor:
        """Run one optimizer step.

        Returns:
            Mean loss over the micro-batches and replicas, on every rank. The device has computed it.
        """
        loss: Tensor = super().train_batch(data_iter)
        self._wait_for_device()
        # DeepSpeed resets this timer only when it prints, which is off: it would keep two CUDA events of every step.
        self.timers(TRAIN_BATCH_TIMER).reset()
        return loss

    def micro_batches_of_step(self, loader: Loader, consumed_samples: int) -> MicroBatches | None:
        """Micro-batches of a step; only the first stage reads tokens and only the last labels, others get None.

        DeepSpeed would copy batches from the CPU's memory by itself, and wait for each copy, which the device begins
        after everything that was enqueued before it: on the last stage after a receive.
        """
        if not (self.is_first_stage() or self.is_last_stage()):
            return None
        return on_device(loader.step(consumed_samples), self.device)

    def eval_batch(self, *arguments: Any, **options: Any) -> Any:
        """Loss of one batch without an update, which the device has computed; see DeepSpeed."""
        loss = super().eval_batch(*arguments, **options)
        self._wait_for_device()
        return loss

    def _aggregate_total_loss(self) -> Tensor:
        self._wait_for_device()  # DeepSpeed copies from pageable memory next, where the host would wait without a limit
        loss: Tensor = super()._aggregate_total_loss()
        return loss

    def _train_schedule(self) -> TrainSchedule:
        return TrainSchedule(self.micro_batches, self.num_stages, self.stage_id)

    def _inference_schedule(self, micro_batches: int) -> InferenceSchedule:
        return InferenceSchedule(micro_batches, self.num_stages, self.stage_id)

    def _exec_send_activations(self, buffer_id: int) -> None:
        self.exchange.send_activations(self.pipe_buffers["outputs"][buffer_id])

    def _exec_recv_activations(self, buffer_id: int) -> None:
        self.pipe_buffers["inputs"][buffer_id] = self.exchange.receive_activations()

    def _exec_send_grads(self, buffer_id: int) -> None:
        self.exchange.send_gradients(self.pipe_buffers["inputs"][buffer_id])
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        gradient = self.exchange.receive_gradients()
        # DeepSpeed's backward pass wants one gradient for each float tensor of a tuple.
        self.grad_layer = (gradient,) if isinstance(self.pipe_buffers["outputs"][buffer_id], tuple) else gradient

    def _exec_optimizer_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        if self.gate(self._is_finite()):
            super()._exec_optimizer_step(lr_kwargs)
            return
        # The gradients are dropped on every rank, nothing of the optimizer's state moves.
        self._force_grad_boundary = True
        self.optimizer.zero_grad()
        if hasattr(self.optimizer, "averaged_gradients"):
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None
                self.optimizer.all_grad_tensors[group] = None
        self._force_grad_boundary = False
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def _copy_recovery_script(self, save_path: str) -> None:
        """Leave DeepSpeed's scripts out of checkpoints: more files would be more ways to fail."""

    def _bf16_reduce_grads(self) -> None:
        """Average the flat fp32 gradients in place; DeepSpeed's bucket of 5e8 values would copy them first."""
        self.buffered_allreduce_fallback(grads=None, elements_per_buffer=0)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        super()._exec_backward_pass(buffer_id)
        if self.is_last_stage():
            # DeepSpeed keeps the logits of every buffer until the next step's forward pass.
            self.pipe_buffers["outputs"][buffer_id] = None

    def _is_finite(self) -> bool:
        """Loss (last stage) and gradients of this rank. fp16 gradients are left to the loss scaler."""
        checks = [] if self.total_loss is None else [self.total_loss.detach().float().abs()]
        if not self.fp16_enabled():
            # A sum is finite if and only if all its terms are (short of overflow), and far cheaper than a maximum.
            checks += [gradient.sum().float() for gradient in self._accumulated_gradients()]
        if not checks:
            return True
        finite = torch.isfinite(torch.stack([check.reshape(()) for check in checks])).all()
        self._wait_for_device()
        return bool(finite)

    def _accumulated_gradients(self) -> list[Tensor]:
        """Reduced gradients of this rank before the optimizer takes them.

        By now ZeRO-1 has emptied `.grad`: it holds its own partition of the gradients, the other ranks theirs.
        """
        if self.using_bf16_optimizer:
            accumulated = [getattr(parameter, "_hp_grad", None) for parameter in self.module.parameters()]
        else:
            accumulated = [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group]
        return [gradient for gradient in accumulated if gradient is not None]

    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.OptimizerStep: _exec_optimizer_step,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.SendGrad: _exec_send_grads,
        schedule.RecvGrad: _exec_recv_grads,
    }

    def _wait_for_device(self) -> None:
        """Wait on the host, where it waits anyway: on NCCL this is where lost peers are noticed."""
        self.pulse.beat(Phase.RECEIVE)
        self.exchange.wait_for_device("while it waited for other ranks")

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """DeepSpeed's interpreter of instructions, with the time of each kept by kind."""
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        self.fwd_outputs: list[Tensor] = []
        times, clock = StepTimes(), ComputeClock(self.device)
        steps = list(pipe_schedule.steps())
        started = time.perf_counter()
        self.exchange.begin([instruction for step in steps for instruction in step])
        for step in steps:
            for instruction in step:
                kind, run = type(instruction), MethodType(self._INSTRUCTION_MAP[type(instruction)], self)
                if kind in UPDATE and not times.pipeline_s:
                    self._wait_for_device()
                    times.pipeline_s = time.perf_counter() - started
                self.pulse.beat(PHASES[kind])
                begun = time.perf_counter()
                if kind in COMPUTE:
                    with clock:
                        run(**instruction.kwargs)
                else:
                    run(**instruction.kwargs)
                times.load_s += (time.perf_counter() - begun) * (kind is schedule.LoadMicroBatch)
        self.exchange.finish()
        if not times.pipeline_s:  # an evaluation has no update
            self._wait_for_device()
            times.pipeline_s = time.perf_counter() - started
        times.compute_s = clock.seconds()
        times.update_s = time.perf_counter() - started - times.pipeline_s
        self.times = times

    def set_learning_rate(self, value: float) -> None:
        """Use `value` from the next update on."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def gradient_norm(self) -> float:
        """True global norm before clipping, of the latest update."""
        norm = self.get_global_grad_norm()
        return math.nan if norm is None else float(norm)


class ComputeClock:
    """Adds up the time spent inside `with clock:`; on CUDA by events, elsewhere by the host's clock."""

    def __init__(self, device: torch.device):
        self._on_cuda = torch.device(device).type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._total_s = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        if self._on_cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._total_s += time.perf_counter() - self._begun
        if self._on_cuda:
            self._events[-1][1].record()

    def seconds(self) -> float:
        """Time inside the clock; the device must have passed its last event."""
        if self._on_cuda:
            return sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        return self._total_s


def build_engine(config: RunConfig, groups: Groups) -> SectionEngine:
    """The model of this rank with its initial weights, and the engine around it."""
    return wrap_module(build_module(config, groups), config, groups)


def build_module(config: RunConfig, groups: Groups) -> SectionPipeline:
    """The layers of this rank with their initial weights."""
    parallel = TensorParallel(groups.tensor)
    with _quiet(), groups.reused():
        module = SectionPipeline(config, groups.grid, parallel)
        fill_parameters(module.canonical_parameters(), config.model, parallel, config.training.seed)
    return module


def wrap_module(module: SectionPipeline, config: RunConfig, groups: Groups) -> SectionEngine:
    """The engine around a module that has its weights; the optimizer's fp32 copies are taken here.

    What deepspeed.initialize does for a pipeline module, with our engine class.
    """
    settings = deepspeed_config(config, groups.grid)
    with _quiet(), groups.reused():
        engine = SectionEngine(
            args=None,
            model=module,
            optimizer=build_optimizer(module.named_parameters(), config.optimizer),
            model_parameters=None,
            mpu=module.mpu(),
            dist_init_required=False,
            config=settings,
            config_class=DeepSpeedConfig(settings, module.mpu()),
        )
    engine.gate = lambda finite: finite
    engine.pulse = Pulse()
    kinds = hand_off_kinds(config, next(module.parameters()).dtype)
    engine.exchange = Exchange(groups.grid, kinds, engine.device, config.parallel.timeout_s)
    if not engine.exchange.rules.early_receives and groups.grid.pipe > 1:
        ends = {"first_stage": engine.is_first_stage(), "last_stage": engine.is_last_stage()}
        with torch.enable_grad():
            dry_pass(module, config, kinds, engine.device, **ends)
    engine.control = groups.control
    return engine


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints facts that our own checks cover, and broadcasts parameters, which torch would warn of."""
    with redirect_stdout(io.StringIO()), torch.no_grad(), _device_as_local_rank():
        yield


@contextmanager
def _device_as_local_rank() -> Iterator[None]:
    """DeepSpeed takes LOCAL_RANK for the number of the device, and compares it with Open MPI's."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if torch.cuda.is_initialized() else ()
    kept = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(kept, str(torch.cuda.current_device())) if kept else {})
    try:
        yield
    finally:
        os.environ.update(kept)
