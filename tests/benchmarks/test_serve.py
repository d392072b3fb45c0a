"""The benchmark of the server: its table, its errors, and a short run."""

import json
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.common.command import main
from tests.launch.generating import write_model


def measure(*arguments: str) -> int:
    """Exit code of the command."""
    return main(serve.__doc__, serve.add_arguments, serve.run, arguments)


def test_the_table_has_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    requests = {"cpu_ms_per_token": {"http_process": 0.5, "locust": 0.25}}
    rounds = [
        {"over_http": speed, "engine": 100.0, "ratio": speed / 100, "requests": requests} for speed in (90, 97, 95)
    ]
    serve.report(
        {
            "tokens_per_s": {4: rounds},
            "alone": {"gap_s": {"p50": 0.01, "p99": 0.02}},
            "with_prompts": {"gap_s": {"p50": 0.012, "p99": 0.08}},
            "turns": {"first_token_s": {"first_turn": 1.0, "second_turn": 0.1}},
        }
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-3:] for row in rows if row[-1] != "ratio"] == [
        ["95.0", "100.0", "0.95"],
        ["0.50,", "locust", "0.25"],
        ["10.0", "12.0", "1.20"],
        ["20.0", "80.0", "4.00"],
        ["1000.0", "100.0", "0.10"],
    ]


def test_without_locust_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "CLIENTS", tmp_path / "locust")
    assert measure() == 2
    assert "`make clients` installs it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_measures_everything(tmp_path: Path) -> None:
    if not serve.CLIENTS.exists():
        pytest.skip(".venv-clients is missing; `make clients` installs it")
    model, result = write_model(tmp_path / "model"), tmp_path / "result.json"
    options = ("--seconds", "3", "--rounds", "1", "--clients", "2", "--prompt-tokens", "64", "--json", str(result))
    assert measure("--model", str(model), *options) == 0
    found = json.loads(result.read_text())
    (first,) = found["tokens_per_s"]["2"]
    assert first["over_http"] > 0 and first["ratio"] == first["over_http"] / first["engine"]
    assert all(used > 0 for used in first["requests"]["cpu_ms_per_token"].values())
    assert found["with_prompts"]["first_token_s"].keys() == {"decoder", "prompter"}
    assert found["turns"]["first_token_s"].keys() == {"first_turn", "second_turn"}
    assert found["alone"]["failures"] == found["turns"]["failures"] == 0
