"""Where documents come from: files, directories, globs and Hugging Face data sets, cut into pieces.

A *piece* is a part of the input that one process can read by itself and that fits in memory: a byte range of a big
file, a group of small files, a row group, a shard. The list of pieces depends on the input and the options alone,
never on the number of processes, so any division of the pieces gives the same documents in the same order.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from stagdist.errors import ConfigError, DataError

PIECE_BYTES = 2 << 20
BLOCK_BYTES = 16 << 10
AUTO_WHOLE_BYTES = 256 << 10
_FILES_PER_PIECE = 256
_ROWS_PER_PIECE = 2000

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".log", ".csv", ".tsv", ".html", ".css", ".xml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh"),
    *(".sql", ".r", ".jl", ".lua", ".pl", ".php", ".scala", ".swift", ".kt", ".hs", ".ml", ".el", ".lisp"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg"),
)

HUB = "hub:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

PieceKind = Literal["files", "blocks", "paragraphs", "lines", "json_lines", "json_whole", "parquet", "rows", "shard"]


@dataclass(frozen=True)
class ReadOptions:
    """How input becomes documents."""

    text_key: str = "text"
    txt_documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    bad_utf8: Literal["error", "replace", "skip"] = "error"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    split_name: str = "train"
    config_name: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of the input that one process reads by itself.

    `start` and `stop` are bytes of a file, row groups of a parquet file or rows of a data set; of a streamed data
    set, the shard and the number of shards. `size` is its share of the work (bytes where they are known).
    """

    kind: PieceKind
    source: str
    start: int = 0
    stop: int = 0
    size: int = 0
    files: tuple[str, ...] = ()


def plan_pieces(inputs: Sequence[str], options: ReadOptions, *, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Cut inputs into pieces, in the order given; files of a directory or glob by name.

    Args:
        piece_bytes: size at which big files are cut; a multiple of BLOCK_BYTES. Documents do not depend on it.

    Raises:
        DataError: an input does not exist or is of a kind that cannot be read.
    """
    if not inputs:
        raise ConfigError("no input; give files, directories, globs or the name of a data set")
    pieces: list[Piece] = []
    plain: list[tuple[str, int]] = []
    for path in _expand(inputs, options):
        if not path.startswith(HUB) and _is_plain(path) and _whole(path, options):
            plain.append((path, os.path.getsize(path)))
            continue
        pieces += _grouped(plain)
        plain = []
        pieces += _pieces_of(path, options, piece_bytes)
    return pieces + _grouped(plain)


def _expand(inputs: Sequence[str], options: ReadOptions) -> Iterator[str]:
    for entry in inputs:
        if entry.startswith(HUB) or os.path.isfile(entry):
            yield entry
        elif os.path.isdir(entry):
            yield from _walk(entry, options)
        elif glob.has_magic(entry):
            found = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path))
            if not found:
                raise DataError(f"no file matches {entry}; correct the pattern (quote it, so that the shell leaves it)")
            yield from found
        elif _looks_like_hub_name(entry):
            yield HUB + entry
        else:
            raise DataError(f"input {entry} does not exist; give a file, directory, glob or the name of a data set")


def _walk(directory: str, options: ReadOptions) -> Iterator[str]:
    known = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, directory)
            wanted = _matches(relative, options.include) if options.include else name.lower().endswith(known)
            if wanted and not name.startswith(".") and not _matches(relative, options.exclude):
                found.append(path)
    if not found:
        raise DataError(f"directory {directory} holds no file to read; name other suffixes with --include '*.ext'")
    return iter(sorted(path for path in found if os.path.isfile(path)))


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) or fnmatch(os.path.basename(path), pattern) for pattern in patterns)


def _looks_like_hub_name(entry: str) -> bool:
    """`owner/name`, but not a path into a directory that exists or a file name that is mistyped."""
    if not _HUB_NAME.fullmatch(entry) or entry.lower().endswith(TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES):
        return False
    return not os.path.isdir(os.path.dirname(entry))


def _is_plain(path: str) -> bool:
    return not path.lower().endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)


def _whole(path: str, options: ReadOptions) -> bool:
    """Whether a text file is one document."""
    if options.txt_documents == "auto":
        return os.path.getsize(path) <= AUTO_WHOLE_BYTES
    return options.txt_documents == "file"


def _grouped(files: list[tuple[str, int]]) -> list[Piece]:
    """Small text files, together up to a piece's size."""
    pieces: list[Piece] = []
    group: list[str] = []
    size = 0
    for path, file_size in files:
        if group and (size + file_size > PIECE_BYTES // 2 or len(group) == _FILES_PER_PIECE):
            pieces.append(Piece("files", group[0], size=size, files=tuple(group)))
            group, size = [], 0
        group.append(path)
        size += file_size
    if group:
        pieces.append(Piece("files", group[0], size=size, files=tuple(group)))
    return pieces


def _pieces_of(path: str, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    if path.startswith(HUB):
        return _hub_pieces(path, options)
    name, size = path.lower(), os.path.getsize(path)
    if name.endswith(PARQUET_SUFFIXES):
        return _parquet_pieces(path)
    if name.endswith(".gz") or (name.endswith(".json") and _starts_with_bracket(path)):
        return [Piece("json_whole", path, 0, size, size)]
    if name.endswith(JSON_SUFFIXES):
        kind: PieceKind = "json_lines"
    else:
        kinds: dict[str, PieceKind] = {"auto": "blocks", "paragraph": "paragraphs", "line": "lines"}
        kind = kinds[options.txt_documents]
    stops = [*range(piece_bytes, size, piece_bytes), size] if size else []
    starts = [0, *stops[:-1]]
    return [Piece(kind, path, start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]


def _starts_with_bracket(path: str) -> bool:
    with open(path, "rb") as stream:
        return stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _parquet_pieces(path: str) -> list[Piece]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error
    return [Piece("parquet", path, index, index + 1, size) for index, size in enumerate(sizes)]


def _hub_pieces(name: str, options: ReadOptions) -> list[Piece]:
    data_set = open_hub(name, options)
    if options.streaming:
        shards = int(data_set.num_shards)
        return [Piece("shard", name, index, shards, 1) for index in range(shards)]
    rows = len(data_set)
    edges = range(0, rows, _ROWS_PER_PIECE)
    return [
        Piece("rows", name, start, min(start + _ROWS_PER_PIECE, rows), min(_ROWS_PER_PIECE, rows - start))
        for start in edges
    ]


def open_hub(name: str, options: ReadOptions) -> Any:
    """Open a data set by name with the `datasets` library; streamed, or downloaded into its cache.

    Raises:
        DataError: it does not exist, cannot be reached, or lacks the split.
    """
    import datasets

    try:
        return datasets.load_dataset(
            name.removeprefix(HUB), options.config_name, split=options.split_name, streaming=options.streaming
        )
    except Exception as error:  # network, missing names, missing splits: the library has no common base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load the data set {name.removeprefix(HUB)} (split {options.split_name}): {reason}; check the "
            "name, --split-name, --config-name and the network"
        ) from error
