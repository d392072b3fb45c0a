"""The bounds of the queue: what is refused, and what leaves room again."""

from collections.abc import Sequence

import pytest

from stagdist.decode.request import FinishReason, Request, RequestOutput
from stagdist.errors import QueueFullError
from tests.decode.decoding import Outbox
from tests.decode.test_lifecycle import SIZE, asked, engine, served


def test_a_full_queue_refuses_requests_until_some_have_a_slot() -> None:
    busy, outbox = engine(1, max_waiting=1), Outbox()
    for name in ("a", "b"):  # one for the free slot
        busy.submit(asked(name))
    where = f"2 requests with {2 * SIZE} prompt tokens are waiting and 1 slots are free; at most 1 "
    with pytest.raises(QueueFullError, match=where):
        busy.submit(asked("c"))
    refused: list[bool] = []

    def sink(outputs: Sequence[RequestOutput]) -> None:
        outbox(outputs)
        if not refused and outputs[0].request_id == "b":
            refused.append(False)
            busy.submit(asked("c"))  # "b" has left the queue, and the name of a refused request is free
            with pytest.raises(QueueFullError):
                busy.submit(asked("d"))
            busy.close()

    busy.run(sink)
    assert {name: done.token_ids for name, done in outbox.completions.items()} == dict.fromkeys(
        "abc", served(asked("alone")).token_ids
    )
    assert (busy.stats().waiting, busy.stats().waiting_tokens) == (0, 0)


def test_a_queue_is_bounded_in_tokens_and_takes_a_longer_prompt_alone() -> None:
    busy = engine(1, max_waiting_tokens=SIZE - 1)
    busy.submit(asked("gets the slot"))
    busy.submit(asked("longer"))
    with pytest.raises(QueueFullError, match=f"2 requests with {2 * SIZE} prompt tokens are waiting"):
        busy.submit(Request("b", (1,)))
    busy = engine(1, max_waiting_tokens=2 * SIZE)
    for name in ("a", "b"):
        busy.submit(asked(name))
    with pytest.raises(QueueFullError):
        busy.submit(Request("c", (1,)))


def test_no_request_is_refused_while_a_slot_is_free() -> None:
    busy = engine(3, max_waiting=0, max_waiting_tokens=1)
    for name in "abc":
        busy.submit(asked(name))
    with pytest.raises(QueueFullError, match="3 requests .* and 3 slots are free; at most 0 requests, and 1 tokens"):
        busy.submit(asked("d"))


def test_a_request_that_was_cancelled_while_it_waited_leaves_room() -> None:
    busy, outbox = engine(1, max_waiting=1), Outbox()
    done: list[str] = []

    def sink(outputs: Sequence[RequestOutput]) -> None:
        outbox(outputs)
        if any(output.request_id == "b" for output in outputs):
            busy.submit(asked("c"))
            done.append("c")
            busy.close()

    busy.submit(asked("a"))
    busy.submit(asked("b"))
    assert busy.cancel("b") and not busy.cancel("unknown")
    busy.run(sink)
    assert not busy.cancel("a"), "it has ended"
    assert done == ["c"]
    assert outbox.completions["b"].finish_reason is FinishReason.CANCELLED
    assert outbox.completions["c"].finish_reason is FinishReason.LENGTH
