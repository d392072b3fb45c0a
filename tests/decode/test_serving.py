"""Requests come at any moment, from any thread, end for many reasons, and fail one by one."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from stagdist.decode.engine import Engine
from stagdist.decode.request import FinishReason, Request, RequestOutput, SamplingParams
from stagdist.errors import ConfigError
from tests.decode.batches import REQUESTS, arrangement, request
from tests.decode.decoding import CONTEXT, Case, Letters, Outbox, World, engine_of, prompt, run_cases
from tests.ranks import run_ranks

GREEDY = REQUESTS[0]


def engine(num_slots: int = 2, **case: Any) -> Engine:
    """An engine in this process."""
    made = replace(arrangement("plain", [], num_slots), **case)
    return engine_of(made, *World().stage(made), heartbeat_s=0.02)


def served(requests: list[Request], num_slots: int = 2, **case: Any) -> list[RequestOutput]:
    """Completions of requests."""
    return engine(num_slots, **case).generate(requests)


@pytest.fixture(scope="module")
def greedy_tokens() -> tuple[int, ...]:
    """What `GREEDY` says, with more of it."""
    (done,) = served([with_params(GREEDY, max_new_tokens=16)])
    assert len(done.token_ids) == 16
    return done.token_ids


def with_params(base: Request, name: str | None = None, **params: Any) -> Request:
    """A request with other parameters."""
    return Request(name or base.request_id, base.prompt_ids, replace(base.params, **params))


# --- endings ----------------------------------------------------------------------------------------------------


def test_a_stop_id_is_the_last_token_and_no_text(greedy_tokens: tuple[int, ...]) -> None:
    stop = greedy_tokens[5]
    place = greedy_tokens.index(stop)
    (done,) = served([with_params(GREEDY, stop_token_ids=(stop,))], letters=True)
    assert (done.token_ids, done.finish_reason) == (greedy_tokens[: place + 1], FinishReason.STOP)
    assert done.text == Letters().decode(greedy_tokens[:place])


def test_the_end_of_the_document_ends_a_request_unless_it_is_ignored(greedy_tokens: tuple[int, ...]) -> None:
    end = greedy_tokens[4]
    place = greedy_tokens.index(end)
    ends = with_params(GREEDY, "ends")
    goes_on = with_params(GREEDY, "goes on", ignore_end_of_document=True)
    first, second = served([ends, goes_on], letters=True, end_of_document=end)
    assert (first.token_ids, first.finish_reason) == (greedy_tokens[: place + 1], FinishReason.STOP)
    assert first.text == Letters().decode(greedy_tokens[:place])
    assert (second.token_ids, second.finish_reason) == (greedy_tokens[:9], FinishReason.LENGTH)
    assert second.text == Letters().decode(greedy_tokens[:9])


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_stop_string_ends_the_text_before_it(greedy_tokens: tuple[int, ...], start: int, length: int) -> None:
    text = Letters().decode(greedy_tokens)
    stop = text[start : start + length]
    place = text.index(stop)
    params: dict[str, Any] = {"stop": (stop, "never"), "max_new_tokens": 16, "logprobs": 0}
    (done,) = served([with_params(GREEDY, **params)], letters=True)
    assert (done.text, done.finish_reason) == (text[:place], FinishReason.STOP)
    assert done.token_ids == greedy_tokens[: place + length], "the token that completes it is the last"
    assert len(done.logprobs) == place + length


def test_a_stop_string_that_only_begins_is_shown_in_the_end(greedy_tokens: tuple[int, ...]) -> None:
    text = Letters().decode(greedy_tokens[:9])
    (done,) = served([with_params(GREEDY, stop=(text[-2:] + "never",))], letters=True)
    assert (done.text, done.finish_reason) == (text, FinishReason.LENGTH)


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match="'refused' has stop strings, but the engine has no tokenizer"):
        engine().submit(with_params(GREEDY, "refused", stop=("A",)))


def test_text_comes_while_it_is_made(greedy_tokens: tuple[int, ...]) -> None:
    outputs: list[RequestOutput] = []
    streaming = engine(letters=True)
    streaming.submit(GREEDY)
    streaming.close()
    streaming.run(outputs.extend)
    assert [output.text for output in outputs] == list(Letters().decode(greedy_tokens[:9]))
    assert [output.finish_reason for output in outputs] == [None] * 8 + [FinishReason.LENGTH]


# --- requests that cannot be served -----------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "empty": ((), {}, "the prompt is empty"),
    "too long": (tuple([1] * (CONTEXT + 1)), {}, f"has {CONTEXT + 1} tokens and the model's context is {CONTEXT}"),
    "outside": ((1, 37), {}, "holds the id 37 at position 1, outside of the vocabulary of 37"),
    "negative": ((-1,), {}, "holds the id -1"),
    "no number": ((1.5,), {}, "1.5"),
    "stop id outside": ((1,), {"stop_token_ids": (99,)}, "stop_token_ids holds the id 99"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_leaves_nothing_behind(greedy_tokens: tuple[int, ...], name: str) -> None:
    ids, params, complaint = BAD[name]
    busy, outbox = engine(), Outbox()
    with pytest.raises(ConfigError) as refused:
        busy.submit(Request(name, ids, SamplingParams(temperature=0.0, **params)))
    assert complaint in str(refused.value) and repr(name) in str(refused.value)
    busy.submit(with_params(GREEDY, name))  # its name is free
    busy.close()
    busy.run(outbox)
    assert outbox.completions[name].token_ids == greedy_tokens[:9]


def test_a_name_is_served_once_at_a_time(greedy_tokens: tuple[int, ...]) -> None:
    outputs: list[RequestOutput] = []
    busy = engine()
    busy.submit(GREEDY)
    with pytest.raises(ConfigError, match="'greedy' is being served"):
        busy.submit(with_params(GREEDY, max_new_tokens=2))

    def again(new: Sequence[RequestOutput]) -> None:
        outputs.extend(new)
        if outputs[-1].finish_reason is not None and len(outputs) == 9:
            busy.submit(GREEDY)  # its name is free now
            busy.close()

    busy.run(again)
    assert tuple(token for output in outputs for token in output.token_ids) == greedy_tokens[:9] * 2
    with pytest.raises(ConfigError, match="same request_id"):
        served([GREEDY, GREEDY])


# --- the end before the end -------------------------------------------------------------------------------------


def run_with(requests: list[Request], act: Callable[[Engine, RequestOutput], None]) -> dict[str, RequestOutput]:
    """Serve with a client that acts on outputs."""
    running, outbox = engine(letters=True), Outbox()
    for each in requests:
        running.submit(each)
    running.close()

    def sink(outputs: Sequence[RequestOutput]) -> None:
        outbox(outputs)
        for output in outputs:
            act(running, output)

    running.run(sink)
    return outbox.completions


def test_cancelled_requests_end_and_the_others_go_on(greedy_tokens: tuple[int, ...]) -> None:
    long = with_params(GREEDY, "long", max_new_tokens=16)
    waiting = with_params(GREEDY, "waiting")
    requests = [with_params(GREEDY, "first", max_new_tokens=16), long, waiting, with_params(GREEDY, "last")]
    seen = 0

    def act(running: Engine, output: RequestOutput) -> None:
        nonlocal seen
        if output.request_id == "long" and output.token_ids:
            seen += 1
            if seen == 4:
                for name in ("long", "waiting", "unknown"):
                    running.cancel(name)

    completions = run_with(requests, act)
    cancelled = completions["long"]
    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert cancelled.token_ids == greedy_tokens[:4], "what was computed meanwhile is dropped"
    assert cancelled.text == Letters().decode(cancelled.token_ids)
    assert (completions["waiting"].finish_reason, completions["waiting"].token_ids) == (FinishReason.CANCELLED, ())
    assert completions["first"].token_ids == greedy_tokens
    assert completions["last"].token_ids == greedy_tokens[:9]


def test_a_request_cancelled_right_after_it_came_never_runs() -> None:
    running, outbox = engine(), Outbox()
    running.submit(GREEDY)
    running.cancel(GREEDY.request_id)
    running.cancel(GREEDY.request_id)
    running.close()
    running.run(outbox)
    done = outbox.completions[GREEDY.request_id]
    assert (done.finish_reason, done.token_ids, running.steps) == (FinishReason.CANCELLED, (), 0)


def test_stop_ends_everything_at_once_and_answers_every_request(greedy_tokens: tuple[int, ...]) -> None:
    requests = [with_params(GREEDY, str(place), max_new_tokens=16) for place in range(4)]
    seen = 0

    def act(running: Engine, output: RequestOutput) -> None:
        nonlocal seen
        seen += len(output.token_ids)
        if seen == 6:
            running.submit(with_params(GREEDY, "late"))
            running.stop()
        elif seen == 7:  # the end is decided by now
            running.submit(with_params(GREEDY, "later"))

    completions = run_with(requests, act)
    assert completions.keys() == {"0", "1", "2", "3", "late", "later"}
    assert {done.finish_reason for done in completions.values()} == {FinishReason.CANCELLED}
    assert 0 < len(completions["0"].token_ids) < 9
    assert completions["0"].token_ids == greedy_tokens[: len(completions["0"].token_ids)]
    assert completions["late"].token_ids == completions["later"].token_ids == ()


# --- requests from other threads --------------------------------------------------------------------------------


def test_many_threads_are_served_by_an_engine_that_was_idle(greedy_tokens: tuple[int, ...]) -> None:
    running, outbox = engine(3), Outbox()
    server = threading.Thread(target=running.run, args=(outbox,))
    server.start()

    def client(number: int) -> None:
        for place in range(3):
            name = f"{number}.{place}"
            running.submit(with_params(GREEDY, name, max_new_tokens=4 + number))
            done = outbox.wait_for(name)
            assert done is not None and done.token_ids == greedy_tokens[: 4 + number]

    clients = [threading.Thread(target=client, args=(number,)) for number in range(5)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    running.close()
    server.join(30)
    assert not server.is_alive() and len(outbox.completions) == 15
    assert all(done.token_ids == greedy_tokens[: 4 + int(name[0])] for name, done in outbox.completions.items())


def idle_case() -> Case:
    """Single requests with pauses; hand-offs are brought to rest between them."""
    requests = [*REQUESTS[:5], request("again", 6, 9), request("last", 13, 3)]
    return replace(arrangement("stagger 2", requests, 2), letters=True)


@pytest.mark.ranks
def test_an_idle_engine_rests_and_serves_what_comes_later() -> None:
    case = idle_case()
    ranks = run_ranks("tests.decode.decoding:serve_with_pauses", 2, case)
    assert ranks[0].rests == ranks[1].rests > 4 * len(case.requests), "the ranks rested together, many times"
    for each in case.requests:
        (expected,) = run_cases([replace(case, requests=[each])])[0].completions
        done = ranks[0].completions[each.request_id]
        assert (done.token_ids, done.text, done.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )
    assert ranks[0].completions["greedy"].token_ids == ranks[0].completions["again"].token_ids
    assert prompt(6, seed=7) == case.requests[0].prompt_ids


def test_a_request_after_the_end_is_refused() -> None:
    stage, transport = World().stage(Case("ended", {}, []))
    engine = engine_of(Case("ended", {}, []), stage, transport)
    assert engine.generate([]) == []
    with pytest.raises(ConfigError, match="after the engine ended"):
        engine.submit(Request("late", (1,)))
