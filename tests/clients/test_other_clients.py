"""Clients that need an environment of their own, against a server of two ranks."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Served

pytestmark = pytest.mark.slow
Client = Callable[..., subprocess.CompletedProcess[str]]


def test_langchain(program: Callable[..., Any]) -> None:
    said = program("with_langchain")
    assert said["chat"] == said["streamed"] == said["async"] != ""
    assert said["usage"]["output_tokens"] <= 12 and said["usage"]["input_tokens"] > 0
    assert said["finish"] in ("length", "stop")
    assert said["completion"] == said["completion_streamed"] != ""
    assert said["batch"] == 2


def test_litellm(program: Callable[..., Any]) -> None:
    said = program("with_litellm")
    assert said["chat"] == said["streamed"] == said["async"] != ""
    assert said["streamed_usage"][-1:] == [said["usage"]]
    assert said["completion"] == said["completion_streamed"] != ""
    assert (said["unknown_model"], said["negative_temperature"]) == ("NotFoundError", "BadRequestError")


SCHEMATHESIS = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]  # `deadline_s` may be very short
"""


def test_schemathesis_finds_no_failure_of_the_server(served: Served, client: Client, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    done = client(
        "schemathesis", "run", f"{served.url}/openapi.json", "--checks", "not_a_server_error",
        "--max-examples", "10", "--seed", "1", "--request-timeout", "120", "--generation-database", "none",
        "--workers", "4",
        cwd=tmp_path, timeout_s=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads(served.get("health")) == {"status": "ok"}


def test_aiperf(served: Served, client: Client, tmp_path: Path) -> None:
    # Without the code of the model, which transformers would ask about; aiperf takes a path only if it may ask the hub.
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in served.model.glob("tokenizer*.json"):
        shutil.copy(file, tokenizer)
    done = client(
        "aiperf", "profile", "--model", "tiny", "--url", served.url, "--endpoint-type", "completions", "--streaming",
        "--tokenizer", str(tokenizer), "--request-count", "12", "--concurrency", "3", "--ui", "none",
        "--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "10", "--extra-inputs", "ignore_eos:true",
        "--artifact-dir", str(tmp_path),
        cwd=tmp_path, HF_HUB_OFFLINE="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    result = json.loads(report.read_text())
    assert result["request_count"]["avg"] == 12
    assert result["time_to_first_token"]["avg"] > 0
