"""What a training checkpoint consists of, whatever grid it lies on: parameters, optimizer values, counters."""

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
"""Walks through a sequence and shows how far it is: (items, what is done) -> items."""


def untracked(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Show nothing."""
    return items


@dataclass(frozen=True)
class Counters:
    """What DeepSpeed keeps besides tensors.

    Attributes:
        global_steps, global_samples, skipped_steps: of its engine.
        param_groups: settings of AdamW's two groups.
        clip_grad: norm to clip at.
        loss_scaler: attributes of its loss scaler.
        dynamic_loss_scale: whether that one adapts.
        random: state of torch's generators by (stage, tensor rank).
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
    """Where whole parameters and their optimizer values come from."""

    def weight(self, spec: ParameterSpec) -> Tensor:
        """The parameter in the type of the run."""

    def optimizer_value(self, spec: ParameterSpec, kind: str) -> Tensor:
        """Its fp32 copy or one of its moments, fp32."""

    def steps(self) -> Tensor:
        """Updates that Adam has done, a scalar."""

    def counters(self) -> Counters:
        """What is no tensor."""
