"""Check the structure of the contents of DeepSpeed files, and compare them."""

from typing import Any

import torch
from torch import Tensor

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_GENERATORS = ("cpu_random_state", "cuda_random_state")
_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def structure_problem(name: str, content: Any) -> str | None:
    """The first structural problem of a file; None if there is none. `name` decides what is checked."""
    if not isinstance(content, dict):
        return f"is a {type(content).__name__} instead of a dictionary"
    if name.startswith("layer_"):
        return None  # its tensors are checked by name
    if name.startswith("mp_rank_"):
        return _model_states_problem(content)
    states = content.get("optimizer_state_dict")
    return _optimizer_problem(states) if isinstance(states, dict) else "lacks the dictionary optimizer_state_dict"


def _model_states_problem(content: dict[str, Any]) -> str | None:
    shapes: Any = content.get("param_shapes")
    if not _are(shapes, dict) or not all(isinstance(shape, list | tuple) for one in shapes for shape in one.values()):
        return "lacks two dictionaries of shapes, param_shapes"
    for key in _COUNTERS:
        if not isinstance(content.get(key), int):
            return f"lacks the number {key}"
    for key in _GENERATORS:
        if key in content and not isinstance(content[key], Tensor):
            return f"has a {type(content[key]).__name__} for {key} instead of a tensor"
    return None


def _optimizer_problem(states: dict[str, Any]) -> str | None:
    if not _are(states.get("single_partition_of_fp32_groups"), Tensor):
        return "lacks two tensors, single_partition_of_fp32_groups"
    if not isinstance(states.get("clip_grad"), int | float):
        return "lacks the number clip_grad"
    if "loss_scaler" in states and not hasattr(states["loss_scaler"], "__dict__"):
        return "has something other than a loss scaler as loss_scaler"
    base = states.get("base_optimizer_state")
    if not isinstance(base, dict) or not _are(base.get("param_groups"), dict):
        return "lacks the settings of two groups, base_optimizer_state.param_groups"
    slots = base.get("state")
    if not isinstance(slots, dict):
        return "lacks the dictionary base_optimizer_state.state"
    if not slots:
        return None  # no step was done; the reader reports it
    for group in (0, 1):
        for key in _SLOTS:
            slot = slots.get(group)
            value = slot.get(key) if isinstance(slot, dict) else None
            if not isinstance(value, Tensor) or (key == "step" and value.numel() != 1):
                return f"lacks the tensor {key} of group {group}, base_optimizer_state.state"
    return None


def _are(found: Any, kind: type) -> bool:
    """Whether `found` is a list with an entry of a type for each of the two groups."""
    return isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(one, kind) for one in found)


def same(one: Any, other: Any) -> bool:
    """Whether two contents are bit-equal."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)
