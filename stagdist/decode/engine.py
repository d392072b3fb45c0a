"""The engine: serves requests and returns tokens and text. It runs on rank 0; the other ranks follow."""

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from stagdist.data.tokenizer import Tokenizer
from stagdist.decode.control import Control
from stagdist.decode.engine_stats import EngineStats, StageReport
from stagdist.decode.operations import operate
from stagdist.decode.request import FinishReason, Request, RequestOutput, check_request, join_outputs
from stagdist.decode.request_state import RequestState
from stagdist.decode.runtime.outcome import Outcome
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampling.sampler import Choice
from stagdist.decode.scheduler import Scheduler
from stagdist.decode.text import TextStream
from stagdist.errors import ConfigError, QueueFullError

Sink = Callable[[Sequence[RequestOutput]], None]
"""Takes the outputs of one operation, each of another request."""


class Engine:
    """Serves requests on rank 0.

    Args:
        stage: this rank's part of the model.
        transport: None in a world of one.
        tokenizer: decodes tokens; without it outputs have token ids only, and stop strings are rejected.
        end_tokens: each of them ends a request that does not ignore them.
        heartbeat_s: an idle engine sends a message to the other ranks at least this often.
        max_waiting: requests without a slot at most, not counting as many as there are free slots.
        max_waiting_tokens: tokens of their prompts at most; a longer prompt may wait alone.

    Attributes:
        smallest_margin: of all tokens so far, if the stage computes margins; else infinite.
        steps: decode steps so far, without prefills.
    """

    def __init__(
        self,
        stage: Stage,
        transport: Transport | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        end_tokens: Collection[int] = (),
        heartbeat_s: float = 200.0,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
    ):
        self._stage, self._transport, self._tokenizer = stage, transport, tokenizer
        self._end_tokens = frozenset(token for token in end_tokens if token < stage.model.vocab_size)
        self._heartbeat_s, self._max_waiting, self._max_waiting_tokens = heartbeat_s, max_waiting, max_waiting_tokens
        # Requests, ids of requests to cancel, and None after the last request. One queue keeps their order.
        self._inbox: queue.SimpleQueue[RequestState | str | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._scheduler: Scheduler[RequestState] = Scheduler(stage.model, stage.topology, stage.limits)
        self._lock = threading.Lock()  # of the next five, which clients change in `submit`
        self._open: dict[str, RequestState] = {}  # requests whose last output is pending
        self._refusal = ""  # why no request is accepted any more
        self._waiting = self._waiting_tokens = 0
        self._stop_s = float("inf")  # when what is unfinished is cancelled
        self._closed = False
        self._earliest_s = float("inf")  # no deadline is before
        self._sink: Sink = lambda outputs: None
        self._unreported: dict[RequestState, None] = {}  # an ordered set
        self._operations = self._prompt_tokens = self._generation_tokens = 0
        self.smallest_margin, self.steps = float("inf"), 0
        self._stats = self._snapshot()

    # --- for clients, from any thread ---------------------------------------------------------------------------

    def check(self, request: Request) -> Request:
        """Refuse a request that this engine cannot serve; `submit` does it as well.

        Returns: the request with the tokens that end every text among its stop ids: all ranks need them.

        Raises:
            ConfigError: as in `check_request`, or it has stop strings and there is no tokenizer.
        """
        params, limits = request.params, self._stage.limits
        ends = () if params.ignore_end_of_document else self._end_tokens.difference(params.stop_token_ids)
        if ends:
            request = replace(request, params=replace(params, stop_token_ids=(*params.stop_token_ids, *sorted(ends))))
        check_request(request, vocab_size=self._stage.model.vocab_size, max_context=limits.max_context)
        if params.stop and self._tokenizer is None:
            raise ConfigError(f"request {request.request_id!r} has stop strings, but the engine has no tokenizer")
        return request

    def submit(self, request: Request, *, deadline_s: float | None = None) -> None:
        """Add a request.

        Args:
            deadline_s: the request ends with `FinishReason.TIMEOUT` so many seconds from now.

        Raises:
            ConfigError: the request cannot be served, a request with this id is being served, or the engine is ending.
            QueueFullError: too many requests, or tokens of prompts, are waiting.
        """
        state = RequestState(
            self.check(request),
            text=self._text_stream(request),
            own_stop_ids=frozenset(request.params.stop_token_ids),
            deadline_s=float("inf") if deadline_s is None else time.perf_counter() + deadline_s,
        )
        name, size = request.request_id, len(request.prompt_ids)
        with self._lock:
            if self._refusal:
                raise ConfigError(f"request {name!r} was submitted {self._refusal}")
            if name in self._open:
                raise ConfigError(f"a request {name!r} is being served; give each its own request_id")
            self._check_queue(size)
            self._open[name] = state
            self._waiting, self._waiting_tokens = self._waiting + 1, self._waiting_tokens + size
            self._inbox.put(state)
        self._wake.set()

    def cancel(self, request_id: str) -> bool:
        """End a request early. Returns whether its last output is pending; False if it has ended or is unknown."""
        with self._lock:
            is_open = request_id in self._open
        if is_open:
            self._inbox.put(request_id)
            self._wake.set()
        return is_open

    def close(self) -> None:
        """Declare that no more requests will be submitted; `run` returns after the last one."""
        self._inbox.put(None)
        self._wake.set()

    def drain(self, timeout_s: float) -> None:
        """Accept no more requests and end: those that run or wait have so many seconds left, then are cancelled."""
        with self._lock:
            self._refusal = "while the engine is shutting down; send it to another one"
            self._stop_s = min(self._stop_s, time.perf_counter() + timeout_s)
        self.close()

    def stop(self) -> None:
        """End after the current operation; unfinished requests are cancelled."""
        with self._lock:
            self._stop_s = 0.0
        self._wake.set()

    def stats(self) -> EngineStats:
        """What the engine was doing in its last operation."""
        return self._stats

    # --- running ------------------------------------------------------------------------------------------------

    def run(self, sink: Sink) -> None:
        """Serve until `close` and the last request, or `stop`.

        Args:
            sink: called in this thread with all new outputs, at most once per operation.

        Raises:
            TransportError: a rank has ended. As before any exception, every unfinished request gets an error output.
        """
        self._sink = sink
        try:
            operate(self._stage, self._transport, self)
        except Exception as error:
            self._end_all(FinishReason.ERROR, str(error))
            raise
        self.host_work()
        self._end_all(FinishReason.CANCELLED)

    def generate(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Serve these requests and close. Returns the complete output of each, in the same order."""
        requests = list(requests)
        outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
        if len(outputs) < len(requests):
            raise ConfigError("two requests have the same request_id; give each its own")
        for request in requests:
            self.submit(request)
        self.close()

        def collect(new: Sequence[RequestOutput]) -> None:
            for output in new:
                outputs[output.request_id].append(output)

        self.run(collect)
        return [join_outputs(parts) for parts in outputs.values()]

    # --- called by `operate` ------------------------------------------------------------------------------------

    def decide(self) -> Control:
        """Decide the operation after the one that is about to run."""
        now_s = time.perf_counter()
        self._take_inbox()
        if self._earliest_s <= now_s:
            for state in self._scheduler.entries():
                if state.deadline_s <= now_s:
                    self._end(state, FinishReason.TIMEOUT)
            self._earliest_s = min((state.deadline_s for state in self._scheduler.entries()), default=float("inf"))
        control = self._scheduler.decide(stopping=now_s >= self._stop_s, closed=self._closed)
        for running in self._scheduler.running.values():
            if running.is_queued:
                self._leave_queue(running)
                self._prompt_tokens += len(running.request.prompt_ids)
        self._operations += 1
        return control

    def took(self, outcome: Outcome) -> None:
        """Process the tokens of an operation, which are in host memory, and log-probabilities of a prompt.

        Text is decoded while later stages compute the next one; a first token does not wait for that.
        """
        plan = self._scheduler.taken()
        if outcome.step is not None:
            self.steps += 1
            self._take(plan.rows, outcome.step)
        if outcome.scores is not None and plan.scored is not None:
            assert outcome.scores.logprobs is not None
            plan.scored.take_prompt_scores(outcome.scores.logprobs.tolist())
        if outcome.first is not None and plan.first is not None:
            self._take({0: plan.first}, outcome.first)
        if outcome.first is not None or self._stage.topology.num_stages == 1:
            self.host_work()

    def rest(self) -> None:
        """Wait for work, at most for the heartbeat interval."""
        self.host_work()
        self._wake.wait(self._heartbeat_s)
        self._wake.clear()

    def take_reports(self, reports: tuple[StageReport, ...]) -> None:
        """Keep what the ranks report about themselves."""
        self._scheduler.stages = reports

    def host_work(self) -> None:
        """Report new tokens and text, while later stages compute."""
        unreported, self._unreported = self._unreported, {}
        outputs = [state.output() for state in unreported if not state.is_reported]
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None:
                    del self._open[output.request_id]
        self._stats = self._snapshot()
        if outputs:
            self._sink(outputs)

    # --- inside -------------------------------------------------------------------------------------------------

    def _text_stream(self, request: Request) -> TextStream | None:
        if self._tokenizer is None:
            return None
        params, decode = request.params, self._tokenizer.decode
        return TextStream(
            decode if params.skip_special_tokens else partial(decode, skip_special_tokens=False),
            request.prompt_ids,
            params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _check_queue(self, size: int) -> None:
        most, most_tokens = self._max_waiting, self._max_waiting_tokens
        free = self._stage.limits.num_slots - len(self._scheduler.running)
        full = most is not None and self._waiting - free >= most
        too_long = most_tokens is not None and self._waiting_tokens + size > most_tokens
        if full or (too_long and self._waiting > free):
            raise QueueFullError(
                f"{self._waiting} requests with {self._waiting_tokens} prompt tokens are waiting and {free} slots are "
                f"free; at most {most} requests, and {most_tokens} tokens, may wait longer; try again later"
            )

    def _leave_queue(self, state: RequestState) -> None:
        state.is_queued = False
        with self._lock:
            self._waiting -= 1
            self._waiting_tokens -= len(state.request.prompt_ids)

    def _take_inbox(self) -> None:
        while not self._inbox.empty():
            entry = self._inbox.get()
            if entry is None:
                self._closed = True
            elif isinstance(entry, str):
                for state in self._scheduler.entries():
                    if state.request.request_id == entry:
                        self._end(state, FinishReason.CANCELLED)
            else:
                self._scheduler.waiting.append(entry)
                self._earliest_s = min(self._earliest_s, entry.deadline_s)

    def _end(self, state: RequestState, finish: FinishReason, error: str | None = None) -> None:
        """End a waiting or running request early."""
        state.end(finish, error)
        self._unreported[state] = None
        if state.is_queued:
            self._leave_queue(state)
            self._scheduler.drop_ended()

    def _end_all(self, finish: FinishReason, error: str | None = None) -> None:
        """End the engine and every request that is open."""
        with self._lock:
            self._refusal = "after the engine ended; build a new engine"
            unfinished = list(self._open.values())
        for state in unfinished:
            self._end(state, finish, error)
        self.host_work()

    def _take(self, rows: Mapping[int, RequestState], choice: Choice) -> None:
        """Give each request its token of a choice.

        Args:
            rows: requests by their row in the choice.
        """
        tokens = choice.tokens.tolist()
        logprobs = None if choice.logprobs is None else choice.logprobs.tolist()
        margins = None if choice.margins is None else choice.margins.tolist()
        now_s = time.perf_counter()
        for row, state in rows.items():
            if state.finish is None:
                if margins is not None:
                    self.smallest_margin = min(self.smallest_margin, margins[row])
                state.take_token(tokens[row], None if logprobs is None else logprobs[row], now_s)
                self._unreported[state] = None

    def _snapshot(self) -> EngineStats:
        scheduler, slots = self._scheduler, self._scheduler.slots()
        return EngineStats(
            running=len(scheduler.running),
            waiting=self._waiting,
            waiting_tokens=self._waiting_tokens,
            steps=self.steps,
            operations=self._operations,
            slots=slots,
            positions_used=sum(slot.position for slot in slots),
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            prefix_queries_total=scheduler.prefix_queries,
            prefix_hits_total=scheduler.prefix_hits,
            step_s=scheduler.step_s,
            stages=scheduler.stages,
        )
