"""Messages between the HTTP process and rank 0, over a Unix stream socket.

A message is a length of 4 bytes (big-endian) and a msgpack map, whose `kind` says which of the types below it is.
"""

import asyncio
import struct
from typing import Any, BinaryIO, Literal, NotRequired, TypedDict, cast

import msgpack

from stagdist.errors import TransportError

MAX_MESSAGE_BYTES = 256 * 2**20

_LENGTH = struct.Struct(">I")

ScoredToken = tuple[int, float, list[tuple[int, float]]]
"""A token, its log-probability, and (token, log-probability) of the likeliest ones."""


# ---- rank 0 to HTTP ----


class ServedModel(TypedDict):
    """The model as `/v1/models` and the metrics describe it."""

    names: list[str]
    path: str
    created: int
    max_context: int
    vocab_size: int
    sections: int
    stages: int
    tensor: int
    slots: int
    parameters: int
    precision: str
    weights: str
    version: str
    connection: str
    stagger: int
    recurrent: bool


class TokenizerContent(TypedDict):
    """What the HTTP process needs of the tokenizer, as rank 0 loaded it.

    `json` is the `tokenizer.json`; `special_tokens` holds `bos_token`, `eos_token` and others by name.
    """

    json: str
    end_token: str | None
    special_tokens: dict[str, str]
    chat_template: str | None


class Hello(TypedDict):
    """First message of rank 0, before it loads weights. `connection` and `stagger` are keys of its configuration."""

    kind: Literal["hello"]
    model: ServedModel
    tokenizer: TokenizerContent


class State(TypedDict):
    """A change of the engine's state; `reason` is for people."""

    kind: Literal["state"]
    state: Literal["loading", "ready", "draining", "failed"]
    reason: str


class Accepted(TypedDict):
    """A submitted request waits or runs."""

    kind: Literal["accepted"]
    id: str


class Rejected(TypedDict):
    """A submitted request is not served."""

    kind: Literal["rejected"]
    id: str
    code: Literal["queue_full", "not_serving", "invalid"]
    message: str


class Times(TypedDict):
    """Seconds from the submission; None for what has not happened."""

    admitted: float | None
    first_token: float | None
    finished: float | None


FINISH_REASONS = {"cancelled": "abort"}
"""Finish reasons that clients know by another name."""

FAILURES = ("error", "timeout")
"""Finish reasons of a choice that end its request with an error."""


class Output(TypedDict):
    """New tokens and text of a request. `prompt_logprobs` comes once; its first entry is None."""

    id: str
    tokens: list[int]
    text: str
    logprobs: list[ScoredToken] | None
    prompt_logprobs: list[ScoredToken | None] | None
    finish: Literal["stop", "length", "error", "cancelled", "timeout"] | None
    stop: str | int | None
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    times: Times


class Slot(TypedDict):
    """One slot of the engine; `position` counts what its caches hold."""

    request_id: str | None
    phase: Literal["free", "prefill", "decode"]
    position: int
    cached: int


class StageTimes(TypedDict):
    """Seconds that a stage computed and waited since the engine started."""

    rank: int
    stage: int
    compute_s: float
    wait_memory_s: float
    wait_token_s: float
    send_s: float


class Stats(TypedDict):
    """Fields of the engine's `EngineStats`."""

    kind: NotRequired[Literal["stats"]]
    running: int
    waiting: int
    waiting_tokens: int
    steps: int
    operations: int
    slots: list[Slot]
    positions_used: int
    prompt_tokens_total: int
    generation_tokens_total: int
    prefix_queries_total: int
    prefix_hits_total: int
    step_s: float
    stages: list[StageTimes]


class Step(TypedDict):
    """What one operation of the engine brought, for all requests."""

    kind: Literal["step"]
    outputs: list[Output]
    stats: Stats | None


class Exit(TypedDict):
    """Rank 0 asks the HTTP process to end: another one takes its port, or the server stops."""

    kind: Literal["exit"]


# ---- HTTP to rank 0 ----


class Welcome(TypedDict):
    """First message of the HTTP process; `settings` is the `fingerprint` of its `ServerSettings`."""

    kind: Literal["welcome"]
    settings: str


class Submit(TypedDict):
    """A request of the engine: `params` has the fields of `SamplingParams` that are not at their default."""

    kind: Literal["submit"]
    id: str
    prompt: list[int]
    params: dict[str, Any]
    deadline_s: float | None


class Cancel(TypedDict):
    """The client of a request is gone."""

    kind: Literal["cancel"]
    id: str


class Stop(TypedDict):
    """The HTTP process ends, or cannot use what rank 0 sent: `reason`."""

    kind: Literal["stop"]
    reason: str


FromEngine = Hello | State | Accepted | Rejected | Step | Stats | Exit
ToEngine = Welcome | Submit | Cancel | Stop


# ---- framing ----


def pack(message: FromEngine | ToEngine) -> bytes:
    """A message as it is sent.

    Raises:
        TransportError: it is larger than `MAX_MESSAGE_BYTES`.
    """
    body = cast(bytes, msgpack.packb(message))
    _check_length(len(body))
    return _LENGTH.pack(len(body)) + body


def receive(stream: BinaryIO) -> Any:
    """The next message of a buffered blocking stream (`socket.makefile("rb")`), None at its end.

    Raises:
        TransportError: the stream ends within a message, or holds something else.
    """
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    length = _length(head)
    body = stream.read(length)
    if len(body) != length:
        raise TransportError(f"the connection ended after {len(body)} of {length} bytes of a message")
    return _unpack(body)


async def receive_async(stream: asyncio.StreamReader) -> Any:
    """The next message of an asyncio stream, None at its end.

    Raises:
        TransportError: as `receive`.
    """
    try:
        head = await stream.readexactly(_LENGTH.size)
        body = await stream.readexactly(_length(head))
    except asyncio.IncompleteReadError as error:
        if not error.partial and error.expected == _LENGTH.size:
            return None
        raise TransportError(f"the connection ended within a message ({len(error.partial)} bytes of it)") from None
    return _unpack(body)


def _length(head: bytes) -> int:
    if len(head) != _LENGTH.size:
        raise TransportError(f"the connection ended after {len(head)} bytes of the length of a message")
    (length,) = _LENGTH.unpack(head)
    _check_length(length)
    return length


def _check_length(length: int) -> None:
    if length > MAX_MESSAGE_BYTES:
        raise TransportError(f"a message has {length} bytes, at most {MAX_MESSAGE_BYTES}")


def _unpack(body: bytes) -> Any:
    try:
        message = msgpack.unpackb(body)
    except ValueError as error:  # the base of msgpack's errors
        raise TransportError(f"a message is not msgpack: {error}") from error
    if not isinstance(message, dict) or "kind" not in message:
        raise TransportError(f"a message is no map with a `kind`: {str(message)[:80]}")
    return message
