"""tools/evaluate.py: the score is that of the formulas, on any ranks; what is wrong is told in one line."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stagdist.checkpoint.model_directory import ModelDirectoryWriter
from stagdist.config import ModelConfig
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import CheckpointError
from stagdist.evaluation import harness
from stagdist.evaluation.perplexity import Scoring, score_file
from stagdist.parallel.layout import model_parameters
from tests.ranks import run_ranks
from tests.reference import stagformer as reference
from tests.reference.variants import BASE, VARIANTS
from tools.evaluate import main

TEXT = "Wäre es ein Traum, so wär es nur kurz.\r\n"
MODEL = BASE | VARIANTS["grouped queries"] | {"vocab_size": 257}


def write(directory: Path, **change: Any) -> dict[str, torch.Tensor]:
    """A directory of random weights that reads bytes; the weights by canonical name."""
    model, tokenizer = ModelConfig(**MODEL | change), byte_tokenizer()
    parameters = reference.random_parameters(model, seed=3, perturb=True)
    with ModelDirectoryWriter(directory, model, torch.float32, tokenizer.end_of_document) as writer:
        tokenizer.save(writer.folder)
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
    return parameters


def nats_by_definition(parameters: dict[str, torch.Tensor], window: int, stride: int) -> float:
    """Every token but the first, each in the window that scores it."""
    ids, total = torch.tensor([list(TEXT.encode())]), 0.0
    for position in range(1, ids.shape[1]):
        start = max(0, math.ceil((position - window) / stride)) * stride
        logits = reference.forward(parameters, MODEL, ids[:, start:position])[0, -1]
        total -= float(torch.log_softmax(logits.double(), -1)[ids[0, position]])
    return total


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that the tool would otherwise complete for the rest of the tests."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text; commands run in it."""
    write(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The tool's exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    return main()


@pytest.mark.parametrize(("window", "stride"), [(None, None), (8, 3)])
def test_the_score_equals_the_definition(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], window: Any, stride: Any
) -> None:
    chosen = ["--window", str(window), "--stride", str(stride)] if window else []
    common = ("--model", "model", "--text", "text.txt", "--json", "score.json", "--quiet", "--device", "cpu")
    assert evaluate(monkeypatch, "perplexity", *common, *chosen) == 0
    result = json.loads((place / "score.json").read_text())
    parameters = reference.random_parameters(ModelConfig(**MODEL), seed=3, perturb=True)
    length = len(TEXT.encode())
    nats = nats_by_definition(parameters, window or MODEL["max_position_embeddings"], stride or window or 16)
    assert (result["tokens"], result["bytes"]) == (length - 1, length - 1)
    assert result["nats_per_token"] == pytest.approx(nats / (length - 1), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / (length - 1)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (length - 1), rel=1e-6)
    assert f"{result['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def score_on_ranks(payload: tuple[str, str, Scoring]) -> tuple[float, int, int]:
    """Run on every rank: nats, tokens and bytes."""
    score = score_file(*payload).score
    return score.nats, score.tokens, score.bytes


@pytest.mark.ranks
@pytest.mark.parametrize("tensor_size", [1, 2], ids=["windows", "matrices"])
def test_ranks_that_split_windows_or_matrices_find_the_same_score(place: Path, tensor_size: int) -> None:
    scoring = Scoring(window=8, stride=3, batch_size=2, device="cpu")
    case = (str(place / "model"), str(place / "text.txt"), scoring)
    expected = score_on_ranks(case)
    split = (*case[:2], replace(scoring, tensor_parallel_size=tensor_size))
    for result in run_ranks("tests.evaluation.test_evaluate_tool:score_on_ranks", 2, split):
        assert result == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--text", "absent.txt"), "cannot read absent.txt: No such file"),
        (("--text", "latin.txt"), "latin.txt is not UTF-8 at byte 1"),
        (("--text", "empty.txt"), "a text of 0 tokens cannot be scored"),
        (("--model", "absent"), "absent is no directory"),
        (("--model", "."), "neither checkpoints nor a model directory"),
        (("--window", "17"), "--window is 17; the model knows 1 to 16"),
        (("--window", "8", "--stride", "9"), "--stride is 9; it must be between 1 and the window, 8"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--tensor-parallel-size", "2"), "1 processes cannot be split into tensor groups of 2"),
        (("--json", "absent/score.json"), "there is no folder absent"),
        (("--tokenizer", "absent"), "tokenizer absent does not exist"),
        (("--model", "small"), "the tokenizer has 257 tokens, the model 37"),
    ],
)
def test_what_cannot_work_is_one_line_and_code_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    (place / "latin.txt").write_bytes(b"a\xe4b")
    (place / "empty.txt").write_bytes(b"")
    if "small" in arguments:
        write(place / "small", vocab_size=37)
    defaults = ("--model", "model", "--text", "text.txt", "--quiet", "--device", "cpu")
    assert evaluate(monkeypatch, "perplexity", *defaults, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and complaint in captured.err


def test_without_the_harness_the_extra_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(harness.PACKAGES, "no_such_module", "no-such-package")
    assert evaluate(monkeypatch, "harness", "--model", "model", "--tasks", "arc_easy") == 2
    line = capsys.readouterr().err
    assert "no-such-package" in line and "pip install 'stagdist[eval]'" in line and line.count("\n") == 1


def test_the_harness_takes_a_run_for_its_model_and_a_checkpoint_for_none(tmp_path: Path) -> None:
    write(tmp_path / "run" / "model")
    assert harness.harness_directory(tmp_path / "run") == tmp_path / "run" / "model"
    assert harness.harness_directory(tmp_path / "run" / "model") == tmp_path / "run" / "model"
    with pytest.raises(CheckpointError, match=r"convert_checkpoint.py export"):
        harness.harness_directory(tmp_path)


TASK = """
task: local_mc
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_a_task_of_a_file_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in harness.PACKAGES:
        pytest.importorskip(module, reason="needs the extra `eval`")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    rows = [{"question": "ab", "choices": ["c", "dd"], "answer": answer} for answer in (0, 1, 1, 1)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "local_mc.yaml").write_text(TASK.format(file=place / "rows.jsonl"))
    common = ("--model", "model", "--include-path", str(place), "--json", "out.json", "--device", "cpu")
    assert evaluate(monkeypatch, "harness", "--tasks", "local_mc", *common) == 0
    accuracy = json.loads((place / "out.json").read_text())["results"]["local_mc"]["acc,none"]
    assert accuracy in (0.25, 0.75)
    assert "local_mc" in capsys.readouterr().out
    assert evaluate(monkeypatch, "harness", "--tasks", "no_such_task", *common) == 2
    assert "knows no task no_such_task" in capsys.readouterr().err
