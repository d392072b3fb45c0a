"""Pieces of input to batches of token ids, by several processes, in the order of the pieces."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import Piece, ReadOptions
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import DataError

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class TokenBatch:
    """Some documents of one piece, tokenised.

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
    """Read and tokenise one piece, a bounded batch at a time; the last batch closes its books."""
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
    pieces: Sequence[Piece], options: ReadOptions, tokenizer: Tokenizer, dtype: type[np.generic], *, workers: int
) -> Iterator[TokenBatch]:
    """Tokenise pieces with `workers` processes; the batches come in the order of the pieces.

    Worker w takes pieces w, w + workers, and so on, and sends into its own pipe. A full pipe holds it back, so memory
    is bounded; a pipe that closes ends it, so no worker outlives this process.

    Raises:
        DataError: of reading; or a worker was killed.
    """
    if workers <= 1 or len(pieces) <= 1:
        reader = Reader(options)
        for piece in pieces:
            yield from encode_piece(piece, reader, tokenizer, dtype)
        return
    workers = min(workers, len(pieces))
    with ExitStack() as stack:
        pipes = [stack.enter_context(_Worker(pieces[w::workers], options, tokenizer, dtype)) for w in range(workers)]
        for index in range(len(pieces)):
            yield from _received(pipes[index % workers], pieces[index])


class _Worker:
    """A worker process for the length of a `with`; gives the receiving end of its pipe."""

    def __init__(
        self, pieces: Sequence[Piece], options: ReadOptions, tokenizer: Tokenizer, dtype: type[np.generic]
    ) -> None:
        # spawn: forking a process that has threads (tokenizers, MPI) can deadlock
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_work, args=(sender, list(pieces), options, tokenizer, dtype), daemon=True
        )
        self._process.start()
        sender.close()

    def __enter__(self) -> Connection:
        return self._receiver

    def __exit__(self, *_: object) -> None:
        self._receiver.close()
        self._process.terminate()
        self._process.join()


def _received(pipe: Connection, piece: Piece) -> Iterator[TokenBatch]:
    """Batches of one piece from its worker."""
    while True:
        try:
            message = pipe.recv()
        except EOFError as error:
            raise DataError(
                f"a worker process ended while it read {piece.source}; was it killed for memory? use fewer --workers"
            ) from error
        if message is None:
            return
        if isinstance(message, BaseException):
            raise message
        yield message


def _work(
    sender: Connection, pieces: list[Piece], options: ReadOptions, tokenizer: Tokenizer, dtype: type[np.generic]
) -> None:
    """Body of a worker process: all batches of each piece, then None."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = Reader(options)
    try:
        for piece in pieces:
            for batch in encode_piece(piece, reader, tokenizer, dtype):
                sender.send(batch)
            sender.send(None)
    except (BrokenPipeError, KeyboardInterrupt):
        return  # nobody listens any more
    except Exception as error:
        sender.send(error)
