"""Runs of `launch/serve.py`, on forked ranks or by a real command, and requests to them, for tests."""

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.launch.runs import BIN, ROOT, Forks, Launch, Run, mpirun
from tests.ranks import GUARD_S, POLL_S, free_port

SERVE = ROOT / "launch" / "serve.py"
HEALTH_POLL_S = 0.1
"""Between requests for /health, which take processor time from the server that starts."""


class Served:
    """A server under test.

    Args:
        run: its command.
        port: of its address on this machine.
    """

    def __init__(self, run: Run, port: int):
        self.run, self.port, self.url = run, port, f"http://127.0.0.1:{port}"

    def health(self) -> int | None:
        """Status of /health; None if nothing listens."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=20).status_code
        return None

    def wait_ready(self) -> "Served":
        """Return when requests are served."""
        self.run.wait_until(lambda: self.health() == 200, "a healthy server", poll_s=HEALTH_POLL_S)
        return self

    def wait_health(self, status: int | None, limit_s: float = 60) -> float:
        """Seconds until /health has a status."""
        begin = time.monotonic()
        while (found := self.health()) != status:
            assert time.monotonic() < begin + limit_s, f"/health is {found}\n{self.run.text()}"
            time.sleep(HEALTH_POLL_S)
        return time.monotonic() - begin

    def stages(self) -> list[dict[str, Any]]:
        """What the ranks have reported about themselves."""
        stats = httpx.get(f"{self.url}/slots", timeout=20).json()["stats"]
        return list(stats["stages"]) if stats else []

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        """The answer to a request without a stream."""
        body = {"model": "m", "prompt": prompt, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=GUARD_S)

    def http_process(self) -> psutil.Process:
        """The process that listens."""
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if "stagdist.serving.http_process" in (process.info["cmdline"] or ()) and any(
                    one.laddr and one.laddr[1] == self.port for one in process.net_connections("tcp")
                ):
                    return process
        raise AssertionError(f"nothing listens on {self.port}:\n{self.run.text()}")

    def is_port_free(self) -> bool:
        """Whether another server could listen."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return probe.connect_ex(("127.0.0.1", self.port)) != 0


class Streaming(threading.Thread):
    """A request with a stream, read in a thread.

    Attributes:
        text: so far.
        finish: why it ended, as the server says.
        error: what the server or the connection says instead.
    """

    def __init__(self, served: Served, prompt: Any, **fields: Any):
        super().__init__(daemon=True)
        self._url = f"{served.url}/v1/completions"
        self._body = {"model": "m", "prompt": prompt, "temperature": 0, "stream": True, "ignore_eos": True, **fields}
        self.text, self.finish, self.error = "", None, ""
        self._answered = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=GUARD_S) as answer:
                if answer.status_code != 200:
                    self.error = f"{answer.status_code}: {answer.read().decode()}"
                    return
                self._answered.set()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError as error:
            self.error = repr(error)

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish

    def wait_accepted(self) -> "Streaming":
        """Return when the engine has accepted it, before which there is no answer."""
        assert self._answered.wait(60), self.error
        return self

    def wait_for_text(self) -> "Streaming":
        """Return when its answer has begun."""
        deadline = time.monotonic() + 60
        while not self.text:
            assert time.monotonic() < deadline and not self.error, self.error or "no text"
            time.sleep(POLL_S)
        return self

    def ended(self, limit_s: float = 60) -> "Streaming":
        """Return when the answer has ended."""
        self.join(limit_s)
        assert not self.is_alive(), f"no end within {limit_s} s: {self.text[-100:]}"
        return self


def _arguments(model: Path, port: int, arguments: Sequence[str], *, access_log: bool = False) -> list[str]:
    fixed = ["--model", str(model), "--served-model-name", "m", "--port", str(port), "--device", "cpu"]
    return [*fixed, *([] if access_log else ["--no-access-log"]), *arguments]


def serve(
    folder: Path,
    model: Path,
    *arguments: str,
    ranks: int | None = 2,
    port: int | None = None,
    before: Callable[[], None] | None = None,
    access_log: bool = False,
) -> Served:
    """Start a server on forked ranks; see `Forks`."""
    port = port or free_port()
    words = _arguments(model, port, arguments, access_log=access_log)
    return Served(Forks(folder, SERVE, words, ranks=ranks, before=before), port)


def serve_by(launcher: str, folder: Path, model: Path, *arguments: str, access_log: bool = False) -> Served:
    """Start a server of two ranks by a real command; `supervisor` is launch/run.py, and python has one rank."""
    port, meeting = free_port(), str(free_port())
    front = {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--quiet", "--num_accelerators", "2", "--master_port", meeting],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", meeting],
        "mpirun": mpirun(meeting, 2),
        "supervisor": [sys.executable, str(ROOT / "launch" / "run.py"), "--folder", str(folder / "run"), "--"],
    }[launcher]
    words = [*front, str(SERVE), *_arguments(model, port, arguments, access_log=access_log)]
    return Served(Launch(folder, words, script=SERVE), port)
