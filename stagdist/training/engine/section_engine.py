"""DeepSpeed's pipeline engine with our schedule and hand-off, a gate before the update, and a clock.

With `deepspeed_adapter.py` the only module that may use a private name of DeepSpeed; `TOUCHED` there lists them.
"""

import math
import time
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor, nn

from stagdist.checkpoint.training.directory import TrainingState
from stagdist.checkpoint.training.index import MOMENTS
from stagdist.config.run_config import RunConfig
from stagdist.data.loader import Loader, on_device
from stagdist.model.megatron import TensorParallel
from stagdist.model.precision import DTYPES
from stagdist.model.stagformer import fill_parameters
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Phase, Pulse
from stagdist.training.engine.deepspeed_adapter import quiet
from stagdist.training.engine.deepspeed_config import deepspeed_config
from stagdist.training.engine.exchange import Exchange
from stagdist.training.engine.kernel_warm_up import dry_pass
from stagdist.training.engine.optimizer import build_optimizer
from stagdist.training.engine.pipeline import HandOff, SectionPipeline, expected_hand_off
from stagdist.training.engine.step_clock import COMPUTE, PHASES, UPDATE, ComputeClock, StepTimes
from stagdist.training.engine.train_schedule import InferenceSchedule, TrainSchedule

MicroBatches = Iterator[tuple[Tensor, Tensor]]
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's dynamic loss scaler; its other attributes are settings."""
Gate = Callable[[bool], bool]
"""Takes whether this rank's loss and gradients are finite; returns whether all ranks update."""
Watch = Callable[[Callable[[], None]], None]
"""Takes the reduction of gradients over the replicas, and runs it."""


class SectionEngine(PipelineEngine):
    """DeepSpeed's pipeline engine over sections. All ranks build it at the same time.

    On a GPU, compute is timed by events on the stream, so the clock does not make the device wait inside a step.

    Args:
        module: the layers of this rank; the optimizer's fp32 copies of the weights are made here.
        settings: DeepSpeed's configuration.
        hand_off: shapes of what a stage hands to the next.
        timeout_s: limit of every wait for another rank.
        pulse: signs of life for a supervisor.

    Attributes:
        control: all ranks over gloo.
        exchange: the edges to the neighboring stages.
        times: of the latest step.
    """

    def __init__(
        self,
        module: SectionPipeline,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        groups: Groups,
        *,
        hand_off: HandOff,
        timeout_s: float,
        pulse: Pulse,
    ):
        with quiet(), groups.reused():
            super().__init__(
                args=None,
                model=module,
                optimizer=optimizer,
                model_parameters=None,
                mpu=module.mpu(),
                dist_init_required=False,
                config=settings,
                config_class=DeepSpeedConfig(settings, module.mpu()),
            )
        self.control, self.pulse, self.times = groups.control, pulse, StepTimes()
        self.exchange = Exchange(groups.grid, hand_off, self.device, timeout_s)
        self._gate: Gate | None = None
        self._watch: Watch | None = None

    def train_batch(
        self, data_iter: MicroBatches | None = None, gate: Gate | None = None, watch: Watch | None = None
    ) -> Tensor:
        """Run one optimizer step.

        Args:
            gate: called once, before the update; None updates always.
            watch: called once, in place of the reduction of gradients.

        Returns:
            Mean loss over the micro-batches and replicas, on every rank. The device has computed it.
        """
        self._gate, self._watch = gate, watch
        loss: Tensor = super().train_batch(data_iter)
        self._wait_for_device()
        # DeepSpeed resets this timer only when it prints, which is off: it would keep two CUDA events of every step.
        self.timers(TRAIN_BATCH_TIMER).reset()
        return loss

    def eval_batch(self, *arguments: Any, **options: Any) -> Any:
        """Loss of one batch without an update, which the device has computed; see DeepSpeed."""
        loss = super().eval_batch(*arguments, **options)
        self._wait_for_device()
        return loss

    def micro_batches_of_step(self, loader: Loader, consumed_samples: int) -> MicroBatches | None:
        """Micro-batches of a step; only the first stage reads tokens and only the last labels, others get None.

        DeepSpeed would copy batches from the CPU's memory by itself, and wait for each copy, which the device begins
        after everything that was enqueued before it: on the last stage after a receive.
        """
        if not (self.is_first_stage() or self.is_last_stage()):
            return None
        return on_device(loader.step(consumed_samples), self.device)

    def set_learning_rate(self, value: float) -> None:
        """Use `value` from the next update on."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def gradient_norm(self) -> float:
        """True global norm before clipping, of the latest update."""
        norm = self.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def moments(self, group: int) -> dict[str, Tensor]:
        """Adam's state of one group of parameters, flat, of this rank; empty before the first update."""
        found: dict[str, Tensor] = self.basic_optimizer.state.get(self.optimizer.param_groups[group]["params"][0], {})
        return found

    def begin_moments(self, steps: int) -> None:
        """Give the optimizer moments of zero that have seen `steps` updates."""
        for group in self.optimizer.param_groups:
            (flat,) = group["params"]
            count = torch.tensor(float(steps), device=flat.device)
            self.basic_optimizer.state[flat] = {"step": count} | {kind: torch.zeros_like(flat) for kind in MOMENTS}

    def loss_scaler_state(self) -> dict[str, int | float | bool] | None:
        """State of the fp16 loss scaler; None in other precisions."""
        if not self.fp16_enabled():
            return None
        scaler = vars(self.optimizer.loss_scaler)
        return {key: scaler[key] for key in SCALER_STATE if key in scaler}

    def continue_from(self, state: TrainingState) -> None:
        """Set the counters and, in fp16, the loss scaler."""
        self.global_steps, self.global_samples, self.skipped_steps = state.step, state.consumed_samples, state.bad_steps
        # A scale that does not adapt is a setting, not state.
        if self.fp16_enabled() and state.loss_scaler is not None and self.optimizer.loss_scaler.dynamic:
            vars(self.optimizer.loss_scaler).update(state.loss_scaler)

    def _aggregate_total_loss(self) -> Tensor:
        self._wait_for_device()  # DeepSpeed copies from pageable memory next, where the host would wait without a limit
        loss: Tensor = super()._aggregate_total_loss()
        return loss

    def _train_schedule(self) -> TrainSchedule:
        return TrainSchedule(self.micro_batches, self.num_stages, self.stage_id)

    def _inference_schedule(self, micro_batches: int) -> InferenceSchedule:
        return InferenceSchedule(micro_batches, self.num_stages, self.stage_id)

    def _exec_send_activations(self, buffer_id: int) -> None:
        self.exchange.send_activations(HandOff(*self.pipe_buffers["outputs"][buffer_id]))

    def _exec_recv_activations(self, buffer_id: int) -> None:
        self.pipe_buffers["inputs"][buffer_id] = self.exchange.receive_activations().to_tuple()

    def _exec_send_grads(self, buffer_id: int) -> None:
        self.exchange.send_gradients(HandOff(*self.pipe_buffers["inputs"][buffer_id]))
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        self.grad_layer = (self.exchange.receive_gradients(),)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        super()._exec_backward_pass(buffer_id)
        if self.is_last_stage():
            # DeepSpeed keeps the logits of every buffer until the next step's forward pass.
            self.pipe_buffers["outputs"][buffer_id] = None

    def unreduced_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Gradient of this rank's samples, before the reduction over replicas; None where there is none."""
        found = (
            getattr(parameter, "_hp_grad", None)
            if self.using_bf16_optimizer
            else self.optimizer.get_gradient_for_reduction(parameter)
        )
        return found

    def _exec_reduce_grads(self) -> None:
        reduce = super()._exec_reduce_grads
        if self._watch is None:
            reduce()
        else:
            self._watch(reduce)

    def _bf16_reduce_grads(self) -> None:
        """Average the flat fp32 gradients in place; DeepSpeed's bucket of 5e8 values would copy them first."""
        self.buffered_allreduce_fallback(grads=None, elements_per_buffer=0)

    def _exec_optimizer_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        finite = self._is_finite()
        if self._gate is None or self._gate(finite):
            super()._exec_optimizer_step(lr_kwargs)
            return
        # All ranks drop their gradients; the optimizer's state stays as it is.
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
        schedule.ReduceGrads: _exec_reduce_grads,
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


def build_engine(config: RunConfig, groups: Groups, pulse: Pulse | None = None) -> SectionEngine:
    """The model of this rank with its initial weights, and the engine around it.

    Args:
        pulse: signs of life for a supervisor; None gives none.
    """
    return wrap_module(build_module(config, groups), config, groups, pulse)


def build_module(config: RunConfig, groups: Groups) -> SectionPipeline:
    """The layers of this rank with their initial weights."""
    parallel = TensorParallel(groups.tensor)
    with quiet(), groups.reused():
        module = SectionPipeline(config.model, config.training.activation_checkpointing, groups.grid, parallel)
        fill_parameters(module.canonical_parameters(), config.model, parallel, config.training.seed)
    return module


def wrap_module(
    module: SectionPipeline, config: RunConfig, groups: Groups, pulse: Pulse | None = None
) -> SectionEngine:
    """The engine around a module that has its weights, ready for the first step."""
    batch, dtype = config.training.micro_batch_size, DTYPES[config.training.precision]
    engine = SectionEngine(
        module,
        build_optimizer(module.named_parameters(), config.optimizer),
        deepspeed_config(config.training, config.optimizer, config.deepspeed, groups.grid),
        groups,
        hand_off=expected_hand_off(config.model, batch, config.sequence_length, dtype),
        timeout_s=config.parallel.timeout_s,
        pulse=Pulse() if pulse is None else pulse,
    )
    if not engine.exchange.rules.early_receives and groups.grid.pipe > 1:
        with torch.enable_grad():
            dry_pass(module, engine.exchange.hand_off, engine.device)
    return engine
