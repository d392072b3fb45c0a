"""A corpus that cannot be trained on is reported in one line with the remedy, and nothing is left behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagdist.data.indexed import corpus_path, write_index
from tests.launch.runs import Run, pretrain, pretrain_alone, tiny_config

pytestmark = pytest.mark.ranks

SEQUENCE = 32
"""`max_position_embeddings` of the tiny model."""


@dataclass(frozen=True)
class BadCorpus:
    """A corpus and what must be reported about it.

    Attributes:
        documents: lengths in tokens; None where there is no corpus at all.
        complaint: what is wrong.
        remedy: what the user can do.
    """

    name: str
    documents: list[int] | None
    complaint: str
    remedy: str

    def write(self, folder: Path) -> Path:
        """Make the corpus; its prefix."""
        prefix = folder / self.name
        if self.documents is not None:
            corpus_path(prefix, ".bin").write_bytes(np.ones(sum(self.documents), dtype=np.uint16).tobytes())
            with corpus_path(prefix, ".idx").open("wb") as stream:
                write_index(stream, np.array(self.documents, dtype=np.int32), np.uint16)
        return prefix

    def check(self, run: Run) -> None:
        """Exactly one line states the problem and the remedy, and no folder of a run was begun."""
        errors = run.errors()
        assert len(errors) == 1, run.text()
        for part in (str(run.folder / self.name), self.complaint, self.remedy):
            assert part in errors[0], f"{part!r} is not in {errors[0]!r}"
        assert "Traceback" not in run.text(), run.text()
        assert not (run.folder / "runs").exists()


BAD_CORPORA = [
    BadCorpus("missing", None, "does not exist", "prepare_data.py"),
    BadCorpus("empty", [], "is empty", "prepare"),
    BadCorpus("short", [SEQUENCE], "is shorter than one sequence", "data.sequence_length"),
]


def config_for(prefix: Path) -> dict[str, Any]:
    """A run on this corpus alone, all of it for training."""
    return tiny_config(prefix, "bad", data={"split": [100, 0, 0]}, evaluation={"interval_steps": 0})


@pytest.mark.parametrize("bad", BAD_CORPORA, ids=lambda bad: bad.name)
def test_a_bad_corpus_is_reported_in_one_line_with_the_remedy(bad: BadCorpus, tmp_path: Path) -> None:
    run = pretrain_alone(tmp_path, config_for(bad.write(tmp_path)))
    assert run.wait() == 2, run.text()
    bad.check(run)


def test_two_ranks_report_it_once(tmp_path: Path) -> None:
    bad = next(bad for bad in BAD_CORPORA if bad.name == "short")
    run = pretrain(tmp_path, config_for(bad.write(tmp_path)))
    assert run.wait() == 2, run.text()
    bad.check(run)
