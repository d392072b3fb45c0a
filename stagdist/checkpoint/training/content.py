"""The content of a training checkpoint, independent of its grid: parameters, optimizer values, counters."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from stagdist.parallel.layout import ParameterSpec

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
"""Optimizer tensors of a parameter: the fp32 copy and Adam's two moments."""

Item = TypeVar("Item")
Track = Callable[[Sequence[Item], str], Iterable[Item]]
"""Iterates over items and shows the progress: (items, name of the work) -> items."""


def untracked(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Iterate without showing the progress."""
    return items


@dataclass(frozen=True)
class Counters:
    """The values that DeepSpeed stores in addition to the parameters and optimizer tensors.

    Attributes:
        global_steps, global_samples, skipped_steps: counters of the engine.
        param_groups: settings of the two AdamW groups.
        clip_grad: largest norm of the gradient.
        loss_scaler: attributes of the loss scaler.
        dynamic_loss_scale: whether the loss scale adapts.
        random: states of the random generators by (stage, tensor rank).
    """

    global_steps: int
    global_samples: int
    skipped_steps: int
    param_groups: list[dict[str, Any]]
    clip_grad: float
    loss_scaler: dict[str, Any]
    dynamic_loss_scale: bool
    random: Callable[[int, int], dict[str, Tensor]]


class TrainingSource(Protocol):
    """Reads global parameters and their optimizer values."""

    def weight(self, spec: ParameterSpec) -> Tensor:
        """A global parameter in the dtype of the run."""

    def optimizer_value(self, spec: ParameterSpec, kind: str) -> Tensor:
        """The fp32 copy or a moment of a parameter; `kind` is one of `KINDS`."""

    def steps(self) -> Tensor:
        """Number of Adam updates, a scalar."""

    def counters(self) -> Counters:
        """Counters, settings and generators."""
