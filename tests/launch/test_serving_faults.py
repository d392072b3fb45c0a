"""While a server works a rank dies or freezes, or the HTTP process dies: clients hear of it, and it starts again."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.faults import short_patience
from tests.launch.generating import write_model
from tests.launch.runs import is_alive
from tests.launch.serving import Streaming, serve, serve_by

pytestmark = pytest.mark.ranks

CONTEXT = 60_000
ENDLESS = CONTEXT - 100
TIMEOUT_S = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model directory with a long context."""
    return write_model(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_server_with_an_error_for_every_request(model: Path, tmp_path: Path, number: int) -> None:
    started = [serve(tmp_path, model, "--batch-size", "1", "--timeout", str(TIMEOUT_S)) for _ in range(2)]
    idle, at_work = (served.wait_ready() for served in started)
    requests = [Streaming(at_work, "abc", max_tokens=ENDLESS).wait_for_text()]
    requests.append(Streaming(at_work, "queued", max_tokens=3).wait_accepted())
    ranks = {served: served.run.ranks() for served in (at_work, idle)}
    begin = time.monotonic()
    for _, rank_1 in ranks.values():
        rank_1.send_signal(number)
    for request in requests:
        request.ended(TIMEOUT_S + 5)
        assert request.error and request.finish != "length", request.error
    psutil.wait_procs([rank_0 for rank_0, _ in ranks.values()], timeout=3 * TIMEOUT_S)
    waited_s = time.monotonic() - begin
    assert waited_s < 2 * TIMEOUT_S + 3, f"noticed after {waited_s:.1f} s"
    for served, (_, rank_1) in ranks.items():
        if number == signal.SIGSTOP:
            rank_1.kill()
        assert served.run.wait() != 0
        assert any("stage 0 (rank 0) lost" in line for line in served.run.errors()), served.run.text()
        assert served.wait_health(None, 10) < 10


def test_a_frozen_rank_0_makes_health_answer_503_until_it_is_back(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model, "--hang-timeout-s", "2", "--timeout", "60").wait_ready()
    rank_0, _ = served.run.ranks()
    rank_0.send_signal(signal.SIGSTOP)
    assert served.wait_health(503, 10) < 6
    assert served.complete("abc", max_tokens=3).status_code == 503
    rank_0.send_signal(signal.SIGCONT)
    assert served.wait_health(200, 10) < 6
    assert served.complete("abc", max_tokens=3).status_code == 200


def test_without_the_http_process_the_engine_ends_with_an_error(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model).wait_ready()
    endless = Streaming(served, "abc", max_tokens=ENDLESS).wait_for_text()
    served.http_process().kill()
    assert served.run.wait(20) == 1
    assert endless.ended(10).error and served.run.errors() == ["error: the HTTP process has ended"], served.run.text()


def test_a_stopped_http_process_holds_the_engine_up_for_a_limited_time(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model, before=short_patience).wait_ready()
    requests = [Streaming(served, "abc", max_tokens=ENDLESS, logprobs=5).wait_for_text() for _ in range(4)]
    stopped = served.http_process()
    stopped.send_signal(signal.SIGSTOP)
    assert served.run.wait(60) == 1
    assert "the HTTP process took no message" in served.run.errors()[0] and not is_alive(stopped)
    assert all(request.ended(10).error for request in requests)


@pytest.mark.parametrize(
    "faults",
    [
        ((0, signal.SIGKILL),),
        # The first test checks what it says to clients, tests/launch/test_run.py that it is started again.
        pytest.param(((1, signal.SIGKILL),), marks=pytest.mark.slow),
        pytest.param(((0, signal.SIGSTOP),), marks=pytest.mark.slow),  # it is killed as well, after the time limit
    ],
)
def test_under_a_supervisor_the_http_process_outlives_the_engine_and_ends_with_the_supervisor(
    model: Path, tmp_path: Path, faults: tuple[tuple[int, signal.Signals], ...]
) -> None:
    served = serve_by("supervisor", tmp_path, model, "--timeout", str(TIMEOUT_S)).wait_ready()
    listening = served.http_process()
    for victim, number in faults:
        endless = Streaming(served, "abc", max_tokens=ENDLESS).wait_for_text()
        begin = time.monotonic()
        served.run.ranks()[victim].send_signal(number)
        assert endless.ended(TIMEOUT_S + 10).error
        served.wait_health(503, 5)
        answer = served.complete("abc", max_tokens=1)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        served.wait_health(200, 60)
        print(f"rank {victim} got {number.name}: served again after {time.monotonic() - begin:.1f} s")
        assert served.complete("abc", max_tokens=3).status_code == 200
        assert served.http_process() == listening
    listening.kill()
    served.wait_health(200, 60)
    second = served.http_process()
    assert second != listening and served.complete("abc", max_tokens=3).status_code == 200
    served.run.process.send_signal(signal.SIGTERM)  # type: ignore[attr-defined]
    assert served.run.wait(60) == 143 and "the ranks have shut down cleanly" in served.run.text(), served.run.text()
    assert served.is_port_free() and not is_alive(second)


@pytest.mark.slow  # tests/cluster/test_supervisor.py checks the same decisions
def test_a_supervisor_that_gives_up_leaves_no_http_process(model: Path, tmp_path: Path) -> None:
    served = serve_by("supervisor", tmp_path, model).wait_ready()
    listening, changed = served.http_process(), model / "config.json"
    aside = changed.rename(tmp_path / "config.json")
    try:
        served.run.ranks()[1].kill()
        assert served.run.wait(60) == 1 and "starting again would not help" in served.run.text()
    finally:
        aside.rename(changed)
    assert not is_alive(listening) and served.is_port_free()


@pytest.mark.slow  # tests/launch/test_serve.py checks that it ends with a server that was asked to
def test_a_supervisor_that_is_killed_leaves_no_http_process(model: Path, tmp_path: Path) -> None:
    served = serve_by("supervisor", tmp_path, model).wait_ready()
    listening = served.http_process()
    served.run.process.kill()  # type: ignore[attr-defined]
    psutil.wait_procs([listening], timeout=30)
    assert not is_alive(listening) and served.is_port_free()
