"""The choices of one request while the engine works on them."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from stagdist.serving.api.prepared import Submission
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.protocol import FAILURES, Output

MAX_UNREAD = 4096
"""Outputs that wait for the client; one that reads more slowly is given up."""


class TextGeneration:
    """Outputs of the choices of a request, in the order in which they come.

    Args:
        request_id: id of the request; the engine has `request_id/index` for each choice.
        submissions: one per choice.
        cancel: asks the engine to stop a choice, by its id.

    Attributes:
        arrival: `time.monotonic` when the request came.
        finished: finish reasons by index.
        tokens: tokens so far, by index.
        cached: tokens of the prompt that were not computed again, by index.
        last_token: `time.monotonic` of the latest token, by index.
    """

    def __init__(self, request_id: str, submissions: Sequence[Submission], cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.submissions = submissions
        self.arrival = time.monotonic()
        self.finished: dict[int, str] = {}
        self.tokens = [0] * len(submissions)
        self.cached = [0] * len(submissions)
        self.last_token: dict[int, float] = {}
        self._accepted: set[int] = set()
        self._cancel = cancel
        self._pending: deque[tuple[int, Output]] = deque()
        self._problem: ProblemError | None = None
        self._changed = asyncio.Event()

    def ids(self) -> list[str]:
        """The engine's ids of the choices."""
        return [f"{self.request_id}/{index}" for index in range(len(self.submissions))]

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self._problem is not None or len(self.finished) == len(self.submissions)

    @property
    def scores_prompts(self) -> bool:
        """Whether the prompts have log-probabilities."""
        return self.submissions[0].params.prompt_logprobs is not None

    @property
    def waiting(self) -> int:
        """Choices without a first output."""
        return 0 if self.over else self.tokens.count(0) - sum(not self.tokens[index] for index in self.finished)

    # ---- from the engine ----

    def accept(self, index: int) -> None:
        """The engine has taken a choice."""
        self._accepted.add(index)
        self._changed.set()

    def put(self, index: int, output: Output) -> None:
        """New tokens of a choice."""
        if self.over or index in self.finished:
            return
        self.tokens[index] += len(output["tokens"])
        self.cached[index] = output["cached_tokens"]
        if output["finish"] is not None:
            self.finished[index] = output["finish"]
        if output["finish"] in FAILURES:
            self._end(_failure(output))
            return
        self._pending.append((index, output))
        if len(self._pending) > MAX_UNREAD * len(self.submissions):
            self._pending.clear()
            self._end(ProblemError(408, f"the client has not read the last {MAX_UNREAD} outputs"))
        self._changed.set()

    def fail(self, problem: ProblemError) -> None:
        """End all choices, if they have not ended; `outputs` raises the problem after what has come."""
        if not self.over:
            self._end(problem)

    def _end(self, problem: ProblemError) -> None:
        self.cancel()
        self._problem = problem
        self._changed.set()

    # ---- for the client ----

    async def accepted(self) -> None:
        """Wait until the engine has taken all choices.

        Raises:
            ProblemError: it has not.
        """
        while len(self._accepted) < len(self.submissions):
            if self._problem is not None:
                raise self._problem
            await self._next_change()

    async def outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """Index and output of choices: all that came since the last time.

        Raises:
            ProblemError: the request ended with an error, which ends all its choices.
        """
        while True:
            batch = list(self._pending)
            self._pending.clear()
            if batch:
                yield batch
            elif self._problem is not None:
                raise self._problem
            elif self.over:
                return
            else:
                await self._next_change()

    async def _next_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def cancel(self) -> None:
        """End the choices that still run: no one reads them."""
        if self._problem is None:
            for index, engine_id in enumerate(self.ids()):
                if index not in self.finished:
                    self._cancel(engine_id)


def _failure(output: Output) -> ProblemError:
    if output["finish"] == "timeout":
        return ProblemError(504, "the request's deadline passed before it was served", code="deadline_exceeded")
    message = output["error"] or "the engine could not serve the request"
    return ProblemError(503, message, code="failed", retry_after_s=5)  # a rank was lost: all open requests end
