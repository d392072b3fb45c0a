"""Requests to a server whose answers are compared token by token, and other clients that keep it busy meanwhile."""

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stagdist.decode.control import Control, Operation
from stagdist.decode.request import FinishReason, Request, SamplingParams
from stagdist.decode.scheduler import Scheduler
from tests.launch.serving import Served
from tests.ranks import GUARD_S

_HTTP_NAMES = {"max_new_tokens": "max_tokens", "ignore_end_of_document": "ignore_eos"}
_DECISIONS = "decisions.json"


def given_fields(params: SamplingParams) -> dict[str, Any]:
    """What a line of a .jsonl file says about sampling; without a seed it would get one by its number."""
    default = vars(SamplingParams())
    return {name: value for name, value in vars(params).items() if value != default[name]} | {"seed": params.seed}


def body_of(request: Request, **more: Any) -> dict[str, Any]:
    """The same request as a client sends it."""
    fields = {_HTTP_NAMES.get(name, name): value for name, value in given_fields(request.params).items()}
    if "logit_bias" in fields:
        fields["logit_bias"] = dict(fields["logit_bias"])
    return {"model": "m", "prompt": request.prompt_ids, "return_token_ids": True, **fields, **more}


def ask(served: Served, body: dict[str, Any], path: str = "completions") -> dict[str, Any]:
    """The answer; one that comes as a stream is joined to what a complete answer would be."""
    body = {**body, "stream_options": {"include_usage": True}} if body.get("stream") else body
    with _answer_to(served, body, path) as answer:
        if not body.get("stream"):
            complete: dict[str, Any] = json.load(answer)
            return complete
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events
    choices: dict[int, dict[str, Any]] = {}
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    for part in (part for chunk in chunks for part in chunk["choices"]):
        _join(choices.setdefault(part["index"], {}), part)
    return {**chunks[0], "choices": [choices[index] for index in sorted(choices)], "usage": chunks[-1]["usage"]}


@contextmanager
def _answer_to(
    served: Served, body: dict[str, Any], path: str = "completions", timeout_s: float = GUARD_S
) -> Iterator[HTTPResponse]:
    """The answer to a request, with the time that each part of it may take; the connection is closed afterwards."""
    with closing(HTTPConnection("127.0.0.1", served.port, timeout=timeout_s)) as connection:
        connection.request("POST", f"/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            assert answer.status == 200, answer.read()
            yield answer


def _join(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a chunk to a choice: texts and lists are joined, other values replaced."""
    for name, value in part.items():
        if isinstance(value, dict):
            _join(choice.setdefault(name, {}), value)
        elif isinstance(value, str | list) and name in choice and name not in ("finish_reason", "stop_reason"):
            choice[name] += value
        elif value is not None or name not in choice:
            choice[name] = value


def cached_tokens(answer: dict[str, Any]) -> int:
    """Tokens of its prompts that were not computed again."""
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


class Neighbors:
    """Clients that come and go while the block runs. Prompts of all begin alike, and none has a seed.

    Args:
        beginning: of their prompts.
        longest: tokens of a prompt.

    Attributes:
        seeds: that the server has drawn, of complete answers.
        left: requests that were given up, with or without a stream.
    """

    def __init__(self, served: Served, count: int, beginning: Sequence[int], longest: int):
        self.seeds: list[int] = []
        self.left = 0
        self._served, self._beginning, self._longest = served, tuple(beginning), longest
        self._ending = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(GUARD_S)
        if error is None and self._errors:
            raise self._errors[0]

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        actions = (self._complete, self._leave_stream, self._leave_answer, self._leave_stream)
        try:
            while not self._ending.is_set():
                more = [draw.randrange(256) for _ in range(draw.randrange(1, self._longest - len(self._beginning)))]
                shared = self._beginning[: draw.randrange(1, len(self._beginning) + 1)]
                actions[draw.randrange(len(actions))]({"model": "m", "prompt": [*shared, *more]}, draw)
        except BaseException as error:  # raised by the block's end
            self._errors.append(error)

    def _complete(self, body: dict[str, Any], draw: random.Random) -> None:
        self.seeds.append(ask(self._served, {**body, "max_tokens": draw.randrange(1, 12)})["seed"])

    def _leave_stream(self, body: dict[str, Any], draw: random.Random) -> None:
        asked = {**body, "max_tokens": 40, "stream": True, "ignore_eos": True}
        with _answer_to(self._served, asked) as answer:
            for _ in range(draw.randrange(12)):
                answer.readline()
        self.left += 1

    def _leave_answer(self, body: dict[str, Any], draw: random.Random) -> None:
        patience_s = 0.02 + 0.1 * draw.random()
        with suppress(TimeoutError), _answer_to(self._served, {**body, "max_tokens": 40}, timeout_s=patience_s):
            return
        self.left += 1


# --- in the ranks -----------------------------------------------------------------------------------------------


def count_decisions() -> None:
    """Called before the server starts: rank 0 leaves the number of its decisions of several kinds when it ends."""
    counts: Counter[str] = Counter()
    decide = Scheduler.decide

    def counting(self: Scheduler[Any], *, stopping: bool, closed: bool) -> Control:
        for entry in self.running.values():
            if entry.finish is FinishReason.CANCELLED:
                counts["left while decoding" if entry.decodes else "left in the prompt"] += 1
        control = decide(self, stopping=stopping, closed=closed)
        counts["chunk beside a step"] += control.step and control.chunk is not None
        if control.chunk is not None and control.admission is not None and control.admission.reused:
            counts["reused" if control.admission.source == control.chunk.slot else "copied"] += 1
        if control.operation is Operation.STOP:
            Path(_DECISIONS).write_text(json.dumps(counts))
        return control

    Scheduler.decide = counting  # type: ignore[method-assign]


def end_and_read_decisions(served: Served) -> Counter[str]:
    """End a server that counts its decisions."""
    for rank in served.run.ranks():
        rank.terminate()
    assert served.run.wait(60) == 0, served.run.text()
    return Counter(json.loads((served.run.folder / _DECISIONS).read_text()))
