"""One rank reports an error that several ranks raise."""

from types import SimpleNamespace

import pytest

from stagdist.errors import ConfigError, StagdistError, TransportError
from stagdist.parallel import ranks_parser
from stagdist.parallel.ranks_parser import OTHERS_WAIT_S, reports_error


@pytest.mark.parametrize(
    ("error", "everywhere", "ranks", "rank_1", "expected"),
    [
        (ConfigError, True, ("0", "0"), False, (True, [])),
        (ConfigError, True, ("2", "0"), False, (False, [])),
        (ConfigError, False, ("2", "0"), False, (True, [])),
        (ConfigError, False, ("3", "1"), False, (True, [OTHERS_WAIT_S])),
        (TransportError, False, ("2", "0"), True, (True, [])),
        (TransportError, False, ("3", "1"), False, (False, [OTHERS_WAIT_S])),
        (TransportError, False, ("1", "1"), True, (True, [])),
        (TransportError, False, ("3", "1"), True, (False, [])),
    ],
)
def test_one_rank_of_a_host_reports_an_error(
    monkeypatch: pytest.MonkeyPatch,
    error: type[StagdistError],
    everywhere: bool,
    ranks: tuple[str, str],
    rank_1: bool,
    expected: tuple[bool, list[float]],
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(ranks_parser, "time", SimpleNamespace(sleep=waits.append))  # other threads may sleep, too
    for name, value in zip(("RANK", "LOCAL_RANK"), ranks, strict=True):
        monkeypatch.setenv(name, value)
    raised = error("problem")
    raised.everywhere = everywhere
    assert (reports_error(raised, rank_1_reports_lost_peer=rank_1), waits) == expected
