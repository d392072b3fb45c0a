"""wandb runs offline where it must, goes on with its run, and no key lands in a file. No network is used."""

import importlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from stagdist.config.parts import WandbConfig
from stagdist.errors import ConfigError
from stagdist.telemetry.metrics import MetricsWriter
from stagdist.telemetry.wandb_run import claim_run_id, start_wandb

FAKE_KEY = "0123456789abcdef" * 2 + "feedc0de"

SCRIPT = """
import json, logging, sys
from contextlib import closing
from pathlib import Path
from stagdist.config.parts import LoggingConfig
from stagdist.telemetry.metrics import MetricsWriter
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
folder, resumed_step, steps = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
target = LoggingConfig(wandb={"enabled": True, "project": "tests"})
shape = {"model": {"hidden_size": 8}}
with closing(MetricsWriter(Path(folder), target, resumed_step=resumed_step, config=shape)) as writer:
    for step in steps:
        writer.write("train", step, {"loss": 1.0 / step})
"""


@dataclass(frozen=True)
class Attempt:
    """What one process with wandb switched on left behind."""

    log: str
    run_id: str


def _attempt(
    folder: Path, resumed_step: int | None, steps: list[int], environment: dict[str, str] | None = None
) -> Attempt:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"HOME": str(folder.parent), "NETRC": str(folder.parent / "no-netrc"), "WANDB_ERROR_REPORTING": "false"}
    clean |= {"WANDB_INIT_TIMEOUT": "4"}
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(resumed_step), json.dumps(steps)]
    result = subprocess.run(command, env=clean | (environment or {}), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return Attempt(result.stderr, (folder / "wandb_run_id").read_text().strip())


def _offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def _history(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics in wandb's own file."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    rows = []
    for stored in _stored_records(next(run.glob("run-*.wandb")).read_bytes()):
        record = messages.Record()
        record.ParseFromString(stored)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _stored_records(stored: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: a header of 7 bytes, then chunks of checksum, length, kind, content."""
    position, record = 7, b""
    while position + 7 <= len(stored):
        if 32768 - position % 32768 < 7:  # no chunk begins in the last bytes of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", stored, position + 4)
        record += stored[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield record
            record = b""


def test_without_a_key_the_run_is_offline_and_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = _attempt(folder, None, [1, 2, 3, 4])
    assert "wandb: offline, because the run could not start online: " in first.log and "API key" in first.log
    assert f"wandb: run {first.run_id} is kept offline; send it with `wandb sync" in first.log
    second = _attempt(folder, 2, [3, 4, 5])
    assert second.run_id == first.run_id
    runs = _offline_runs(folder)
    assert len(runs) == 2 and all(run.name.endswith("-" + first.run_id) for run in runs)
    histories = [[(row["step"], row["train/loss"]) for row in _history(run)] for run in runs]
    assert histories == [
        [(step, 1.0 / step) for step in (1, 2, 3, 4)],
        [(step, 1.0 / step) for step in (3, 4, 5)],
    ]


def test_with_a_key_but_no_network_the_run_is_offline_and_the_key_is_in_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    attempt = _attempt(
        folder, None, [1], {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{_free_port()}"}
    )
    assert "wandb: offline, because the run could not start online" in attempt.log
    assert FAKE_KEY not in attempt.log
    assert len(_offline_runs(folder)) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not [path for path in files if FAKE_KEY.encode() in path.read_bytes()]


@pytest.mark.slow  # the test above checks what follows where a run cannot start online
def test_a_server_that_refuses_the_key_does_not_cost_the_run(tmp_path: Path) -> None:
    with _RefusingServer() as address:
        attempt = _attempt(tmp_path / "run", None, [1], {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": address})
    assert "wandb: offline, because the run could not start online" in attempt.log
    assert len(_offline_runs(tmp_path / "run")) == 1


def test_wandb_mode_disabled_is_respected(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path / "run", None, [1], {"WANDB_MODE": "disabled"})
    assert "wandb: disabled by WANDB_MODE" in attempt.log
    assert not _offline_runs(tmp_path / "run")


def test_wandb_switched_off_leaves_no_trace(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path)) as writer:
        writer.write("train", 1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_cannot_start_at_all_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    modes: list[Any] = []

    def refuse(**arguments: Any) -> None:
        modes.append(arguments.get("mode"))
        raise wandb.errors.UsageError("no room for the run")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    with pytest.raises(ConfigError, match="wandb cannot start: no room for the run; set logging.wandb.enabled: false"):
        start_wandb(tmp_path, WandbConfig(enabled=True), name="run", config={}, resumed=False)
    assert modes == [None, "offline"], "online first, then offline"


def test_the_run_id_is_kept_for_resumed_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = claim_run_id(tmp_path, resumed=True)
    assert claim_run_id(tmp_path, resumed=True) == first
    fresh = claim_run_id(tmp_path, resumed=False)
    assert fresh != first and claim_run_id(tmp_path, resumed=True) == fresh
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert claim_run_id(tmp_path, resumed=True) == "mine"
    assert (tmp_path / "wandb_run_id").read_text() == "mine\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Refusal(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


class _RefusingServer:
    """Answers every request with 401."""

    def __enter__(self) -> str:
        self.server = HTTPServer(("127.0.0.1", 0), _Refusal)
        Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
