"""Mutated files of corpora: a refusal of one line, or the documents that are there."""

from pathlib import Path

import numpy as np
import pytest

from stagdist.config.parts import DataConfig
from stagdist.data.compatibility import check_data
from stagdist.data.indexed import open_index
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import DataError
from tests.data.test_corpus import write_foreign
from tests.fuzz.mutations import COUNT, mutations

ROWS = 257
DOCUMENTS = [[(index * 7 + place) % ROWS for place in range(5 + index % 40)] for index in range(60)]
DTYPES = (np.uint16, np.int16, np.int32, np.int64)


def problem(prefix: Path) -> str | None:
    """Why a corpus is refused before training; None if it is not."""
    data = DataConfig(corpora=[{"prefix": str(prefix)}], split=[1, 0, 0])  # type: ignore[list-item, arg-type]
    try:
        check_data(data, sequence_length=16, vocab_size=ROWS)
    except DataError as error:
        assert "\n" not in str(error) and prefix.name in str(error)
        return str(error)
    return None


def documents_of(prefix: Path) -> list[list[int]]:
    """What training reads: every sequence, by its length."""
    index = open_index(str(prefix))
    tokens = np.fromfile(f"{prefix}.bin", index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_a_foreign_corpus(tmp_path: Path, dtype: type[np.generic], ending: str) -> None:
    prefix = tmp_path / "corpus"
    write_foreign(prefix, DOCUMENTS, dtype)
    path = tmp_path / f"corpus{ending}"
    refused, count = 0, COUNT // len(DTYPES)
    for mutation in mutations(path.read_bytes(), count, seed=1, others=[path.read_bytes() * 2]):
        path.write_bytes(mutation.content)
        found = problem(prefix)
        refused += found is not None
        if found is not None:
            continue
        assert "cut" not in mutation.name and "foreign" not in mutation.name
        differing = [pair for pair in zip(documents_of(prefix), DOCUMENTS, strict=True) if pair[0] != pair[1]]
        assert len(differing) == (ending == ".bin"), mutation.name
        flat = [token for document, _ in differing for token in document]
        assert all(0 <= token < ROWS for token in flat), mutation.name
    assert refused >= count // 2


def test_a_corpus_of_ours(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    texts = ["to be or not to be, that is the question\n\n" * (1 + index % 3) for index in range(30)]
    (tmp_path / "text.txt").write_text("".join(texts))
    prepare([str(tmp_path / "text.txt")], str(prefix), byte_tokenizer())
    expected = documents_of(prefix)
    for ending in (".idx", ".json"):
        path = tmp_path / f"corpus{ending}"
        content = path.read_bytes()
        for mutation in mutations(content, COUNT // 2, seed=2):
            path.write_bytes(mutation.content)
            if problem(prefix) is None:
                assert documents_of(prefix) == expected, mutation.name
        path.write_bytes(content)
    path = tmp_path / "corpus.bin"
    content = path.read_bytes()
    for place in {*range(0, len(content), max(1, len(content) // COUNT)), len(content) - 1}:
        path.write_bytes(content[:place])
        assert "corpus.bin is" in (problem(prefix) or ""), place
