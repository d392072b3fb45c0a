"""tools/evaluate.py: the score equals the definition on any number of ranks; an error is one line."""

import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import CheckpointError
from stagdist.evaluation import harness
from stagdist.evaluation.perplexity import Scoring, score_file
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.synthetic import model_directory, training_checkpoint
from tests.decode.comparison import rounded_model
from tests.ranks import GUARD_S, ROOT, Script, end_processes, fork_script, free_port, run_ranks
from tests.reference import stagformer as reference
from tests.reference.variants import BASE, VARIANTS
from tools.evaluate import main

TEXT = "Wäre es ein Traum, so wär es nur kurz.\r\n"
MODEL = BASE | VARIANTS["grouped queries"] | {"vocab_size": 257}


def write(directory: Path, **change: Any) -> dict[str, torch.Tensor]:
    """A model directory of random weights with the byte tokenizer; the weights by canonical name."""
    model, tokenizer = ModelConfig(**MODEL | change), byte_tokenizer()
    parameters = reference.random_parameters(model, seed=3, perturb=True)
    with ModelDirectoryWriter(directory, model, torch.float32, tokenizer.end_of_document) as writer:
        tokenizer.save(writer.folder)
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
    return parameters


def nats_by_definition(parameters: dict[str, torch.Tensor], window: int, stride: int, model: Any = MODEL) -> float:
    """Every token but the first, each in the window that scores it."""
    ids, total = torch.tensor([list(TEXT.encode())]), 0.0
    for position in range(1, ids.shape[1]):
        start = max(0, math.ceil((position - window) / stride)) * stride
        logits = reference.forward(parameters, model, ids[:, start:position])[0, -1]
        total -= float(torch.log_softmax(logits.double(), -1)[ids[0, position]])
    return total


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
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
    (place / "text.txt").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode()))  # read as those of a corpus are
    assert evaluate(monkeypatch, "perplexity", *common, *chosen) == 0
    assert json.loads((place / "score.json").read_text())["perplexity"] == result["perplexity"]


@pytest.mark.parametrize("change", [{}, {"combine_sections": True, "tie_word_embeddings": True}], ids=["plain", "tied"])
def test_with_int8_weights_the_score_is_that_of_the_rounded_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    written = write(place / "rounded", **change)
    parameters, held = rounded_model({name: value.double() for name, value in written.items()}, MODEL | change)
    common = ("--model", "rounded", "--text", "text.txt", "--json", "score.json", "--quiet", "--device", "cpu")
    chosen = ("--weights", "int8", "--window", "8", "--stride", "3")
    assert evaluate(monkeypatch, "perplexity", *common, *chosen) == 0
    result = json.loads((place / "score.json").read_text())
    nats = nats_by_definition(parameters, 8, 3, held) / result["tokens"]
    assert result["nats_per_token"] == pytest.approx(nats, rel=3e-7)
    assert evaluate(monkeypatch, "perplexity", *common, *chosen[2:]) == 0
    exact = json.loads((place / "score.json").read_text())["nats_per_token"]
    assert abs(exact - nats) > 1e-6 * nats, "the comparison would not notice floats"


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


def assert_one_line(capsys: pytest.CaptureFixture[str], complaint: str) -> None:
    """Standard error has one line and standard output none."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and complaint in captured.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--text", "absent.txt"), "cannot read absent.txt: No such file"),
        (("--text", "latin.txt"), "latin.txt is not UTF-8 at byte 1"),
        (("--text", "empty.txt"), "empty.txt has 0 tokens; the first is not scored"),
        (("--text", "mark.txt"), "mark.txt has 0 tokens"),
        (("--text", "wide.txt"), "wide.txt is UTF-16; convert it: iconv"),
        (("--text", "wide-unmarked.txt"), "wide-unmarked.txt is UTF-16LE; convert it: iconv"),
        (("--text", "zeros.bin"), "zeros.bin is not text"),
        (("--text", "table"), "table is a table (parquet); write its text to a .txt file"),
        (("--text", "cut.gz"), "cut.gz is damaged"),
        (("--text", "model"), "cannot read model: Is a directory"),
        (("--json", "model"), "--json model is a folder"),
        (("--model", "absent"), "absent is no directory"),
        (("--model", "."), "neither checkpoints nor a model directory"),
        (("--weights", "int8", "--tensor-parallel-size", "2"), "leave out --tensor-parallel-size"),
        (("--weights", "int4"), "--weights: invalid choice: 'int4'"),
        (("--window", "17"), "--window is 17; the model supports 1 to 16"),
        (("--window", "8", "--stride", "9"), "--stride is 9; it must be between 1 and the window, 8"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--tensor-parallel-size", "2"), "1 processes cannot be split into tensor groups of 2"),
        (("--json", "absent/score.json"), "there is no folder absent"),
        (("--tokenizer", "absent"), "tokenizer absent does not exist"),
        (("--model", "small"), "eos_token_id has 256, but the model has the ids 0 to 36"),
    ],
)
def test_invalid_arguments_are_one_line_and_code_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    (place / "latin.txt").write_bytes(b"a\xe4b")
    contents = {
        "empty.txt": b"", "mark.txt": b"\xef\xbb\xbf", "wide.txt": TEXT.encode("utf-16"), "zeros.bin": bytes(64),
        "table": b"PAR1\x15\x04",
        "wide-unmarked.txt": "A plain text.".encode("utf-16-le"), "cut.gz": gzip.compress(TEXT.encode())[:-9],
    }  # fmt: skip
    for name, content in contents.items():
        (place / name).write_bytes(content)
    if "small" in arguments:
        write(place / "small", vocab_size=37)
    defaults = ("--model", "model", "--text", "text.txt", "--quiet", "--device", "cpu")
    assert evaluate(monkeypatch, "perplexity", *defaults, *arguments) == 2
    assert_one_line(capsys, complaint)


COMMON = ("perplexity", "--model", "model", "--text", "text.txt", "--quiet", "--device", "cpu")


@pytest.mark.slow  # the test below checks the same without the launcher
@pytest.mark.ranks
def test_one_of_several_ranks_reports_an_error_under_a_launcher(place: Path) -> None:
    launcher = ("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()))
    ended = call(*launcher, str(ROOT / "tools" / "evaluate.py"), *COMMON, "--model", "absent")
    assert ended.returncode != 0
    one_error(ended.stdout + ended.stderr, "absent is no directory")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(("--window", "17"), "--window is 17"), (("--model", "absent"), "absent is no directory")],
)
def test_one_of_several_ranks_reports_an_error(place: Path, arguments: tuple[str, ...], complaint: str) -> None:
    words, output = (*COMMON, *arguments), place / "output"
    ranks = fork_script(Script(ROOT / "tools" / "evaluate.py", words, place, output, output), 2)
    try:
        ranks[0].join(GUARD_S)
        assert ranks[0].exitcode == 2
    finally:
        end_processes(ranks)  # as a launcher does, so that the second need not say it as well
    one_error(output.read_text(), complaint)


def one_error(text: str, complaint: str) -> None:
    """One line says what is wrong, and there is no stack of the tool."""
    reported = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(reported) == 1 and complaint in reported[0], text
    assert 'evaluate.py", line' not in text


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_invalid_command_line_is_reported_by_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert evaluate(monkeypatch, "perplexity", "--model", "x", "--text", "y", "--windw", "3") == 2
    expected = "error: unrecognized arguments: --windw 3 (see --help)\n" if rank == "0" else ""
    assert capsys.readouterr().err == expected


def test_a_run_its_checkpoint_and_its_export_have_one_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    checkpoint = training_checkpoint(tmp_path / "run", {}, (2, 1, 2))
    export(tmp_path / "run", tmp_path / "exported", ConversionOptions())
    scores = []
    for model in ("run", str(checkpoint.relative_to(tmp_path)), "exported"):
        common = ("--model", model, "--text", "text.txt", "--json", "score.json", "--quiet", "--device", "cpu")
        assert evaluate(monkeypatch, "perplexity", *common) == 0
        result = json.loads((tmp_path / "score.json").read_text())
        assert result["model"] == model and result["window"] == 32
        scores.append((result["bits_per_byte"], result["perplexity"], result["tokens"], result["bytes"]))
    assert scores[0][2] == len(TEXT.encode()) - 1 and scores[0][0] > 1.0
    assert scores == [scores[0]] * 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--tasks", ""), "--tasks is empty"),
        (("--tasks", ","), "--tasks is empty"),
        (("--include-path", "absent"), "--include-path absent is not a folder"),
        (("--batch-size", "0"), "--batch-size is 0; it must be at least 1"),
        (("--limit", "0"), "--limit is 0; it must be above 0"),
        (("--limit", "nan"), "--limit is nan"),
        (("--num-fewshot", "-1"), "--num-fewshot is -1"),
    ],
)
def test_invalid_arguments_of_the_harness_are_one_line_and_code_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    assert evaluate(monkeypatch, "harness", "--model", "model", "--tasks", "local_mc", *arguments) == 2
    assert_one_line(capsys, complaint)


def test_a_missing_harness_is_reported_with_the_extra_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(harness.PACKAGES, "no_such_module", "no-such-package")
    assert evaluate(monkeypatch, "harness", "--model", "model", "--tasks", "arc_easy") == 2
    line = capsys.readouterr().err
    assert "no-such-package" in line and "pip install 'stagdist[eval]'" in line and line.count("\n") == 1


def test_the_harness_accepts_the_folder_of_a_run_and_refuses_a_checkpoint(tmp_path: Path) -> None:
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


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task that needs no network."""
    for module in harness.PACKAGES:
        pytest.importorskip(module, reason="needs the extra `eval`")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "ab", "choices": ["c", "dd"], "answer": answer} for answer in (0, 1, 1, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_mc.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


@pytest.mark.parametrize("connection", ["staggered", "sequential"])
def test_a_task_from_a_file_has_the_same_result_as_with_lm_eval(
    tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], connection: str
) -> None:
    model_directory(tmp_path / "run" / "model", {"connection": connection})
    monkeypatch.chdir(tmp_path)
    ours = ("--model", "run", "--include-path", str(tasks), "--json", "out.json", "--device", "cpu")
    assert evaluate(monkeypatch, "harness", "--tasks", "local_mc", *ours) == 0
    scores = json.loads((tmp_path / "out.json").read_text())["results"]["local_mc"]
    assert scores["acc,none"] in (0.25, 0.75)
    assert "local_mc" in capsys.readouterr().out
    assert evaluate(monkeypatch, "harness", "--tasks", "no_such_task", *ours) == 2
    assert "has no task no_such_task" in capsys.readouterr().err

    ended = call(
        "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=run/model,trust_remote_code=True",
        "--include_path", str(tasks), "--tasks", "local_mc", "--device", "cpu", "--batch_size", "8",
        "--output_path", "theirs",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (written,) = tmp_path.glob("theirs/**/results_*.json")
    theirs = json.loads(written.read_text())["results"]["local_mc"]
    assert {key: theirs[key] for key in scores} == scores


def call(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of this environment, without the variables of a launcher."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ranks}
    folder = Path(sys.executable).parent
    environment = kept | {"PATH": f"{folder}{os.pathsep}{kept['PATH']}"}
    return subprocess.run(
        [str(folder / command), *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
