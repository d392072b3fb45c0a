"""`launch/generate.py` alone, on two ranks and under `deepspeed`: the same text, clear errors, answers at once."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stagdist.decode.frontend import deployment
from stagdist.decode.frontend.generate import Generation
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.build import EngineOptions
from stagdist.evaluation.perplexity import Scoring, score_file
from stagdist.parallel.world import World
from tests.launch.faults import only_rank_0
from tests.launch.generating import Done, command, error_lines, generate, run_ranks_to_end, start_ranks, write_model

pytestmark = pytest.mark.ranks

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5},
    {"temperature": 1, "min_p": 0.02, "logprobs": 3},
    {},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.8, "logit_bias": {"101": 4}, "min_tokens": 5},
]
BAD: list[tuple[bytes, str]] = [
    (b'{"prompt": ""}', "empty"),
    (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    (b'{"prompt_ids": [3, 257]}', "outside of the vocabulary"),
    (b'{"prompt": "' + b"x" * 200 + b'"}', "context is 128"),
    (b'{"prompt": "x", "temprature": 1}', "did you mean 'temperature'"),
    (b'{"prompt": "x", "top_p": 2}', "top_p is 2"),
    (b'{"prompt": "x"', "not JSON"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model directory."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad prompts in turn."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    good = [json.dumps({"prompt": f"word {i}", "id": f"good {i}", **keys}).encode() for i, keys in enumerate(SETTINGS)]
    lines = [line for i in range(len(BAD)) for line in (*good[i : i + 1], BAD[i][0])]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def answers(done: Done) -> list[dict[str, Any]]:
    """The JSON objects of a run by index; DeepSpeed's launcher reports a code that is not 0 on standard output."""
    lines = [line for line in done.stdout.splitlines() if not line.startswith(b"[20")]
    return sorted(map(json.loads, lines), key=lambda answer: answer["index"])


def comparable(found: list[dict[str, Any]]) -> list[Any]:
    """Answers without their times, with log-probabilities as exact as fp64 gives them on every grid."""
    text = json.dumps([{key: value for key, value in answer.items() if not key.endswith("_s")} for answer in found])
    return list(json.loads(text, parse_float=lambda number: round(float(number), 8)))


# test_generation_faults.py generates by DeepSpeed's command, tests/lab/test_launchers.py by torchrun.
DEEPSPEED = pytest.param(partial(generate, "deepspeed"), marks=pytest.mark.slow)


@pytest.mark.parametrize("start", [partial(run_ranks_to_end, ranks=2), DEEPSPEED], ids=["forks", "deepspeed"])
def test_two_ranks_give_the_answers_of_one_process_and_bad_prompts_harm_no_other(
    model: Path, prompts: Path, tmp_path: Path, start: Callable[..., Done]
) -> None:
    arguments = ["--prompts-file", str(prompts), "--json", "--max-new-tokens", "24", "--ignore-eos"]
    arguments += ["--precision", "fp64"]  # the digits of fp32 depend on the grid
    plain = run_ranks_to_end(model, *arguments)
    found = answers(plain)
    errors = error_lines(plain.stderr.decode())
    assert plain.returncode == 1, plain.stderr.decode()
    assert len(errors) == len(BAD) and "Traceback" not in plain.stderr.decode()
    for _, complaint in BAD:
        assert any(complaint in line and "prompts.jsonl" in line for line in errors), (complaint, errors)
    assert [answer["index"] for answer in found] == list(range(len(SETTINGS) + len(BAD)))
    refused = [answer for answer in found if "error" in answer]
    assert [complaint in answer["error"] for answer, (_, complaint) in zip(refused, BAD, strict=True)] == [True] * 7
    served = [answer for answer in found if "error" not in answer]
    assert [answer["id"] for answer in served] == [f"good {i}" for i in range(len(SETTINGS))]
    assert [answer["seed"] for answer in served] == [0, 2, 5, 6, 8, 10]  # seed + index, unless the prompt has its own
    assert all(len(answer["token_ids"]) == 24 for answer in served)
    assert len(served[3]["logprobs"]) == 24 and len(served[3]["logprobs"][0]["top"]) == 3

    trace = tmp_path / "trace.json"
    pair = start(model, *arguments, "--batch-size", "3", "--head", "sharded", "--trace", str(trace))
    assert pair.returncode == 1 and comparable(answers(pair)) == comparable(found), pair.stderr.decode()
    assert len(error_lines(pair.stderr.decode())) == len(BAD)
    assert "pipe 2 x tensor 1, 2 sections, sharded head" in pair.stderr.decode()
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in events} == {0, 1} and list(tmp_path.iterdir()) == [trace]

    # tests/lab/test_launchers.py starts ranks by Open MPI.
    split = run_ranks_to_end(model, *arguments, "--tensor-parallel-size", "2", "--batch-size", "2", ranks=2)
    assert split.returncode == 1 and comparable(answers(split)) == comparable(found), split.stderr.decode()
    assert "pipe 1 x tensor 2" in split.stderr.decode()


@pytest.mark.parametrize(
    ("device", "asked", "precision"), [("cuda:1", None, "bf16"), ("cpu", None, "fp32"), ("cuda:1", "fp64", "fp64")]
)
def test_the_precision_is_bf16_on_a_gpu_and_fp32_on_a_cpu_unless_the_user_names_one(
    model: Path, monkeypatch: pytest.MonkeyPatch, device: str, asked: str | None, precision: str
) -> None:
    monkeypatch.setattr(deployment, "choose_device", lambda choice, local_rank: device)
    options, world = EngineOptions(precision=asked), World(0, 1, 0)
    generation = Generation(model, options, SamplingParams(), world, prompts=("a",))
    assert generation.plan.options.precision == precision


def test_text_keeps_the_order_of_the_prompts_and_the_summary_has_the_numbers(model: Path) -> None:
    arguments = ["--prompt", "first ", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape"), "--prompt", "é "]
    sampling = ["--max-new-tokens", "9", "--temperature", "0.9", "--seed", "7", "--ignore-eos"]
    together = run_ranks_to_end(model, *arguments, *sampling, "--batch-size", "2", "--margins")
    alone = [
        run_ranks_to_end(model, "--prompt", text, *sampling[:-2], seed, "--ignore-eos")
        for text, seed in (("first ", "7"), ("é ", "9"))
    ]
    assert together.returncode == 1 and [done.returncode for done in alone] == [0, 0], together.stderr.decode()
    assert together.stdout == alone[0].stdout + alone[1].stdout
    assert alone[0].stdout.startswith(b"first ") and alone[1].stdout.startswith("é ".encode())
    text = together.stderr.decode()
    assert len(error_lines(text)) == 1 and "--prompt number 2 is not UTF-8" in text
    assert "3 prompts (1 not served), 18 new tokens; median time to first token" in text
    assert "tokens/s; overall" in text and "1 process, 2 sections, fp32 on cpu" in text
    assert "smallest top-2 margin" in text


def test_a_line_of_standard_input_is_answered_while_it_stays_open(model: Path, tmp_path: Path) -> None:
    expected = run_ranks_to_end(model, "--max-new-tokens", "5", "--ignore-eos", given=b"one\n\xff\nthree\n")
    assert expected.returncode == 1 and "line 2 of standard input is not UTF-8" in expected.stderr.decode()
    # Launchers pass standard input on: test_generation_faults.py gives them their prompt by it.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pipe.open("r+b", buffering=0) as given:
        words = ("--max-new-tokens", "5", "--ignore-eos", "--timeout", "1")
        run = start_ranks(tmp_path, model, *words, given=pipe)
        given.write(b"one\n")
        first = run.wait_for(len(b"one") + 6)
        assert expected.stdout.startswith(first)
        time.sleep(2.5)
        assert run.poll() is None, "an idle engine outlives its timeout more than once"
        given.write(b"\xff\nthree\n")
        run.wait_for(len(expected.stdout))
    assert run.wait() == 1
    assert run.out.read_bytes() == expected.stdout
    assert "line 2 of standard input is not UTF-8" in run.text()


def test_stop_texts_and_ids_end_an_answer(model: Path) -> None:
    arguments = ["--prompt", "abc", "--json", "--max-new-tokens", "40", "--ignore-eos"]
    (answer,) = answers(run_ranks_to_end(model, *arguments))
    ids = answer["token_ids"]
    letter = next(text for text in answer["text"] if text.isascii() and text.isprintable())
    (stopped,) = answers(run_ranks_to_end(model, *arguments, "--stop", letter, "--stop", "never seen"))
    assert stopped["finish_reason"] == "stop" and stopped["text"] == answer["text"].partition(letter)[0]
    (ended,) = answers(run_ranks_to_end(model, *arguments, "--stop-token-id", str(ids[10])))
    assert ended["token_ids"] == ids[: ids.index(ids[10]) + 1] and ended["finish_reason"] == "stop"
    assert (stopped["stop_reason"], ended["stop_reason"], answer["stop_reason"]) == (letter, ids[10], None)
    (shown,) = answers(run_ranks_to_end(model, *arguments, "--stop", letter, "--include-stop-str-in-output"))
    assert shown["text"] == stopped["text"] + letter


def test_options_bias_and_choose_among_tokens(model: Path) -> None:
    arguments = ["--prompt", "abc", "--json", "--max-new-tokens", "12", "--ignore-eos"]
    (biased,) = answers(run_ranks_to_end(model, *arguments, "--logit-bias", "65=100", "--temperature", "0"))
    assert biased["text"] == "A" * 12
    bounded = [*arguments, "--allowed-token-id", "66", "--allowed-token-id", "67", "--temperature", "0"]
    counted = [*bounded, "--frequency-penalty", "2", "--presence-penalty", "2"]
    (allowed,), (varied,) = (answers(run_ranks_to_end(model, *each)) for each in (bounded, counted))
    assert set(allowed["text"]) <= {"B", "C"} == set(varied["text"])
    assert abs(varied["text"].count("B") - 6) < abs(allowed["text"].count("B") - 6), "repetition costs something"


def test_scores_of_a_prompt_add_up_to_the_perplexity_of_the_evaluation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and 日本 is far away. " * 2)
    arguments = ["--prompt", text.read_text(), "--json", "--prompt-logprobs", "2", "--max-new-tokens", "0"]
    (answer,) = answers(run_ranks_to_end(model, *arguments, "--prefill-chunk", "16"))
    scores = answer["prompt_logprobs"]
    assert (answer["token_ids"], answer["text"], answer["finish_reason"]) == ([], "", "length")
    assert scores[0] is None and [entry["token_id"] for entry in scores[1:]] == answer["prompt_token_ids"][1:]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    expected = score_file(model, text, Scoring(device="cpu")).score
    assert expected.tokens == len(scores) - 1
    mean = sum(entry["logprob"] for entry in scores[1:]) / (len(scores) - 1)
    assert -mean == pytest.approx(expected.nats / expected.tokens, abs=1e-6)
    refused = run_ranks_to_end(model, "--prompt", "a", "--prompt-logprobs", "1")
    assert "cannot be shown in plain text" in refused.stderr.decode()


def test_an_answer_ends_where_transformers_would_end_it(model: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "abc", "--json", "--max-new-tokens", "30", "--temperature", "0"]
    (complete,) = answers(run_ranks_to_end(model, *arguments, "--ignore-eos"))
    ids = complete["token_ids"]
    stated = shutil.copytree(model, tmp_path / "stated")
    (stated / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, ids[10]], "do_sample": False}))
    (ended,) = answers(run_ranks_to_end(stated, *arguments))
    assert ended["token_ids"] == ids[: ids.index(ids[10]) + 1] and ended["finish_reason"] == "stop"
    theirs: Any = AutoModelForCausalLM.from_pretrained(stated, trust_remote_code=True, dtype="auto")
    prompt = torch.tensor([list(b"abc")])
    assert theirs.generate(prompt, max_new_tokens=30)[0, 3:].tolist() == ended["token_ids"]
    (ignored,) = answers(run_ranks_to_end(stated, *arguments, "--ignore-eos"))
    assert ignored["token_ids"] == ids


def test_stagger_0_runs_and_says_that_its_sections_take_turns(tmp_path: Path) -> None:
    done = run_ranks_to_end(write_model(tmp_path / "zero", stagger=0), "--prompt", "x", "--max-new-tokens", "3")
    assert done.returncode == 0 and "sections run one after the other" in done.stderr.decode()


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["sections.1.null_memory"]
    save_file(tensors, folder / "model.safetensors")


def _reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["output_norm.weight"] = tensors["output_norm.weight"][:16].clone()
    save_file(tensors, folder / "model.safetensors")


def _cut_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-40])


def _lose_shard(folder: Path) -> None:
    names = sorted(load_file(folder / "model.safetensors"))
    weight_map = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_drop_tensor, "lacks the tensor sections.1.null_memory"),
        (_reshape_tensor, "output_norm.weight in"),
        (_cut_file, "incomplete metadata, file not fully covered"),
        (_lose_shard, "lacks weights: there is no model-00002-of-00002.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["tensor", "shape", "cut", "shard", "weights", "tokenizer"],
)
def test_an_incomplete_directory_is_refused_before_any_group(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "damaged")
    (folder / "complete.json").unlink()  # as in a directory of another program; otherwise it names what is damaged
    damage(folder)
    done = run_ranks_to_end(folder, "--prompt", "x", ranks=2, before=only_rank_0)
    errors = error_lines(done.stderr.decode())
    assert done.returncode == 2 and done.stdout == b"", done.stderr
    assert len(errors) == 1 and complaint in errors[0] and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "warm"], "invalid float value"),
        (["--tensor-parallel-size", "4"], "tensor groups of 4"),
        (["--max-context", "4096"], "positions up to 128"),
        (["--max-context", "0"], "max_context is 0"),
        (["--batch-size", "0"], "(--batch-size) is 0"),
        (["--batch-size", "9" * 30], "; give 1 to 16777215"),
        (["--timeout", "nan"], "(--timeout) is nan"),
        (["--timeout", "inf"], "(--timeout) is inf"),
        (["--logprobs", "2"], "add --json"),
        (["--recurrent"], "recurrent decoding is defined for"),
        (["--device", "cuda"], "no CUDA device"),
        (["--prompts-file", "no.txt"], "not allowed with"),
    ],
)
def test_bad_arguments_get_one_line_from_one_rank(model: Path, arguments: list[str], complaint: str) -> None:
    done = run_ranks_to_end(model, "--prompt", "x", *arguments, ranks=2)
    errors = error_lines(done.stderr.decode())
    assert done.returncode == 2 and len(errors) == 1 and complaint in errors[0], done.stderr


@pytest.mark.skipif(psutil.virtual_memory().total > 2**38, reason="the memory holds so many slots")
def test_more_slots_than_the_memory_holds_are_one_line(model: Path) -> None:
    done = run_ranks_to_end(model, "--prompt", "x", "--batch-size", str(10**7))
    (error,) = error_lines(done.stderr.decode())
    assert done.returncode == 2 and "10000000 x 128 positions (--batch-size, --max-context)" in error
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("content", [None, b""], ids=["none", "empty"])
def test_a_file_of_prompts_that_gives_none_is_an_error(model: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    done = run_ranks_to_end(model, "--prompts-file", str(path))
    assert done.returncode == (2 if content is None else 1) and len(error_lines(done.stderr.decode())) == 1


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, complaint in ((tmp_path / "file" / "trace.json", "cannot be written"), (tmp_path, "is a folder")):
        done = run_ranks_to_end(model, "--prompt", "x", "--trace", str(path))
        errors = error_lines(done.stderr.decode())
        assert done.returncode == 2 and done.stdout == b"" and len(errors) == 1 and complaint in errors[0], errors


def test_a_reader_that_leaves_ends_a_run_whose_prompts_never_end(model: Path) -> None:
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as prompts:
        words = command("python", model, "--max-new-tokens", "5", "--ignore-eos")
        process = subprocess.Popen(words, stdin=prompts.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert prompts.stdout is not None and process.stdout is not None and process.stderr is not None
        prompts.stdout.close()  # the run is the only reader
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == b""
        process.stderr.close()


@pytest.mark.slow  # the test above checks the same, with prompts that would go on
def test_a_reader_that_leaves_ends_the_run_quietly(model: Path) -> None:
    words = command("python", model, "--prompt", "x", "--max-new-tokens", "100", "--ignore-eos")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
    process.stderr.close()
