"""A server of two ranks for all tests of this folder, and the Python that has the clients."""

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch.generating import write_model
from tests.launch.runs import ROOT, Forks
from tests.ranks import free_port

CLIENTS = ROOT / ".venv-clients" / "bin"


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    model: Path

    def get(self, path: str) -> bytes:
        """The body at a path."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a JSON body."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model on bytes with random weights, whose conversations are plain text."""
    folder = tmp_path_factory.mktemp("served")
    model = write_model(folder / "tiny", max_position_embeddings=256)
    port = free_port()
    words = ["--model", str(model), "--port", str(port), "--device", "cpu", "--batch-size", "4"]
    run = Forks(folder, ROOT / "launch" / "serve.py", [*words, "--chat-template", "plain"])
    try:
        server = Served(f"http://127.0.0.1:{port}", model)
        run.wait_until(lambda: _is_healthy(server), "a healthy server", poll_s=0.1)
        yield server
        for rank in run.ranks():
            rank.send_signal(signal.SIGTERM)
        assert run.wait() == 0, run.text()
    finally:
        run.end()


def _is_healthy(server: Served) -> bool:
    with contextlib.suppress(OSError):
        return bool(server.get("health"))
    return False


@pytest.fixture(scope="package")
def client() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of the clients' environment, such as `python FILE`, to its end; `more` are variables."""
    if not (CLIENTS / "python").exists():
        pytest.skip(f"{CLIENTS.parent.name} is missing; `make clients` installs it")

    def run(*words: str, cwd: Path = ROOT, timeout_s: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1", "NO_COLOR": "1"}
        paths = {"PATH": f"{CLIENTS}{os.pathsep}{kept['PATH']}", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [str(CLIENTS / words[0]), *words[1:]],
            cwd=cwd, env=kept | quiet | paths | more, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def program(served: Served, client: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Any]:
    """Runs a file of `programs/` with the server's address and further arguments; the JSON that it prints last."""

    def run(name: str, *arguments: str) -> Any:
        done = client("python", str(ROOT / "tests" / "clients" / "programs" / f"{name}.py"), served.url, *arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
