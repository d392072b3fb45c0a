"""What runs next, without tensors: turns of prompts, slots, prefixes, and ends in the middle of a prompt."""

from typing import Any

import pytest

from stagdist.config.parts import ModelConfig
from stagdist.decode.control import Admission, Chunk, Control, Operation
from stagdist.decode.request import FinishReason, Request, SamplingParams
from stagdist.decode.scheduler import LOOKUPS, OperationPlan, ScheduledRequest, Scheduler
from stagdist.decode.topology import Limits, topology_for
from tests.decode.decoding import config_of

CHUNK = 4


class Driver:
    """A scheduler whose operations take no time: every request generates 100, 101, ....

    Attributes:
        log: of each operation: rows that step, chunk, slot whose first token is chosen.
    """

    def __init__(self, stages: int = 1, slots: int = 2, **limits: Any):
        keys = {"section_layers": [1] * max(2, stages), **limits.pop("keys", {})}
        model = ModelConfig(**config_of(keys | {"max_position_embeddings": 256}))
        sizes = Limits(slots, 256, limits.pop("chunk_size", CHUNK), **limits)
        self.scheduler: Scheduler[ScheduledRequest] = Scheduler(model, topology_for(model, stages), sizes)
        self.requests: dict[str, ScheduledRequest] = {}
        self.controls: list[Control] = []

    def add(self, name: str, ids: list[int], count: int = 3) -> ScheduledRequest:
        """Submit a request."""
        request = ScheduledRequest(Request(name, tuple(ids), SamplingParams(max_new_tokens=count)))
        self.scheduler.waiting.append(request)
        self.requests[name] = request
        return request

    def run(self, count: int = 1) -> list[Control]:
        """So many operations, with the tokens that they choose."""
        for _ in range(count):
            self.controls.append(self.scheduler.decide(stopping=False, closed=False))
            if self.controls[-1].operation is Operation.RUN:
                plan: OperationPlan[ScheduledRequest] = self.scheduler.taken()
                for each in (*plan.rows.values(), *filter(None, [plan.first])):
                    each.tokens.append(100 + len(each.tokens))
        return self.controls[-count:]

    def until_rest(self) -> list[Control]:
        """Operations until nothing is left to do."""
        begin = len(self.controls)
        while self.run()[0].operation is not Operation.REST:
            assert len(self.controls) < begin + 500
        return self.controls[begin:]


def chunks(controls: list[Control]) -> list[tuple[int, int, int]]:
    """Slot and bounds of all chunks."""
    return [(each.chunk.slot, each.chunk.start, each.chunk.stop) for each in controls if each.chunk is not None]


def test_prompts_take_turns_and_every_operation_has_a_step_of_all_that_decode() -> None:
    driver = Driver(slots=3)
    first = driver.add("first", [1], 30)
    driver.run(2)
    driver.add("long", list(range(2, 14)))
    driver.add("longer", list(range(20, 36)))
    controls = driver.run(7)
    assert chunks(controls) == [(1, 0, 4), (1, 4, 8), (2, 0, 4), (1, 8, 12), (2, 4, 8), (2, 8, 12), (2, 12, 16)]
    assert all(control.step for control in controls) and len(first.tokens) == 9


def test_a_long_prompt_gets_every_second_chunk_however_many_short_ones_come() -> None:
    driver = Driver(slots=3)
    driver.add("long", list(range(200)))
    for number in range(102):
        driver.add(str(number), [201 + number % 50], 1)
        driver.run()
    assert driver.requests["long"].decodes


def test_chunks_become_smaller_where_a_prompt_has_several_stages_to_itself() -> None:
    def sizes(controls: list[Control]) -> list[int]:
        return [stop - start for _, start, stop in chunks(controls)]

    prompt = list(range(250))
    one, two = (Driver(stages, slots=3, chunk_size=128, prefix_caching=False) for stages in (1, 2))
    for driver in (one, two):
        driver.add("alone", prompt, 200)
        driver.run(5)
    assert sizes(one.controls) == [128, 122] and sizes(two.controls) == [112, 112, 26]
    two.add("beside steps", prompt, 1)
    assert sizes(two.run(3)) == [128, 122]
    pair = Driver(2, slots=2, chunk_size=128, prefix_caching=False)
    for name in ("one", "other"):
        pair.add(name, prompt, 1)
    assert chunks(pair.run(8))[:4] == [(0, 0, 128), (0, 128, 250), (1, 0, 112), (1, 112, 224)], (
        "the second one fills the stages"
    )


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_first_token_comes_when_the_last_chunk_has_passed_all_stages(stages: int) -> None:
    driver = Driver(stages)
    request = driver.add("one", list(range(10)), 2)
    controls = driver.run(3 + stages - 1)
    assert [control.chunk is not None for control in controls] == [True] * 3 + [False] * (stages - 1)
    assert not any(control.step for control in controls) and request.tokens == [100]
    (step,) = driver.run()
    assert step.step and request.tokens == [100, 101]
    (rest,) = driver.run()
    assert (rest.operation, rest.retired) == (Operation.REST, (0,))


@pytest.mark.parametrize("stages", [1, 3])
def test_a_cancelled_prompt_frees_its_slot_at_once_and_gets_no_token(stages: int) -> None:
    driver = Driver(stages, slots=1)
    first = driver.add("first", list(range(12)))
    driver.run(2)
    first.finish = FinishReason.CANCELLED
    second = driver.add("second", list(range(30, 36)))
    (control,) = driver.run()
    assert control.retired == (0,) and control.chunk == Chunk(0, 0, 4)
    driver.until_rest()
    assert first.tokens == [] and len(second.tokens) == 3


def test_a_request_that_is_cancelled_between_its_last_chunk_and_its_first_token_gets_none() -> None:
    driver = Driver(4, slots=1)
    first = driver.add("first", [1, 2])
    driver.run(2)
    first.finish = FinishReason.CANCELLED
    again = driver.add("again", [1, 2, 3])
    driver.until_rest()
    assert first.tokens == [] and (len(again.tokens), again.cached_tokens) == (3, 1)


# --- prefixes ---------------------------------------------------------------------------------------------------


def admissions(controls: list[Control]) -> list[Admission]:
    """All admissions."""
    return [control.admission for control in controls if control.admission is not None]


def test_a_prompt_takes_the_slot_that_holds_most_of_it() -> None:
    driver = Driver(slots=3)
    driver.add("a", [1, 2, 3, 4, 5, 6])
    driver.add("b", [1, 2, 3, 9, 9, 9, 9, 9])
    driver.until_rest()
    driver.add("c", [1, 2, 3, 9, 9, 9, 7])
    (admission,) = admissions(driver.until_rest())
    assert (admission.source, admission.reused, driver.requests["c"].cached_tokens) == (1, 6, 5)
    # The next turn: prompt, answer without its last token, which no step has read, and more.
    driver.add("d", [1, 2, 3, 4, 5, 6, 100, 101, 102, 8])
    controls = driver.until_rest()
    assert [each.reused for each in admissions(controls)] == [8] and chunks(controls)[0] == (0, 7, 10)


def test_what_a_new_prompt_would_overwrite_is_moved_to_another_slot() -> None:
    driver = Driver(slots=3)
    driver.add("conversation", list(range(40)))
    driver.until_rest()
    driver.add("other", [0, 1, 2, 3, 4, 77, 78])
    controls = driver.until_rest()
    assert (admissions(controls)[0].source, admissions(controls)[0].moved_to, admissions(controls)[0].moved) == (
        0,
        1,
        42,
    )
    assert chunks(controls)[0] == (0, 4, 7)
    driver.add("next turn", [*range(40), 50])
    assert admissions(driver.until_rest())[0].reused == 40


@pytest.mark.parametrize("shared", [0, 3, 12])
def test_as_many_conversations_as_slots_keep_their_prefixes(shared: int) -> None:
    driver = Driver(slots=5)
    texts = {name: [*range(shared), *range(20 * name, 20 * name + 6)] for name in range(1, 6)}
    for turn in range(4):
        for name, ids in texts.items():
            request = driver.add(f"{name} {turn}", ids.copy(), 3)
            driver.until_rest()
            if turn:
                assert request.cached_tokens == len(ids) - 3, (
                    "all but its last answer's last token, the new one and the lag"
                )
            ids += [*request.tokens, 7]
    new = driver.add("new", [250, 251, 252])
    (admission,) = admissions(driver.until_rest())
    assert (admission.reused, new.cached_tokens) == (0, 0)
    kept = [driver.add(f"{name} again", ids).request for name, ids in texts.items() if name > 1]
    driver.until_rest()
    assert all(driver.requests[each.request_id].cached_tokens > shared for each in kept), "it took the oldest slot"


def test_a_prompt_waits_for_another_one_that_computes_its_beginning() -> None:
    driver = Driver(slots=4)
    driver.add("a", list(range(16)))
    driver.add("same", list(range(16)))
    driver.add("unlike", [60, 61])
    controls = driver.until_rest()
    assert chunks(controls)[:3] == [(0, 0, 4), (0, 4, 8), (1, 0, 2)], "the third one does not wait"
    assert driver.requests["same"].cached_tokens >= 11


def test_few_prefixes_are_looked_for_in_one_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, looked, longest = Driver(slots=4), list[ScheduledRequest](), Scheduler._longest_prefix

    def counted(self: Scheduler[Any], entry: ScheduledRequest) -> Any:
        looked.append(entry)
        return longest(self, entry)

    monkeypatch.setattr(Scheduler, "_longest_prefix", counted)
    for number in range(60):
        driver.add(str(number), [*range(200), 200 + number])
    unlike = driver.add("unlike", [7, 7])
    for _ in range(50):
        before = len(looked)
        driver.run()
        assert len(looked) - before <= LOOKUPS
    assert unlike.tokens, "it had to wait for no other prompt"
    assert len(looked) == len(set(looked)) == 61, "once each while the first one is computed"


def test_a_prompt_whose_awaited_prompt_was_cancelled_is_computed() -> None:
    driver = Driver(slots=2)
    first, second = (driver.add(name, list(range(40))) for name in ("first", "second"))
    driver.run(3)
    assert second.awaited is first and second.admitted_s is None
    first.finish = FinishReason.CANCELLED
    driver.until_rest()
    assert len(second.tokens) == 3 and second.cached_tokens == 11 and second.awaited is None


def test_what_a_ring_buffer_has_lost_is_not_reused() -> None:
    driver = Driver(slots=1, keys={"cross_attention_window": 6})
    driver.add("a", list(range(8)), 4)
    driver.until_rest()
    for ids, reused in (([*range(8), 5], 0), ([*range(8), 5, 100, 101, 102], 9), ([*range(5), 9, 9], 0)):
        request = driver.add(str(ids), ids, 1)
        driver.until_rest()
        assert request.cached_tokens == max(0, reused - 1), ids


def test_reuse_can_be_switched_off() -> None:
    driver = Driver(prefix_caching=False)
    for name in ("a", "b"):
        driver.add(name, [1, 2, 3, 4])
    assert [each.reused for each in admissions(driver.until_rest())] == [0, 0]
    assert (driver.scheduler.prefix_queries, driver.scheduler.prefix_hits) == (0, 0)


def test_requests_one_after_the_other_decode_in_the_lowest_slot() -> None:
    driver = Driver(slots=8)
    for number in range(20):
        driver.add(str(number), [20 * number, 1, 2, 3])
        assert {slot for slot, _, _ in chunks(driver.until_rest())} == {0}, "a step computes the rows below a slot too"


# --- messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control",
    [
        Control(Operation.RUN, step=True),
        Control(Operation.REST, retired=(0, 4)),
        Control(Operation.STOP),
        Control(Operation.REPORT, retired=(1,)),
        Control(Operation.RUN, True, (2,), Chunk(3, 128, 256)),
        Control(
            Operation.RUN,
            False,
            (),
            Chunk(4, 5, 9, True),
            Admission(
                tuple(range(100_000, 100_009)),
                SamplingParams(seed=2**63 - 1, stop=("é",), stop_token_ids=(1, 2), logit_bias=((3, -1.5),), top_k=7),
                2,
                6,
                0,
                9,
            ),
        ),
    ],
    ids=lambda control: control.operation.name,
)
def test_a_control_message_arrives_as_it_was_sent(control: Control) -> None:
    message, payload = control.encode(5)
    assert message.shape == (11,) and Control.payload_size(message) == len(payload)
    assert Control.decode(message, payload) == control
