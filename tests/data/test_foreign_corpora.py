"""Corpora of other programs: ids that the model lacks, positions that contradict each other, failed downloads."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stagdist.config.loading import dump_config
from stagdist.config.parts import DataConfig
from stagdist.data.compatibility import check_data, problems_on_this_machine
from stagdist.data.indexed import CorpusIndex
from stagdist.data.loader import BatchPlan, Loader
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import ConfigError, DataError
from tests.checkpoint.synthetic import run_config
from tests.data.test_corpus import LENGTH, numbered, refused, write_foreign
from tests.ranks import ROOT, run_script


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
    record.unlink()
    with ThreadPoolExecutor(8) as ranks:
        for verdict in [ranks.submit(check_data, data, sequence_length=LENGTH, vocab_size=300) for _ in range(8)]:
            verdict.result()
    assert len(reads) == 3, "of several ranks one reads, and the others wait"
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
    for mode, problem in ((b"\0" * 9, None), (b"\0" * 8 + b"\1", "c.idx has sequences that are marked as images")):
        (tmp_path / "c.idx").write_bytes(index + mode)
        if problem:
            assert problem in refused(data)
        else:
            check_data(DataConfig(**data), sequence_length=LENGTH, vocab_size=300)  # type: ignore[arg-type]
    (tmp_path / "c.idx").write_bytes(index)
    with (tmp_path / "c.bin").open("ab") as stream:
        stream.write(b"more")
    assert "c.bin does not belong to its index" in refused(data)


@pytest.mark.parametrize("value", [None, 5, -1, 1.5, True, "x", [], {}, [None], float("inf"), 1 << 70])
def test_a_description_with_a_value_of_another_type_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    right = asdict(prepare([str(tmp_path / "a.txt")], str(tmp_path / "c"), byte_tokenizer()).description)
    data = {"corpora": [{"prefix": str(tmp_path / "c")}], "split": [1, 0, 0]}
    for key in (*right, "unknown"):
        (tmp_path / "c.json").write_text(json.dumps({**right, key: value}))
        same = type(value) is type(right.get(key)) or (key == "seed" and value in (None, 5)) or value == []
        if not same:
            assert f"cannot read {tmp_path / 'c.json'}: {key}" in refused(data)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_file_that_was_not_downloaded_is_named(tmp_path: Path, ending: str) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 9))}]}
    path = tmp_path / f"c{ending}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 720\n")
    assert refused(data) == f"{path} is a git-lfs pointer, not the file: run git lfs pull in its directory"
    path.write_text("\n<!DOCTYPE HTML><html>")
    problem = "begins with <!DOCTYPE html: it is a web page" if ending == ".idx" else "is cut short"
    assert f"{path} {problem}" in refused(data)
    write_foreign(tmp_path / "c", [list(b"<!doctype html>") * 9], np.uint8)
    check_data(DataConfig(**data | {"split": [1, 0, 0]}), sequence_length=LENGTH, vocab_size=300)  # type: ignore[arg-type]


def test_ids_that_the_tokenizer_lacks_are_trained_and_evaluated(tmp_path: Path) -> None:
    """The rows of the model decide, not the tokenizer: bytes have 257 ids, the corpus 400."""
    documents = [[(index * 7 + place) % 400 for place in range(200)] for index in range(50)]
    config = yaml.safe_load(dump_config(run_config({"vocab_size": 400})))
    corpora = [{"prefix": write_foreign(tmp_path / "c", documents)}]
    config["runs_directory"] = str(tmp_path)
    config["data"] |= {"corpora": corpora, "sequence_length": 16, "split": [80, 10, 10]}
    config["training"] |= {"steps": 2, "global_batch_size": 2}
    config["evaluation"] |= {"interval_steps": 1, "num_batches": 2}
    config["parallel"] |= {"device": "cpu", "pipeline_parallel_size": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_script(ROOT / "launch" / "pretrain.py", "--config", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 5 < summary["validation"]["loss"] < 7 and 5 < summary["test"]["loss"] < 7  # log 400 is 6


def test_the_loader_is_the_last_guard(tmp_path: Path) -> None:
    """For a corpus that is changed after it was checked."""
    sample = {"tokens": torch.tensor([1, 2]), "labels": torch.tensor([2, -1])}
    loader = Loader([sample], BatchPlan(1, 1, 0, 1), vocab_size=300)
    with pytest.raises(DataError, match="hold token id -1, but model.vocab_size is 300; prepare the corpus again"):
        next(loader.step(0))
    loader.close()


def test_a_dry_run_reads_the_data_that_is_there(tmp_path: Path) -> None:
    config = run_config({"vocab_size": 300})
    write_foreign(tmp_path / "c", [[1] * 99 + [-1]], np.int16)
    data = DataConfig(corpora=[{"prefix": str(tmp_path / "c")}])  # type: ignore[list-item]
    (problem,) = problems_on_this_machine(config.model_copy(update={"data": data}))
    assert "holds token id -1" in problem
    for absent in ({"tokenizer": "absent"}, {"corpora": [{"prefix": "absent"}]}):
        part = DataConfig(**{**data.model_dump(), **absent})
        assert problems_on_this_machine(config.model_copy(update={"data": part})) == []


@pytest.mark.parametrize("name", ["c.json", "c.bin"])
def test_a_file_that_is_not_of_a_corpus_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / name).write_text('[{"text": "mine"}]')
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=rf"{name} exists and belongs to no corpus; choose another --output"):
            prepare([str(tmp_path / "a.txt")], str(tmp_path / "c"), byte_tokenizer(), overwrite=overwrite)
    assert (tmp_path / name).read_text() == '[{"text": "mine"}]' and len(list(tmp_path.iterdir())) == 2
