"""The indexed corpus on disk: PREFIX.bin, PREFIX.idx (the format of Megatron-LM and GPT-NeoX) and PREFIX.json.

`.bin` holds token ids one after the other; `.idx` says where each sequence and document begins; `.json` (ours,
absent from foreign corpora) says which tokenizer made them. This module reads and writes the index with numpy
alone, so preparing and checking corpora does not import a framework; reading for training is megatron-core's.
"""

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stagdist.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_SAMPLED_BYTES = 1 << 16
_WRITE_STEP = 1 << 20


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Smallest type that every reader of the format expects for a vocabulary: uint16 below 65500, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def corpus_path(prefix: str | Path, ending: str) -> Path:
    """File of a corpus: `PREFIX` + `.bin`, `.idx` or `.json`."""
    return Path(str(prefix) + ending)


def canonical_prefix(prefix: str) -> str:
    """One spelling per corpus, since cached index maps are found by the hash of it."""
    path = Path(prefix)
    return str(Path(os.path.realpath(path.parent), path.name))


@dataclass(frozen=True)
class CorpusDescription:
    """What PREFIX.json says about a corpus that stagdist prepared.

    Attributes:
        begin_of_document: special tokens that every document begins with; older corpora have none.
    """

    documents: int
    tokens: int
    bytes: int
    max_token: int
    dtype: str
    seed: int | None
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_document: int
    sources: tuple[str, ...]
    begin_of_document: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_description(prefix: str) -> CorpusDescription | None:
    """PREFIX.json, or None where the corpus has none (made by another program).

    Raises:
        DataError: the file cannot be understood.
    """
    path = corpus_path(prefix, ".json")
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lists = {key: tuple(content.get(key, ())) for key in ("sources", "begin_of_document")}
        return CorpusDescription(**content | lists)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"cannot read {path}: {error}; prepare the corpus again, or delete this file") from error


def write_index(stream: BinaryIO, lengths: np.ndarray, dtype: type[np.generic]) -> None:
    """Write an `.idx` with one sequence per document.

    Args:
        lengths: tokens of each document, int32 [documents].
    """
    count, itemsize = len(lengths), np.dtype(dtype).itemsize
    code = next(code for code, known in _DTYPES.items() if known is dtype)
    stream.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
    stream.write(np.ascontiguousarray(lengths, np.int32).data)
    position = 0
    for start in range(0, count, _WRITE_STEP):
        ends = np.cumsum(lengths[start : start + _WRITE_STEP], dtype=np.int64) * itemsize + position
        stream.write(np.concatenate(([position], ends[:-1])).astype(np.int64).data)
        position = int(ends[-1])
    for start in range(0, count + 1, _WRITE_STEP):
        stream.write(np.arange(start, min(start + _WRITE_STEP, count + 1), dtype=np.int64).data)


@dataclass(frozen=True)
class CorpusIndex:
    """An opened `.idx`: what a corpus holds, without its tokens.

    Shapes: lengths int32 [sequences], memory-mapped.
    """

    prefix: str
    dtype: type[np.integer[Any]]
    lengths: np.ndarray
    documents: int

    @property
    def tokens(self) -> int:
        """Tokens of the corpus."""
        return int(self.lengths.sum(dtype=np.int64))

    def first_tokens(self, count: int) -> tuple[int, ...]:
        """The first token ids of the first document."""
        count = min(count, int(self.lengths[0]))
        return tuple(np.fromfile(corpus_path(self.prefix, ".bin"), self.dtype, count).tolist())

    def split_tokens(self, share: tuple[float, float]) -> int:
        """Tokens of the sequences between two shares of the corpus (cut as megatron-core cuts)."""
        first, last = (round(edge * float(len(self.lengths))) for edge in share)
        return int(self.lengths[first:last].sum(dtype=np.int64))

    def identity(self) -> str:
        """Short hash that changes when the corpus is prepared again: file sizes and samples of both files."""
        digest = hashlib.sha256()
        for ending in (".idx", ".bin"):
            path = corpus_path(self.prefix, ending)
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as stream:
                digest.update(stream.read(_SAMPLED_BYTES))
                stream.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(stream.read(_SAMPLED_BYTES))
        return digest.hexdigest()[:16]

    def largest_token(self, limit: int) -> int:
        """Largest token id among at most `limit` tokens, taken in blocks spread evenly over the corpus."""
        tokens = np.memmap(corpus_path(self.prefix, ".bin"), dtype=self.dtype, mode="r")
        block = 1 << 20
        count = -(-len(tokens) // block)
        blocks = np.unique(np.linspace(0, count - 1, min(count, max(1, limit // block))).astype(np.int64))
        return max(int(tokens[index * block : (index + 1) * block].max()) for index in blocks)


def open_index(prefix: str) -> CorpusIndex:
    """Open a corpus's index and check that both files are complete.

    Raises:
        DataError: the corpus is missing, unfinished, damaged or empty.
    """
    index_path, token_path = corpus_path(prefix, ".idx"), corpus_path(prefix, ".bin")
    missing = [str(path) for path in (index_path, token_path) if not path.is_file()]
    if missing:
        raise DataError(f"corpus {prefix} does not exist: no {' and no '.join(missing)}; {_missing_remedy(prefix)}")
    size = index_path.stat().st_size
    with index_path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index_path} is not an index of Megatron-LM's format (mmap); prepare the corpus again")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{index_path} has version {version} and token type {code}; only integer corpora of version 1")
    if size < _HEADER.size + 12 * sequences + 8 * boundaries:
        raise DataError(f"{index_path} is cut short ({size} bytes for {sequences} sequences); prepare the corpus again")
    if sequences == 0:
        raise DataError(f"corpus {prefix} is empty: it holds no document; prepare it again from files with text")
    lengths = np.memmap(index_path, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(sequences,))
    index = CorpusIndex(prefix, _DTYPES[code], lengths, max(0, boundaries - 1))
    expected = index.tokens * np.dtype(index.dtype).itemsize
    if token_path.stat().st_size < expected:
        raise DataError(
            f"{token_path} is cut short: {token_path.stat().st_size} bytes, its index says {expected}; "
            "copy or prepare the corpus again"
        )
    if expected == 0:
        raise DataError(f"corpus {prefix} is empty: it holds no token; prepare it again from files with text")
    return index


def _missing_remedy(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"a prefix is written without its ending: {prefix[:-4]}"
    if corpus_path(prefix, ".bin.partial").is_file():
        return "a run of tools/prepare_data.py was interrupted there, start it again"
    return "make it with tools/prepare_data.py, or correct the path"
