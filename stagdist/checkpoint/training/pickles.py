"""Read DeepSpeed files without running code from them: tensors, plain containers and a few harmless types.

A pickle can run any program when it is loaded. The restricted loader of torch refuses types that are not on a list.
The types below also occur in DeepSpeed files; they are replaced, so that reading a checkpoint needs no DeepSpeed.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, EnumType, IntEnum
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from stagdist.checkpoint.published.other_formats import refuse_undownloaded
from stagdist.errors import CheckpointError


@dataclass
class Fragment:
    """Replaces `fragment_address` of DeepSpeed: a range of a flat tensor, in values."""

    numel: int
    start: int


class ZeroStage(IntEnum):
    """Replaces `ZeroStageEnum` of DeepSpeed."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    """Replaces the loss scalers of DeepSpeed; has only their attributes."""


def enum_member(enumeration: object, name: object) -> Enum:
    """Replaces `getattr` in pickles: early releases of Python 3.11 store an enum member as a call of it.

    Raises:
        UnpicklingError: the attribute is not a member of an enum.
    """
    if isinstance(enumeration, EnumType) and name in enumeration.__members__:
        member: Enum = enumeration.__members__[str(name)]
        return member
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r}, which is not a member of an enum")


ENUM_MEMBER = (enum_member, "builtins.getattr")
"""Function and the name that it replaces in pickles."""

DEEPSPEED_TYPES: tuple[tuple[Callable[..., object], str], ...] = (
    ENUM_MEMBER,
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (type("DynamicLossScaler", (LossScaler,), {}), "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)
"""Replacement and full name of every type in the DeepSpeed files of our runs that is not a type of torch."""


def load_file(path: Path, *, trust_pickle: bool = False) -> Any:
    """Read one DeepSpeed file; tensors are memory-mapped.

    Args:
        trust_pickle: use the unrestricted loader, which runs any code in the file.

    Raises:
        CheckpointError: the file is missing, damaged, or has other types; the message names them.
    """
    refuse_undownloaded(path)
    try:
        if trust_pickle:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        with safe_globals(list(DEEPSPEED_TYPES)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(refusal(path, error)) from error
    except Exception as error:  # damage in a pickle can end in any
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} cannot be read: {reason}; get the checkpoint from its source again") from error


def refusal(path: Path, error: Exception) -> str:
    """The error message for a file that was refused, with the types that it has."""
    with safe_globals(list(DEEPSPEED_TYPES)):
        try:
            foreign = get_unsafe_globals_in_checkpoint(path)
        except Exception:  # a malicious file may break any parser
            foreign = []
    # Torch begins with advice to load the file without restrictions; its reason comes after that.
    reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]
    what = f"would run {', '.join(sorted(foreign)[:4])}" if foreign else f"is no plain tensor file ({reason})"
    return (
        f"{path} {what} while it is loaded, which no checkpoint of stagdist does. Only if you trust who made it, give "
        "--trust-pickle to this command, or once to python tools/convert_checkpoint.py reshard, which writes a clean "
        "copy"
    )
