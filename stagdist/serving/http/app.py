"""The routes of the server."""

import asyncio
import contextlib
import ctypes
import json
from collections.abc import AsyncGenerator, Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stagdist.serving.api.chat import prepare_chat
from stagdist.serving.api.completions import prepare_completion
from stagdist.serving.api.openapi import openapi
from stagdist.serving.api.prepared import PreparedRequest, parse_json
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.api.served_model import ModelView
from stagdist.serving.api.wire import DetokenizeRequest, TokenizeRequest, parse_model
from stagdist.serving.http.engine_client import EngineClient
from stagdist.serving.http.middleware import RequestMiddleware
from stagdist.serving.http.server_metrics import ServerMetrics
from stagdist.serving.http.streams import ClientGoneError, EventStream, answer_events, complete_answer, unless_gone
from stagdist.serving.settings import ServerSettings

PAGE = Path(__file__).resolve().parents[1] / "page"
PAGE_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NOT_SERVED = (
    *("audio/speech", "audio/transcriptions", "embeddings", "images/generations", "messages", "moderations"),
    *("rerank", "responses", "score"),
)
"""Endpoints of other servers below /v1/, answered with 501."""

EVENTS_INTERVAL_S = 0.2
MAX_LISTENERS = 64

_SMALL_BODY = 4096
"""Bytes of a body that is checked and encoded at once; larger ones would keep others waiting."""

_LARGE_BODY = 1 << 20
"""Bytes of a body that takes much memory to encode, which is returned to the system afterwards; one at a time."""

_DISCARDED = 16
"""A body above the limit is read up to this multiple of it, since clients that still write miss the answer."""

Preparation = Callable[[Any, ModelView, int], PreparedRequest]
Conversion = Callable[[Any, ModelView], dict[str, Any]]


def make_app(settings: ServerSettings, client: EngineClient, metrics: ServerMetrics) -> ASGIApp:
    """The application of the server."""
    routed = Starlette(routes=_Server(settings, client, metrics).routes(), exception_handlers=_HANDLERS)
    routed.router.redirect_slashes = False  # the address of a redirection would come from the client's Host header
    app: ASGIApp = RequestMiddleware(routed, settings, metrics)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


async def _show_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return error.response()


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is no such path", 405: f"{request.method} is not allowed here"}
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return ProblemError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _show_crash(request: Request, error: Exception) -> Response:
    return ProblemError(500, "the server failed; its log has the reason").response()


_HANDLERS: dict[Any, Any] = {
    ProblemError: _show_problem,
    HTTPException: _show_http_error,
    Exception: _show_crash,
}


class _Server:
    """Handlers of all paths."""

    def __init__(self, settings: ServerSettings, client: EngineClient, metrics: ServerMetrics) -> None:
        self._settings, self._client, self._metrics = settings, client, metrics
        self._listeners = 0
        self._large_body = asyncio.Lock()
        self._page = {file.name: file for file in PAGE.glob("*") if file.suffix in PAGE_TYPES}

    def routes(self) -> list[Route]:
        get, post = ["GET"], ["POST"]
        return [
            Route("/v1/models", self._models, methods=get),
            Route("/v1/models/{name:path}", self._model, methods=get),
            Route("/v1/completions", partial(self._generate, prepare=prepare_completion), methods=post),
            Route("/v1/chat/completions", partial(self._generate, prepare=prepare_chat), methods=post),
            *(Route(f"/v1/{name}", self._not_served, methods=post) for name in NOT_SERVED),
            Route("/tokenize", partial(self._convert, convert=_tokenized), methods=post),
            Route("/detokenize", partial(self._convert, convert=_detokenized), methods=post),
            Route("/tokenizer_info", self._tokenizer_info, methods=get),
            Route("/health", self._health, methods=get),
            Route("/ping", self._health, methods=get),
            Route("/live", self._live, methods=get),
            Route("/live/events", self._live_events, methods=get),
            Route("/version", self._version, methods=get),
            Route("/metrics", self._show_metrics, methods=get),
            Route("/slots", self._slots, methods=get),
            Route("/openapi.json", self._openapi, methods=get),
            Route("/", self._index, methods=get),
            Route("/page/{name}", self._page_file, methods=get),
        ]

    # ---- text ----

    async def _generate(self, request: Request, prepare: Preparation) -> Response:
        served = self._client.require_ready()
        self._client.require_place()
        limit = self._settings.max_queued_requests
        prepared = await self._from_body(request, lambda body: prepare(body, served, limit))
        generation = self._client.submit(prepared.id, prepared.submissions, prepared.fields.deadline_s)
        self._metrics.submitted(generation, prepared.n)
        request.scope["generation"] = generation
        try:
            await unless_gone(request.receive, generation.accepted())
            if prepared.fields.stream:
                return EventStream(answer_events(prepared, generation))
            answer = await unless_gone(request.receive, complete_answer(prepared, generation))
        except BaseException:
            generation.cancel()
            raise
        return Response(answer, media_type="application/json")

    async def _from_body(self, request: Request, work: Callable[[Any], Any]) -> Any:
        """Result of `work` on the decoded body; large bodies are worked on in a thread."""
        body = await self._read_body(request)
        if len(body) <= _SMALL_BODY:
            return work(parse_json(body))
        if len(body) < _LARGE_BODY:
            return await asyncio.to_thread(lambda: work(parse_json(body)))
        async with self._large_body:
            try:
                return await asyncio.to_thread(lambda: work(parse_json(body)))
            finally:
                ctypes.CDLL(None).malloc_trim(0)  # the C library would keep it

    async def _read_body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ProblemError(415, f"the body must be application/json; it is {kind[:80]!r}")
        if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise ProblemError(415, f"the body must not be compressed; its Content-Encoding is {coding[:80]!r}")
        limit, size, chunks = self._settings.max_body_bytes, 0, []
        close = {"Connection": "close"}
        too_large = ProblemError(413, f"the body is larger than {limit} bytes", headers=close)
        if request.headers.get("expect") and int(request.headers.get("content-length", "0")) > limit:
            raise too_large  # the client waits with the body
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        chunks.append(chunk)
                    elif size > limit * _DISCARDED:
                        break
        except TimeoutError:
            message = f"the body did not arrive within {self._settings.body_timeout_s:g} s"
            raise ProblemError(408, message, headers=close) from None
        except ClientDisconnect:
            raise ClientGoneError from None
        if size > limit:
            self._metrics.rejected("too_large")
            raise too_large
        return b"".join(chunks)

    async def _not_served(self, request: Request) -> Response:
        raise ProblemError(501, f"{request.url.path} is not served; use /v1/completions or /v1/chat/completions")

    # ---- models and tokens ----

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._served().objects()})

    async def _model(self, request: Request) -> Response:
        served = self._served()
        name = served.check_name(request.path_params["name"])
        return JSONResponse(next(each for each in served.objects() if each["id"] == name))

    def _served(self) -> ModelView:
        return self._client.served or self._client.require_ready()

    async def _convert(self, request: Request, convert: Conversion) -> Response:
        served = self._served()
        return JSONResponse(await self._from_body(request, lambda body: convert(body, served)))

    async def _tokenizer_info(self, request: Request) -> Response:
        served = self._served()
        tokenizer = served.tokenizer
        names = {name: served.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **names,
                "eos_token": names["eos_token"] or tokenizer.end_token,
                "chat_template": served.template_source,
                "vocab_size": served.model["vocab_size"],
                "model_max_length": served.model["max_context"],
            }
        )

    # ---- state ----

    async def _health(self, request: Request) -> Response:
        state, reason = self._client.health()
        if state == "ready":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": state, "reason": reason}, 503, {"Retry-After": "5", "Cache-Control": "no-store"})

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _version(self, request: Request) -> Response:
        served = self._client.served
        return JSONResponse({"version": served.model["version"] if served else None})

    async def _show_metrics(self, request: Request) -> Response:
        self._metrics.healthy = self._client.health()[0] == "ready"
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

    def _state(self) -> dict[str, Any]:
        state, reason = self._client.health()
        return {"state": state, "reason": reason, "stats": self._client.stats}

    async def _slots(self, request: Request) -> Response:
        state = self._state()
        slots = state["stats"]["slots"] if state["stats"] else []
        if "fail_on_no_slot" in request.query_params and not any(slot["phase"] == "free" for slot in slots):
            raise ProblemError(503, "no slot is free", code="no_slot", retry_after_s=1)
        return JSONResponse(state)

    async def _live_events(self, request: Request) -> Response:
        if self._listeners >= MAX_LISTENERS:
            raise ProblemError(503, f"{MAX_LISTENERS} pages listen already", retry_after_s=30)
        return _EndlessStream(self._state_events())

    async def _state_events(self) -> AsyncGenerator[bytes, None]:
        self._listeners += 1
        shown: Any = None
        try:
            yield b"retry: 2000\n\n"
            while not self._client.finished.is_set():
                state = self._state()
                current = (self._client.stats_number, state["state"])
                if current != shown:
                    shown = current
                    yield b"data: " + json.dumps(state).encode() + b"\n\n"
                await asyncio.sleep(EVENTS_INTERVAL_S)
        finally:
            self._listeners -= 1

    async def _openapi(self, request: Request) -> Response:
        served = self._client.served
        return JSONResponse(openapi(served.model["version"] if served else "0", self._settings))

    # ---- page ----

    async def _index(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")

    async def _page_file(self, request: Request) -> Response:
        file = self._page.get(request.path_params["name"])
        if file is None:
            raise ProblemError(404, "the page has no such file")
        return FileResponse(file, headers=PAGE_HEADERS, media_type=PAGE_TYPES[file.suffix])


class _EndlessStream(EventStream):
    """Events until the client leaves, which is no loss."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and all events."""
        with contextlib.suppress(ClientGoneError):
            await super().__call__(scope, receive, send)


def _tokenized(body: Any, served: ModelView) -> dict[str, Any]:
    fields = parse_model(TokenizeRequest, body)
    served.check_name(fields.model)
    text = fields.content if fields.prompt is None else fields.prompt
    if (text is None) == (fields.messages is None):
        raise ProblemError(400, "give `prompt` or `messages`", param="prompt")
    if fields.messages is not None:
        messages = [message.model_dump() for message in fields.messages]
        ids = served.encode_chat(messages, add_generation_prompt=fields.add_generation_prompt)
    else:
        ids = served.encode(
            text or "", add_special_tokens=fields.add_special_tokens, parse_special=fields.parse_special
        )
    names = [served.texts.name(token) for token in ids] if fields.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.model["max_context"], "tokens": ids, "token_strs": names}


def _detokenized(body: Any, served: ModelView) -> dict[str, Any]:
    fields = parse_model(DetokenizeRequest, body)
    served.check_name(fields.model)
    size = served.model["vocab_size"]
    if (wrong := next((token for token in fields.tokens if token >= size), None)) is not None:
        raise ProblemError(400, f"tokens holds {wrong}; the vocabulary has {size}", param="tokens")
    text = served.tokenizer.decode(fields.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}
