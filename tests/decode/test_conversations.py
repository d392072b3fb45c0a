"""Conversations in turn: their caches move between slots, and answers are those of prompts computed completely."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from stagdist.decode.layers.runner import SectionCache
from stagdist.decode.operations import operate
from stagdist.decode.request import RequestOutput
from tests.decode.batches import arrangement
from tests.decode.decoding import Case, World, engine_of, prompt
from tests.decode.test_prefix_reuse import MODELS, ON_SEVERAL_RANKS, ON_STAGES, asked, same
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

TURNS, CONVERSATIONS = 3, 3
SHARED = prompt(3, seed=4)
"""The beginning of all conversations."""


def converse(cases: Sequence[Case]) -> list[list[RequestOutput]]:
    """Called on every rank: a request after the end of the one before; each conversation gets longer by its answers."""
    world = World()
    return [_converse(world, case) for case in cases]


def _converse(world: World, case: Case) -> list[RequestOutput]:
    stage, transport = world.stage(case)
    if transport is not None and transport.rank > 0:
        operate(stage, transport, None)
        return []
    engine, done = engine_of(case, stage, transport), list[RequestOutput]()
    texts = {str(number): [*SHARED, *prompt(4, seed=20 + number)] for number in range(CONVERSATIONS)}
    coming = [(name, turn) for turn in range(TURNS) for name in texts]

    def ask_next() -> None:
        name, turn = coming.pop(0)
        engine.submit(asked(f"{name}, turn {turn}", tuple(texts[name]), 1))

    def take(outputs: Sequence[RequestOutput]) -> None:
        (output,) = outputs  # one token, then its end
        done.append(output)
        texts[output.request_id[0]] += [*output.token_ids, 30 + len(coming) % 5]
        if coming:
            ask_next()
        else:
            engine.close()

    ask_next()
    engine.run(take)
    return done


def cases_of(names: Sequence[str]) -> list[Case]:
    """Each model without reuse, with as many slots as conversations, and with one slot fewer."""
    cases = []
    for name in names:
        plain = replace(arrangement("plain", [], 1), name=name, keys=MODELS[name])
        for slots, reuse in ((1, False), (CONVERSATIONS, True), (CONVERSATIONS - 1, True)):
            options = replace(plain.options, num_slots=slots, prefix_caching=reuse)
            cases.append(replace(plain, options=options))
    return cases


def check(cases: Sequence[Case], found: Sequence[list[RequestOutput]]) -> None:
    """Compare the second and third run of each model with the first, and look at what was reused."""
    for place in range(0, len(cases), 3):
        expected = found[place]
        assert len(expected) == TURNS * CONVERSATIONS and not any(output.cached_tokens for output in expected)
        for case, outputs in zip(cases[place + 1 : place + 3], found[place + 1 : place + 3], strict=True):
            same(outputs, expected, f"{case.name}, {case.options.num_slots} slots")
            later = [output.cached_tokens for output in outputs[CONVERSATIONS:]]
            if case.options.num_slots == CONVERSATIONS and case.keys.get("cross_attention_window") is None:
                assert min(later) > len(SHARED), f"{case.name} forgot a conversation: {later}"


def test_conversations_that_move_between_slots_equal_complete_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[int] = []
    exchange = SectionCache.exchange

    def counting(self: SectionCache, *slots: Any) -> None:
        exchanged.append(slots[0])
        exchange(self, *slots)

    monkeypatch.setattr(SectionCache, "exchange", counting)
    cases = cases_of(sorted(MODELS))
    check(cases, converse(cases))
    assert len(exchanged) > len(MODELS)


@pytest.mark.parametrize(
    "names", [ON_STAGES, pytest.param(ON_SEVERAL_RANKS - ON_STAGES, marks=pytest.mark.slow)], ids=["usual", "others"]
)
def test_conversations_move_between_slots_on_all_stages(names: set[str]) -> None:
    cases = cases_of(sorted(name for name in names if len(MODELS[name].get("section_layers", "12")) % 2 == 0))
    check(cases, run_ranks("tests.decode.test_conversations:converse", 2, cases)[0])
