"""Log-probabilities of a prompt over HTTP add up to the perplexity of `tools/evaluate.py`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stagdist.data.tokenizer import byte_tokenizer
from stagdist.decode.request_state import RequestState
from tests.launch.generating import write_model
from tests.launch.served_answers import ask
from tests.launch.serving import Streaming, serve
from tests.ranks import ROOT, run_script
from tests.reference import stagformer as reference
from tests.reference.variants import BASE

pytestmark = pytest.mark.ranks

CONTEXT = 512
CHUNK = 48
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "two sections, head sharded": ({}, "sharded"),
    "four shared and combined sections": (
        {"section_layers": [1, 1, 1, 1], "share_section_weights": True, "combine_sections": True},
        "last",
    ),
    "combined, head sharded": ({"combine_sections": True}, "sharded"),
    "two sections": ({}, "last"),
    "stagger 2, window": ({"stagger": 2, "cross_attention_window": 20}, "last"),
    "sequential, head sharded": ({"connection": "sequential"}, "sharded"),
}
QUICK = tuple(CASES)[:1]
"""What `make test` serves; tests/decode/test_prompt_logprobs.py scores with either head and combined sections."""
TEXT = (ROOT / "docs" / "decoding.md").read_text()
"""Begins with more than a context of text."""


def text_of(size: int) -> str:
    """A text of so many bytes; it holds characters of several bytes, and ends with one."""
    return TEXT.encode()[: size - 3].decode(errors="ignore").ljust(size - 3) + "€"


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    """The model keys of a case, for bytes."""
    return BASE | {"vocab_size": byte_tokenizer().vocab_size, "max_position_embeddings": CONTEXT} | keys


def evaluated_nats(model: Path, text: str, folder: Path) -> float:
    """The score by the command, in the weights' own precision."""
    (folder / "text.txt").write_text(text)
    words: list[str | Path] = [
        "--model",
        model,
        "--text",
        folder / "text.txt",
        "--json",
        folder / "score.json",
        "--device",
        "cpu",
    ]
    done = run_script(ROOT / "tools" / "evaluate.py", "perplexity", *words, "--quiet")
    assert done.returncode == 0, done.stderr
    score = json.loads((folder / "score.json").read_text())
    assert score["tokens"] == len(text.encode()) - 1
    return score["tokens"] * math.log(score["perplexity"])


def recomputed(config: dict[str, Any], text: str) -> list[float]:
    """Log-probabilities of all bytes after the first, by the reference in fp64."""
    parameters = reference.random_parameters(config, 0, torch.float32, perturb=True)
    ids = torch.tensor([list(text.encode())])
    rows = reference.forward({name: value.double() for name, value in parameters.items()}, config, ids)[0]
    logprobs: list[float] = rows.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    return logprobs


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in CASES]
)
def test_the_log_probabilities_of_a_text_add_up_to_its_perplexity(name: str, tmp_path: Path) -> None:
    keys, head = CASES[name]
    config = config_of(keys)
    model = write_model(tmp_path / "model", **config)
    options = ["--precision", "fp64", "--head", head, "--batch-size", "3", "--prefill-chunk", str(CHUNK)]
    served = serve(tmp_path, model, *options)
    text = text_of(CONTEXT - 11)
    nats, right = evaluated_nats(model, text, tmp_path), recomputed(config, text)
    served.wait_ready()
    beside = Streaming(served, text[:300], max_tokens=CONTEXT)  # its chunks and steps are between those of the text
    for prompt in (text, text, list(text.encode())):
        scored = ask(served, {"model": "m", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1})
        (choice,) = scored["choices"]
        first, *logprobs = choice["logprobs"]["token_logprobs"]
        assert choice["text"] == text and first is None and scored["usage"]["completion_tokens"] == 0
        assert -math.fsum(logprobs) == pytest.approx(nats, rel=1e-6)
        assert logprobs == pytest.approx(right, abs=1e-9)
    assert beside.ended().finish == "length"


def score_one_position_late() -> None:
    """Called on every rank: the first score of every chunk is that of the position behind it."""
    take = RequestState.take_prompt_scores

    def wrong(self: RequestState, rows: Any) -> None:
        take(self, [rows[min(1, len(rows) - 1)], *rows[1:]])

    RequestState.take_prompt_scores = wrong  # type: ignore[method-assign]


@pytest.mark.slow  # says something about the test above only
def test_the_sum_notices_one_wrong_score_in_every_chunk(tmp_path: Path) -> None:
    config, text = config_of({}), text_of(500)
    model = write_model(tmp_path / "model", **config)
    options = ["--precision", "fp64", "--prefill-chunk", str(CHUNK)]
    served = serve(tmp_path, model, *options, before=score_one_position_late).wait_ready()
    scored = ask(served, {"model": "m", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 0})
    found, right = scored["choices"][0]["logprobs"]["token_logprobs"][1:], recomputed(config, text)
    assert sum(found) != pytest.approx(sum(right), rel=1e-4)
    wrong = [number for number, pair in enumerate(zip(found, right, strict=True)) if abs(pair[0] - pair[1]) > 1e-9]
    assert wrong == list(range(0, len(right), CHUNK))
