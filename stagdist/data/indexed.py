"""The indexed corpus on disk: PREFIX.bin, PREFIX.idx (the format of Megatron-LM and GPT-NeoX) and PREFIX.json.

`.bin` holds token ids one after the other; `.idx` says where each sequence and document begins; `.json` (ours,
absent from foreign corpora) says which tokenizer made them. This module reads and writes the index with numpy
alone, so preparing and checking corpora does not import a framework; reading for training is megatron-core's.
"""

import glob
import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from stagdist.errors import DataError
from stagdist.files import locked, not_downloaded, writing

LOG = logging.getLogger(__name__)

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
_SCAN_STEP = 1 << 20
_LARGEST_DESCRIPTION = 1 << 28
_AGAIN = "copy or prepare the corpus again"


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

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    max_token: NonNegativeInt
    dtype: str
    seed: int | None
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_document: int
    sources: tuple[str, ...] = ()
    begin_of_document: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The file's content; bytes of a path that are not UTF-8 become question marks."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


def read_description(prefix: str) -> CorpusDescription | None:
    """PREFIX.json, or None where the corpus has none (made by another program).

    Raises:
        DataError: the file cannot be understood.
    """
    path = corpus_path(prefix, ".json")
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:  # at most a part: the name may be that of a large file with text
            return TypeAdapter(CorpusDescription).validate_json(stream.read(_LARGEST_DESCRIPTION))
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise DataError(
            f"cannot read {path}: {reason}; prepare the corpus again, or move this file away if another program made "
            "the corpus"
        ) from error


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
        """The first token ids: of the first document that is not empty."""
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

    def token_range(self, cache: Path) -> tuple[int, int]:
        """Smallest and largest token id. All tokens are read once; the result is kept in `cache` until they change.

        Of several processes that ask at the same time, one reads the tokens and the others wait.

        Raises:
            DataError: nothing can be written to `cache`.
        """
        changed = corpus_path(self.prefix, ".bin").stat().st_mtime_ns
        record = cache / f"token_range_{self.identity()}_{changed}.json"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / ".token_range.lock", timeout_s=-1):
                if (known := _recorded_range(record)) is None:
                    LOG.info("reading %s.bin for ids outside the vocabulary, once", self.prefix)
                    blocks = [(int(block.min()), int(block.max())) for _, block in self._blocks()]
                    known = min(low for low, _ in blocks), max(high for _, high in blocks)
                    with writing(record) as stream:
                        json.dump(known, stream)
        except OSError as error:
            raise DataError(f"cannot write {record}: {error}; set data.cache_directory") from error
        return known

    def first_outside(self, vocab_size: int) -> int:
        """Position of the first token id that is negative or not below `vocab_size`; -1 if there is none."""
        for start, block in self._blocks():
            outside = (block < 0) | (block >= vocab_size)
            if outside.any():
                return start + int(outside.argmax())
        return -1

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All tokens, a few MiB at a time, each with the position of its first token."""
        tokens = np.memmap(corpus_path(self.prefix, ".bin"), dtype=self.dtype, mode="r")
        return ((start, tokens[start : start + _SCAN_STEP]) for start in range(0, len(tokens), _SCAN_STEP))


def _recorded_range(record: Path) -> tuple[int, int] | None:
    try:
        low, high = map(int, json.loads(record.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return low, high


def open_index(prefix: str) -> CorpusIndex:
    """Open a corpus's index and check that both files are complete.

    Raises:
        DataError: the corpus is missing, unfinished, damaged or empty.
    """
    index_path, token_path = corpus_path(prefix, ".idx"), corpus_path(prefix, ".bin")
    missing = [str(path) for path in (index_path, token_path) if not path.is_file()]
    if missing:
        raise DataError(f"corpus {prefix} does not exist: no {' and no '.join(missing)}; {_missing_remedy(prefix)}")
    for path in (index_path, token_path):
        if problem := not_downloaded(path, text=path == token_path):  # tokens may be bytes of HTML
            raise DataError(problem)
    index, pointers, boundaries = _read_index(prefix, index_path)
    itemsize = np.dtype(index.dtype).itemsize
    expected = index.tokens * itemsize
    if token_path.stat().st_size != expected:
        fault = "is cut short" if token_path.stat().st_size < expected else "does not belong to its index"
        raise DataError(f"{token_path} {fault}: {token_path.stat().st_size} bytes, its index says {expected}; {_AGAIN}")
    if expected == 0:
        raise DataError(f"corpus {prefix} is empty: it holds no token; prepare it again from files with text")
    fits = int(pointers[0]) == 0 and int(boundaries[0]) == 0 and int(boundaries[-1]) == len(index.lengths)
    for start in range(0, len(index.lengths), _WRITE_STEP):
        part = pointers[start : start + _WRITE_STEP + 1]
        fits &= np.array_equal(np.diff(part), index.lengths[start : start + len(part) - 1] * np.int64(itemsize))
    for start in range(0, len(boundaries), _WRITE_STEP):
        fits &= bool((np.diff(boundaries[start : start + _WRITE_STEP + 1]) >= 0).all())
    if not fits:
        raise DataError(f"{index_path} is damaged: its positions do not follow from its lengths; {_AGAIN}")
    return index


def _read_index(prefix: str, path: Path) -> tuple[CorpusIndex, np.ndarray, np.ndarray]:
    """An index, with the first byte of each sequence, int64 [sequences], and the boundaries of documents, int64."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{path} is not an index of Megatron-LM's format (mmap); {_AGAIN}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path} has version {version} and token type {code}; write the corpus again, as version 1 with uint16 "
            "(type 8) or int32 (type 4)"
        )
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):  # Megatron-LM appends a byte of each sequence of images or text
        fault = "is cut short" if size < expected else "is damaged"
        raise DataError(f"{path} {fault} ({size} bytes for {sequences} sequences); {_AGAIN}")
    if sequences == 0 or boundaries == 0:
        raise DataError(f"corpus {prefix} is empty: it holds no document; prepare it again from files with text")
    content = np.memmap(path, np.uint8, mode="r", offset=_HEADER.size)
    lengths = content[: 4 * sequences].view(np.int32)
    if int(lengths.min()) < 0:
        raise DataError(f"{path} is damaged: the length of a sequence is {lengths.min()}; {_AGAIN}")
    pointers = content[4 * sequences : 12 * sequences].view(np.int64)
    documents = content[12 * sequences : 12 * sequences + 8 * boundaries].view(np.int64)
    if content[12 * sequences + 8 * boundaries :].any():
        raise DataError(f"{path} has sequences that are marked as images or other media; write a corpus of text only")
    return CorpusIndex(prefix, _DTYPES[code], lengths, boundaries - 1), pointers, documents


def _missing_remedy(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"a prefix is written without its ending: {prefix[:-4]}"
    if any(Path(prefix).parent.glob(f"{glob.escape(Path(prefix).name)}.*.partial")):
        return "a run of tools/prepare_data.py was interrupted there, start it again"
    return "make it with tools/prepare_data.py, or correct the path"
