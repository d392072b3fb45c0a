"""Documents of one piece of input (see `stagdist.data.prepare.sources`).

A byte range owns the documents that begin in it: its reader continues past the end for the last one, and skips what
began before the start. So every document is read exactly once, wherever a file is split.
"""

import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from stagdist.data.prepare.sources import (
    BLOCK_BYTES,
    PIECE_BYTES,
    Piece,
    ReadOptions,
    compression,
    is_text_name,
    open_dataset,
    open_input,
)
from stagdist.errors import DataError

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Reader:
    """Reads pieces in one process; counts the documents that it left out."""

    options: ReadOptions
    skipped_empty: int = 0
    skipped_bad: int = 0
    _datasets: dict[str, Any] = field(default_factory=dict)

    def documents(self, piece: Piece) -> Iterator[str]:
        """Texts of a piece, in order; empty ones are left out.

        Raises:
            DataError: the file is damaged, not text, or lacks the key.
        """
        for text in self._texts(piece):
            if text is None:
                self.skipped_bad += 1
            elif not text.strip():
                self.skipped_empty += 1
            else:
                yield text

    def _texts(self, piece: Piece) -> Iterator[str | None]:
        readers = {"files": self._files, "json_lines": self._json, "json_array": self._json, "parquet": self._parquet,
                   "rows": self._rows, "shard": self._rows}  # fmt: skip
        return readers.get(piece.kind, self._cut_text)(piece)

    def _files(self, piece: Piece) -> Iterator[str | None]:
        for path in piece.files:
            with _opened(path) as stream:
                raw = stream.read()
            yield self._decode(raw, path, 0)

    def _cut_text(self, piece: Piece) -> Iterator[str | None]:
        with _opened(piece.source, seekable=piece.kind != "lines") as stream:
            if piece.kind == "lines":
                for position, line in _lines(stream, piece):
                    yield self._decode(line.rstrip(b"\r\n"), piece.source, position)
                return
            window = BLOCK_BYTES if piece.kind == "blocks" else PIECE_BYTES
            for start, raw in _blocks(stream, piece, window):
                parts = [raw] if piece.kind == "blocks" else _BLANK_LINE.split(raw)
                for part in parts:
                    yield self._decode(part.strip(b"\r\n"), piece.source, start)

    def _decode(self, raw: bytes, path: str, position: int) -> str | None:
        if position == 0:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if b"\0" in raw[:8192] and not is_text_name(path):
                raise DataError(f"{path} is not text; convert it to .jsonl, .txt or .parquet, or leave it out")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.options.bad_utf8 == "skip":
                return None
            if self.options.bad_utf8 == "replace":
                return raw.decode("utf-8", "replace")
            raise DataError(
                f"{path} is not UTF-8 (byte 0x{raw[error.start]:02x} at {position + error.start}); convert it "
                "(iconv -t utf-8), leave it out (--exclude), or choose --bad-utf8 skip or replace"
            ) from error

    def _json(self, piece: Piece) -> Iterator[str | None]:
        with _opened(piece.source) as stream:
            if piece.kind == "json_lines":
                for position, line in _lines(stream, piece):
                    yield from self._json_line(line, piece.source, position)
                return
            records = _parse(stream.read(), piece.source, 0)
        for index, record in enumerate(records):
            yield self._text_of(record, f"{piece.source}, record {index}")

    def _json_line(self, line: bytes, path: str, position: int) -> Iterator[str | None]:
        if position == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            return
        if self.options.bad_utf8 != "error":
            text = self._decode(line, path, position)
            if text is None:
                yield None
                return
            line = text.encode()
        yield self._text_of(_parse(line, path, position), f"{path}, at byte {position}")

    def _text_of(self, record: Any, place: str) -> str:
        text = record.get(self.options.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = f"its keys are {', '.join(map(str, record))}" if isinstance(record, dict) else "it is not an object"
            raise DataError(f"{place}: no text under the key {self.options.text_key!r}, {keys}; choose with --text-key")
        return repaired(text)

    def _parquet(self, piece: Piece) -> Iterator[str | None]:
        import pyarrow.parquet

        key = self.options.text_key
        with open_input(piece.source) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            if key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"{piece.source} has no column {key!r} but {columns}; choose with --text-key")
            for batch in file.iter_batches(256, row_groups=[piece.start], columns=[key]):
                for text in batch.column(0).to_pylist():
                    yield self._text_of({key: text if text is not None else ""}, piece.source)

    def _rows(self, piece: Piece) -> Iterator[str | None]:
        if piece.source not in self._datasets:
            self._datasets[piece.source] = open_dataset(piece.source, self.options)
        dataset = self._datasets[piece.source]
        if piece.kind == "shard":
            rows = dataset if piece.stop == 1 else dataset.shard(num_shards=piece.stop, index=piece.start)
        else:
            rows = (dataset[index] for index in range(piece.start, piece.start + piece.size))
        for row in rows:
            yield self._text_of(row, piece.source)


@contextmanager
def _opened(path: str, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """An input, decompressed; a compressed one that must be seekable is first unpacked into a temporary file.

    Raises:
        DataError: a compressed file is damaged.
    """
    with open_input(path) as stream:
        try:
            if not (seekable and compression(path)):
                yield stream
                return
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked, PIECE_BYTES)
                yield unpacked  # type: ignore[misc]
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if compression(path) is None or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise DataError(f"{path} is damaged: {error}; fetch it again") from error


def repaired(text: str) -> str:
    r"""Text that can be written as UTF-8: halves of surrogate pairs (JSON's \ud800) become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parse(raw: bytes, path: str, position: int) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path} is not JSON at byte {position}: {error}; correct or remove that record") from error


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


def _blocks(stream: BinaryIO, piece: Piece, window: int) -> Iterator[tuple[int, bytes]]:
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
    blank = _BLANK_LINE.search(text)
    if blank:
        return position - 1 + blank.end()
    newline = text.find(b"\n")
    if newline >= 0:
        return position + newline
    # 0b10xxxxxx continues a UTF-8 character
    continued = next((offset for offset, byte in enumerate(text[1:]) if byte & 0xC0 != 0x80), 0)
    return position + continued
