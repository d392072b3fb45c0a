"""What a file holds, by its name and its first bytes; and its bytes, decompressed.

The name decides where it is clear: `.jsonl` holds JSON, `.txt` text. Otherwise the content decides, so that the syntax
of JSON or the bytes of an archive never become text.
"""

import bz2
import io
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, Literal

import fsspec

from stagdist.errors import DataError
from stagdist.files import not_downloaded

Contents = Literal["text", "json_lines", "json_array", "parquet", "arrow"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIX = ".arrow"
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".log", ".csv", ".tsv", ".html", ".css", ".xml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh"),
    *(".sql", ".r", ".lua", ".pl", ".php", ".scala", ".swift", ".kt", ".hs", ".ml", ".el", ".lisp"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg"),
)
DOCUMENT_SUFFIXES = (*TEXT_SUFFIXES, ".jl", *JSON_SUFFIXES, *PARQUET_SUFFIXES, ARROW_SUFFIX)
"""Suffixes of the files that are read in a directory; `.jl` is Julia or JSON lines."""

HUB = "hub:"
"""Begins the name of a dataset of the Hub."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 8192
_CHUNK_BYTES = 1 << 18
_PACKED_BYTES = 1 << 13  # zlib makes at most a thousand times as many of them
_COMPRESSED = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|(?P<xz>\xfd7zXZ\0)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
)
_DECODERS: dict[str, Any] = {
    "gzip": partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
_REFUSED = {
    (b"PK\3\4", b"7z\xbc\xaf", b"Rar!\x1a", b"\x04\x22\x4d\x18"): "an archive; unpack it and give its files",
    (b"%PDF-",): "a PDF; extract its text, for example with pdftotext",
    (b"version https://git-lfs",): "a git-lfs pointer, not the file: run git lfs pull in its directory",
    (b"FEA1",): "Feather of version 1; write it again with pyarrow.feather.write_feather",
}
_JSON_BEGINS = re.compile(rb"""\s*(\{\s*["}]|\[\s*[{\]])""")
# by the quarters of the bytes that are mostly zero
_ENCODINGS = {"0101": "UTF-16LE", "1010": "UTF-16BE", "0111": "UTF-32LE", "1110": "UTF-32BE"}
_MARKED = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\b\x1b"})


def plain_name(path: str) -> str:
    """Lower-case path without the suffix of a compression."""
    stem, suffix = os.path.splitext(path.lower())
    return stem if suffix in COMPRESSIONS else path.lower()


def recognize(path: str) -> tuple[Contents, bool, bool]:
    """What a file holds, whether it is compressed, and whether it is text by its name but looks like records.

    Raises:
        DataError: it holds something else, UTF-16 for example, or is damaged.
    """
    with remote_errors_named(path), open_input(path) as stream:
        head = stream.read(_HEAD_BYTES)
        compressed = is_decompressed(stream)
    if not head:  # nothing is no document, whatever its name
        return "text", compressed, False
    for beginnings, what in _REFUSED.items():
        if head.startswith(beginnings) or (head[257:262] == b"ustar" and "archive" in what):
            raise DataError(f"{path} is {what}")
    name = plain_name(path)
    if name.endswith(PARQUET_SUFFIXES) or head.startswith(b"PAR1\x15"):
        return "parquet", compressed, False
    if name.endswith(ARROW_SUFFIX) or head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
        return "arrow", compressed, False
    if (encoding := _wide_encoding(head)) and not name.endswith(".bin"):  # 16-bit token ids look like UTF-16
        raise DataError(f"{path} is {encoding}; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW")
    controls = len(head) - len(head.translate(None, _CONTROLS))
    named = name.endswith(TEXT_SUFFIXES + JSON_SUFFIXES)
    if controls > 4 + len(head) // 50 or (b"\0" in head and not named):
        raise DataError(f"{path} is not text; convert it to .jsonl, .txt or .parquet, or leave it out")
    head = head.removeprefix(BYTE_ORDER_MARK)
    if name.endswith(JSON_SUFFIXES) or (not named and _looks_like_json(head)):
        return ("json_array" if head.lstrip().startswith(b"[") else "json_lines"), compressed, False
    records = name.endswith((".csv", ".tsv")) or (name.endswith((".txt", ".text", ".log")) and _looks_like_json(head))
    return "text", compressed, records


def holds_records(path: str) -> bool:
    """Whether a file without suffix is JSON lines or parquet, like the `part-00000` of Spark."""
    try:
        return recognize(path)[0] != "text"
    except (DataError, OSError):
        return False


def _looks_like_json(head: bytes) -> bool:
    """Whether a text begins as JSON does, or most of its lines do: the first one may be damaged."""
    lines = [line for line in head.splitlines() if line.strip()]
    return bool(_JSON_BEGINS.match(head)) or sum(map(bool, map(_JSON_BEGINS.match, lines))) * 2 > len(lines)


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by its byte order mark or by its zeros."""
    for mark, encoding in _MARKED.items():
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return None
    quarters = [head[start::4] for start in range(4)]
    return _ENCODINGS.get("".join("01"[quarter.count(0) * 2 > len(quarter)] for quarter in quarters))


def open_input(path: str) -> BinaryIO:
    """Open a local file or a URL for reading, decompressed.

    Raises:
        DataError: a URL cannot be opened, or the file is a pointer of git-lfs, or not compressed as its suffix says; at
            a later read: the compressed file is damaged.
    """
    if "://" not in path:
        if problem := not_downloaded(path, text=True):
            raise DataError(problem)
        packed: BinaryIO = open(path, "rb")  # noqa: SIM115  # the caller closes it
    else:
        with remote_errors_named(path):
            packed = io.BufferedReader(fsspec.open(path, "rb").open())
    head = packed.peek(16)  # type: ignore[attr-defined]
    magic = _COMPRESSED.match(head)
    codec = magic.lastgroup if magic else None
    if head and codec != (suffix := COMPRESSIONS.get(os.path.splitext(path.lower())[1], codec)):
        packed.close()
        raise DataError(f"{path} is damaged: it is not {suffix}; fetch it again, or correct its suffix")
    return packed if codec is None else io.BufferedReader(_Decompressed(path, packed, codec), _CHUNK_BYTES)


def open_seekable(path: str) -> BinaryIO:
    """Open for random access: a compressed file, or one of a server that cannot seek, is copied to a temporary file."""
    stream = open_input(path)
    with suppress(OSError, ValueError):
        stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return stream
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    with stream:
        shutil.copyfileobj(stream, unpacked, _CHUNK_BYTES)
    unpacked.seek(0)
    return unpacked  # type: ignore[return-value]


def is_decompressed(stream: BinaryIO) -> bool:
    """Whether a stream holds the decompressed bytes of a file; only one of `open_seekable` can seek then."""
    return isinstance(stream, io.BufferedRandom) or isinstance(getattr(stream, "raw", None), _Decompressed)


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Errors of a library that reads the bytes of a file become a DataError. Errors of the system pass.

    Raises:
        DataError: the file is damaged.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow and lzma have no common class of errors
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "requires too much memory" in str(error):  # zstd --long, as in dumps of web sites
            raise DataError(f"{path} has a larger window than pyarrow reads; unpack it: zstd -d --long=31") from error
        raise DataError(f"{path} is damaged: {error}; fetch it again") from error


@contextmanager
def remote_errors_named(source: str) -> Iterator[None]:
    """Errors while a URL or a dataset of the Hub is read become a DataError; each library has classes of its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DataError) or not (source.startswith(HUB) or "://" in source):
            raise
        missing = isinstance(error, ImportError)
        remedy = "install what is missing" if missing else "check the name, the credentials and the network"
        raise DataError(f"{source} cannot be read: {type(error).__name__}: {error}; {remedy}") from error


class _Decompressed(io.RawIOBase):
    """Bytes of a compressed file up to its very end: what follows its last stream is damage, not the end."""

    def __init__(self, path: str, packed: BinaryIO, codec: str) -> None:
        self._path, self._packed = path, packed
        self._chunks = _decompress_zstd(packed) if codec == "zstd" else _decompress(packed, codec)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with damage_named(self._path):
            while not self._rest and (chunk := next(self._chunks, None)) is not None:
                self._rest = chunk
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


def _decompress(packed: BinaryIO, codec: str) -> Iterator[bytes]:
    """One stream after the other. Zeros may follow a stream (padding of a tape or an archive), nothing else may."""
    decoder: Any = None
    while data := packed.read(_PACKED_BYTES):
        while data and (decoder or (data := data.lstrip(b"\0"))):
            decoder = decoder or _DECODERS[codec]()
            yield decoder.decompress(data, 0 if codec == "gzip" else _CHUNK_BYTES)
            while not (decoder.eof or getattr(decoder, "needs_input", True)):
                yield decoder.decompress(b"", _CHUNK_BYTES)
            data = decoder.unused_data
            decoder = None if decoder.eof else decoder
    if decoder:
        raise EOFError("it is cut off")


def _decompress_zstd(packed: BinaryIO) -> Iterator[bytes]:
    import pyarrow

    stream = pyarrow.CompressedInputStream(packed, "zstd")
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
