"""Builds the stage of this rank from a model: checks, grid, weights."""

import functools
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from stagdist.checkpoint.published.model_reader import ReadSlice
from stagdist.config.cross_checks import tensor_parallel_problems
from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.runner import Lap
from stagdist.decode.layers.weights import Device, Shard, WeightFormat, WeightLoader, check_weight_format
from stagdist.decode.native.library import PRECISIONS, library
from stagdist.decode.runtime.graphs import CaptureProgress
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.runtime.warm_up import Unconnected, dry_limits, dry_pass
from stagdist.decode.topology import HeadLayout, Limits, Topology, topology_for
from stagdist.errors import ConfigError
from stagdist.model.precision import DTYPES
from stagdist.parallel.device import choose_attention, on_cuda
from stagdist.parallel.grid import Grid
from stagdist.parallel.world import join_world
from stagdist.telemetry.pulse import Pulse
from stagdist.telemetry.spans import SpanRecorder

DEFAULT_CHUNK = 128

_log = logging.getLogger(__name__)

LONGEST_TIMEOUT_S = 30 * 24 * 3600.0
"""Largest accepted timeout, well within the range of clocks and sockets."""

START_S = 300.0
"""Minimum limit for starting and joining all processes: imports can take longer than any step."""


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    Attributes:
        tensor_parallel_size: ranks that split every matrix; the number of stages is world size / this.
        head: `last` or `sharded`, see `Topology`.
        num_slots: requests decoded together.
        max_context: positions of a request; None means the model's.
        chunk_size: positions of a prefill chunk, at most.
        inter_token_target_ms: chunks are so small that a step with a chunk takes no longer, if possible; None: all
            chunks have `chunk_size` positions.
        precision: `fp32`, `bf16`, `fp16` or `fp64`; None: see `default_precision`.
        weights: `int8`: matrices are rounded to int8, with one scale per output channel, all but the embedding; None:
            they have the precision above.
        prefix_caching: a prompt reuses the caches of a slot that holds its beginning.
        recurrent: skip section 1 while decoding.
        timeout_s: limit of every wait between ranks.
        link_delay_s: artificial one-way latency of every message between ranks, for measurements: hand-offs, tokens
            and control; each collective takes one latency longer.
        want_margins: keep the smallest distance between best and second best token.
        graphs: run every step as one CUDA graph on each rank, on a CPU as a step of the same fixed shape; None: on a
            GPU, unless messages are delayed: a graph cannot delay them.
        kernels: on a GPU, run the layers of these steps and the choice of tokens as Triton kernels; None: if there are
            graphs. On a CPU without graphs, run the layers of steps as compiled C++; None: if there is a compiler. With
            graphs, True and TRITON_INTERPRET=1, run Triton kernels on a CPU, for tests.
    """

    tensor_parallel_size: int = 1
    head: HeadLayout = "last"
    num_slots: int = 1
    max_context: int | None = None
    chunk_size: int = DEFAULT_CHUNK
    precision: str | None = None
    weights: WeightFormat | None = None
    inter_token_target_ms: float | None = None
    prefix_caching: bool = True
    recurrent: bool = False
    timeout_s: float = 600.0
    link_delay_s: float = 0.0
    want_margins: bool = False
    graphs: bool | None = None
    kernels: bool | None = None

    def __post_init__(self) -> None:
        counts = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "num_slots (--batch-size)": self.num_slots,
            "chunk_size (--prefill-chunk)": self.chunk_size,
        }
        for name, value in counts.items():
            if not 1 <= value < 1 << 24:
                raise ConfigError(f"{name} is {value}; give 1 to {(1 << 24) - 1}")
        target_ms = self.inter_token_target_ms
        if target_ms is not None and not 0 < target_ms < float("inf"):
            raise ConfigError(
                f"inter_token_target_ms (--inter-token-target-ms) is {target_ms}; give milliseconds above 0"
            )
        if not 0 < self.timeout_s <= LONGEST_TIMEOUT_S:  # NaN compares false
            raise ConfigError(
                f"timeout_s (--timeout) is {self.timeout_s}; give seconds above 0, at most {LONGEST_TIMEOUT_S:.0f}"
            )
        if not 0 <= self.link_delay_s < self.timeout_s:
            raise ConfigError(f"link_delay_s is {self.link_delay_s}; give seconds from 0 to below --timeout")
        if self.graphs and self.link_delay_s > 0:
            raise ConfigError("a graph cannot delay messages; give graphs=False, or no link_delay_s")
        if self.precision is not None and self.precision not in DTYPES:
            raise ConfigError(f"precision is {self.precision!r}; give one of {', '.join(DTYPES)}")
        check_weight_format(self.weights, None if self.precision is None else DTYPES[self.precision])


def default_precision(device: str) -> str:
    """`bf16` on a GPU, which then reads half the bytes of fp32 for every token; `fp32` on a CPU."""
    return "bf16" if on_cuda(device) else "fp32"


@dataclass(frozen=True)
class DecodePlan:
    """A model on a grid, checked before any process group exists; nothing is built yet."""

    model: ModelConfig
    topology: Topology
    grid: Grid
    limits: Limits
    options: EngineOptions


def plan_decoding(model: ModelConfig, options: EngineOptions, world_size: int) -> DecodePlan:
    """Decide how a model is distributed over `world_size` ranks.

    Raises:
        ConfigError: it does not fit, with the remedy.
    """
    tensor = options.tensor_parallel_size
    if world_size % tensor:
        raise ConfigError(
            f"{world_size} processes cannot be split into tensor groups of {tensor}; start a multiple of {tensor} "
            "processes, or give another --tensor-parallel-size"
        )
    if problems := tensor_parallel_problems(model, tensor, "--tensor-parallel-size"):
        raise ConfigError("; ".join(problems))
    topology = topology_for(model, world_size // tensor, options.head, recurrent=options.recurrent)
    known = model.max_position_embeddings
    context = known if options.max_context is None else options.max_context
    if not 1 <= context <= known:
        raise ConfigError(f"max_context is {context}, the model has positions up to {known}; give 1 to {known}")
    target_s = None if options.inter_token_target_ms is None else options.inter_token_target_ms / 1e3
    limits = Limits(options.num_slots, context, options.chunk_size, options.prefix_caching, target_s)
    return DecodePlan(model, topology, Grid(world_size // tensor, 1, tensor), limits, options)


@contextmanager
def joined_world(plan: DecodePlan, device: str) -> Iterator[Transport | None]:
    """The communicators of this rank while the block runs; None in a world of one.

    The environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) names the world. After an error in the block the
    communicators stay as they are.

    Raises:
        TransportError: the processes did not meet.
    """
    if plan.grid.world_size == 1:
        if on_cuda(device):
            torch.cuda.set_device(device)  # events and graphs use the current device
        yield None
        return
    options = plan.options
    join_world(device, options.timeout_s, start_timeout_s=max(START_S, options.timeout_s))
    transport = Transport(
        plan.grid,
        device,
        options.timeout_s,
        combined=plan.topology.combined,
        link_delay_s=options.link_delay_s,
    )
    yield transport
    transport.close()
    # After an error the process exits, which the others detect; destroying groups could wait for a dead rank.
    dist.destroy_process_group()


def build_stage(
    plan: DecodePlan,
    read: ReadSlice,
    device: str,
    transport: Transport | None,
    *,
    recorder: SpanRecorder | None = None,
    lap: Lap | None = None,
    pulse: Pulse | None = None,
    progress: CaptureProgress | None = None,
) -> Stage:
    """This rank's stage with its slices of the weights.

    On NCCL a dry pass launches the kernels once before the ranks depend on each other. Those of captured steps whose
    shape follows from the context are compiled in the capture.

    Args:
        recorder: records a span for every instruction; disables graphs by default.
        lap: called when a phase inside a section ends; disables graphs by default.
        pulse: heartbeat for a supervisor.
        progress: called after each CUDA graph that is captured.

    Raises:
        ConfigError: kernels are requested where they cannot run.
    """
    choose_attention(training=False)
    options = plan.options
    graphs = options.graphs
    if graphs is None:
        graphs = on_cuda(device) and recorder is None and lap is None and options.link_delay_s == 0
    kernels = use_kernels(options, device, graphs)
    native = not graphs and use_native(options, device)
    where = Device(device, DTYPES[options.precision or default_precision(device)], by_rows=native)
    index, rank = (0, 0) if transport is None else (transport.stage, transport.tensor_rank)
    loader = WeightLoader(plan.model, read, Shard(rank, plan.grid.tensor), where, options.weights)
    setup = StageSetup(
        plan.model,
        plan.topology,
        plan.limits,
        where,
        loader.stage(plan.topology, index),
        transport,
        want_margins=options.want_margins,
        lap=lap,
        fixed=graphs,
        kernels=kernels,
        native=native,
    )
    if transport is not None and not transport.rules.early_receives:
        alone = Unconnected(plan.grid, transport.stage, transport.tensor_rank)
        dry_pass(Stage(replace(setup, transport=alone, limits=dry_limits(plan.limits), lap=None)))
    stage = Stage(setup, recorder=recorder, pulse=pulse)
    stage.capture(progress)
    return stage


def use_kernels(options: EngineOptions, device: str, graphs: bool) -> bool:
    """Whether steps run Triton kernels.

    Args:
        graphs: steps have a fixed shape.

    Raises:
        ConfigError: they are requested where they cannot run, or Triton has no compiler or no headers of Python.
    """
    on_gpu = on_cuda(device)
    if not on_gpu:
        if graphs and options.kernels and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                f"kernels run on a GPU, not on {device!r}; give kernels=None, or set TRITON_INTERPRET=1 to test them"
            )
        return graphs and bool(options.kernels)
    kernels = graphs and on_gpu if options.kernels is None else options.kernels
    if options.kernels and not graphs:
        raise ConfigError("kernels run in steps of fixed shape; give graphs=True as well, or kernels=None")
    if kernels and on_gpu:
        found = "Triton compiles the kernels of decoding and finds no"
        if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
            raise ConfigError(f"{found} C compiler; install gcc or set CC, or give kernels=False")
        if not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file():
            raise ConfigError(f"{found} Python.h; install python3-dev, or give kernels=False")
    return kernels


def use_native(options: EngineOptions, device: str) -> bool:
    """Whether steps on a CPU run compiled C++ layers. Says so if they could and there is no compiler.

    Raises:
        ConfigError: they are requested where they cannot run.
    """
    if on_cuda(device) or options.kernels is False:
        return False
    precision = options.precision or default_precision(device)
    try:
        if precision not in PRECISIONS:
            raise ConfigError(f"compiled layers have no {precision}; give one of {', '.join(PRECISIONS)}")
        library()
    except ConfigError as error:
        if options.kernels:
            raise
        _warn_once(f"the layers of steps run in plain torch, which takes longer: {error}")
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    """Warn on one rank of each host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _log.warning(message)
