"""The HTTP process: `python -m stagdist.serving.http_process` with `ServerSettings` as JSON on standard input.

It is free of torch, so that it starts within a second and answers while the model is loaded. SIGINT and SIGTERM, which
launchers send to all processes, are for rank 0: it drains and then ends this process.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stagdist.errors import ConfigError
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.http.app import make_app
from stagdist.serving.http.engine_client import EngineClient
from stagdist.serving.http.server_metrics import ServerMetrics
from stagdist.serving.settings import ServerSettings

UNREAD_TIMEOUT_S = 60
"""A client that takes no data for so long is disconnected."""

_SHUTDOWN_S = 5
"""Limit for writing the last answers."""

_BACKLOG = 4096


class _SilentServer(uvicorn.Server):
    """A server that leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _ImpatientProtocol(H11Protocol):
    """Connections without a request end like idle ones, also before the first request and within its head.

    What is no request gets an error object like all others.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_wait()

    def data_received(self, data: bytes) -> None:
        limit = self.timeout_keep_alive_task  # a head that comes byte by byte does not extend it
        super().data_received(data)
        if self._waits():
            self._limit_wait(None if limit is None else limit.when())

    def timeout_keep_alive_handler(self) -> None:
        if self._waits():  # or a request is served that was sent before the last answer
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else the body of an answered request is broken
            problem = ProblemError(400, "this is no valid HTTP/1.1 request", headers={"Connection": "close"}).response()
            head = h11.Response(status_code=400, headers=problem.raw_headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=bytes(problem.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _limit_wait(self, until: float | None = None) -> None:
        self._unset_keepalive_if_required()
        until = until or self.loop.time() + self.timeout_keep_alive
        self.timeout_keep_alive_task = self.loop.call_at(until, self.timeout_keep_alive_handler)


def bound_socket(host: str, port: int) -> socket.socket:
    """The socket of the server. It listens: no other process can take the address from now on.

    Raises:
        ConfigError: the address is taken or is none of this host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT_S * 1000)  # connections inherit it
        bound.bind(address)
        bound.listen(_BACKLOG)
    except (OSError, ValueError) as error:  # a name that is not a host name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from error
    return bound


async def serve(settings: ServerSettings, bound: socket.socket) -> None:
    """Serve until the engine is gone for good."""
    metrics = ServerMetrics(settings.metrics_prefix)
    client = EngineClient(settings, metrics)
    config = uvicorn.Config(
        make_app(settings, client, metrics),
        http=_ImpatientProtocol,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    server = _SilentServer(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    serving.add_done_callback(lambda _: client.finished.set())  # it ends by itself after an error only
    parent = asyncio.create_task(_watch_parent(settings, client))
    try:
        await client.listen()
    finally:
        parent.cancel()
        server.should_exit = True
        await serving


async def _watch_parent(settings: ServerSettings, client: EngineClient) -> None:
    """End if the process that started this one is gone and no supervisor starts another."""
    parent = os.getppid()
    while settings.supervised or os.getppid() == parent:
        await asyncio.sleep(1)
    client.finished.set()


def main() -> int:
    """Read the settings and serve; 2 means that the address cannot be used."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    settings = ServerSettings.model_validate_json(sys.stdin.buffer.read())
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one file for each client
    try:
        bound = bound_socket(settings.host, settings.port)
    except ConfigError as error:
        print(error)  # read by rank 0, which reports it
        return 2
    asyncio.run(serve(settings, bound))
    return 0


if __name__ == "__main__":
    sys.exit(main())
