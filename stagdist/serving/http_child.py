"""The HTTP process as rank 0 sees it: found or started, connected, and ended."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any, cast

import psutil

from stagdist.cluster.hosts.leftovers import JOB_VARIABLE, SERVICE_LOG, service_mark
from stagdist.errors import ConfigError, StagdistError
from stagdist.serving.protocol import FromEngine, Welcome, pack, receive
from stagdist.serving.settings import KEYS_VARIABLE, ServerSettings
from stagdist.telemetry.pulse import PULSE_FILE

MODULE = "stagdist.serving.http_process"

START_S = 60.0
"""Limit for the start of the HTTP process, imports included."""

WELCOME_S = 5.0
"""Limit for the first message of a process that listens."""

LEAVING_S = 2.0
"""Time in which a process notices that its engine has ended."""

FAREWELL_S = 8.0
"""Limit for the HTTP process to send the ends of its answers."""

SEND_S = 10.0
"""Limit for a message that the HTTP process does not take; rank 0 does not run meanwhile."""

_POLL_S = 0.02
_NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", PULSE_FILE, KEYS_VARIABLE,
)  # fmt: skip
"""Variables of a rank. The supervisor ends every process that has the pulse file of a rank when the rank has ended."""


class HttpProcessError(StagdistError, RuntimeError):
    """The HTTP process has ended or does not answer."""


class HttpProcess:
    """Rank 0's connection to the HTTP process. The constructor finds a living one or starts one, and does not wait.

    Args:
        settings: of the process. One of the same run with other settings is asked to end first.

    Attributes:
        ended: why nothing can be sent or received any more.
        lock: held while a message is sent.
    """

    def __init__(self, settings: ServerSettings):
        self._settings = settings
        self.ended = "the HTTP process has ended"
        self.lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket = self._find()
        if self._socket is None:
            self._child = self._start()

    def connect(self) -> None:
        """Wait until the process listens, and connect.

        Raises:
            ConfigError: it cannot use the port or a setting.
            HttpProcessError: it did not start.
        """
        deadline = time.monotonic() + START_S
        while self._socket is None:
            assert self._child is not None and self._child.stdout is not None
            if (code := self._child.poll()) is not None:
                says = self._child.stdout.read().decode(errors="replace").strip()
                kind = ConfigError if code == 2 else HttpProcessError
                raise kind(says or f"the HTTP process ended with code {code} while it started")
            if time.monotonic() > deadline:
                raise HttpProcessError(f"the HTTP process did not start within {START_S:g} s")
            self._socket = _connected(self._settings.engine_socket)
            try:
                if self._socket is None or self._welcome() is None:
                    self._socket = None
                    time.sleep(_POLL_S)
            except TimeoutError:
                raise HttpProcessError(f"the HTTP process did not answer within {WELCOME_S:g} s") from None
        # A process that takes no messages keeps rank 0 waiting for a limited time. Receiving has no limit.
        limit = struct.pack("ll", int(SEND_S), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._stream = self._socket.makefile("rb")

    def send(self, message: FromEngine) -> None:
        """Send a message, from any thread.

        Raises:
            HttpProcessError: the process has ended, or takes no messages.
        """
        data = pack(message)
        with self.lock:
            self.send_locked(data)

    def send_locked(self, data: bytes) -> None:
        """Send packed messages; the caller holds the lock.

        Raises:
            HttpProcessError: as `send`.
        """
        assert self._socket is not None, "connect comes first"
        try:
            self._socket.sendall(data)
        except BlockingIOError as error:
            self.ended = f"the HTTP process took no message for {SEND_S:g} s and was ended"
            self._kill()
            raise HttpProcessError(self.ended) from error
        except OSError as error:
            raise HttpProcessError(self.ended) from error

    def receive(self) -> Any:
        """The next message; None when the process has ended.

        Raises:
            TransportError: it sent something else.
        """
        try:
            return receive(self._stream)
        except OSError:
            return None

    def abandon(self, code: int | None) -> None:
        """End this process with an exit code, before it serves, and the HTTP process with it."""
        if self._socket is not None:
            with suppress(HttpProcessError):
                self.send({"kind": "exit"})
        elif self._child is not None:
            self._child.kill()
        os._exit(code or 1)

    def __enter__(self) -> "HttpProcess":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End the process. After an error it waits for the next rank 0 if there is a supervisor."""
        if kind is None or not self._settings.supervised:
            self._end()
        elif self._socket is None:
            self._kill()
        else:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    # --- inside -------------------------------------------------------------------------------------------------

    def _find(self) -> socket.socket | None:
        """A connection to the process of an earlier attempt; one with other settings has ended afterwards."""
        deadline = time.monotonic() + LEAVING_S
        while (found := _connected(self._settings.engine_socket)) is not None:
            self._socket, welcome = found, None
            with suppress(TimeoutError):
                welcome = self._welcome()
                if welcome is None and time.monotonic() < deadline:  # its last engine has just ended
                    time.sleep(_POLL_S)
                    continue
            if welcome is not None and welcome["settings"] == self._settings.fingerprint():
                return found
            self._end()
            break
        return None

    def _welcome(self) -> Welcome | None:
        """The first message of the process; None if it has an engine already, or is about to end.

        Raises:
            TimeoutError: it gives none.
        """
        assert self._socket is not None
        self._socket.settimeout(WELCOME_S)
        try:
            with self._socket.makefile("rb") as stream:
                # Nothing follows the first message until we have sent one, so the buffer takes no other.
                return cast(Welcome | None, receive(stream))
        except ConnectionError:
            return None
        finally:
            self._socket.settimeout(None)

    def _end(self) -> None:
        """Ask it to end once its answers are complete, so that its port is free; it is killed after `FAREWELL_S`."""
        if self._socket is not None:
            with suppress(HttpProcessError):
                self.send({"kind": "exit"})
            try:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(self._pid()).wait(FAREWELL_S)
            except psutil.TimeoutExpired:
                self._kill()
        else:
            self._kill()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        elif self._socket is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid(), signal.SIGKILL)

    def _pid(self) -> int:
        """Of the process that listens; it need not have said anything."""
        assert self._socket is not None
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])

    def _start(self) -> "subprocess.Popen[bytes]":
        log = os.environ.get(SERVICE_LOG)
        with open(log, "ab", buffering=0) if log else nullcontext() as stream:  # it outlives the pipe to the agent
            child = subprocess.Popen(
                [sys.executable, "-m", MODULE], env=_child_variables(os.environ), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stream, start_new_session=True,
            )  # fmt: skip
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin:  # it has ended; `connect` says why
            child.stdin.write(self._settings.model_dump_json().encode())
        return child


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _child_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of the HTTP process: it is no process of an attempt, which the supervisor would end with it."""
    kept = {name: value for name, value in environment.items() if name not in _NOT_INHERITED}
    if mark := environment.get(JOB_VARIABLE):
        kept[JOB_VARIABLE] = service_mark(mark)
    return kept
