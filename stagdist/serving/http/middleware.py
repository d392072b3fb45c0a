"""What every HTTP request passes: the path's prefix, a request id, keys, metrics, the access log, security headers."""

import asyncio
import contextlib
import hashlib
import hmac
import re
import sys
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stagdist.serving.api.problems import ProblemError
from stagdist.serving.http.server_metrics import ServerMetrics
from stagdist.serving.http.streams import ClientGoneError
from stagdist.serving.settings import ServerSettings

PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info")
"""Paths that need a key, where keys are set: all that read prompts or write text."""

METHODS = ("GET", "HEAD", "POST", "OPTIONS")
"""Methods that metrics count by name."""

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)

_BEGIN_AT_ONCE = 32
"""Requests that begin before the streams of others continue."""

CLIENT_GONE = 499
"""Status of requests whose client left, in the log and in metrics."""


class RequestMiddleware:
    """The application around the routes.

    The scope of a request gets `request_id`; handlers add the `generation` for the access log.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._turn = asyncio.Semaphore(_BEGIN_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 0
        async with self._turn:
            await asyncio.sleep(0)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        self._set_root_path(scope)

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            if not self._has_key(scope):
                self._metrics.rejected("unauthorized")
                problem = ProblemError(
                    401,
                    "the API key is missing or wrong",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await problem.response()(scope, receive, send_framed)
            else:
                await self._app(scope, receive, send_framed)
        except ClientGoneError:
            status = CLIENT_GONE
            self._metrics.client_left()
        finally:
            seconds = time.monotonic() - begin
            route = scope.get("route")
            method = scope["method"] if scope["method"] in METHODS else "other"  # clients may invent some
            self._metrics.http_request(route.path if route else "none", method, status or 500, seconds)
            if self._settings.access_log:
                _log(scope, status or 500, seconds)

    def _set_root_path(self, scope: Scope) -> None:
        """Accept paths with and without the prefix, as proxies remove it or do not."""
        root = self._settings.root_path.rstrip("/")
        if root:
            scope["root_path"] = root
            if scope["path"] != root and not scope["path"].startswith(root + "/"):
                scope["path"] = root + scope["path"]

    def _has_key(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(self._settings.root_path.rstrip("/"))
        if not self._keys or not path.startswith(PROTECTED):
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = key.strip(" \t").encode("latin-1")  # as headers are decoded; other spaces may be bytes of a key
        return _matches(_digest(sent), self._keys) and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _matches(digest: bytes, known: Sequence[bytes]) -> bool:
    """Compare with all keys: the time says neither which one is close nor how much of it is right."""
    return sum(hmac.compare_digest(digest, one) for one in known) > 0


def _log(scope: Scope, status: int, seconds: float) -> None:
    client = scope["client"][0] if scope.get("client") else "-"
    path = ascii(scope["path"])[1:-1]  # no query and no control characters
    generation, more = scope.get("generation"), ""
    if generation is not None:
        prompts = sum(len(each.prompt) for each in generation.submissions)
        more = f" answer={generation.request_id} prompt_tokens={prompts} completion_tokens={sum(generation.tokens)}"
    moment = time.strftime("%Y-%m-%dT%H:%M:%S")
    line = f"{moment} {client} {scope['method']} {path} {status} {seconds * 1e3:.1f}ms id={scope['request_id']}{more}"
    with contextlib.suppress(OSError):  # a full disk, or a reader that is gone
        print(line, file=sys.stderr, flush=True)
