"""Where documents come from: files, directories, globs, URLs and Hugging Face datasets, split into pieces.

A *piece* is a part of the input that one process can read: a byte range of a large file, a group of small files, a
compressed file, a row group, a shard. The list of pieces depends on the input and the options alone, never on the
number of processes, so any division of the pieces gives the same documents in the same order.

Files are opened by fsspec: compressed ones (.gz, .bz2, .xz, .zst) are decompressed, and URLs such as `s3://` or `gs://`
name files of object stores.
"""

import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, BinaryIO, Literal

import fsspec

from stagdist.errors import ConfigError, DataError
from stagdist.files import not_downloaded

PIECE_BYTES = 2 << 20
BLOCK_BYTES = 16 << 10
AUTO_WHOLE_BYTES = 256 << 10
_FILES_PER_PIECE = 256
_ROWS_PER_PIECE = 2000

JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIX = ".arrow"
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Name of the compression by suffix. fsspec decompresses the first three; pyarrow zstd, which fsspec would read without
noticing that a file is cut off."""
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".log", ".csv", ".tsv", ".html", ".css", ".xml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh"),
    *(".sql", ".r", ".jl", ".lua", ".pl", ".php", ".scala", ".swift", ".kt", ".hs", ".ml", ".el", ".lisp"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg"),
)

HUB = "hub:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

PieceKind = Literal["files", "blocks", "paragraphs", "lines", "json_lines", "json_array", "parquet", "rows", "shard"]
DOCUMENT_SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES + (ARROW_SUFFIX,)


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
    """A part of the input that one process reads.

    `start` and `stop` are bytes of a file, row groups of a parquet file or rows of a dataset; for a streamed dataset,
    the shard and the number of shards. `stop` is None for a compressed file, which one process reads completely. `size`
    is the share of the work (bytes if they are known).
    """

    kind: PieceKind
    source: str
    start: int = 0
    stop: int | None = 0
    size: int = 0
    files: tuple[str, ...] = ()


def plan_pieces(inputs: Sequence[str], options: ReadOptions, *, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Split inputs into pieces, in the order given; files of a directory or glob by name.

    Args:
        piece_bytes: size at which large files are split; a multiple of BLOCK_BYTES. Documents do not depend on it.

    Raises:
        DataError: an input does not exist or is of a kind that cannot be read.
    """
    if not inputs:
        raise ConfigError("no input; give files, directories, globs, URLs or the name of a dataset")
    pieces: list[Piece] = []
    plain: list[tuple[str, int]] = []
    for path in _expand(inputs, options):
        if _is_text(path) and (size := file_size(path)) <= _largest_document(path, options):
            plain.append((path, size))
            continue
        pieces += _grouped(plain)
        plain = []
        pieces += _pieces_of(path, options, piece_bytes)
    return pieces + _grouped(plain)


def _expand(inputs: Sequence[str], options: ReadOptions) -> Iterator[str]:
    for entry in inputs:
        if entry.startswith(HUB) or os.path.isfile(entry):
            yield entry
        elif "://" in entry:
            yield from _expand_url(entry, options)
        elif os.path.isdir(entry):
            yield from _walk(entry, options)
        elif glob.has_magic(entry):
            found = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path))
            if not found:
                raise DataError(f"no file matches {entry}; correct the pattern (quote it for the shell)")
            yield from found
        elif _looks_like_hub_name(entry):
            yield HUB + entry
        else:
            raise DataError(f"input {entry} does not exist; give a file, directory, glob, URL or the name of a dataset")


def _expand_url(url: str, options: ReadOptions) -> Iterator[str]:
    """Files of a URL that may be a glob or a folder."""
    try:
        store, root = fsspec.core.url_to_fs(url)
        if glob.has_magic(root):
            found = store.glob(root)
        elif store.isdir(root):
            names = {path: os.path.relpath(path, root) for path in store.find(root)}
            found = [path for path, name in names.items() if _is_wanted(name, options)]
        else:
            found = [root] if store.exists(root) else []
    except ImportError as error:
        raise DataError(f"{url} cannot be read: {error}") from error
    except Exception as error:  # every store has error classes of its own
        raise DataError(f"{url} cannot be listed: {error}; check the URL and the credentials") from error
    if not found:
        raise DataError(f"no file at {url}; correct the URL")
    yield from (store.unstrip_protocol(path) for path in sorted(found))


def _walk(directory: str, options: ReadOptions) -> Iterator[str]:
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        paths = [os.path.join(folder, name) for name in names]
        found += [path for path in paths if _is_wanted(os.path.relpath(path, directory), options)]
    if not found:
        raise DataError(f"directory {directory} holds no file to read; name other suffixes with --include '*.ext'")
    return iter(sorted(path for path in found if os.path.isfile(path)))


def _is_wanted(relative: str, options: ReadOptions) -> bool:
    """Whether a file of a directory is read."""
    if os.path.basename(relative).startswith(".") or _matches(relative, options.exclude):
        return False
    return _matches(relative, options.include) if options.include else _name(relative).endswith(DOCUMENT_SUFFIXES)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) or fnmatch(os.path.basename(path), pattern) for pattern in patterns)


def _looks_like_hub_name(entry: str) -> bool:
    """`owner/name`, but not a path into a directory that exists or a file name that is mistyped."""
    if not _HUB_NAME.fullmatch(entry) or _name(entry).endswith(DOCUMENT_SUFFIXES):
        return False
    return not os.path.isdir(os.path.dirname(entry))


def compression(path: str) -> str | None:
    """Compression of a file by its suffix."""
    return COMPRESSIONS.get(os.path.splitext(path.lower())[1])


def _name(path: str) -> str:
    """Lower-case path without the suffix of a compression."""
    return os.path.splitext(path.lower())[0] if compression(path) else path.lower()


def is_text_name(path: str) -> bool:
    """Whether a file has a suffix of text files."""
    return _name(path).endswith(TEXT_SUFFIXES)


def open_input(path: str) -> BinaryIO:
    """Open a local file or a URL for reading, decompressed.

    Raises:
        DataError: a package for the URL is missing, or the file is a git-lfs pointer.
    """
    if "://" not in path and (problem := not_downloaded(path, text=True)):
        raise DataError(problem)
    if compression(path) is None and "://" not in path:
        return open(path, "rb")
    try:
        if compression(path) == "zstd":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(fsspec.open(path, "rb").open(), "zstd"))
        return fsspec.open(path, "rb", compression=compression(path)).open()
    except ImportError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def file_size(path: str) -> int:
    """Bytes of a local file or URL, compressed as it is."""
    if "://" not in path:
        return os.path.getsize(path)
    store, root = fsspec.core.url_to_fs(path)
    return int(store.size(root) or 0)


def _is_text(path: str) -> bool:
    rows = JSON_SUFFIXES + PARQUET_SUFFIXES + (ARROW_SUFFIX,)
    return not path.startswith(HUB) and not _name(path).endswith(rows)


def _largest_document(path: str, options: ReadOptions) -> float:
    """Size up to which a text file is one document; the size of a compressed one is not known."""
    sizes = {"auto": -1.0 if compression(path) else AUTO_WHOLE_BYTES, "file": float("inf")}
    return sizes.get(options.txt_documents, -1.0)


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
    name = _name(path)
    if path.startswith(HUB) or name.endswith(ARROW_SUFFIX):
        return _dataset_pieces(path, options)
    if name.endswith(PARQUET_SUFFIXES):
        return _parquet_pieces(path)
    size = file_size(path)
    if name.endswith(".json") and _starts_with_bracket(path):
        return [Piece("json_array", path, 0, size, size)]
    kinds: dict[str, PieceKind] = {"auto": "blocks", "paragraph": "paragraphs", "line": "lines"}
    kind = "json_lines" if name.endswith(JSON_SUFFIXES) else kinds[options.txt_documents]
    if compression(path):
        return [Piece(kind, path, 0, None, size)]
    stops = [*range(piece_bytes, size, piece_bytes), size] if size else []
    starts = [0, *stops[:-1]]
    return [Piece(kind, path, start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]


def _starts_with_bracket(path: str) -> bool:
    with open_input(path) as stream:
        return stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _parquet_pieces(path: str) -> list[Piece]:
    import pyarrow.parquet

    try:
        with open_input(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error
    return [Piece("parquet", path, index, index + 1, size) for index, size in enumerate(sizes)]


def _dataset_pieces(name: str, options: ReadOptions) -> list[Piece]:
    dataset = open_dataset(name, options)
    if options.streaming and name.startswith(HUB):
        shards = int(dataset.num_shards)
        return [Piece("shard", name, index, shards, 1) for index in range(shards)]
    rows = len(dataset)
    edges = range(0, rows, _ROWS_PER_PIECE)
    return [
        Piece("rows", name, start, min(start + _ROWS_PER_PIECE, rows), min(_ROWS_PER_PIECE, rows - start))
        for start in edges
    ]


def open_dataset(name: str, options: ReadOptions) -> Any:
    """Open a dataset with the `datasets` library: one of the Hub by name, streamed or downloaded; or an Arrow file.

    Raises:
        DataError: it does not exist, cannot be reached or read, or lacks the split.
    """
    import datasets

    try:
        if not name.startswith(HUB):
            open_input(name).close()
            return datasets.Dataset.from_file(name)
        return datasets.load_dataset(
            name.removeprefix(HUB), options.config_name, split=options.split_name, streaming=options.streaming
        )
    except DataError:
        raise
    except Exception as error:  # network, missing names, missing splits: the library has no common base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not name.startswith(HUB):
            raise DataError(f"{name} is not an Arrow file of a dataset: {reason}; write it again") from error
        raise DataError(
            f"cannot load the dataset {name.removeprefix(HUB)} (split {options.split_name}): {reason}; check the "
            "name, --split-name, --config-name and the network"
        ) from error
