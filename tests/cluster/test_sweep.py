"""Ending what is left on hosts that greet everybody who logs in."""

from pathlib import Path

import pytest

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.hosts.remote import Finished
from stagdist.cluster.supervision import attempt


@pytest.mark.parametrize(
    ("stdout", "expected"),
    [
        ('Welcome to node1!\n{"ended": [1, 2], "left": []}\n', (2, 0, [])),
        ("Welcome to node1!\n", (0, 0, ["node1"])),
    ],
)
def test_what_a_shell_says_before_the_answer_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, stdout: str, expected: tuple[int, int, list[str]]
) -> None:
    monkeypatch.setattr(attempt, "run_on", lambda *words, **options: Finished(0, stdout, "", 0.1))
    ended, left, dead = attempt.sweep("pdsh", (Host("node1", 1),), "mark", Path.cwd(), Path.cwd())
    assert (ended, left, list(dead)) == expected
