"""One rule for the ids of a tokenizer and the rows of a model, at every door."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.convert.find import open_model
from stagdist.config.loading import dump_config
from stagdist.config.parts import DataConfig
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import Tokenizer, train_bpe
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError
from tests.checkpoint.synthetic import run_config
from tests.ranks import ROOT, run_script

CONVERT, EVALUATE = ROOT / "tools" / "convert_checkpoint.py", ROOT / "tools" / "evaluate.py"
PRETRAIN, GENERATE = ROOT / "launch" / "pretrain.py", ROOT / "launch" / "generate.py"
ROWS = 300
ONE = {"device": "cpu", "pipeline_parallel_size": 1}
TEXT = "to be or not to be, that is the question: <FIM> whether it is nobler in the mind to suffer. "


def directory(folder: Path, *, special: bool, rows: int = ROWS, extra: int = 4) -> Path:
    """A Llama of `ROWS` rows whose tokenizer has more ids: the vocabulary has as many, added tokens follow."""
    tokenizer = train_bpe([TEXT * 20], 260)
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    filler = [tokenizers.AddedToken(f"<unused{n}>", special=True) for n in range(ROWS - tokenizer.vocab_size)]
    backend.add_tokens([*filler, *(tokenizers.AddedToken(f"<FIM{n}>", special=special) for n in range(extra))])
    keys: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.end_of_document, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_attention_heads=4, max_position_embeddings=64, **keys
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer(backend.to_str(), tokenizer.end_token).save(folder)
    return folder


def write_run(llama: Path, file: Path, rows: int = ROWS, section_layers: tuple[int, ...] = (1, 1)) -> Path:
    """A configuration of two steps on a corpus of the tokenizer of `llama`."""
    prefix = str(file.parent / "corpus")
    (file.parent / "text.txt").write_text(TEXT * 50)
    prepare([str(file.parent / "text.txt")], prefix, load_tokenizer(llama))
    read = open_model(llama).model if rows == ROWS else open_model(llama).model.model_copy(update={"vocab_size": rows})
    shape = read.model_copy(update={"connection": "staggered", "section_layers": section_layers})
    keys = {"tokenizer": str(llama), "corpora": [{"prefix": prefix}], "sequence_length": 32, "split": [1, 0, 0]}
    config = run_config({})
    training = config.training.model_copy(update={"steps": 2, "global_batch_size": 2})
    data, parallel = DataConfig(**keys), config.parallel.model_copy(update=ONE)  # type: ignore[arg-type]
    parts = {"model": shape, "data": data, "training": training, "parallel": parallel}
    file.write_text(dump_config(config.model_copy(update=parts | {"name": "run", "runs_directory": "runs"})))
    return file


def passes(tool: Path, *arguments: str | Path) -> str:
    """What a command that succeeds prints."""
    done = run_script(tool, *arguments)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def refused(tool: Path, *arguments: str | Path, code: int = 2) -> str:
    """The problem that a command reports."""
    done = run_script(tool, *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr, (done.stdout, done.stderr)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "ids up to" in line]
    assert len(lines) == 1, (done.stdout, done.stderr)
    return lines[0][lines[0].index("the tokenizer ") :]


def test_special_tokens_beyond_the_rows_pass_every_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Code Llama: 32004 tokens over 32000 rows."""
    monkeypatch.chdir(tmp_path)
    llama = directory(tmp_path / "llama", special=True)
    assert (load_tokenizer(llama).vocab_size, load_tokenizer(llama).text_vocab_size) == (304, 260)
    passes(CONVERT, "upcycle", llama, "stag", "--section-layers", "1", "1", "--quiet")
    config = write_run(llama, tmp_path / "run.yaml")
    passes(CONVERT, "import", "stag", "runs/run", "--config", config, "--quiet")
    assert "no problem found" in passes(CONVERT, "inspect", "stag", "--quiet")
    assert "This run would start." in passes(PRETRAIN, "--config", config, "--dry-run")
    passes(PRETRAIN, "--config", config)
    passes(CONVERT, "export", "runs/run", "exported", "--quiet")
    passes(CONVERT, "merge", "runs/run", "stag", "merged", "--quiet")
    passes(CONVERT, "verify", "runs/run", "exported", "--quiet")
    passes(EVALUATE, "perplexity", "--model", "exported", "--text", "text.txt")
    prompts: list[dict[str, Any]] = [
        {"prompt_ids": [1, 303]},
        {"prompt_ids": [1, 2], "stop_token_ids": [303]},
        {"prompt": "to <FIM0> be"},
    ]
    Path("prompts.jsonl").write_text("\n".join(json.dumps(prompt | {"max_new_tokens": 2}) for prompt in prompts))
    done = run_script(GENERATE, "--model", "exported", "--prompts-file", "prompts.jsonl", "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all("the id 303" in answer["error"] for answer in answers[:2]) and "error" not in answers[2], done


def test_ids_of_text_beyond_the_rows_are_refused_at_every_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama = directory(tmp_path / "llama", special=False)
    config = write_run(llama, tmp_path / "run.yaml")
    directory(tmp_path / "fitting", special=True)
    messages = {
        refused(CONVERT, "upcycle", llama, "o", "--section-layers", "1", "1", "--quiet"),
        refused(CONVERT, "import", llama, "o", "--quiet"),
        refused(CONVERT, "inspect", llama, "--quiet", code=1),
        refused(CONVERT, "verify", llama, "fitting", "--quiet"),
        refused(CONVERT, "merge", llama, "fitting", "o", "--quiet"),
        refused(EVALUATE, "perplexity", "--model", llama, "--text", "text.txt"),
        refused(GENERATE, "--model", llama, "--prompt", "to be"),
    }
    assert not Path("o").exists()
    (message,) = messages
    assert f"the tokenizer {llama} gives text or its end ids up to 303" in message
    assert f"the weights in {llama} have 300 rows" in message and "model.resize_token_embeddings(304)" in message
    new_run = {refused(PRETRAIN, "--config", config, "--dry-run"), refused(PRETRAIN, "--config", config)}
    assert new_run == {
        f"the tokenizer {llama} gives text or its end ids up to 303, but model.vocab_size is 300; "
        "raise model.vocab_size to 304 or more"
    }


def test_the_remedies_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama = directory(tmp_path / "llama", special=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    model.resize_token_embeddings(304)
    model.save_pretrained("resized")
    tokenizer.save_pretrained("resized")
    passes(CONVERT, "upcycle", "resized", "stag", "--section-layers", "1", "1", "--quiet")
    assert "no problem found" in passes(CONVERT, "inspect", "resized", "--quiet")
    directory(tmp_path / "fitting", special=True)
    passes(CONVERT, "upcycle", llama, "other", "--section-layers", "1", "1", "--tokenizer", "fitting", "--quiet")
    config = write_run(llama, tmp_path / "run.yaml", 304)
    assert "This run would start." in passes(PRETRAIN, "--config", config, "--dry-run")


def test_an_end_or_begin_token_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    llama = directory(tmp_path / "llama", special=True)
    path = llama / "tokenizer_config.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"eos_token": "<FIM1>"}))
    assert load_tokenizer(llama).text_vocab_size == 302
    assert "ids up to 301" in refused(CONVERT, "inspect", llama, "--quiet", code=1)
    path.write_text(json.dumps(body))
    backend = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<FIM2> $A", special_tokens=[("<FIM2>", 302)]
    )
    backend.save(str(llama / "tokenizer.json"))
    assert "ids up to 302" in refused(CONVERT, "inspect", llama, "--quiet", code=1)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("keys", "outside"),
    [
        ({"eos_token_id": [1, 300]}, "eos_token_id has 300"),
        ({"eos_token_id": -2}, "eos_token_id has -2"),
        ({"eos_token_id": [2, -1]}, "eos_token_id has -1"),
        ({"bos_token_id": -1}, "bos_token_id has -1"),
        ({"bos_token_id": 301}, "bos_token_id has 301"),
        ({"pad_token_id": 32000}, "pad_token_id has 32000"),
    ],
)
def test_special_tokens_of_a_directory_beyond_the_rows_are_named(
    tmp_path: Path, file: str, keys: dict[str, Any], outside: str
) -> None:
    llama = directory(tmp_path / "llama", special=True)
    body = json.loads((llama / file).read_text())
    (llama / file).write_text(json.dumps(body | keys))
    with pytest.raises(CheckpointError, match=rf"{file}: {outside}, but the model has the ids 0 to 299"):
        open_model(llama)
    (llama / file).write_text(json.dumps(body | {"pad_token_id": -1, "eos_token_id": [256, 2]}))
    open_model(llama)
