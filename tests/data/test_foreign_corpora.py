"""Corpora of other programs: ids that the model lacks, positions that contradict each other, failed downloads."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagdist.config.parts import DataConfig
from stagdist.data.compatibility import check_data
from stagdist.data.indexed import CorpusIndex
from tests.data.test_corpus import LENGTH, numbered, refused, write_foreign


@pytest.mark.parametrize(
    ("dtype", "rare"), [(np.int16, -1), (np.int16, -25536), (np.int32, -100), (np.int64, -1), (np.int64, 2**40)]
)
def test_one_rare_id_outside_the_vocabulary_is_found_wherever_it_is(
    tmp_path: Path, dtype: type[np.generic], rare: int
) -> None:
    size = (1 << 20) + 5000  # more than one block is read
    documents = [[1] * size]
    data = {"corpora": [{"prefix": str(tmp_path / "c")}], "split": [1, 0, 0]}
    for place in (0, size // 2, size - 1):
        documents[0][place] = rare
        write_foreign(tmp_path / "c", documents, dtype)
        message = refused(data)
        assert f"corpus {tmp_path / 'c'} holds token id {rare}" in message and f"position {place}" in message
        assert ("Write the corpus again" in message) == (rare < 0)
        documents[0][place] = 1
    write_foreign(tmp_path / "c", documents, dtype)
    check_data(DataConfig(**data), sequence_length=LENGTH, vocab_size=300)  # type: ignore[arg-type]


def test_ids_that_wrapped_to_negative_numbers_never_reach_training(tmp_path: Path) -> None:
    wrapped = np.arange(30000, 36000).astype(np.int16).reshape(60, 100).tolist()
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", wrapped, np.int16)}]}
    assert "with a wider type than int16" in refused(data, vocab_size=50000)


def test_a_foreign_corpus_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(corpora=[{"prefix": write_foreign(tmp_path / "c", numbered(0, 9))}])  # type: ignore[list-item]
    (tmp_path / "index_cache").mkdir()
    (tmp_path / "index_cache" / "token_range_damaged.json").write_text("[")
    reads: list[str] = []
    blocks = CorpusIndex._blocks

    def counted(index: CorpusIndex) -> Any:
        reads.append(index.prefix)
        return blocks(index)

    monkeypatch.setattr(CorpusIndex, "_blocks", counted)
    for _ in range(3):
        check_data(data, sequence_length=LENGTH, vocab_size=300)
    assert len(reads) == 1
    (record,) = (path for path in (tmp_path / "index_cache").glob("token_range_*.json") if "damaged" not in path.name)
    record.write_text("[")
    check_data(data, sequence_length=LENGTH, vocab_size=300)
    assert len(reads) == 2, "a damaged record is written again"
    tokens = np.fromfile(tmp_path / "c.bin", np.uint16)
    tokens[100] = 301
    tokens.tofile(tmp_path / "c.bin")
    os.utime(tmp_path / "c.bin", ns=(1, 1))
    assert "position 100" in refused({"corpora": [{"prefix": str(tmp_path / "c")}]})


def test_damaged_positions_of_an_index_are_noticed(tmp_path: Path) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 9))}]}
    index = (tmp_path / "c.idx").read_bytes()
    negative, pointer, boundary = ((place, value) for place, value in ((34, -1), (34 + 36 + 8, 7), (34 + 108 + 16, 8)))
    for (place, value), kind in ((negative, "<i4"), (pointer, "<i8"), (boundary, "<i8")):
        number = np.array([value], kind).tobytes()
        (tmp_path / "c.idx").write_bytes(index[:place] + number + index[place + len(number) :])
        assert "c.idx is damaged" in refused(data)
    (tmp_path / "c.idx").write_bytes(index)
    with (tmp_path / "c.bin").open("ab") as stream:
        stream.write(b"more")
    assert "c.bin does not belong to its index" in refused(data)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_file_that_was_not_downloaded_is_named(tmp_path: Path, ending: str) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 9))}]}
    path = tmp_path / f"c{ending}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 720\n")
    assert refused(data) == f"{path} is a git-lfs pointer, not the file: run git lfs pull in its directory"
    path.write_text("\n<!DOCTYPE HTML><html>")
    assert f"{path} begins with <!DOCTYPE html: it is a web page" in refused(data)
