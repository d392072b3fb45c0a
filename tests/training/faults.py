"""Faults planted in a run, so that the comparison with the reference can prove that it would notice them."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from stagdist.parallel.grid import Coordinate
from stagdist.training.engine.section_engine import SectionEngine
from tests.training.parity_cases import BAD_STEP

ENTRANCES = ("stagdist.model.layer", "stagdist.model.section", "stagdist.model.head")
"""Modules that mark where a tensor enters split projections."""


def _unshifted(memory: Tensor, null_memory: Tensor | None, stagger: int) -> Tensor:
    return memory if null_memory is None else memory + 0 * null_memory


def _clip_by_half(optimizer: DeepSpeedZeroOptimizer, gradients: list[Tensor], norm: Tensor) -> None:
    _clip(optimizer, gradients, norm / 2)


_clip = DeepSpeedZeroOptimizer.unscale_and_clip_grads

PATCHES: dict[str, list[tuple[str, Any]]] = {
    "tied gradients stay apart": [
        ("stagdist.training.engine.pipeline.SectionPipeline.get_tied_weights_and_groups", lambda module: [])
    ],
    "memory is not shifted": [("stagdist.model.section.shift_memory", _unshifted)],
    "tensor ranks keep their partial gradients": [
        (f"{module}.enter_tensor_parallel", lambda states, parallel: states) for module in ENTRANCES
    ],
    "clipped by half the norm": [
        ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.unscale_and_clip_grads", _clip_by_half)
    ],
}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Everything inside runs with the fault."""
    with ExitStack() as patches:
        for target, replacement in PATCHES.get(fault or "", []):
            patches.enter_context(patch(target, replacement))
        yield


def damage(engine: SectionEngine, fault: str | None) -> None:
    """Faults of a finished engine."""
    if fault == "norm counts copies twice":
        for parameter in engine.module.parameters():
            parameter.ds_pipe_replicated = False
    victim = engine.module.canonical_parameters().get("sections.0.layers.0.mlp.up_proj.weight")
    if fault == "a gradient is infinite" and victim is not None:
        victim.register_hook(lambda gradient: gradient * math.inf if engine.global_steps == BAD_STEP else gradient)


def replica(place: Coordinate, fault: str | None) -> int:
    """Which replica's samples a rank reads."""
    return 0 if fault == "replicas read the same samples" else place.data
