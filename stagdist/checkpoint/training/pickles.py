"""DeepSpeed's files read without running what they say: only tensors, plain containers and a few harmless types.

A pickle can run any program when it is loaded. torch's restricted loader refuses everything but a list of types; the
few below are what DeepSpeed's own files hold besides. Here they come back as plain stand-ins, so that reading a
checkpoint needs no DeepSpeed.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, EnumType, IntEnum
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from stagdist.errors import CheckpointError


@dataclass
class Fragment:
    """Stand-in for DeepSpeed's `fragment_address`: a stretch of a flat tensor, in values."""

    numel: int
    start: int


class ZeroStage(IntEnum):
    """Stand-in for DeepSpeed's `ZeroStageEnum`."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    """Stand-in for DeepSpeed's loss scalers: their attributes and nothing else."""


def enum_member(enumeration: object, name: object) -> Enum:
    """What stands in for `getattr` in pickles: early releases of Python 3.11 store an enum's member as one.

    Raises:
        UnpicklingError: anything else is asked for.
    """
    if isinstance(enumeration, EnumType) and name in enumeration.__members__:
        member: Enum = enumeration.__members__[str(name)]
        return member
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r}, which is no member of an enum")


ENUM_MEMBER = (enum_member, "builtins.getattr")
"""Function and the name under which pickles ask for it."""

DEEPSPEED_TYPES: tuple[tuple[Callable[..., object], str], ...] = (
    ENUM_MEMBER,
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (type("DynamicLossScaler", (LossScaler,), {}), "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)
"""Stand-in and full name of every type that DeepSpeed's files of our runs hold besides torch's."""


def load_file(path: Path, *, trust_pickle: bool = False) -> Any:
    """Content of one of DeepSpeed's files; tensors are memory-mapped.

    Args:
        trust_pickle: load with the unrestricted loader, which runs whatever the file says.

    Raises:
        CheckpointError: the file is missing, damaged, or asks for types that are not on the list, by name.
    """
    try:
        if trust_pickle:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        with safe_globals(list(DEEPSPEED_TYPES)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(refusal(path, error)) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def refusal(path: Path, error: Exception) -> str:
    """Why a file was not loaded, with the types it asks for."""
    with safe_globals(list(DEEPSPEED_TYPES)):
        try:
            foreign = get_unsafe_globals_in_checkpoint(path)
        except Exception:  # a file made to harm may break any parser
            foreign = []
    # Torch begins with advice to load the file without restrictions; its reason comes after that.
    reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]
    what = f"would run {', '.join(sorted(foreign)[:4])}" if foreign else f"is no plain tensor file ({reason})"
    return (
        f"{path} {what} while it is loaded, which no checkpoint of stagdist does. Only if you trust who made it, give "
        "--trust-pickle to this command, or once to python tools/convert_checkpoint.py reshard, which writes a clean "
        "copy"
    )
