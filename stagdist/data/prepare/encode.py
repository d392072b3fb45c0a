"""Pieces of input to part files of token ids, by several processes.

A part file holds the tokens of a run of pieces; `PART.lengths` beside it holds the lengths of the documents.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import Piece, ReadOptions
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import DataError

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Part:
    """A part file, and what is in it."""

    path: Path
    documents: int
    tokens: int
    text_bytes: int
    max_token: int
    skipped_empty: int
    skipped_bad: int

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents]; each ends with the end-of-document token."""
        return np.fromfile(lengths_path(self.path), np.int32)


def lengths_path(part: Path) -> Path:
    """File with the lengths of the documents of a part file."""
    return part.with_suffix(".lengths" + part.suffix)


@dataclass(frozen=True)
class Encoder:
    """Reads pieces and tokenizes their documents."""

    options: ReadOptions
    tokenizer: Tokenizer
    dtype: type[np.generic]

    def write_part(self, pieces: Sequence[Piece], path: Path) -> Part:
        """Write the documents of some pieces, in order, with a bounded number of them in memory.

        Raises:
            DataError: of reading.
        """
        reader = Reader(self.options)
        documents = count = text_bytes = max_token = 0
        with path.open("wb") as stream, lengths_path(path).open("wb") as lengths:
            for texts in _batches(reader.documents(pieces)):
                arrays = self.tokenizer.encode_arrays(texts, self.dtype)
                tokens = np.concatenate(arrays)
                stream.write(tokens.data)
                lengths.write(np.array([len(array) for array in arrays], np.int32).data)
                documents += len(arrays)
                count += len(tokens)
                text_bytes += sum(len(text.encode()) for text in texts)
                max_token = max(max_token, int(tokens.max()))
        return Part(path, documents, count, text_bytes, max_token, reader.skipped_empty, reader.skipped_bad)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_parts(
    encoder: Encoder, runs: Sequence[Sequence[Piece]], paths: Sequence[Path], *, workers: int
) -> Iterator[Part]:
    """Tokenize each run of pieces into its part file, by `workers` processes; the parts come in order.

    Raises:
        DataError: of reading; or a worker was killed.
    """
    workers = min(workers, len(runs))
    if workers <= 1:
        yield from map(encoder.write_part, runs, paths)
        return
    # spawn: forking a process that has threads (tokenizers, MPI) can deadlock. An executor reports a killed worker; a
    # multiprocessing.Pool would wait for it forever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    try:
        yield from pool.map(write_part_in_worker, runs, paths)
    except BrokenProcessPool as error:
        raise DataError("a worker process ended; was it killed for memory? use fewer --workers") from error
    finally:
        for worker in multiprocessing.active_children():  # after an error they would finish their runs first
            worker.terminate()
        pool.shutdown(cancel_futures=True)


class _Worker:
    """State of a worker process, set once at its start."""

    encoder: ClassVar[Encoder]


def _start_worker(encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    _Worker.encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_part_in_worker(pieces: Sequence[Piece], path: Path) -> Part:
    """`Encoder.write_part` of this worker.

    What a worker returns passes through a pipe. If it is killed while it writes more than `PIPE_BUF` bytes, the
    executor waits forever for the rest; so the lengths are in a file too.
    """
    return _Worker.encoder.write_part(pieces, path)
