"""DeepSpeed's private ground: every name that DeepSpeed does not document, and the small classes around them.

This module and `section_engine.py` are the only ones that may use such a name. `TOUCHED` lists each of them with the
reason and the expected signature. `tests/training/engine/test_deepspeed_adapter.py` compares the list with the
installed release, so that an upgrade of DeepSpeed fails there, in words, instead of inside a run.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import NamedTuple

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology


class Touched(NamedTuple):
    """What is expected of a name.

    Attributes:
        signature: of a function, as `inspect.signature` prints it; `class`; `variable` of a module; the type of a
            constant; `attribute` for what an instance assigns.
        why: what it is used for.
    """

    signature: str
    why: str


_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_PIPELINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
_MODULE = "deepspeed.runtime.pipe.module.PipelineModule"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
_FRAGMENT = "deepspeed.utils.tensor_fragment.tensor_fragment"

TOUCHED = {
    # The interpreter of a schedule, replaced to time instructions and to wait with a limit.
    f"{_PIPELINE}._exec_schedule": Touched("(self, pipe_schedule)", "replaced by an interpreter with a clock"),
    f"{_PIPELINE}._INSTRUCTION_MAP": Touched("dict", "extended by our instructions"),
    f"{_PIPELINE}._reserve_pipe_buffers": Touched("(self, num_buffers)", "called by our interpreter"),
    f"{_PIPELINE}.fwd_outputs": Touched("attribute", "reset by our interpreter"),
    f"{_PIPELINE}._train_schedule": Touched("(self)", "replaced by eager 1F1B"),
    f"{_PIPELINE}._inference_schedule": Touched("(self, micro_batches)", "replaced by forward passes alone"),
    # Hand-offs, replaced by those that do not wait for the peer.
    f"{_PIPELINE}._exec_send_activations": Touched("(self, buffer_id)", "replaced by the exchange"),
    f"{_PIPELINE}._exec_recv_activations": Touched("(self, buffer_id)", "replaced by the exchange"),
    f"{_PIPELINE}._exec_send_grads": Touched("(self, buffer_id)", "replaced by the exchange"),
    f"{_PIPELINE}._exec_recv_grads": Touched("(self, buffer_id)", "replaced by the exchange"),
    f"{_PIPELINE}.pipe_buffers": Touched("attribute", "where passes find inputs and leave outputs"),
    f"{_PIPELINE}.grad_layer": Touched("attribute", "where a backward pass finds received gradients"),
    # The update.
    f"{_PIPELINE}._exec_backward_pass": Touched("(self, buffer_id)", "extended: frees the logits"),
    f"{_PIPELINE}._exec_optimizer_step": Touched("(self, lr_kwargs=None)", "extended by the gate"),
    f"{_PIPELINE}._force_grad_boundary": Touched("attribute", "set while a step is skipped"),
    f"{_PIPELINE}.total_loss": Touched("attribute", "checked to be finite"),
    f"{_PIPELINE}._aggregate_total_loss": Touched("(self)", "extended: waits for the device with a limit first"),
    f"{_PIPELINE}.using_bf16_optimizer": Touched("attribute", "decides where gradients are"),
    f"{_PIPELINE}._bf16_reduce_grads": Touched("(self)", "replaced by a reduction in place"),
    f"{_PIPELINE}._exec_reduce_grads": Touched("(self)", "extended: an audit looks before and after"),
    f"{_ZERO}.get_gradient_for_reduction": Touched("(self, param)", "gradients of this rank before the reduction"),
    f"{_FRAGMENT}.get_lp_grad_fragment": Touched("(self, index_in_param_group)", "reduced gradient that is owned"),
    f"{_BF16}._index_in_param_group": Touched("attribute", "its argument"),
    f"{_ENGINE}.buffered_allreduce_fallback": Touched(
        "(self, grads=None, elements_per_buffer=500000000)", "reduces bf16 gradients in place with an empty bucket"
    ),
    f"{_BF16}._hp_grad": Touched("attribute", "fp32 gradients of bf16 parameters"),
    f"{_ZERO}.averaged_gradients": Touched("attribute", "reduced gradients; dropped when a step is skipped"),
    f"{_ZERO}.all_grad_tensors": Touched("attribute", "dropped when a step is skipped"),
    f"{_ZERO}.clip_grad": Touched("attribute", "set after loading, which takes the saved value"),
    f"{_ENGINE}.skipped_steps": Touched("attribute", "counted when a step is skipped"),
    f"{_ENGINE}.global_samples": Touched("attribute", "counted when a step is skipped"),
    "deepspeed.runtime.pipe.engine.TRAIN_BATCH_TIMER": Touched("str", "timer that DeepSpeed resets only when it logs"),
    # Saving and loading.
    f"{_ZERO}._hp_mapping": Touched("attribute", "which part of a parameter this rank owns, and its fp32 values"),
    f"{_BF16}._hp_mapping": Touched("attribute", "the same in bf16"),
    f"{_ZERO}.loss_scaler": Touched("attribute", "state of the fp16 loss scaler"),
    # The pipeline's layers.
    f"{_MODULE}._partition_layers": Touched("(self, method='uniform')", "replaced by cuts between sections"),
    f"{_MODULE}._set_bounds": Touched("(self, start=None, stop=None)", "sets this stage's layers"),
    f"{_MODULE}._topo": Touched("attribute", "read before DeepSpeed's public accessor works"),
    f"{_MODULE}.parts": Touched("attribute", "the cuts"),
    # Start.
    "deepspeed.ops.__compatible_ops__": Touched("variable", "a compiled operation for CPUs is turned off"),
    "deepspeed.runtime.config.DeepSpeedConfig": Touched("class", "the engine takes it ready-made"),
    "torch.distributed.distributed_c10d.default_pg_timeout": Touched(
        "variable", "limit of the groups that DeepSpeed makes; set in stagdist/parallel/groups.py"
    ),
    "torch.distributed.distributed_c10d.default_pg_nccl_timeout": Touched("variable", "the same on NCCL"),
}
"""Private and replaced names by their full name."""


class CutPipeline(PipelineModule):
    """DeepSpeed's pipeline module, cut where we say.

    Args:
        layers: of all stages.
        bounds: index of each stage's first layer, and the number of layers.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        bounds: list[int],
        topology: PipeModelDataParallelTopology,
        loss_fn: partial[torch.Tensor],
    ):
        self._bounds = bounds
        super().__init__(layers=layers, topology=topology, loss_fn=loss_fn)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Cut at our bounds; DeepSpeed's own methods would cut inside `[embedding, section]`."""
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class OwnedPart(NamedTuple):
    """The part of a parameter whose optimizer state this rank owns under ZeRO-1.

    Attributes:
        start, stop: flat range in the rank's parameter.
        value: fp32 [stop - start], a view of the optimizer's copy.
        group: index of the optimizer's group of parameters.
        flat: the range of `value` in the flat tensor of the group.
    """

    start: int
    stop: int
    value: torch.Tensor
    group: int
    flat: slice


def owned_part(parameter: torch.nn.Parameter) -> OwnedPart | None:
    """The part of a parameter that this rank owns; None where other replicas own all of it.

    DeepSpeed's public `safe_get_full_fp32_param` returns the same values, but sums over all replicas for each of them.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    flat = mapping.get_hp_fragment_address()
    return OwnedPart(
        start,
        start + length,
        mapping.get_hp_fragment().data,
        mapping.param_group_index,
        slice(flat.start, flat.start + length),
    )


class OwnedGradient(NamedTuple):
    """The part of a reduced gradient that this rank's update uses.

    Attributes:
        start: position of the first value in the rank's parameter.
        values: flat, not clipped yet.
    """

    start: int
    values: torch.Tensor


def owned_gradient(parameter: torch.nn.Parameter) -> OwnedGradient | None:
    """What this rank has received of a reduced gradient; None where other replicas own all of it.

    Between the reduction and the update only.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    # In bf16 every rank has all of it.
    return OwnedGradient(start, gradient[start : start + length] if gradient.numel() > length else gradient)


def disable_shared_memory_op() -> None:
    """Turn off an operation that exists for CPUs alone, needs a compiler, and takes a minute to compile per node."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints facts that our own checks cover, and broadcasts parameters, of which torch would warn."""
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
