"""Documents of one piece of input (see `stagdist.data.prepare.sources`).

A byte range owns the documents that begin in it: its reader continues past the end for the last one, and skips what
began before the start. So every document is read exactly once, wherever a file is split.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

from stagdist.data.prepare.columns import Columnar, column_texts
from stagdist.data.prepare.formats import (
    BYTE_ORDER_MARK,
    is_decompressed,
    open_input,
    open_seekable,
    remote_errors_named,
)
from stagdist.data.prepare.sources import BLOCK_BYTES, PIECE_BYTES, Piece, ReadOptions, listed, open_dataset
from stagdist.errors import DataError

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_BAD_BYTE = re.compile("[\udc80-\udcff]")


@dataclass
class Reader:
    """Reads pieces; counts the documents that it left out."""

    options: ReadOptions
    skipped_empty: int = 0
    skipped_bad: int = 0

    def documents(self, pieces: Iterable[Piece]) -> Iterator[str]:
        """Texts of pieces, in order; empty ones are left out.

        Raises:
            DataError: a file is damaged, not text, or lacks the key.
        """
        for text in chain.from_iterable(map(self._texts, pieces)):
            if text is None:
                self.skipped_bad += 1
            elif not text.strip():
                self.skipped_empty += 1
            else:
                yield text

    def _texts(self, piece: Piece) -> Iterator[str | None]:
        match piece.kind:
            case "file":
                return self._file(piece)
            case "json_lines":
                return self._json_lines(piece)
            case "json_array":
                return self._json_array(piece)
            case "parquet" | "arrow":
                return self._columns(piece, piece.kind)
            case "shard":
                return self._rows(piece)
        return self._cut_text(piece)

    def _file(self, piece: Piece) -> Iterator[str | None]:
        with _opened(piece.source) as stream:
            if raw := stream.read():  # a file of 0 bytes holds no document, not an empty one
                yield self._plain(raw, piece.source, 0)

    def _cut_text(self, piece: Piece) -> Iterator[str | None]:
        with _opened(piece.source, seekable=piece.kind != "lines") as stream:
            cut = {"lines": _lines, "blocks": _blocks}.get(piece.kind, _paragraphs)
            for position, raw in cut(stream, piece):
                text = raw if piece.kind == "lines" else raw.lstrip(b"\r\n")
                yield self._plain(text.rstrip(b"\r\n"), piece.source, position + len(raw) - len(text))

    def _plain(self, raw: bytes, path: str, position: int) -> str | None:
        text = raw.removeprefix(BYTE_ORDER_MARK) if position == 0 else raw
        return self._decode(text, path, position + len(raw) - len(text))

    def _decode(self, raw: bytes, path: str, position: int) -> str | None:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.options.bad_utf8 == "skip":
                return None
            if self.options.bad_utf8 == "replace":
                return raw.decode("utf-8", "replace")
            raise DataError(
                f"{path} is not UTF-8 (byte 0x{raw[error.start]:02x} at {position + error.start}); convert it (for "
                "example iconv -f LATIN1 -t UTF-8), leave it out (--exclude), or choose --bad-utf8 skip or replace"
            ) from error

    def _json_lines(self, piece: Piece) -> Iterator[str | None]:
        with _opened(piece.source) as stream:
            for position, line in _lines(stream, piece):
                line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    text, place = self._decode(line, piece.source, position), f"{piece.source}, at byte {position}"
                    yield None if text is None else self._text_of(_parse(text, piece.source, position), place)

    def _json_array(self, piece: Piece) -> Iterator[str | None]:
        path, skip = piece.source, self.options.bad_utf8 == "skip"
        with _opened(path) as stream:
            raw = stream.read().removeprefix(BYTE_ORDER_MARK)
            content = raw.decode("utf-8", "surrogateescape") if skip else self._decode(raw, path, 0)
            for index, record in enumerate(_parse(content or "", path, 0)):
                value = record.get(self.options.text_key) if skip and isinstance(record, dict) else None
                bad = isinstance(value, str) and _BAD_BYTE.search(value)
                yield None if bad else self._text_of(record, f"{path}, record {index}")

    def _text_of(self, record: Any, place: str) -> str:
        """Text of a record; of null, which is a document without text, the empty one."""
        key = self.options.text_key
        if not isinstance(record, dict):
            raise DataError(f"{place}: the record is {_named(record)}, not an object with the key {key!r}")
        text = record.get(key, 0)
        if isinstance(text, str):
            return repaired(text)
        if text is None:
            return ""
        fault = f"no text under the key {key!r}"
        if key in record:
            fault = f"the value under {key!r} is {_named(text)}, not text"
        keys = listed(list(map(str, record)))
        raise DataError(f"{place}: {fault}, its keys are {keys}; choose with --text-key, or remove that record")

    def _columns(self, piece: Piece, kind: Columnar) -> Iterator[str | None]:
        for row in column_texts(piece.source, kind, piece.start, piece.stop, self.options.text_key):
            yield "" if row is None else self._decode(row, f"a text in {piece.source}", 0)

    def _rows(self, piece: Piece) -> Iterator[str | None]:
        with remote_errors_named(piece.source):
            for row in open_dataset(piece.source, self.options).shard(piece.stop, piece.start):
                yield self._text_of(row, piece.source)


@contextmanager
def _opened(path: str, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """An input, decompressed. What looks wrong in a compressed file is damage if the archive does not read to its end.

    Raises:
        DataError: a compressed file is damaged.
    """
    with remote_errors_named(path), (open_seekable if seekable else open_input)(path) as stream:
        try:
            yield stream
        except DataError as error:
            if not is_decompressed(stream):
                raise
            while stream.read(PIECE_BYTES):
                pass
            raise DataError(f"{error} (bytes are counted in the decompressed text)") from error


def _named(value: Any) -> str:
    """The type of a value in words."""
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return {**names, bool: "true or false", type(None): "null"}.get(type(value), f"of type {type(value).__name__}")


def repaired(text: str) -> str:
    r"""Text that can be written as UTF-8: halves of surrogate pairs (JSON's \ud800) become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parse(text: str, path: str, position: int) -> Any:
    try:
        try:
            return json.loads(text)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise
            return json.loads(text, parse_int=float)  # an integer of more digits than Python takes
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        remedy = "correct or remove that record"
        if text.strip() == "{" or "Extra data" in str(reason):
            remedy = "write each record on one line, or all in one array"
        raise DataError(f"{path} is not JSON at byte {position}: {reason}; {remedy}") from error


def _lines(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in a byte range, with their positions."""
    position = piece.start
    if piece.start:
        stream.seek(piece.start - 1)
        position += len(stream.readline()) - 1
    while piece.stop is None or position < piece.stop:
        line = stream.readline()
        if not line:
            return
        yield position, line
        position += len(line)


def _paragraphs(stream: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    for position, text in _blocks(stream, piece, PIECE_BYTES):
        start = 0
        for blank in _BLANK_LINE.finditer(text):
            yield position + start, text[start : blank.start()]
            start = blank.end()
        yield position + start, text[start:]


def _blocks(stream: BinaryIO, piece: Piece, window: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Parts of a text of about `window` bytes that begin in a byte range, split at blank lines."""
    size = stream.seek(0, io.SEEK_END)
    end = size if piece.stop is None else piece.stop
    start = _boundary(stream, piece.start, size, window)
    for edge in range(piece.start + window, end + window, window):
        stop = _boundary(stream, min(edge, end), size, window)
        if stop > start:
            stream.seek(start)
            yield start, stream.read(stop - start)
        start = stop


def _boundary(stream: BinaryIO, position: int, size: int, window: int) -> int:
    """First place to cut at or after a position: a blank line within `window`, else a line, else a character."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    stream.seek(position - 1)
    text = stream.read(window + 1)
    if blank := _BLANK_LINE.search(text):
        return position - 1 + blank.end()
    newline = text.find(b"\n")
    if newline >= 0:
        return position + newline
    # 0b10xxxxxx continues a UTF-8 character
    continued = next((offset for offset, byte in enumerate(text[1:]) if byte & 0xC0 != 0x80), 0)
    return position + continued
