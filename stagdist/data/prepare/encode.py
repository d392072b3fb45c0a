"""Pieces of input to batches of token ids, by several processes, in the order of the pieces."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import Piece, ReadOptions
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import DataError

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class TokenBatch:
    """Some documents of one piece, tokenized.

    Shapes: tokens [sum of lengths], lengths int32 [documents]; each document ends with the end-of-document token.
    `read` is the part of the pieces' sizes that is done with this batch.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    read: int
    skipped_empty: int = 0
    skipped_bad: int = 0


def encode_piece(piece: Piece, reader: Reader, tokenizer: Tokenizer, dtype: type[np.generic]) -> Iterator[TokenBatch]:
    """Read and tokenize one piece, a bounded batch at a time; the last batch carries the counters."""
    texts: list[str] = []
    characters = 0
    for text in reader.documents(piece):
        texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(texts) == _BATCH_DOCUMENTS:
            yield _encode(texts, tokenizer, dtype)
            texts, characters = [], 0
    last = _encode(texts, tokenizer, dtype)
    skipped = reader.skipped_empty, reader.skipped_bad
    reader.skipped_empty = reader.skipped_bad = 0
    yield TokenBatch(last.tokens, last.lengths, last.text_bytes, piece.size, *skipped)


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: type[np.generic]) -> TokenBatch:
    arrays = tokenizer.encode_arrays(texts, dtype)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    lengths = np.array([len(array) for array in arrays], np.int32)
    return TokenBatch(tokens, lengths, sum(len(text.encode()) for text in texts), 0)


def encode_pieces(
    pieces: Sequence[Piece],
    options: ReadOptions,
    tokenizer: Tokenizer,
    dtype: type[np.generic],
    *,
    workers: int,
) -> Iterator[TokenBatch]:
    """Tokenize pieces with `workers` processes. The batches come in the order of the pieces.

    At most two pieces per worker are read ahead; their tokens wait in temporary files, so memory is bounded, although a
    compressed file is one piece, however large.

    Raises:
        DataError: of reading; or a worker was killed.
    """
    if workers <= 1 or len(pieces) <= 1:
        reader = Reader(options)
        for piece in pieces:
            yield from encode_piece(piece, reader, tokenizer, dtype)
        return
    # spawn: forking a process that has threads (tokenizers, MPI) can deadlock. An executor reports a killed worker; a
    # multiprocessing.Pool would wait for it forever.
    context, folder = multiprocessing.get_context("spawn"), tempfile.TemporaryDirectory(prefix="stagdist-tokens-")
    setup = (options, tokenizer, dtype, folder.name)
    pool = ProcessPoolExecutor(min(workers, len(pieces)), context, _start_worker, setup)
    ahead: deque[Future[str]] = deque()
    try:
        for piece in pieces:
            ahead.append(pool.submit(encode_in_worker, piece))
            if len(ahead) > 2 * workers:
                yield from _stored_batches(ahead.popleft().result())
        while ahead:
            yield from _stored_batches(ahead.popleft().result())
    except BrokenProcessPool as error:
        raise DataError("a worker process ended; was it killed for memory? use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
        folder.cleanup()


def _stored_batches(path: str) -> Iterator[TokenBatch]:
    with open(path, "rb") as stream:
        os.unlink(path)
        while stream.peek(1):
            yield pickle.load(stream)


class _Worker:
    """State of a worker process, set once at its start."""

    setup: ClassVar[tuple[Reader, Tokenizer, type[np.generic], str]]


def _start_worker(options: ReadOptions, tokenizer: Tokenizer, dtype: type[np.generic], folder: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent shuts its workers down
    _Worker.setup = Reader(options), tokenizer, dtype, folder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_in_worker(piece: Piece) -> str:
    """Path of a file with the batches of a piece.

    What a worker returns passes through a pipe. If it is killed while it writes more than `PIPE_BUF` bytes, the
    executor waits forever for the rest.
    """
    reader, tokenizer, dtype, folder = _Worker.setup
    descriptor, path = tempfile.mkstemp(dir=folder)
    with open(descriptor, "wb") as stream:
        for batch in encode_piece(piece, reader, tokenizer, dtype):
            pickle.dump(batch, stream)
    return path
