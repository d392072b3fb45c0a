"""Prepare a corpus: tokenize input, shuffle its documents, write the indexed format.

In two passes, with memory that grows by 28 bytes per document only. First each rank tokenizes its run of the pieces,
in order, into a temporary part file. Then one permutation of all documents, made from the seed alone, is drawn, and
each rank copies its share of the shuffled corpus out of the (memory-mapped) parts. The result is the same, byte for
byte, for every number of ranks and workers. While it runs the disk holds the tokens twice.

Everything is written to `PREFIX.*.partial`; `.idx` is renamed last, so a corpus exists if and only if its `.idx` does.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stagdist.data.indexed import CorpusDescription, corpus_path, token_dtype, write_index
from stagdist.data.prepare.encode import encode_pieces
from stagdist.data.prepare.processes import Ranks
from stagdist.data.prepare.sources import Piece, ReadOptions, listed, plan_pieces
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import ConfigError, DataError

_PARTIAL = ".partial"
_COPIED_DOCUMENTS = 4096


@dataclass(frozen=True)
class Prepared:
    """What was written, and what was left out of it."""

    prefix: str
    description: CorpusDescription
    skipped_empty: int
    skipped_bad: int


@dataclass
class _Part:
    """What one rank tokenized: the counters of its part file."""

    lengths: np.ndarray
    text_bytes: int = 0
    max_token: int = 0
    skipped_empty: int = 0
    skipped_bad: int = 0


def prepare(
    inputs: Sequence[str],
    prefix: str,
    tokenizer: Tokenizer,
    *,
    options: ReadOptions | None = None,
    tokenizer_source: str = "bytes",
    workers: int = 1,
    seed: int | None = 1234,
    overwrite: bool = False,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Prepared:
    """Write PREFIX.bin, .idx and .json from text.

    Args:
        inputs: files, directories, globs, `hub:NAME` or `owner/name`.
        seed: of the order of documents; None keeps the order of the input.
        workers: tokenizing processes on each rank.
        ranks: the ranks of `mpirun`; every one of them calls this.

    Raises:
        ConfigError: the output exists, or an argument is wrong.
        DataError: input is missing, damaged or holds no text; the disk is full.
    """
    ranks = ranks or Ranks()
    options = options or ReadOptions()
    pieces: list[Piece] = ranks.from_first(
        _planned(inputs, prefix, options, overwrite, workers) if ranks.rank == 0 else None
    )
    dtype = token_dtype(tokenizer.vocab_size)
    with _partial_files(prefix, ranks):
        share = _share(pieces, ranks)
        part = _tokenize(share, prefix, options, tokenizer, dtype, workers=workers, progress=progress, ranks=ranks)
        parts: list[_Part] = ranks.gather(part)
        description = _describe(parts, tokenizer, tokenizer_source, inputs, seed, dtype)
        _write_shuffled(prefix, parts, dtype, seed, ranks)
        if ranks.rank == 0:
            _finish(prefix, description, parts, dtype, seed)
        ranks.gather(None)
    skipped = [sum(each.skipped_empty for each in parts), sum(each.skipped_bad for each in parts)]
    return Prepared(prefix, description, *skipped)


def _planned(inputs: Sequence[str], prefix: str, options: ReadOptions, overwrite: bool, workers: int) -> list[Piece]:
    if workers < 1:
        raise ConfigError(f"--workers is {workers}, at least 1 is needed")
    if prefix.endswith((".bin", ".idx", "/")):
        raise ConfigError(f"output {prefix} is a prefix without ending; give {prefix[:-4].rstrip('/.')} for example")
    if corpus_path(prefix, ".idx").exists() and not overwrite:
        raise ConfigError(f"{prefix}.idx exists; choose another --output, or --overwrite")
    pieces = plan_pieces(inputs, options)
    if not pieces:
        raise DataError(f"no text in {listed(inputs)}; nothing was written")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    return pieces


def _share(pieces: list[Piece], ranks: Ranks) -> list[Piece]:
    """This rank's run of the pieces, of about equal size on every rank."""
    sizes = np.array([piece.size for piece in pieces], np.float64)
    middles = np.cumsum(sizes) - sizes / 2
    owners = np.minimum(middles * ranks.size // max(sizes.sum(), 1), ranks.size - 1)
    first, last = np.searchsorted(owners, [ranks.rank, ranks.rank + 1])
    return pieces[first:last]


def _partial(prefix: str, ending: str) -> Path:
    return corpus_path(prefix, ending + _PARTIAL)


def _part_path(prefix: str, rank: int) -> Path:
    return _partial(prefix, f".part{rank:05d}")


@contextmanager
def _partial_files(prefix: str, ranks: Ranks) -> Iterator[None]:
    """Temporary files: those of an interrupted run are removed before, ours afterwards however it ends."""
    name = Path(prefix).name

    def clear() -> None:
        for path in list(Path(prefix).parent.iterdir()):
            if path.name.startswith(name + ".") and path.name.endswith(_PARTIAL):
                path.unlink(missing_ok=True)

    if ranks.rank == 0:
        clear()
    ranks.gather(None)
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot prepare {prefix}: {error}; correct that and start again; nothing was left behind"
        ) from error
    finally:
        # a failing rank clears for all: the others may never get here
        if ranks.rank == 0 or sys.exc_info()[0] is not None:
            clear()


def _tokenize(
    pieces: list[Piece],
    prefix: str,
    options: ReadOptions,
    tokenizer: Tokenizer,
    dtype: type[np.generic],
    *,
    workers: int,
    progress: bool,
    ranks: Ranks,
) -> _Part:
    """First pass: this rank's pieces into its part file."""
    lengths, part = [np.zeros(0, np.int32)], _Part(np.zeros(0, np.int32))
    total = sum(piece.size for piece in pieces)
    with _part_path(prefix, ranks.rank).open("wb") as stream, _bar(total, "tokenizing", progress, ranks) as advance:
        for batch in encode_pieces(pieces, options, tokenizer, dtype, workers=workers):
            stream.write(batch.tokens.data)
            lengths.append(batch.lengths)
            part.text_bytes += batch.text_bytes
            part.max_token = max(part.max_token, int(batch.tokens.max(initial=0)))
            part.skipped_empty += batch.skipped_empty
            part.skipped_bad += batch.skipped_bad
            advance(batch.read)
    part.lengths = np.concatenate(lengths)
    return part


@contextmanager
def _bar(total: int, action: str, progress: bool, ranks: Ranks) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    of_all = f" (rank 0 of {ranks.size})" if ranks.size > 1 else ""
    with tqdm(
        total=total,
        desc=action + of_all,
        unit="B",
        unit_scale=True,
        disable=not progress or ranks.rank != 0,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    ) as bar:
        yield bar.update


def _order(documents: int, seed: int | None) -> np.ndarray:
    """Input number of each output document; RandomState is frozen, so the order for a seed never changes."""
    if seed is None:
        return np.arange(documents)
    return np.random.RandomState(seed).permutation(documents)


def _write_shuffled(prefix: str, parts: list[_Part], dtype: type[np.generic], seed: int | None, ranks: Ranks) -> None:
    """Second pass: this rank's share of the documents, in the new order, at its place in the file."""
    lengths = np.concatenate([part.lengths for part in parts])
    order = _order(len(lengths), seed)
    first, last = (len(order) * edge // ranks.size for edge in (ranks.rank, ranks.rank + 1))
    itemsize = np.dtype(dtype).itemsize
    path = _partial(prefix, ".bin")
    if ranks.rank == 0:
        with path.open("wb") as stream:
            stream.truncate(int(lengths.sum(dtype=np.int64)) * itemsize)
    ranks.gather(None)
    document = _DocumentBytes(prefix, parts, itemsize)
    with path.open("r+b") as stream:
        stream.seek(int(lengths[order[:first]].sum(dtype=np.int64)) * itemsize)
        for start in range(first, last, _COPIED_DOCUMENTS):
            stream.write(b"".join(document(index) for index in order[start : min(start + _COPIED_DOCUMENTS, last)]))
        stream.flush()
        os.fsync(stream.fileno())
    ranks.gather(None)


class _DocumentBytes:
    """Bytes of a document by its number in the input, out of the part files of all ranks."""

    def __init__(self, prefix: str, parts: list[_Part], itemsize: int) -> None:
        self._first = np.cumsum([0] + [len(part.lengths) for part in parts])
        self._ends = [np.cumsum(part.lengths, dtype=np.int64) * itemsize for part in parts]
        self._bytes = [
            np.memmap(_part_path(prefix, rank), np.uint8, "r").data if len(part.lengths) else memoryview(b"")
            for rank, part in enumerate(parts)
        ]

    def __call__(self, document: int) -> memoryview:
        rank = int(np.searchsorted(self._first, document, "right")) - 1
        index = int(document - self._first[rank])
        start = int(self._ends[rank][index - 1]) if index else 0
        return self._bytes[rank][start : int(self._ends[rank][index])]


def _describe(
    parts: list[_Part],
    tokenizer: Tokenizer,
    tokenizer_source: str,
    inputs: Sequence[str],
    seed: int | None,
    dtype: type[np.generic],
) -> CorpusDescription:
    documents = sum(len(part.lengths) for part in parts)
    if documents == 0:
        empty = sum(part.skipped_empty + part.skipped_bad for part in parts)
        raise DataError(f"no text in {listed(inputs)} ({empty} documents were left out); nothing was written")
    return CorpusDescription(
        documents=documents,
        tokens=sum(int(part.lengths.sum(dtype=np.int64)) for part in parts),
        bytes=sum(part.text_bytes for part in parts),
        max_token=max(part.max_token for part in parts),
        dtype=np.dtype(dtype).name,
        seed=seed,
        tokenizer=tokenizer_source,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        sources=tuple(inputs),
        begin_of_document=tokenizer.begin_ids,
    )


def _finish(
    prefix: str, description: CorpusDescription, parts: list[_Part], dtype: type[np.generic], seed: int | None
) -> None:
    """Write index and description, then give all three their names, the index last."""
    lengths = np.concatenate([part.lengths for part in parts])
    with _partial(prefix, ".idx").open("wb") as stream:
        write_index(stream, lengths[_order(len(lengths), seed)], dtype)
        stream.flush()
        os.fsync(stream.fileno())
    _partial(prefix, ".json").write_text(description.to_json(), encoding="utf-8")
    corpus_path(prefix, ".idx").unlink(missing_ok=True)
    for ending in (".bin", ".json", ".idx"):
        os.replace(_partial(prefix, ending), corpus_path(prefix, ending))
