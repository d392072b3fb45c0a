"""A server starts, serves, finishes what it has accepted after a signal, and names what it cannot use."""

import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.generating import run_ranks_to_end, write_model
from tests.launch.runs import Launch, is_alive
from tests.launch.serving import Streaming, serve, serve_by
from tests.ranks import free_port

pytestmark = pytest.mark.ranks

CONTEXT = 60_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model directory with a long context."""
    return write_model(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("ranks", [None, 2])
def test_the_text_is_that_of_the_generate_command_and_a_signal_ends_an_idle_server(
    model: Path, tmp_path: Path, ranks: int | None
) -> None:
    served = serve(tmp_path, model, ranks=ranks).wait_ready()
    served.run.wait_until(lambda: any(served.stages()), "reports of the ranks")
    assert all(stage["compute_s"] > 0 for stage in served.stages()), "every rank has warmed up before it was ready"
    answer = served.complete("abc", max_tokens=12).json()
    expected = run_ranks_to_end(model, "--prompt", "abc", "--max-new-tokens", "12", "--temperature", "0")
    assert "abc" + answer["choices"][0]["text"] == expected.stdout.decode().removesuffix("\n")
    listening = served.http_process()
    for rank in served.run.ranks():  # as torchrun, srun and a container do
        rank.send_signal(signal.SIGTERM)
    assert served.run.wait(30) == 0 and served.run.errors() == [], served.run.text()
    assert served.is_port_free() and not is_alive(listening)


def test_after_a_signal_accepted_requests_are_finished_wherever_they_are_and_new_ones_refused(
    model: Path, tmp_path: Path
) -> None:
    served = serve(tmp_path, model, "--batch-size", "2", "--prefill-chunk", "16").wait_ready()
    streaming = Streaming(served, "abc", max_tokens=400).wait_for_text()
    queued, in_prefill = Streaming(served, "x" * 4000, max_tokens=3), Streaming(served, "x" * 4000, max_tokens=3)
    queued.wait_accepted(), in_prefill.wait_accepted()
    for rank in served.run.ranks():
        rank.send_signal(signal.SIGTERM)
    served.wait_health(503, 5)
    refused = served.complete("late", max_tokens=1)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    for one in (streaming, in_prefill, queued):
        assert one.ended().finish == "length" and not one.error, one.error
    assert served.run.wait(30) == 0 and "cut off" not in served.run.text()


@pytest.mark.slow  # the same decision as above, below the launchers, which signal in ways of their own
@pytest.mark.parametrize("launcher", ["python", "deepspeed", "torchrun", "supervisor"])
def test_a_signal_to_a_launcher_lets_accepted_requests_finish(model: Path, tmp_path: Path, launcher: str) -> None:
    served = serve_by(launcher, tmp_path, model, "--batch-size", "2", "--prefill-chunk", "16").wait_ready()
    streaming = Streaming(served, "abc", max_tokens=600).wait_for_text()
    queued, in_prefill = Streaming(served, "x" * 4000, max_tokens=3), Streaming(served, "x" * 4000, max_tokens=3)
    queued.wait_accepted(), in_prefill.wait_accepted()
    assert isinstance(served.run, Launch)
    family = served.run.family()
    served.run.process.send_signal(signal.SIGTERM)
    served.wait_health(503, 10)
    for one in (streaming, in_prefill, queued):
        assert one.ended().finish == "length" and not one.error, one.error
    code = served.run.wait(30)
    assert code == {"python": 0, "supervisor": 143}.get(launcher, code)
    assert not psutil.wait_procs(family, timeout=10)[1] and served.is_port_free()
    assert "shut down after" in served.run.text() and "cut off" not in served.run.text() and not served.run.errors()


def test_what_is_not_finished_within_the_limit_is_cut_off_and_counted(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model, "--drain-timeout-s", "1").wait_ready()
    endless = Streaming(served, "abc", max_tokens=CONTEXT - 10).wait_for_text()
    begin = time.monotonic()
    served.run.ranks()[0].send_signal(signal.SIGTERM)
    assert endless.ended(20).finish != "length"
    assert served.run.wait(30) == 143 and time.monotonic() - begin > 1
    assert "1 requests were cut off" in served.run.text() and served.is_port_free()


def test_a_second_signal_ends_the_server_at_once(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model).wait_ready()
    endless = Streaming(served, "abc", max_tokens=CONTEXT - 10).wait_for_text()
    rank_0 = served.run.ranks()[0]
    rank_0.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert rank_0.status() != psutil.STATUS_ZOMBIE and not endless.finish
    rank_0.send_signal(signal.SIGTERM)
    assert served.run.wait(10) == 143
    assert endless.ended(10).error and served.wait_health(None, 10) < 10


def test_a_signal_while_the_model_is_loaded_leaves_nothing(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model)
    rank_0 = served.run.ranks()[0]
    served.run.wait_until(
        lambda: any("http_process" in " ".join(one.cmdline()) for one in rank_0.children()), "a child"
    )
    for rank in served.run.ranks():
        rank.send_signal(signal.SIGTERM)
    assert served.run.wait(30) in (143, -signal.SIGTERM)
    assert served.wait_health(None, 10) < 10 and served.run.errors() == []


def test_a_port_in_use_and_an_unknown_host_are_named(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = serve(tmp_path, model, ranks=None, port=port)
        assert taken.run.wait() == 2
        (error,) = taken.run.errors()
        assert f"port {port}" in error and "in use" in error and "Traceback" not in taken.run.text()
    unknown = serve(tmp_path, model, "--host", "no.such.host.example", ranks=None)
    assert unknown.run.wait() == 2
    (error,) = unknown.run.errors()
    assert "no.such.host.example" in error and "Traceback" not in unknown.run.text()


def test_a_second_server_for_a_port_is_refused_and_the_first_one_serves_on(model: Path, tmp_path: Path) -> None:
    served = serve(tmp_path, model, ranks=None).wait_ready()
    second = serve(tmp_path, model, ranks=None, port=served.port)
    assert second.run.wait() == 2
    assert f"port {served.port}: Address already in use" in second.run.errors()[0]
    assert served.complete("abc", max_tokens=3).status_code == 200


def test_a_model_without_a_tokenizer_is_named_and_nothing_listens_afterwards(model: Path, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    served = serve(tmp_path, bare, ranks=2, port=free_port())
    assert served.run.wait() == 2
    (error,) = served.run.errors()
    assert "tokenizer" in error and served.wait_health(None, 10) < 10
