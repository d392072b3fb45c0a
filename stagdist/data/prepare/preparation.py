"""Prepare a corpus: tokenize input, shuffle its documents, write the indexed format.

In two passes, with memory that grows by 28 bytes per document only. First the pieces of input are divided into runs,
and the workers of every rank tokenize one run after the other, each into a temporary part file. Then one permutation of
all documents, made from the seed alone, is drawn, and each rank copies its share of the shuffled corpus out of the
(memory-mapped) parts. The result is the same, byte for byte, for every number of ranks and workers. While it runs the
disk holds the tokens twice.

Everything is written to `PREFIX.RUN.*.partial`; `.idx` is renamed last, so a corpus exists if and only if its `.idx`
does.
"""

import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from stagdist.data.indexed import CorpusDescription, corpus_path, read_description, token_dtype, write_index
from stagdist.data.prepare.encode import Encoder, Part, write_parts
from stagdist.data.prepare.processes import Ranks
from stagdist.data.prepare.sources import Piece, ReadOptions, listed, plan_pieces
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import ConfigError, DataError
from stagdist.files import PARTIAL, sync_path

_RUN_BYTES = 16 << 20
_MAX_LARGE_RUNS = 4096
_RUNS_PER_WORKER = 4
_COPIED_DOCUMENTS = 4096


@dataclass(frozen=True)
class Prepared:
    """What was written, and how many documents were left out of it."""

    description: CorpusDescription
    skipped_empty: int
    skipped_bad: int


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
    planned = _planned(inputs, prefix, options, overwrite, workers) if ranks.rank == 0 else []
    pieces: list[Piece] = ranks.gather(planned)[0]
    encoder = Encoder(options, tokenizer, token_dtype(tokenizer.vocab_size))
    with _partial_files(prefix, ranks) as partial:
        written = _tokenize(pieces, partial, encoder, workers=workers, progress=progress, ranks=ranks)
        parts: list[Part] = list(chain.from_iterable(ranks.gather(written)))
        skipped = sum(part.skipped_empty for part in parts), sum(part.skipped_bad for part in parts)
        parts = [part for part in parts if part.documents]
        if not parts:
            raise DataError(
                f"no text in {listed(inputs)} ({sum(skipped)} documents were left out); nothing was written"
            )
        lengths = np.concatenate([part.lengths() for part in parts])
        # RandomState is frozen, so the order for a seed never changes
        order = np.arange(len(lengths)) if seed is None else np.random.RandomState(seed).permutation(len(lengths))
        _write_tokens(partial, parts, lengths, order, encoder.dtype, ranks)
        description = _describe(parts, encoder, tokenizer_source, tuple(inputs), seed)
        if ranks.rank == 0:
            _finish(prefix, partial, description, lengths[order], encoder.dtype)
        ranks.gather(None)
    return Prepared(description, *skipped)


def _planned(inputs: Sequence[str], prefix: str, options: ReadOptions, overwrite: bool, workers: int) -> list[Piece]:
    if workers < 1:
        raise ConfigError(f"--workers is {workers}, at least 1 is needed")
    if prefix.endswith((".bin", ".idx")) or os.path.basename(prefix) in ("", ".", ".."):
        example = os.path.join(prefix, "corpus") if prefix[-1:] in ("", ".", "/") else prefix[:-4]
        raise ConfigError(f"output {prefix!r} is not the beginning of a file's name; give {example} for example")
    if corpus_path(prefix, ".idx").exists() and not overwrite:
        raise ConfigError(f"{prefix}.idx exists; choose another --output, or --overwrite")
    if other := _file_of_another(prefix):
        raise ConfigError(f"{other} exists and belongs to no corpus; choose another --output, or move it away")
    pieces = plan_pieces(inputs, options)
    if not pieces:
        raise DataError(f"no text in {listed(inputs)}; nothing was written")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    return pieces


def _file_of_another(prefix: str) -> Path | None:
    """A file that a corpus would replace although it is not of one, the input `PREFIX.json` for example."""
    index, tokens, description = (corpus_path(prefix, ending) for ending in (".idx", ".bin", ".json"))
    try:
        ours = read_description(prefix) is not None or index.exists()
    except DataError:
        return description
    return tokens if tokens.exists() and not ours else None


def _describe(
    parts: list[Part], encoder: Encoder, tokenizer_source: str, sources: tuple[str, ...], seed: int | None
) -> CorpusDescription:
    return CorpusDescription(
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.text_bytes for part in parts),
        max_token=max(part.max_token for part in parts),
        dtype=np.dtype(encoder.dtype).name,
        seed=seed,
        tokenizer=tokenizer_source,
        tokenizer_fingerprint=encoder.tokenizer.fingerprint,
        vocab_size=encoder.tokenizer.vocab_size,
        end_of_document=encoder.tokenizer.end_of_document,
        sources=sources,
        begin_of_document=encoder.tokenizer.begin_ids,
    )


def _partial(prefix: str, ending: str) -> Path:
    return corpus_path(prefix, ending + PARTIAL)


@contextmanager
def _partial_files(prefix: str, ranks: Ranks) -> Iterator[str]:
    """Prefix of temporary files: those of earlier runs are removed before, ours afterwards however it ends.

    Each run has names of its own, so two at the same time never mix: the second ends the first, or the last one stays.
    """
    partial = f"{prefix}.{ranks.gather(secrets.token_hex(4))[0]}"

    def clear(beginning: str) -> None:
        names = re.compile(beginning + r"\.(part\d+(\.lengths)?|bin|idx|json)" + re.escape(PARTIAL))
        for path in list(Path(prefix).parent.iterdir()):
            if names.fullmatch(path.name):
                path.unlink(missing_ok=True)

    if ranks.rank == 0:
        clear(re.escape(Path(prefix).name) + r"(\.[0-9a-f]{8})?")
    ranks.gather(None)
    try:
        yield partial
    except OSError as error:
        remedy = "correct that and start again"
        if isinstance(error, FileNotFoundError) and PARTIAL in str(error):
            remedy = "another run with this --output has removed it; give each run its own"
        raise DataError(f"cannot prepare {prefix}: {error}; {remedy}; nothing was left behind") from error
    finally:
        # a failing rank clears for all: the others may never get here
        if ranks.rank == 0 or sys.exc_info()[0] is not None:
            clear(re.escape(Path(partial).name))


def _tokenize(
    pieces: list[Piece], prefix: str, encoder: Encoder, *, workers: int, progress: bool, ranks: Ranks
) -> list[Part]:
    """First pass: the parts of this rank, which takes some consecutive runs of all."""
    from tqdm import tqdm

    large = min(sum(piece.size for piece in pieces) // _RUN_BYTES, _MAX_LARGE_RUNS)
    runs = _runs(pieces, max(large, _RUNS_PER_WORKER * workers * ranks.size))
    first, last = (len(runs) * edge // ranks.size for edge in (ranks.rank, ranks.rank + 1))
    paths = [_partial(prefix, f".part{number:05d}") for number in range(first, last)]
    sizes = [sum(piece.size for piece in run) for run in runs[first:last]]
    parts = []
    with tqdm(
        total=sum(sizes),
        desc="tokenizing" + (f" (rank 0 of {ranks.size})" if ranks.size > 1 else ""),
        unit="B",
        unit_scale=True,
        disable=not progress or ranks.rank != 0,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    ) as bar:
        for part, size in zip(write_parts(encoder, runs[first:last], paths, workers=workers), sizes, strict=True):
            parts.append(part)
            bar.update(size)
    return parts


def _runs(pieces: list[Piece], count: int) -> list[list[Piece]]:
    """Pieces in their order, in at most `count` runs of about equal size."""
    sizes = np.array([piece.size + 1 for piece in pieces], np.float64)  # 0 where the size is not known
    middles = np.cumsum(sizes) - sizes / 2
    numbers = (middles * count // sizes.sum()).tolist()
    numbered = groupby(zip(numbers, pieces, strict=True), key=lambda pair: pair[0])
    return [[piece for _, piece in run] for _, run in numbered]


def _write_tokens(
    prefix: str, parts: list[Part], lengths: np.ndarray, order: np.ndarray, dtype: type[np.generic], ranks: Ranks
) -> None:
    """Second pass: this rank's share of the documents, in the new order, at its place in the file.

    Args:
        lengths: tokens of each document in the order of the input, int32 [documents].
        order: number in the input of each document of the corpus, int64 [documents].
    """
    path, itemsize = _partial(prefix, ".bin"), np.dtype(dtype).itemsize
    if ranks.rank == 0:
        with path.open("wb") as stream:
            stream.truncate(sum(part.tokens for part in parts) * itemsize)
    ranks.gather(None)
    part_ends = np.cumsum([part.documents for part in parts])
    ends = np.concatenate([np.cumsum(part, dtype=np.int64) for part in np.split(lengths, part_ends[:-1])])
    tokens = [np.memmap(part.path, dtype, "r").data for part in parts]
    first, last = (len(order) * edge // ranks.size for edge in (ranks.rank, ranks.rank + 1))
    with path.open("r+b") as stream:
        stream.seek(int(lengths[order[:first]].sum(dtype=np.int64)) * itemsize)
        for start in range(first, last, _COPIED_DOCUMENTS):
            documents = order[start : min(start + _COPIED_DOCUMENTS, last)]
            owners = np.searchsorted(part_ends, documents, "right")
            places = zip(owners, ends[documents] - lengths[documents], ends[documents], strict=True)
            stream.write(b"".join(tokens[owner][begin:end] for owner, begin, end in places))
    sync_path(path)
    ranks.gather(None)


def _finish(
    prefix: str, partial: str, description: CorpusDescription, lengths: np.ndarray, dtype: type[np.generic]
) -> None:
    """Write index and description, then give all three their names, the index last."""
    with _partial(partial, ".idx").open("wb") as stream:
        write_index(stream, lengths, dtype)
    sync_path(_partial(partial, ".idx"))
    _partial(partial, ".json").write_text(description.to_json(), encoding="utf-8")
    corpus_path(prefix, ".idx").unlink(missing_ok=True)
    for ending in (".json", ".bin", ".idx"):  # tokens without a description are of another program
        os.replace(_partial(partial, ending), corpus_path(prefix, ending))
