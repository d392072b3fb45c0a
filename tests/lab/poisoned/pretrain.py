"""launch/pretrain.py with one difference: while the file POISON names exists, rank 0 finds a loss that is not finite.

A file that says `once` goes with the first step that it spoils, as a flipped bit would.
"""

import os
import runpy
from pathlib import Path

from stagdist.training.engine.section_engine import SectionEngine

POISON = Path(os.environ["STAGDIST_TEST_POISON"])
_healthy = SectionEngine._is_finite


def _is_finite(engine: SectionEngine) -> bool:
    finite = _healthy(engine)
    if os.environ["RANK"] == "0" and POISON.exists():
        if POISON.read_text() == "once":
            POISON.unlink()
        return False
    return finite


SectionEngine._is_finite = _is_finite  # type: ignore[method-assign, assignment]
runpy.run_path(str(Path(__file__).resolve().parents[3] / "launch" / "pretrain.py"), run_name="__main__")
