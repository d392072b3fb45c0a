"""Answers over HTTP are those of the generate command and of full recomputation, alone and among others."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from stagdist.data.tokenizer import byte_tokenizer
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.scheduler import ScheduledRequest, Scheduler
from tests.decode.plain_sampler import plain_choice
from tests.decode.test_exactness import COMBINATIONS
from tests.decode.test_recurrent import VARIANTS as RECURRENT
from tests.decode.test_recurrent import recurrence
from tests.launch.generating import run_ranks_to_end, write_model
from tests.launch.served_answers import (
    Neighbors,
    ask,
    body_of,
    cached_tokens,
    count_decisions,
    end_and_read_decisions,
    given_fields,
)
from tests.launch.serving import Served, serve
from tests.reference import stagformer as reference
from tests.reference.variants import BASE, VARIANTS

pytestmark = pytest.mark.ranks

CONTEXT = 96
CHUNK = 8
SLOTS = 8
END = byte_tokenizer().end_of_document


@dataclass(frozen=True)
class Layout:
    """How a model is run.

    Attributes:
        keys: of the model, added to `BASE`.
        ranks: of the server and of the generate command; None: one process.
        options: of both commands.
        server: options of the server alone.
    """

    keys: dict[str, Any]
    ranks: int | None = None
    options: tuple[str, ...] = ()
    server: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The model keys, for bytes. The vocabulary is odd, except where a variant needs an even one."""
        size = END + 2 if "vocab_size" in self.keys else END + 1
        return BASE | self.keys | {"max_position_embeddings": CONTEXT, "vocab_size": size}

    @property
    def copies_prefixes(self) -> bool:
        """Whether a prompt can begin with that of a neighbor; a ring buffer of a window holds no beginnings."""
        return self.keys.get("cross_attention_window") is None and "--no-prefix-caching" not in self.server

    @property
    def continues_answers(self) -> bool:
        """Whether a next turn can continue in the slot of the one before; with stagger 2 a window has lost too much."""
        return self.copies_prefixes or ("cross_attention_window" in self.keys and self.keys.get("stagger", 1) < 2)


MODELS = {
    # Two ranks, or three where there are three sections; a model of one section has one process.
    name: Layout(keys, {1: None, 3: 3}.get(len(keys.get("section_layers", [1, 1])), 2))
    for name, keys in (VARIANTS | COMBINATIONS).items()
}
LAYOUTS = {
    "one process": Layout(COMBINATIONS["four shared, combined"]),
    "recurrent": Layout(RECURRENT["stagger 1"], None, ("--recurrent",)),
    "recurrent on two tensor ranks": Layout(RECURRENT["stagger 1"], 2, ("--recurrent", "--tensor-parallel-size", "2")),
    "recurrent, window": Layout(RECURRENT["stagger 2, window, tied, grouped"], None, ("--recurrent",)),
    "two tensor ranks": Layout(VARIANTS["grouped queries"], 2, ("--tensor-parallel-size", "2")),
    "two stages of two tensor ranks": Layout(
        VARIANTS["unequal sections"], 4, ("--tensor-parallel-size", "2", "--head", "sharded")
    ),
    "sharded head of combined sections": Layout(VARIANTS["combined"], 2, ("--head", "sharded", "--max-context", "88")),
    "no prefix caching": Layout(VARIANTS["stagger 2"], 2, server=("--no-prefix-caching",)),
    "chunks as long as time allows": Layout(
        VARIANTS["tied"], 2, server=("--prefill-chunk", "48", "--inter-token-target-ms", "4")
    ),
}
QUICK = ("four shared, combined",)
"""What `make test` serves; tests/decode/test_conversations.py decodes all of `MODELS`."""
SYSTEM = tuple(b"You are a function that returns at once. ")
"""The beginning of most prompts: several chunks."""


def asked(name: str, prompt: bytes, count: int, **params: Any) -> Request:
    """A request with log-probabilities, which show what changes no token; without a temperature it is greedy."""
    fixed = {"max_new_tokens": count, "temperature": 0.0, "logprobs": 0}
    return Request(name, tuple(prompt), SamplingParams(**fixed | params))


def after_system(name: str, prompt: bytes, count: int, **params: Any) -> Request:
    """One whose prompt begins like most others."""
    return asked(name, bytes(SYSTEM) + prompt, count, **params)


REQUESTS = [
    after_system("greedy", b"Go.", 14),
    asked("one token", b"x", 9, temperature=0.8, seed=3),
    after_system("top k", b"Go on.", 10, temperature=1.3, top_k=5, seed=2**62 + 1),
    after_system("top p", b"Go.", 8, temperature=1.0, top_p=0.8, seed=11, stop_token_ids=tuple(range(0, 256, 9))),
    asked("penalty", b"unlike the others", 12, repetition_penalty=1.7, ignore_end_of_document=True),
    after_system("min p", b"Stop", 10, temperature=0.7, min_p=0.02, repetition_penalty=1.2, seed=5),
    after_system("to the end of the context", bytes(range(40, 80)), 100, temperature=1.5, seed=3, min_tokens=50),
    asked("only a part of it", bytes(SYSTEM[:19]), 10, presence_penalty=1.1, frequency_penalty=0.3),
    after_system(
        "changed",
        b"Go on.",
        12,
        temperature=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.7,
        logit_bias=((5, 1.5), (130, -2.0)),
        allowed_token_ids=tuple(range(2, 240)),
        min_tokens=6,
        stop_token_ids=tuple(range(0, 256, 3)),
        seed=8,
    ),
]
FIRST = REQUESTS[0]


@dataclass
class Difference:
    """An answer that is not the right one."""

    where: str
    name: str
    found: Any
    expected: Any


class Comparison:
    """The right answers of a model, and what differed from them.

    Args:
        expected: answers of the generate command, by name.

    Attributes:
        cached: positions that the answers did not compute.
    """

    def __init__(self, layout: Layout, expected: dict[str, dict[str, Any]]):
        parameters = reference.random_parameters(layout.config, 0, torch.float32, perturb=True)
        self._parameters = {name: value.double() for name, value in parameters.items()}
        self._layout, self._expected = layout, expected
        self._recomputed: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[float]]] = {}
        self.differences: list[Difference] = []
        self.cached = 0

    def check(self, where: str, request: Request, answer: dict[str, Any]) -> None:
        """Compare an answer with one choice or several equal ones."""
        self.cached += cached_tokens(answer)
        for choice in answer["choices"]:
            found = [choice["token_ids"], choice["text"], choice["finish_reason"], choice["stop_reason"]]
            if (like := self._expected.get(request.request_id)) is not None:
                expected = [like["token_ids"], like["text"], like["finish_reason"], like["stop_reason"]]
                if found != expected:
                    self.differences.append(Difference(where, request.request_id, found, expected))
            name, tokens = request.request_id, tuple(choice["token_ids"])
            if (name, tokens) not in self._recomputed:
                self._recomputed[name, tokens] = self._recompute(request, tokens)
            right, logprobs = self._recomputed[name, tokens]
            if right != list(tokens):
                self.differences.append(Difference(f"{where}, recomputed", name, tokens, right))
            elif choice["logprobs"]["token_logprobs"] != pytest.approx(logprobs, abs=1e-9):
                found = choice["logprobs"]["token_logprobs"]
                self.differences.append(Difference(f"{where}, log-probabilities", name, found, logprobs))

    def _recompute(self, request: Request, tokens: tuple[int, ...]) -> tuple[list[int], list[float]]:
        """Choose every token again from logits of the complete sequence; returns log-probabilities too."""
        prompt, params = request.prompt_ids, request.params
        if not params.ignore_end_of_document:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, END))
        if "--recurrent" in self._layout.options:
            logits = recurrence(self._parameters, self._layout.config, prompt, tokens)
        else:
            ids = torch.tensor([[*prompt, *tokens][:-1]])
            logits = reference.forward(self._parameters, self._layout.config, ids)[0, len(prompt) - 1 :]
        chosen = [
            plain_choice(row, params, prompt, list(tokens[:index]), len(prompt) + index)
            for index, row in enumerate(logits.numpy())
        ]
        right = [token for token, _ in chosen]
        return right, [float(logprobs[token]) for token, logprobs in chosen]


def generated(model: Path, requests: list[Request], layout: Layout) -> dict[str, dict[str, Any]]:
    """Answers of `launch/generate.py` by name, in one process unless options ask for another layout."""
    lines = [{"id": each.request_id, "prompt_ids": each.prompt_ids, **given_fields(each.params)} for each in requests]
    file = model.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--prompts-file", str(file), "--precision", "fp64", "--json", *layout.options]
    done = run_ranks_to_end(model, *words, ranks=layout.ranks if layout.options else None)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(requests)
    return {answer["id"]: answer for answer in answers}


def served_model(folder: Path, layout: Layout, before: Callable[[], None] = count_decisions) -> tuple[Path, Served]:
    """A model directory and a server of it, which starts."""
    model = write_model(folder / "model", **layout.config)
    options = ["--precision", "fp64", "--batch-size", str(SLOTS), "--prefill-chunk", str(CHUNK)]
    options += [*layout.options, *layout.server]
    return model, serve(folder, model, *options, ranks=layout.ranks, before=before)


def ask_alone(served: Served, comparison: Comparison, *, reuses: bool) -> None:
    """One request after the other, then the next turn of a conversation."""
    for number, request in enumerate(REQUESTS):
        comparison.check("alone", request, ask(served, body_of(request, stream=number % 2 == 0)))
    first = ask(served, body_of(FIRST))["choices"][0]
    turn = asked("turn", bytes([*FIRST.prompt_ids, *(min(token, 255) for token in first["token_ids"])]) + b"And?", 8)
    answer = ask(served, body_of(turn))
    assert (cached_tokens(answer) > 0) == reuses, "the answer before is in a slot"
    comparison.check("next turn", turn, answer)


def ask_among_others(served: Served, comparison: Comparison) -> Neighbors:
    """All requests, every second one with a stream, while 15 others come and go."""

    def one(job: tuple[Request, dict[str, Any]]) -> tuple[Request, dict[str, Any]]:
        return job[0], ask(served, body_of(job[0], **job[1]))

    three = {"prompt": [FIRST.prompt_ids] * 3}
    jobs = [(each, {"stream": number % 2 == 1}) for number, each in enumerate(REQUESTS)] + [(FIRST, three)]
    with Neighbors(served, 15, SYSTEM, CONTEXT - 10) as neighbors, ThreadPoolExecutor(2) as pool:
        for request, answer in pool.map(one, jobs):
            comparison.check("among others", request, answer)
    return neighbors


def stats_when_idle(served: Served) -> dict[str, Any]:
    """Statistics of a server that has nothing to do."""

    def stats() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{served.url}/slots").json()["stats"]
        return found

    served.run.wait_until(lambda: not any(stats()[name] for name in ("running", "waiting")), "idle slots", 30)
    return stats()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS | LAYOUTS]
)
def test_answers_are_those_of_the_generate_command_alone_and_among_others(name: str, tmp_path: Path) -> None:
    layout = (MODELS | LAYOUTS)[name]
    model, served = served_model(tmp_path, layout)
    comparison = Comparison(layout, generated(model, REQUESTS, layout))
    served.wait_ready()
    ask_alone(served, comparison, reuses=layout.continues_answers)
    alone = comparison.cached
    neighbors = ask_among_others(served, comparison)
    assert comparison.differences == []
    # What the comparison is about has happened.
    stats = stats_when_idle(served)
    assert stats["prefix_hits_total"] >= comparison.cached and all(s["phase"] == "free" for s in stats["slots"])
    assert neighbors.left > 5 and len(neighbors.seeds) == len(set(neighbors.seeds)) > 1
    decisions = end_and_read_decisions(served)
    # Whether a client leaves while its short prompt is computed is chance; tests/decode/test_scheduler.py does that.
    kinds = ["chunk beside a step", "left while decoding"]
    kinds += ["reused"] * layout.continues_answers + ["copied"] * layout.copies_prefixes
    assert all(decisions[kind] > 0 for kind in kinds), decisions
    if layout.copies_prefixes:
        assert comparison.cached > alone > len(SYSTEM)
    if "--no-prefix-caching" in layout.server:
        assert decisions["reused"] == decisions["copied"] == comparison.cached == 0


def start_prefixes_too_late() -> None:
    """Called on every rank: the first position that is computed is one behind the first that differs."""
    count_decisions()
    longest = Scheduler._longest_prefix

    def wrong(self: Scheduler[Any], entry: ScheduledRequest) -> tuple[int | None, int, int] | None:
        found, lag = longest(self, entry), self._topology.lag
        if found is None or found[0] is None:
            return found
        return *found[:2], min(found[2] + lag + 1, len(entry.prompt) - max(1, lag))

    Scheduler._longest_prefix = wrong  # type: ignore[method-assign]


@pytest.mark.slow  # says something about the test above only
def test_the_comparison_notices_prefixes_that_start_one_position_too_late(tmp_path: Path) -> None:
    layout = MODELS["unequal sections"]
    _, served = served_model(tmp_path, layout, before=start_prefixes_too_late)
    comparison = Comparison(layout, {})
    served.wait_ready()
    for request in REQUESTS:
        comparison.check("alone", request, ask(served, body_of(request)))
    assert comparison.cached > 0 and len({each.name for each in comparison.differences}) > 1


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Served]:
    """A server with 15 clients that come and go, whose chunks are as long as time allows."""
    options = ("--head", "sharded", "--prefill-chunk", "48", "--inter-token-target-ms", "4")
    _, served = served_model(tmp_path, replace(MODELS["unequal sections"], server=options))
    with Neighbors(served.wait_ready(), 15, SYSTEM, CONTEXT - 10):
        yield served


def test_equal_seeds_give_equal_tokens_under_load_and_requests_without_a_seed_differ(busy: Served) -> None:
    def tokens(**fields: Any) -> list[tuple[int, ...]]:
        answer = ask(busy, {**body_of(FIRST), "temperature": 1.0, "max_tokens": 10, **fields})
        return [tuple(choice["token_ids"]) for choice in answer["choices"]]

    with ThreadPoolExecutor(6) as pool:
        greedy = pool.map(lambda stream: tokens(temperature=0, stream=stream), [False, True] * 3)
        several = pool.map(lambda stream: tuple(tokens(n=3, seed=40, stream=stream)), [False, True] * 3)
        single = pool.map(lambda seed: tokens(seed=seed)[0], (40, 41, 42))
        unseeded = list(pool.map(lambda _: ask(busy, {**body_of(FIRST), "temperature": 1.0, "seed": None}), range(8)))
    assert len(set(map(tuple, greedy))) == 1
    assert set(several) == {tuple(single)}
    drawn = {answer["seed"]: tuple(answer["choices"][0]["token_ids"]) for answer in unseeded}
    assert len(drawn) == len(set(drawn.values())) == 8
    for seed, found in list(drawn.items())[:2]:
        assert tokens(seed=seed, max_tokens=FIRST.params.max_new_tokens) == [found], "the answer's seed repeats it"
