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
    serve.report(
        {
            "tokens_per_s": {4: {"over_http": 95.0, "engine": 100.0}},
            "alone": {"gap_s": {"p50": 0.01, "p99": 0.02}},
            "with_prompts": {"gap_s": {"p50": 0.012, "p99": 0.08}},
            "turns": {"first_token_s": {"first_turn": 1.0, "second_turn": 0.1}},
        }
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-3:] for row in rows if row[-1] != "ratio"] == [
        ["95.0", "100.0", "0.95"],
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
    options = ("--seconds", "3", "--clients", "2", "--prompt-tokens", "64", "--json", str(result))
    assert measure("--model", str(model), *options) == 0
    found = json.loads(result.read_text())
    assert found["tokens_per_s"]["2"]["over_http"] > 0 and found["tokens_per_s"]["2"]["engine"] > 0
    assert found["with_prompts"]["first_token_s"].keys() == {"decoder", "prompter"}
    assert found["turns"]["first_token_s"].keys() == {"first_turn", "second_turn"}
    assert found["alone"]["failures"] == found["turns"]["failures"] == 0
