"""The asyncio side of the socket to rank 0: submits requests and hands out what comes, over restarts of the engine."""

import asyncio
import contextlib
import math
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagdist.errors import StagdistError
from stagdist.serving.api.prepared import Submission
from stagdist.serving.api.problems import ProblemError, problem_of_params
from stagdist.serving.api.served_model import ModelView
from stagdist.serving.http.generation import TextGeneration
from stagdist.serving.http.server_metrics import ServerMetrics
from stagdist.serving.protocol import Stats, Step, ToEngine, pack, receive_async
from stagdist.serving.settings import ServerSettings

_MAX_RETRY_AFTER_S = 60


class EngineClient:
    """Listens for rank 0 on a Unix socket, one after the other.

    Attributes:
        served: the model of the latest engine; None before the first one.
        state: `starting` (no engine yet), `loading`, `ready`, `draining`, `failed` or `restarting`.
        stats: the latest of the engine.
        stats_number: counts them.
        finished: set when the HTTP process is to end.
    """

    def __init__(self, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.served: ModelView | None = None
        self.state, self.reason = "starting", "the engine has not started yet"
        self.stats: Stats | None = None
        self.stats_number = 0
        self.finished = asyncio.Event()
        self._settings, self._metrics = settings, metrics
        self._writer: asyncio.StreamWriter | None = None
        self._taken: socket.socket | None = None
        self._open: dict[str, tuple[TextGeneration, int]] = {}
        self._last_message = self._last_progress = time.monotonic()
        self._lost_since: float | None = time.monotonic()
        self._finish_interval_s, self._last_finish = 1.0, time.monotonic()

    async def listen(self) -> None:
        """Accept rank 0 until `finished`; notice one that hangs or does not come back."""
        path = Path(self._settings.engine_socket)
        path.unlink(missing_ok=True)
        async with await asyncio.start_unix_server(self._serve_engine, path):
            while not self.finished.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.finished.wait(), 1)
                limit = self._settings.restart_timeout_s
                if self._lost_since is not None and time.monotonic() - self._lost_since > limit:
                    self.finished.set()
                if self.hangs():
                    message = f"the engine has not answered for {self._settings.hang_timeout_s:g} s"
                    self._fail_all(ProblemError(503, message, retry_after_s=10))
            self._send({"kind": "stop", "reason": ""})  # no one needs the engine
            if self._writer is not None and self._taken is not None:
                _close(self._writer, self._taken)
        path.unlink(missing_ok=True)

    # ---- state ----

    def hangs(self) -> bool:
        """Whether a ready engine gives no sign of life, or has work and finishes no operation."""
        if self.state not in ("ready", "draining") or self.stats is None:
            return False
        return time.monotonic() - min(self._last_message, self._last_progress) > self._settings.hang_timeout_s

    def health(self) -> tuple[str, str]:
        """State and its reason; only `ready` serves requests."""
        if self.hangs():
            return "hung", f"the engine has not finished an operation for {self._settings.hang_timeout_s:g} s"
        return self.state, self.reason

    def require_ready(self) -> ModelView:
        """The model, if requests are served.

        Raises:
            ProblemError: they are not.
        """
        state, reason = self.health()
        if state != "ready" or self.served is None:
            headers = {"Connection": "close"} if state == "draining" else None
            message = f"the server is not serving ({state}{f': {reason}' if reason else ''})"
            raise ProblemError(503, message, code=state, retry_after_s=5, headers=headers)
        return self.served

    def require_place(self) -> None:
        """Refuse a request before it is read, if too many wait.

        Raises:
            ProblemError: they do.
        """
        slots = self.served.model["slots"] if self.served else 0
        waiting = sum(generation.waiting for generation in {one for one, _ in self._open.values()})
        if waiting >= self._settings.max_queued_requests + slots:
            raise self._queue_full(f"{waiting} requests wait")

    def _queue_full(self, message: str) -> ProblemError:
        self._metrics.rejected("queue_full")
        waiting = self.stats["waiting"] if self.stats else 1
        after = min(_MAX_RETRY_AFTER_S, math.ceil(self._finish_interval_s * max(1, waiting) / 2))
        return ProblemError(
            429, f"the queue is full: {message}; try again later", code="queue_full", retry_after_s=after
        )

    # ---- requests ----

    def submit(
        self, request_id: str, submissions: Sequence[Submission], deadline_s: float | None = None
    ) -> TextGeneration:
        """Send the choices of a request to the engine; `TextGeneration.accepted` says whether it takes them.

        Raises:
            ProblemError: requests are not served, or too many wait.
        """
        self.require_ready()
        self.require_place()
        generation = TextGeneration(request_id, submissions, self._cancel)
        for index, (engine_id, each) in enumerate(zip(generation.ids(), submissions, strict=True)):
            self._open[engine_id] = generation, index
            prompt, params = list(each.prompt), each.changed_params()
            self._send(
                {"kind": "submit", "id": engine_id, "prompt": prompt, "params": params, "deadline_s": deadline_s}
            )
        return generation

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(pack(message))

    def _cancel(self, engine_id: str) -> None:
        if self._open.pop(engine_id, None) is not None:
            self._send({"kind": "cancel", "id": engine_id})

    def _fail_all(self, problem: ProblemError) -> None:
        for generation in {one for one, _ in self._open.values()}:
            generation.fail(problem)
            self._metrics.failed("engine")
        self._open.clear()

    # ---- messages of rank 0 ----

    async def _serve_engine(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:  # started for the same port by mistake: its rank 0 says so
            writer.close()
            return
        self._writer = writer
        self._lost_since = None
        reader, taken = _taken_by_thread(writer)
        self._taken = taken
        try:
            self._send({"kind": "welcome", "settings": self._settings.fingerprint()})
            while self._writer is writer and (message := await receive_async(reader)) is not None:
                self._last_message = time.monotonic()
                if message["kind"] == "hello":
                    # A large vocabulary takes a second.
                    self.served = await asyncio.to_thread(ModelView, message, self._settings)
                    self._metrics.describe({**self.served.model, "names": self.served.names})
                    self.state, self.reason = "loading", "the engine loads the model"
                else:
                    self._take(message)
        except (StagdistError, ConnectionError) as error:
            self._send({"kind": "stop", "reason": str(error)})
        finally:
            if self._writer is writer:
                self._lose("the engine ended")
            _close(writer, taken)

    def _lose(self, reason: str) -> None:
        """The connection ended: everything open gets an error."""
        self._writer = None
        ended_on_purpose = self.state == "draining"
        if self.state != "failed":
            self.state, self.reason = "restarting", reason
        self._fail_all(ProblemError(503, f"{reason} before the request was finished", retry_after_s=5))
        self._lost_since = time.monotonic()
        self.stats = self._metrics.stats = None
        if not self._settings.supervised or ended_on_purpose:
            self.finished.set()

    def _take(self, message: Any) -> None:
        match message["kind"]:
            case "step":
                self._take_step(message)
            case "stats":
                self._take_stats(message)
            case "accepted":
                if (found := self._open.get(message["id"])) is not None:
                    found[0].accept(found[1])
            case "rejected":
                self._take_rejection(message["id"], message["code"], message["message"])
            case "state":
                self.state, self.reason = message["state"], message["reason"]
            case "exit":
                self._fail_all(ProblemError(503, "the server ends", retry_after_s=5))
                self.finished.set()

    def _take_step(self, step: Step) -> None:
        tokens, self._last_progress = 0, time.monotonic()
        for output in step["outputs"]:
            tokens += len(output["tokens"])
            if (found := self._open.get(output["id"])) is None:
                continue  # cancelled here, not there yet
            generation, index = found
            self._metrics.output(generation, index, output)
            generation.put(index, output)
            if output["finish"] is not None:
                self._open.pop(output["id"], None)
                now = time.monotonic()
                self._finish_interval_s += 0.1 * (now - self._last_finish - self._finish_interval_s)
                self._last_finish = now
        if tokens:
            self._metrics.observe("iteration_tokens_total", tokens)
        if step["stats"] is not None:
            self._take_stats(step["stats"])

    def _take_stats(self, stats: Stats) -> None:
        before, works = self.stats, stats["running"] + stats["waiting"] > 0
        if before is None or not works or stats["operations"] != before["operations"]:
            self._last_progress = time.monotonic()
        self.stats = stats
        self.stats_number += 1
        self._metrics.stats = stats

    def _take_rejection(self, engine_id: str, code: str, message: str) -> None:
        found = self._open.pop(engine_id, None)
        if found is None:
            return
        if code == "queue_full":
            problem = self._queue_full(message)
        elif code == "invalid":
            problem = problem_of_params(message.removeprefix(f"request {engine_id!r}: "))
        else:
            problem = ProblemError(503, message, code=code, retry_after_s=5)
            self._metrics.rejected(code)
        found[0].fail(problem)


def _taken_by_thread(writer: asyncio.StreamWriter) -> tuple[asyncio.StreamReader, socket.socket]:
    """What rank 0 sends, and the socket. A thread takes it, so that rank 0 never waits for thousands of requests."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    loop, reader, connection = asyncio.get_running_loop(), asyncio.StreamReader(), writer.get_extra_info("socket").dup()

    def take() -> None:
        ready = select.poll()
        ready.register(connection, select.POLLIN)
        # The loop is closed when the process ends.
        with connection, contextlib.suppress(RuntimeError):
            with contextlib.suppress(OSError):
                while ready.poll() and (data := connection.recv(1 << 16)):
                    loop.call_soon_threadsafe(reader.feed_data, data)
            loop.call_soon_threadsafe(reader.feed_eof)

    threading.Thread(target=take, daemon=True, name="engine").start()
    return reader, connection


def _close(writer: asyncio.StreamWriter, taken: socket.socket) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        taken.shutdown(socket.SHUT_RD)  # ends the thread
