"""What a check is told, what it may answer, and how it is called in the process made for it."""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]
"""What a check has measured; JSON values only."""

NEEDS_GPU = "needs a GPU"


class ImpossibleError(Exception):
    """The check cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large a check runs.

    Attributes:
        gpus: GPUs of this machine; 0 in a rehearsal.
        kept: file that receives the numbers measured so far, so that a check that hangs or fails leaves them.
    """

    gpus: int = 0
    kept: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether this is a run on a GPU, with real shapes; a rehearsal runs on the CPU, with tiny ones."""
        return self.gpus > 0

    @property
    def device(self) -> str:
        """Device of a check of one process."""
        return "cuda:0" if self.on_gpu else "cpu"

    @property
    def precision(self) -> str:
        """Of models that are too large for bf16 on a CPU, which emulates it."""
        return "bf16" if self.on_gpu else "fp32"

    @property
    def rank_device(self) -> str:
        """Device of this rank: its own GPU where there are several, else the one that all ranks share."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.gpus > 1 else self.device

    def keep(self, numbers: Numbers) -> None:
        """Write down the numbers measured so far; later calls replace earlier ones. Rank 0 only."""
        if self.kept is not None and os.environ.get("RANK", "0") == "0":
            aside = self.kept.with_suffix(".part")
            aside.write_text(json.dumps(numbers))
            aside.rename(self.kept)


def goal(setting: Setting, wanted: float, measured: float, met: bool) -> Numbers:
    """A goal as numbers; in a rehearsal it is not judged."""
    return {"goal": wanted, "measured": measured, "met": met if setting.on_gpu else None}


def perform(payload: tuple[str, dict[str, Any], Setting]) -> dict[str, Any]:
    """Call a check, named as `module:function`, with its arguments; the target of `tests.ranks.run_ranks`.

    Returns:
        `{"numbers": ...}`, or `{"impossible": reason}`.
    """
    target, arguments, setting = payload
    module, _, function = target.partition(":")
    try:
        numbers = getattr(importlib.import_module(module), function)(setting, **arguments)
    except ImpossibleError as reason:
        return {"impossible": str(reason)}
    json.dumps(numbers)  # fails here, where the traceback names the check
    return {"numbers": numbers}
