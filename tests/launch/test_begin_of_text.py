"""A model is prompted and scored as it was trained: with the begin-of-text token if its documents had one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagdist.data.indexed import corpus_path, read_description
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.evaluation.perplexity import Scoring, score_file
from tests.data.foreign_tokenizers import TEXTS, make
from tests.launch.generating import run_ranks_to_end
from tests.launch.runs import pretrain_alone, tiny_config

pytestmark = pytest.mark.ranks

TEXT = "the cat sat on the mat"


@pytest.fixture(params=[True, False], ids=["begins", "older corpus"])
def begins(request: pytest.FixtureRequest) -> bool:
    """Whether the documents of the corpus have a begin-of-text token; those of older corpora have none."""
    return bool(request.param)


def prepared(folder: Path, tokenizer: Tokenizer, *, begins: bool) -> Path:
    """A corpus, or one as it was written before begin-of-text tokens were."""
    (folder / "text.txt").write_text("\n".join(TEXTS))
    maker = tokenizer if begins else tokenizer.without_begin()
    prepare([str(folder / "text.txt")], str(folder / "corpus"), maker)
    path = corpus_path(folder / "corpus", ".json")
    body = json.loads(path.read_text())
    assert body["begin_of_document"] == list(tokenizer.begin_ids) * begins
    if not begins:
        del body["begin_of_document"]
        path.write_text(json.dumps(body))
    description = read_description(str(folder / "corpus"))
    first = int(np.fromfile(corpus_path(folder / "corpus", ".bin"), np.uint16, 1)[0])
    assert description is not None and (first in tokenizer.begin_ids) == begins
    return folder / "corpus"


def nats_of_transformers(model: Path, ids: list[int]) -> float:
    """Loss of all tokens but the first, by the published model and code."""
    loaded = AutoModelForCausalLM.from_pretrained(str(model), trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.tensor([ids])).logits[0, :-1]
    return float(F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="sum"))


@pytest.mark.parametrize("kind", ["llama_3", "llama_2"])
def test_training_scoring_and_prompts_agree(
    kind: str, begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(make(kind, tmp_path / "tokenizer"))
    prefix = prepared(tmp_path, tokenizer, begins=begins)
    keys: dict[str, Any] = {"split": [100, 0, 0], "tokenizer": str(tmp_path / "tokenizer")}
    config = tiny_config(
        prefix, "run", model={"vocab_size": tokenizer.vocab_size}, data=keys, training={"steps": 2},
        evaluation={"interval_steps": 0},
    )  # fmt: skip
    run = pretrain_alone(tmp_path, config)
    assert run.wait() == 0, run.text()
    model = tmp_path / "runs/run/model"

    ids = [*list(tokenizer.begin_ids) * begins, *tokenizer.encode(TEXT)]
    assert AutoTokenizer.from_pretrained(str(model))(TEXT)["input_ids"] == ids
    done = run_ranks_to_end(model, "--prompt", TEXT, "--json", "--max-new-tokens", "1")
    assert json.loads(done.stdout)["prompt_token_ids"] == ids, done.stderr.decode()

    settings = json.loads((model / "config.json").read_text())
    assert (settings["bos_token_id"] in tokenizer.begin_ids) == begins
    assert settings["eos_token_id"] == tokenizer.end_of_document

    (tmp_path / "scored.txt").write_text("\ufeff" + TEXT)
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    expected = nats_of_transformers(model, ids)
    for source in (model, tmp_path / "runs/run/checkpoints/step_00000002"):
        score = score_file(source, tmp_path / "scored.txt", Scoring(device="cpu")).score
        assert score.tokens == len(ids) - 1
        assert score.nats == pytest.approx(expected, rel=1e-5)
