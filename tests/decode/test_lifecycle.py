"""From the queue to the end: what is refused, what ends too late, what is known of a request and of the engine."""

import random
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from stagdist.decode.engine import Engine
from stagdist.decode.request import FinishReason, Request, RequestOutput, SamplingParams
from stagdist.errors import ConfigError, QueueFullError, TransportError
from tests.decode.batches import REQUESTS, arrangement
from tests.decode.decoding import Letters, Outbox, World

GREEDY = REQUESTS[0]
SIZE = len(GREEDY.prompt_ids)


class Words:
    """Letters, and one special token that is a star where it is shown."""

    def __init__(self, special: int) -> None:
        self._special = special

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        star = "" if skip_special_tokens else "*"
        return "".join(star if token == self._special else Letters().decode([token]) for token in ids)


def engine(num_slots: int = 2, letters: Any = None, **options: Any) -> Engine:
    """An engine in this process."""
    stage, transport = World().stage(arrangement("plain", [], num_slots))
    tokenizer: Any = letters or Letters()
    return Engine(stage, transport, tokenizer=tokenizer, **{"heartbeat_s": 0.02} | options)


def asked(name: str, **params: Any) -> Request:
    """The greedy request with another name and other parameters."""
    return Request(name, GREEDY.prompt_ids, replace(GREEDY.params, **params))


def served(request: Request, **options: Any) -> RequestOutput:
    """The complete output of a request in an engine of its own."""
    (done,) = engine(1, **options).generate([request])
    return done


@pytest.fixture(scope="module")
def tokens() -> tuple[int, ...]:
    """What `GREEDY` says."""
    done = served(asked("long", max_new_tokens=16))
    assert len(set(done.token_ids)) > 4, "these tests need different tokens"
    return done.token_ids


# --- deadlines --------------------------------------------------------------------------------------------------


def test_requests_that_ended_before_their_deadlines_are_not_kept() -> None:
    busy, requests, kept = engine(1), list[weakref.ref[Request]](), list[int]()

    def submit() -> None:
        request = asked(str(len(requests)), max_new_tokens=2)
        requests.append(weakref.ref(request))
        busy.submit(request, deadline_s=86_400.0)

    def sink(outputs: Sequence[RequestOutput]) -> None:
        if outputs[-1].finish_reason is not None:
            kept.append(sum(request() is not None for request in requests))
            if len(requests) < 20:
                submit()
            else:
                busy.close()

    submit()
    busy.run(sink)
    assert len(kept) == 20 and max(kept) <= 3


def test_a_deadline_ends_a_request_in_the_queue_and_in_a_slot(tokens: tuple[int, ...]) -> None:
    busy, outbox = engine(1), Outbox()
    busy.submit(asked("running", max_new_tokens=16), deadline_s=0.3)
    busy.submit(asked("waiting"), deadline_s=0.2)
    busy.submit(asked("patient"), deadline_s=60.0)
    busy.submit(asked("last"))
    busy.close()

    def slow(outputs: Sequence[RequestOutput]) -> None:
        outbox(outputs)
        if outputs[0].request_id == "running":
            time.sleep(0.1)

    busy.run(slow)
    completions = outbox.completions
    for name in ("running", "waiting"):
        assert completions[name].finish_reason is FinishReason.TIMEOUT
        assert completions[name].error is None
    assert 0 < len(completions["running"].token_ids) < 9
    assert completions["running"].token_ids == tokens[: len(completions["running"].token_ids)]
    assert completions["waiting"].token_ids == ()
    for name in ("patient", "last"):
        assert (completions[name].token_ids, completions[name].finish_reason) == (tokens[:9], FinishReason.LENGTH)


# --- the end of the engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("timeout_s", "ends"), [(60.0, FinishReason.LENGTH), (0.0, FinishReason.CANCELLED)])
def test_a_draining_engine_finishes_what_it_has_within_the_limit(timeout_s: float, ends: FinishReason) -> None:
    busy, outbox = engine(1), Outbox()
    drained: list[bool] = []

    def sink(outputs: Sequence[RequestOutput]) -> None:
        outbox(outputs)
        if not drained:
            drained.append(True)
            busy.drain(timeout_s)
            with pytest.raises(ConfigError, match="'late' was submitted while the engine is shutting down"):
                busy.submit(asked("late"))

    for name in ("a", "b"):
        busy.submit(asked(name))
    busy.run(sink)
    assert {done.finish_reason for done in outbox.completions.values()} == {ends}
    assert outbox.completions.keys() == {"a", "b"}


def test_an_idle_engine_that_drains_returns_at_once() -> None:
    idle = engine(heartbeat_s=60.0)
    thread = threading.Thread(target=idle.run, args=(lambda outputs: None,))
    thread.start()
    time.sleep(0.1)
    idle.drain(60.0)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [TransportError("rank 1 has ended"), RuntimeError("out of memory")])
def test_when_a_rank_is_lost_every_open_request_gets_the_error_first(error: Exception, tokens: tuple[int, ...]) -> None:
    stage, transport = World().stage(arrangement("plain", [], 2))
    busy, outbox, run, operations = Engine(stage, transport), Outbox(), stage.run, 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal operations
        operations += 1
        if operations == 6:
            busy.submit(asked("just came"))
            raise error
        return run(*arguments, **options)

    stage.run = failing  # type: ignore[method-assign]
    for name in ("a", "b", "waiting"):
        busy.submit(asked(name))
    with pytest.raises(type(error)) as raised:
        busy.run(outbox)
    assert raised.value is error
    assert outbox.completions.keys() == {"a", "b", "waiting", "just came"}
    for name, done in outbox.completions.items():
        assert (done.finish_reason, done.error) == (FinishReason.ERROR, str(error))
        assert done.token_ids == tokens[: len(done.token_ids)] and bool(done.token_ids) == (name in {"a", "b"})
    with pytest.raises(ConfigError, match="after the engine ended"):
        busy.submit(asked("late"))


def test_every_accepted_request_ends_once_whatever_clients_do_at_the_same_time(tokens: tuple[int, ...]) -> None:
    busy, outputs, accepted = engine(3, max_waiting=5), list[RequestOutput](), list[str]()
    server = threading.Thread(target=busy.run, args=(outputs.extend,))
    server.start()

    def client(number: int) -> None:
        rng = random.Random(number)
        for place in range(40):
            name = f"{number}.{place}"
            try:
                busy.submit(asked(name), deadline_s=rng.choice([None, None, 0.0, 0.02]))
            except QueueFullError:
                time.sleep(0.005)
                continue
            accepted.append(name)
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
                busy.cancel(name)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    busy.drain(60.0)
    server.join(60)
    ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason is not None}
    assert sorted(ends) == sorted(accepted) and len(accepted) > 10
    assert sum(output.finish_reason is not None for output in outputs) == len(accepted)
    assert set(ends.values()) == {FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.TIMEOUT}
    for name, reason in ends.items():
        found = tuple(token for output in outputs if output.request_id == name for token in output.token_ids)
        assert found == tokens[: 9 if reason is FinishReason.LENGTH else len(found)]
    end = busy.stats()
    assert (end.running, end.waiting, end.waiting_tokens) == (0, 0, 0)


# --- what is known ----------------------------------------------------------------------------------------------


def test_outputs_carry_the_times_of_their_request_and_the_length_of_its_prompt() -> None:
    began, outputs = time.perf_counter(), list[RequestOutput]()
    busy = engine(1)
    busy.submit(asked("a"))
    busy.submit(asked("b"))
    busy.close()
    busy.run(outputs.extend)
    last = {output.request_id: output.times for output in outputs}
    first_a, first_b = last["a"], last["b"]
    for times in (first_a, first_b):
        assert times.admitted_s is not None and times.first_token_s is not None and times.finished_s is not None
        assert began < times.submitted_s < times.admitted_s < times.first_token_s < times.finished_s
    assert first_a.finished_s is not None and first_b.first_token_s is not None
    assert first_b.first_token_s > first_a.finished_s - 1.0
    assert {output.prompt_tokens for output in outputs} == {SIZE}
    assert all((output.times.finished_s is None) == (output.finish_reason is None) for output in outputs)


def test_statistics_are_those_of_the_last_operation() -> None:
    busy, seen = engine(2), []
    for name in ("a", "b", "c"):
        busy.submit(asked(name, max_new_tokens=4))
    busy.close()
    busy.run(lambda outputs: seen.append(busy.stats()))
    assert [stats.waiting for stats in seen] == sorted((stats.waiting for stats in seen), reverse=True)
    assert all(stats.waiting_tokens == SIZE * stats.waiting for stats in seen)
    assert seen[0].waiting > 0
    full = next(stats for stats in seen if stats.running == 2)
    assert [slot.request_id for slot in full.slots] == ["a", "b"]
    assert full.positions_used == sum(slot.position for slot in full.slots) >= 2 * SIZE
    assert [stats.operations for stats in seen] == sorted({stats.operations for stats in seen})
    end = busy.stats()
    assert (end.running, end.waiting, end.prompt_tokens_total, end.generation_tokens_total) == (0, 0, 3 * SIZE, 12)
    assert [slot.phase for slot in end.slots] == ["free", "free"]


# --- how an output ends -----------------------------------------------------------------------------------------


def test_the_stop_that_ended_a_request_is_named(tokens: tuple[int, ...]) -> None:
    letter = Letters().decode(tokens[3:4])
    place = tokens.index(tokens[3])
    assert served(asked("string", stop=("never", letter))).stop_reason == letter
    assert served(asked("id", stop_token_ids=(tokens[3],))).stop_reason == tokens[3]
    ended = served(asked("end"), end_tokens=[tokens[3], 10**6])
    assert (ended.stop_reason, ended.finish_reason, len(ended.token_ids)) == (None, FinishReason.STOP, place + 1)
    both = served(asked("both", stop_token_ids=(tokens[3],)), end_tokens=[tokens[3]])
    assert both.stop_reason == tokens[3]
    assert served(asked("length")).stop_reason is None


def test_the_stop_is_shown_on_request(tokens: tuple[int, ...]) -> None:
    text, place = Letters().decode(tokens), tokens.index(tokens[3])
    stop, shown = text[place : place + 2], {"include_stop_str_in_output": True}
    assert served(asked("string", stop=(stop,), **shown)).text == text[: place + 2]
    assert served(asked("id", stop_token_ids=(tokens[3],), **shown)).text == text[: place + 1]
    assert served(asked("neither", stop_token_ids=(tokens[3],))).text == text[:place]


def test_special_tokens_have_text_on_request(tokens: tuple[int, ...]) -> None:
    words = Words(tokens[2])
    hidden, shown = (served(asked("a", skip_special_tokens=skip), letters=words).text for skip in (True, False))
    assert shown == "".join("*" if token == tokens[2] else Letters().decode([token]) for token in tokens[:9])
    assert hidden == shown.replace("*", "")
    assert hidden != shown


@pytest.mark.parametrize("ignore", [False, True])
def test_a_request_does_not_end_before_its_least_number_of_tokens(tokens: tuple[int, ...], ignore: bool) -> None:
    params: dict[str, Any] = {"min_tokens": 6, "ignore_end_of_document": ignore, "max_new_tokens": 16}
    ends = {"end_tokens": [tokens[1]]}
    done = served(asked("min", stop_token_ids=(tokens[2],), **params), **ends)
    assert len(done.token_ids) >= 7
    assert tokens[2] not in done.token_ids[:6]
    assert (tokens[1] in done.token_ids[:6]) == ignore, "an ignored end is a token like others"
    text = Letters().decode(tokens)
    assert served(asked("text", stop=(text[0], text[7]), **params | {"min_tokens": 7})).text == text[:7]


def test_impossible_minimums_are_found_with_the_tokens_that_end_every_text(tokens: tuple[int, ...]) -> None:
    params = SamplingParams(min_tokens=1, allowed_token_ids=(5,))
    engine(end_tokens=[6]).submit(Request("fits", (1,), params))
    with pytest.raises(ConfigError, match="every allowed token ends the output"):
        engine(end_tokens=[5]).submit(Request("r", (1,), params))
