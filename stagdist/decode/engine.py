"""The engine: serves requests and returns tokens and text. It runs on rank 0; the other ranks follow."""

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from stagdist.data.tokenizer import Tokenizer
from stagdist.decode.operations import Control, Operation, operate
from stagdist.decode.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    check_request,
    join_outputs,
)
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampler import Choice
from stagdist.decode.scheduler import ScheduledRequest, Scheduler
from stagdist.decode.text import TextStream
from stagdist.errors import ConfigError

Sink = Callable[[RequestOutput], None]


@dataclass(eq=False)
class _Accepted(ScheduledRequest):
    """A request and what is known of its output."""

    submitted_s: float = field(default_factory=time.perf_counter)
    text: TextStream | None = None
    received: int = 0
    reported: bool = False  # the last output was given to the sink
    first_token_s: float | None = None
    fresh: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)


class Engine:
    """Serves requests on rank 0.

    Args:
        stage: this rank's part of the model.
        transport: None in a world of one.
        tokenizer: decodes tokens; without it outputs have token ids only, and stop strings are rejected.
        end_tokens: each of them ends a request that does not ignore them.
        heartbeat_s: an idle engine sends a message to the other ranks at least this often.

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
    ):
        self._stage, self._transport, self._tokenizer = stage, transport, tokenizer
        self._end_tokens, self._heartbeat_s = frozenset(end_tokens), heartbeat_s
        # Requests, ids of requests to cancel, and None after the last request. One queue keeps their order.
        self._inbox: queue.SimpleQueue[_Accepted | str | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._scheduler: Scheduler[_Accepted] = Scheduler(stage.limits)
        self._served: set[str] = set()  # ids of requests whose last output is pending
        self._served_lock = threading.Lock()
        self._closed = self._stopping = self._ended = False
        self._sink: Sink = lambda output: None
        self._unreported: list[_Accepted] = []
        self.smallest_margin, self.steps = float("inf"), 0

    # --- for clients, from any thread ---------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Add a request. A request that cannot be served gets an error output; others are not affected.

        Raises:
            ConfigError: a request with this id is already being served, or `run` has returned.
        """
        with self._served_lock:
            if self._ended:
                raise ConfigError(
                    f"request {request.request_id!r} was submitted after the engine ended; build a new engine"
                )
            if request.request_id in self._served:
                raise ConfigError(f"a request {request.request_id!r} is being served; give each its own request_id")
            self._served.add(request.request_id)
        self._inbox.put(_Accepted(request))
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """End a request early. Does nothing if it has ended or is unknown."""
        self._inbox.put(request_id)
        self._wake.set()

    def close(self) -> None:
        """Declare that no more requests will be submitted; `run` returns after the last one."""
        self._inbox.put(None)
        self._wake.set()

    def stop(self) -> None:
        """End after the current operation; unfinished requests are cancelled."""
        self._stopping = True
        self._wake.set()

    # --- running ------------------------------------------------------------------------------------------------

    def run(self, sink: Sink) -> None:
        """Serve until `close` and the last request, or `stop`.

        Args:
            sink: called in this thread with every output as soon as it exists.

        Raises:
            TransportError: a rank has ended.
        """
        self._sink = sink
        operate(self._stage, self._transport, self)
        self.host_work()
        with self._served_lock:
            self._ended = True
        self._take_inbox()
        for accepted in self._scheduler.entries():
            accepted.finish = accepted.finish or FinishReason.CANCELLED
            self._report(accepted)
        self._scheduler.drop_ended()

    def generate(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Serve these requests and close. Returns the complete output of each, in the same order."""
        requests = list(requests)
        outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
        if len(outputs) < len(requests):
            raise ConfigError("two requests have the same request_id; give each its own")
        for request in requests:
            self.submit(request)
        self.close()
        self.run(lambda output: outputs[output.request_id].append(output))
        return [join_outputs(parts) for parts in outputs.values()]

    # --- called by `operate` ------------------------------------------------------------------------------------

    def decide(self) -> Control:
        """Decide the operation after the one that is about to run."""
        self._take_inbox()
        return self._scheduler.decide(stopping=self._stopping, closed=self._closed)

    def admission(self, slot: int) -> Request:
        """Return the request of the ADMIT that is about to run."""
        return self._scheduler.admission(slot)

    def took(self, control: Control, choice: Choice) -> None:
        """Process the tokens of an operation. Text is decoded while later stages compute the next one."""
        rows = self._scheduler.taken()
        choice = self._stage.on_host(choice)
        tokens = choice.tokens.tolist()
        logprobs = None if choice.logprobs is None else choice.logprobs.tolist()
        margins = None if choice.margins is None else choice.margins.tolist()
        now = time.perf_counter()
        admitted = control.operation is Operation.ADMIT
        self.steps += not admitted
        for slot, running in rows.items():
            if running.finish is None:
                row = 0 if admitted else slot
                if margins is not None:
                    self.smallest_margin = min(self.smallest_margin, margins[row])
                self._take_token(running, tokens[row], None if logprobs is None else logprobs[row], now)
        if admitted or self._stage.topology.num_stages == 1:
            self.host_work()

    def rest(self) -> None:
        """Wait for work, at most for the heartbeat interval."""
        self.host_work()
        self._wake.wait(self._heartbeat_s)
        self._wake.clear()

    # --- inside -------------------------------------------------------------------------------------------------

    def _take_inbox(self) -> None:
        while not self._inbox.empty():
            entry = self._inbox.get()
            if entry is None:
                self._closed = True
            elif isinstance(entry, str):
                self._drop(entry)
            else:
                self._take_request(entry)

    def _take_request(self, accepted: _Accepted) -> None:
        request, limits = accepted.request, self._stage.limits
        try:
            check_request(request, vocab_size=self._stage.model.vocab_size, max_context=limits.max_context)
            if request.params.stop and self._tokenizer is None:
                raise ConfigError(f"request {request.request_id!r} has stop strings, but the engine has no tokenizer")
        except ConfigError as error:
            reason = FinishReason.ERROR
            self._give_out(RequestOutput(request.request_id, finish_reason=reason, error=str(error)))
        else:
            if self._tokenizer is not None:
                accepted.text = TextStream(self._tokenizer.decode, request.prompt_ids, request.params.stop)
            self._scheduler.waiting.append(accepted)

    def _give_out(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            with self._served_lock:
                self._served.discard(output.request_id)
        self._sink(output)

    def _drop(self, request_id: str) -> None:
        """Cancel a waiting or running request."""
        for accepted in self._scheduler.entries():
            if accepted.request.request_id == request_id and accepted.finish is None:
                accepted.finish = FinishReason.CANCELLED
                self._unreported.append(accepted)
        self._scheduler.drop_ended()

    def _take_token(self, running: _Accepted, token: int, logprobs: Sequence[float] | None, now: float) -> None:
        params = running.request.params
        running.received += 1
        if running.first_token_s is None:
            running.first_token_s = now - running.submitted_s
        running.fresh.append((token, _token_logprobs(params, token, logprobs)))
        if token in params.stop_token_ids or (token in self._end_tokens and not params.ignore_end_of_document):
            running.finish = FinishReason.STOP
        elif running.received == running.allowed:
            running.finish = FinishReason.LENGTH
        if running not in self._unreported:
            self._unreported.append(running)

    def host_work(self) -> None:
        """Report new tokens and text, while later stages compute."""
        unreported, self._unreported = self._unreported, []
        for running in unreported:
            self._report(running)

    def _report(self, running: _Accepted) -> None:
        """Give the new tokens and text of a request to the sink."""
        if running.reported:
            return
        fresh, running.fresh = running.fresh, []
        text = ""
        if running.text is not None:
            for index, (token, _) in enumerate(fresh):
                # A stop token adds no text.
                if running.finish is FinishReason.STOP and index == len(fresh) - 1:
                    break
                text += running.text.push(token)
                if running.text.stopped:
                    running.finish = FinishReason.STOP
                    fresh = fresh[: index + 1]
                    break
            if running.finish is not None and not running.text.stopped:
                text += running.text.finish()
        running.reported = running.finish is not None
        self._give_out(
            RequestOutput(
                running.request.request_id,
                token_ids=tuple(token for token, _ in fresh),
                text=text,
                logprobs=tuple(entry for _, entry in fresh if entry is not None),
                finish_reason=running.finish,
                time_to_first_token_s=running.first_token_s,
            )
        )


def _token_logprobs(params: SamplingParams, token: int, values: Sequence[float] | None) -> TokenLogprobs | None:
    if params.logprobs is None or values is None:
        return None
    count = (len(values) - 1) // 2
    ids, likeliest = values[1 : 1 + params.logprobs], values[1 + count : 1 + count + params.logprobs]
    return TokenLogprobs(token, values[0], tuple((int(i), value) for i, value in zip(ids, likeliest, strict=True)))
