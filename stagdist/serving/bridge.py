"""Joins the engine of rank 0 with the HTTP process: requests in, outputs and signs of life out."""

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stagdist.decode.engine import Engine
from stagdist.decode.engine_stats import EngineStats
from stagdist.decode.request import FinishReason, Request, RequestOutput, RequestTimes, SamplingParams, TokenLogprobs
from stagdist.errors import ConfigError, QueueFullError, StagdistError
from stagdist.serving.http_child import HttpProcess, HttpProcessError
from stagdist.serving.protocol import FromEngine, Output, Rejected, ScoredToken, Stats, Times, pack

STATS_S = 0.1
"""Shortest time between statistics in messages with outputs."""

IDLE_STATS_S = 1.0
"""Time between statistics of their own, which show that rank 0 lives."""


class EngineBridge:
    """Serves the requests of the HTTP process.

    Args:
        http: connected.
        engine: its `run` gets `take` as sink.
        drain_s: limit for requests that are being served when the server is to end.

    Attributes:
        cut_off: requests that were not finished when the engine ended.
        lost: why the HTTP process is gone; None while it is there.
    """

    def __init__(self, http: HttpProcess, engine: Engine, drain_s: float):
        self._http, self._engine, self._drain_s = http, engine, drain_s
        self.cut_off = 0
        self.lost: StagdistError | None = None
        self._draining = False
        self._cancelled: set[str] = set()  # by clients; their last output is pending
        self._stats_at, self._sent = 0.0, EngineStats()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to take requests, and to send signs of life."""
        threading.Thread(target=self._read, daemon=True, name="requests").start()
        threading.Thread(target=self._send_stats, daemon=True, name="stats").start()

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """Send the outputs of one operation in one message. Without the HTTP process the engine stops."""
        stats = self._new_stats() if time.perf_counter() - self._stats_at > STATS_S else None
        for output in outputs:
            if output.finish_reason is not None:
                asked = output.request_id in self._cancelled
                self._cancelled.discard(output.request_id)
                self.cut_off += output.finish_reason is FinishReason.CANCELLED and not asked
        self._send({"kind": "step", "outputs": [_output(each) for each in outputs], "stats": stats})

    def drain(self) -> None:
        """Take no more requests; the engine ends after the last one, or cancels what is left after `drain_s`."""
        self._draining = True
        self._engine.drain(self._drain_s)
        self._send({"kind": "state", "state": "draining", "reason": "the server is shutting down"})

    def close(self) -> None:
        """Send no more signs of life."""
        self._ended.set()

    def _send(self, message: FromEngine) -> None:
        if self.lost is None:
            try:
                self._http.send(message)
            except HttpProcessError as error:
                self._lose(error)

    # --- threads ------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while (message := self._http.receive()) is not None:
                match message["kind"]:
                    case "submit":
                        self._submit(message)
                    case "cancel":
                        self._cancelled.add(message["id"])
                        if not self._engine.cancel(message["id"]):  # it was rejected, or has ended
                            self._cancelled.discard(message["id"])
                    case "stop":
                        if message["reason"]:  # what rank 0 sent cannot be used, and would not be the next time
                            raise ConfigError(message["reason"])
                        break
            raise HttpProcessError(self._http.ended)
        except Exception as error:  # the engine must not outlive the thread that brings its requests
            self._lose(error if isinstance(error, StagdistError) else HttpProcessError(f"a message failed: {error!r}"))

    def _lose(self, error: StagdistError) -> None:
        if not self._ended.is_set():
            self.lost = self.lost or error
            self._engine.stop()

    def _submit(self, message: dict[str, Any]) -> None:
        name = message["id"]
        # The lock keeps the first output, which the engine's thread sends, behind the acceptance.
        with self._http.lock:
            try:
                request = Request(name, tuple(message["prompt"]), SamplingParams(**message["params"]))
                self._engine.submit(request, deadline_s=message["deadline_s"])
            except (ConfigError, QueueFullError) as error:
                code = "queue_full" if isinstance(error, QueueFullError) else "invalid"
                code = "not_serving" if self._draining else code
                answer: Any = Rejected(kind="rejected", id=name, code=code, message=str(error))  # type: ignore[typeddict-item]
            else:
                answer = {"kind": "accepted", "id": name}
            self._http.send_locked(pack(answer))

    def _send_stats(self) -> None:
        while not self._ended.is_set() and self.lost is None:
            since = time.perf_counter() - self._stats_at
            # What the last operation left has no outputs to travel with.
            if since > IDLE_STATS_S or (since > 2 * STATS_S and self._engine.stats() is not self._sent):
                self._send({"kind": "stats", **self._new_stats()})  # type: ignore[typeddict-item]
            self._ended.wait(STATS_S)

    def _new_stats(self) -> Stats:
        self._stats_at, self._sent = time.perf_counter(), self._engine.stats()
        return asdict(self._sent)  # type: ignore[return-value]


def _output(output: RequestOutput) -> Output:
    return Output(
        id=output.request_id,
        tokens=list(output.token_ids),
        text=output.text,
        logprobs=[_scored(each) for each in output.logprobs] if output.logprobs else None,
        prompt_logprobs=None
        if output.prompt_logprobs is None
        else [None if each is None else _scored(each) for each in output.prompt_logprobs],
        finish=None if output.finish_reason is None else output.finish_reason.value,
        stop=output.stop_reason,
        error=output.error,
        prompt_tokens=output.prompt_tokens,
        cached_tokens=output.cached_tokens,
        times=_times(output.times),
    )


def _scored(entry: TokenLogprobs) -> ScoredToken:
    return entry.token_id, entry.logprob, list(entry.top)


def _times(times: RequestTimes) -> Times:
    begin, moments = times.submitted_s, (times.admitted_s, times.first_token_s, times.finished_s)
    admitted, first_token, finished = (None if moment is None else moment - begin for moment in moments)
    return Times(admitted=admitted, first_token=first_token, finished=finished)
