"""Whether a training checkpoint holds exactly what it was written from: every value of every rank, copies included."""

from typing import Any

import torch

from stagdist.checkpoint.training.content import KINDS, Counters, Track, TrainingSource
from stagdist.checkpoint.training.file_structure import same
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.errors import CheckpointError


def require_same(written: TrainingReader, source: TrainingSource, track: Track[Any]) -> None:
    """Compare weights, optimizer values, step, counters, settings and generators.

    Raises:
        CheckpointError: something differs, by name.
    """
    written.check_layout()
    for spec in track(list(written.specs()), "checking"):
        for where, weight in written.weight_copies(spec):
            if not torch.equal(weight, source.weight(spec)):
                raise CheckpointError(f"{spec.name}{where} was not written as it was read")
        for kind in KINDS:
            expected = source.optimizer_value(spec, kind)
            for where, value in written.optimizer_copies(spec, kind):
                if not torch.equal(value, expected):
                    raise CheckpointError(f"{kind} of {spec.name}{where} was not written as it was read")
    if not torch.equal(written.steps(), source.steps()):
        raise CheckpointError("the optimizer's step was not written as it was read")
    _require_same_counters(written, source.counters())


def _require_same_counters(written: TrainingReader, expected: Counters) -> None:
    """Those of the first rank; `check_layout` has compared the others with it."""
    found = written.counters()
    names = ["global_steps", "global_samples", "skipped_steps", "param_groups", "clip_grad"]
    names += [] if written.bf16 else ["loss_scaler", "dynamic_loss_scale"]  # the bf16 optimizer has none
    for name in names:
        if not same(getattr(found, name), getattr(expected, name)):
            raise CheckpointError(f"{name} was not written as it was read")
    pipe, _, tensor = written.state.grid
    for stage in range(pipe):
        for rank in range(tensor):
            if not same(found.random(stage, rank), expected.random(stage, rank)):
                raise CheckpointError(
                    f"the generators of stage {stage}, tensor rank {rank} were not written as they were read"
                )
