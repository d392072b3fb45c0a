"""Messages on the socket between the HTTP process and rank 0."""

import asyncio
import io
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest

from stagdist.errors import ConfigError, TransportError
from stagdist.serving import protocol
from stagdist.serving.protocol import pack, receive, receive_async
from stagdist.serving.settings import ServerSettings, engine_socket

MESSAGE: Any = {"kind": "cancel", "id": "é"}


def both(data: bytes) -> list[Any]:
    """The first message as each side reads it; errors as they are."""

    async def read() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await receive_async(reader)

    results: list[Any] = []
    for function in (lambda: receive(io.BytesIO(data)), lambda: asyncio.run(read())):
        try:
            results.append(function())
        except TransportError as error:
            results.append(error)
    return results


def test_a_message_comes_back() -> None:
    assert both(pack(MESSAGE)) == [MESSAGE, MESSAGE]
    assert both(b"") == [None, None]


def test_messages_follow_each_other() -> None:
    stream = io.BytesIO(pack(MESSAGE) + pack({"kind": "exit"}))
    assert [receive(stream), receive(stream), receive(stream)] == [MESSAGE, {"kind": "exit"}, None]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00\x00", "ended"),
        (pack(MESSAGE)[:-1], "ended"),
        (b"\xff\xff\xff\xff", "at most"),
        (struct.pack(">I", 1) + b"\xc1", "not msgpack"),
        (struct.pack(">I", 1) + b"\x01", "no map"),
        (struct.pack(">I", 1) + b"\x80", "no map"),
    ],
)
def test_what_is_no_message(data: bytes, words: str) -> None:
    for error in both(data):
        assert isinstance(error, TransportError), error
        assert words in str(error)


def test_a_message_above_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", 8)
    with pytest.raises(TransportError, match="at most 8"):
        pack(MESSAGE)


def test_no_code_travels() -> None:
    """msgpack has plain values only; an extension type stays data."""
    body = msgpack.packb({"kind": "x", "value": msgpack.ExtType(5, b"cos\nsystem")})
    (first, _) = both(struct.pack(">I", len(body)) + body)
    assert isinstance(first["value"], msgpack.ExtType)


def test_the_socket_is_in_a_folder_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = engine_socket("127.0.0.1", 8000, "run")
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path not in (engine_socket("127.0.0.1", 8001, "run"), engine_socket("127.0.0.1", 8000, "other"))
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        engine_socket("127.0.0.1", 8000, "run")


def test_the_fingerprint_shows_no_key_and_changes_with_it() -> None:
    settings = [ServerSettings(engine_socket="/s", api_keys=(key,)) for key in ("first-key", "second-key")]
    assert settings[0].fingerprint() != settings[1].fingerprint()
    assert "first-key" not in settings[0].fingerprint() + repr(settings[0])
