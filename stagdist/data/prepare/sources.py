"""Where documents come from: files, directories, globs, URLs and Hugging Face datasets, split into pieces.

A *piece* is a part of the input that one process can read: a small file, a byte range of a large one, a compressed
file, a row group, a shard. The list of pieces depends on the input and the options alone, never on the
number of processes, so any division of the pieces gives the same documents in the same order.

URLs such as `s3://` or `gs://` name files of object stores, which fsspec opens.
"""

import glob
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from typing import Any, Literal, NoReturn

import fsspec

from stagdist.data.prepare.columns import column_parts
from stagdist.data.prepare.formats import (
    DOCUMENT_SUFFIXES,
    HUB,
    Contents,
    holds_records,
    plain_name,
    recognize,
    remote_errors_named,
)
from stagdist.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)

PIECE_BYTES = 2 << 20
BLOCK_BYTES = 16 << 10
AUTO_WHOLE_BYTES = 256 << 10
_ROWS_PER_PIECE = 2000

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the datasets library writes beside its data."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

PieceKind = Contents | Literal["file", "blocks", "paragraphs", "lines", "shard"]


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


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the input that one process reads.

    `start` and `stop` are bytes of a file, row groups of a parquet file or batches of an Arrow file; for a dataset, the
    shard and the number of shards. `stop` is None for a compressed file and for one of unknown size, which one process
    reads completely. `size` is the share of the work (bytes if they are known).
    """

    kind: PieceKind
    source: str
    start: int = 0
    stop: int | None = 0
    size: int = 0


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
    records: list[str] = []
    for path in _expand(inputs, options, []):
        if not _matches(path, options.exclude):
            of_hub = path.startswith(HUB)
            pieces += _dataset_pieces(path, options) if of_hub else _file_pieces(path, options, piece_bytes, records)
    if records:
        remedy = "to read the texts of their records, convert them to .jsonl"
        LOG.warning("note: read as text (%d): %s; %s", len(records), listed(records), remedy)
    return pieces


def files_left_out(inputs: Sequence[str], options: ReadOptions) -> list[str]:
    """Files in directories that are not read, because neither name nor content says that they hold documents."""
    left_out: list[str] = []
    list(_expand(inputs, options, left_out))
    return left_out


def listed(names: Sequence[str], count: int = 5) -> str:
    """The first names and the number of the others."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _expand(inputs: Sequence[str], options: ReadOptions, left_out: list[str]) -> Iterator[str]:
    """Paths of the files to read; those that are passed over in directories are added to `left_out`."""
    for entry in inputs:
        if entry.startswith(HUB) or os.path.isfile(entry):
            yield entry
        elif "://" in entry:
            yield from _expand_url(entry, options, left_out)
        elif os.path.isdir(entry):
            yield from _select(entry, _walk(entry), options, left_out)
        elif glob.has_magic(entry):
            matches = sorted(glob.glob(entry, recursive=True))
            found = [path for path in matches if not _is_special(path)]
            if not found:
                raise DataError(f"no file matches {entry}; correct the pattern (quote it for the shell)")
            left_out += sorted({*matches} - {*found}) if "**" not in entry else []
            yield from found
        elif os.path.exists(entry):
            raise DataError(f"input {entry} is a pipe or a device; write its content to a file first")
        elif _looks_like_hub_name(entry):
            yield HUB + entry
        elif not _matches(entry, options.exclude):
            raise DataError(f"input {entry} does not exist; give a file, directory, glob, URL or the name of a dataset")


def _expand_url(url: str, options: ReadOptions, left_out: list[str]) -> Iterator[str]:
    """Files of a URL that may be a glob or a folder."""
    with remote_errors_named(url):
        store, root = fsspec.core.url_to_fs(url)
        if glob.has_magic(root):
            found = sorted(map(store.unstrip_protocol, store.glob(root)))
        elif store.isdir(root):
            names = {store.unstrip_protocol(path): os.path.relpath(path, root) for path in store.find(root)}
            found = _select(url, names, options, left_out)
        else:
            found = [store.unstrip_protocol(root)] if store.exists(root) else []
    if not found:
        raise DataError(f"no file at {url}; correct the URL")
    yield from found


def _walk(directory: str) -> dict[str, str]:
    """Files below a directory: path, and path relative to it."""

    def fail(error: OSError) -> NoReturn:
        raise error

    found = {}
    for folder, folders, names in os.walk(directory, onerror=fail):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names + linked:
            path = os.path.join(folder, name)
            found[path] = os.path.relpath(path, directory)
    return found


def _select(directory: str, found: dict[str, str], options: ReadOptions, left_out: list[str]) -> list[str]:
    """The files of a directory that are read, by name."""
    found = {path: name for path, name in found.items() if not os.path.basename(name).startswith(".")}
    wanted: list[str] = []
    passed: list[str] = []
    for path, relative in sorted(found.items()):
        if _matches(relative, options.exclude) or (options.include and not _matches(relative, options.include)):
            continue
        name = os.path.basename(plain_name(relative))
        described = name in _DESCRIPTIONS or path.removesuffix(".json") + ".idx" in found
        known = bool(options.include) or (name.endswith(DOCUMENT_SUFFIXES) and not described)
        keep = not _is_special(path) and (known or ("." not in name and holds_records(path)))
        (wanted if keep else passed).append(path)
    if found and not wanted:
        names = f" but {listed(passed)}" if passed else ""
        raise DataError(f"directory {directory} holds no file to read{names}; name others with --include '*.ext'")
    left_out += passed
    return wanted


def _is_special(path: str) -> bool:
    """Whether a local path is a directory, a link to one, or a pipe."""
    return "://" not in path and not os.path.isfile(path) and os.path.exists(path)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) or fnmatch(os.path.basename(path), pattern) for pattern in patterns)


def _looks_like_hub_name(entry: str) -> bool:
    """`owner/name`, but not a path into a directory that exists or a file name that is mistyped."""
    if not _HUB_NAME.fullmatch(entry) or plain_name(entry).endswith(DOCUMENT_SUFFIXES):
        return False
    return not os.path.isdir(os.path.dirname(entry))


def file_size(path: str) -> int | None:
    """Bytes of a local file or URL, compressed as it is; None where a server does not say."""
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"{path} is a link to a file that is missing; fetch that file, or leave it out (--exclude)")
    if "://" not in path:
        return os.path.getsize(path)
    with remote_errors_named(path):
        store, root = fsspec.core.url_to_fs(path)
        return store.size(root)


def _file_pieces(path: str, options: ReadOptions, piece_bytes: int, records: list[str]) -> list[Piece]:
    """The pieces of a file; the name of text that looks like records is added to `records`."""
    size, mode = file_size(path), options.txt_documents
    contents, compressed, like_records = recognize(path)
    records += [path] * like_records
    small = not compressed and size is not None and size <= AUTO_WHOLE_BYTES
    if contents == "text" and (mode == "file" or (mode == "auto" and small)):
        return [Piece("file", path, size=size or 0)]
    texts: dict[str, PieceKind] = {"auto": "blocks", "paragraph": "paragraphs", "line": "lines"}
    kind: PieceKind = texts[mode] if contents == "text" else contents
    if compressed or size is None:
        return [Piece(kind, path, 0, None, size or 0)]
    if contents == "json_array":
        return [Piece(kind, path, 0, size, size)]
    if contents == "parquet" or contents == "arrow":
        return [Piece(kind, path, *part) for part in column_parts(path, contents)]
    stops = [*range(piece_bytes, size, piece_bytes), size]
    return [Piece(kind, path, start, stop, stop - start) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _dataset_pieces(name: str, options: ReadOptions) -> list[Piece]:
    dataset = open_dataset(name, options)
    shards = int(dataset.num_shards) if options.streaming else math.ceil(len(dataset) / _ROWS_PER_PIECE)
    return [Piece("shard", name, index, shards, 1) for index in range(shards)]


@cache
def open_dataset(name: str, options: ReadOptions) -> Any:
    """Open a dataset of the Hub with the `datasets` library, streamed or downloaded.

    Raises:
        DataError: it does not exist, cannot be reached or read, or lacks the split.
    """
    import datasets

    name = name.removeprefix(HUB)
    try:
        return datasets.load_dataset(name, options.config_name, split=options.split_name, streaming=options.streaming)
    except Exception as error:  # network, missing names, missing splits: the library has no common base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load the dataset {name} (split {options.split_name}): {reason}; check the name, --split-name, "
            "--config-name and the network"
        ) from error
