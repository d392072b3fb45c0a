"""Splits and blends over indexed corpora, their cache, and every corpus that is refused."""

import json
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagdist.config.parts import DataConfig
from stagdist.data.compatibility import check_data, split_shares
from stagdist.data.corpus import Splits, build_splits
from stagdist.data.indexed import write_index
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import Tokenizer, byte_tokenizer
from stagdist.errors import ConfigError, DataError
from tests.ranks import run_ranks

LENGTH = 32


def write_foreign(prefix: Path | str, documents: list[list[int]], dtype: type[np.generic] = np.uint16) -> str:
    """A corpus as Megatron-LM or GPT-NeoX leave it: the two files, no description."""
    with Path(f"{prefix}.idx").open("wb") as stream:
        write_index(stream, np.array([len(document) for document in documents], np.int32), dtype)
    np.array([token for document in documents for token in document], dtype).tofile(f"{prefix}.bin")
    return str(prefix)


def numbered(first: int, count: int, size: int = 40) -> list[list[int]]:
    """Documents that can be told apart: document n holds the token n throughout."""
    return [[number] * size for number in range(first, first + count)]


def build(data: dict[str, Any], num_samples: tuple[int, int, int], **arguments: Any) -> Splits:
    chosen: dict[str, Any] = {"sequence_length": LENGTH, "tokenizer": byte_tokenizer(), "vocab_size": 4096}
    return build_splits(DataConfig(**data), num_samples=num_samples, **{**chosen, **arguments})


def tokens_of(dataset: Any, count: int) -> list[list[int]]:
    return [dataset[index]["tokens"].tolist() for index in range(count)]


def share_of(dataset: Any, count: int, low: int, high: int) -> float:
    flat = [token for sample in tokens_of(dataset, count) for token in sample]
    return sum(low <= token < high for token in flat) / len(flat)


def test_samples_are_consecutive_tokens_with_labels_one_ahead(corpus: str, bpe: Tokenizer) -> None:
    splits = build({"corpora": [{"prefix": corpus}], "split": [1, 0, 0]}, (500, 0, 0), tokenizer=bpe)
    assert splits.validation is None and splits.test is None
    stream = np.fromfile(f"{corpus}.bin", np.uint16)
    places = np.lib.stride_tricks.sliding_window_view(stream, LENGTH)
    inside = 0
    for index in range(100):
        sample = splits.train[index]
        tokens, labels = sample["tokens"], sample["labels"]
        assert tokens.shape == labels.shape == (LENGTH,) and str(tokens.dtype) == "torch.int64"
        assert tokens[1:].tolist() == labels[:-1].tolist()
        inside += bool((places == tokens.numpy()).all(1).any())
    assert inside > 80, "samples within one document are found in the file as they are"


def test_splits_hold_different_documents_cut_where_megatron_cuts(tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    for split in ((98.0, 1.0, 1.0), (90.0, 7.0, 3.0), (0.7, 0.3, 0.0), (100.0, 0.0, 0.0)):
        theirs = convert_split_vector_to_split_matrix(parse_and_normalize_split(",".join(map(str, split))))
        ours = [share if share[1] > share[0] else None for share in split_shares(split)]
        assert ours == theirs
    prefix = write_foreign(tmp_path / "c", numbered(0, 200))
    splits = build({"corpora": [{"prefix": prefix}], "split": [80, 15, 5]}, (100, 30, 9))
    for dataset, low, high in ((splits.train, 0, 160), (splits.validation, 160, 190), (splits.test, 190, 200)):
        assert dataset is not None and share_of(dataset, 9, low, high) == 1.0


def test_tiny_shares_are_not_misread(tmp_path: Path) -> None:
    prefix = write_foreign(tmp_path / "c", numbered(0, 200))
    splits = build({"corpora": [{"prefix": prefix}], "split": [1.0, 1e-5, 0]}, (50, 0, 0))
    assert share_of(splits.train, 50, 0, 200) == 1.0 and splits.validation is None


def test_a_split_that_nobody_wants_is_not_built_but_kept_from_training(tmp_path: Path) -> None:
    """With three documents, 98,1,1 leaves the two others empty; megatron-core would count epochs of them for ever."""
    prefix = write_foreign(tmp_path / "c", numbered(0, 3, size=400))
    splits = build({"corpora": [{"prefix": prefix}]}, (10, 0, 0))
    assert splits.validation is None and splits.test is None
    kept = build({"corpora": [{"prefix": prefix}], "split": [2, 1, 0]}, (10, 0, 0))
    assert share_of(kept.train, 10, 0, 2) == 1.0


def test_blends_draw_by_weight_and_cut_each_corpus(tmp_path: Path) -> None:
    first = write_foreign(tmp_path / "a", numbered(0, 100))
    second = write_foreign(tmp_path / "b", numbered(1000, 300))
    data = {"corpora": [{"prefix": first, "weight": 3}, {"prefix": second, "weight": 1}], "split": [90, 10, 0]}
    splits = build(data, (400, 40, 0))
    assert share_of(splits.train, 400, 0, 90) == pytest.approx(0.75, abs=0.01)
    assert share_of(splits.train, 400, 1000, 1270) == pytest.approx(0.25, abs=0.01)
    assert share_of(splits.validation, 40, 90, 100) == pytest.approx(0.75, abs=0.03)
    assert splits.test is None
    import torch

    assert not torch.distributed.is_initialized(), "no process group is left behind"


@pytest.mark.parametrize("weights", [[1] * 7, [1, 2, 3, 5, 8, 13, 21], [1, 1, 1, 1, 1, 1, 994]])
def test_blends_of_many_corpora_and_few_samples_are_never_short(tmp_path: Path, weights: list[float]) -> None:
    corpora = [
        {"prefix": write_foreign(tmp_path / f"c{index}", numbered(index, 30)), "weight": weight}
        for index, weight in enumerate(weights)
    ]
    for count in (1, 5, 16, 333):
        splits = build({"corpora": corpora, "split": [1, 0, 0]}, (count, 0, 0))
        assert len(splits.train) >= count  # type: ignore[arg-type]


def test_splits_may_have_corpora_of_their_own(tmp_path: Path) -> None:
    prefixes = [write_foreign(tmp_path / f"c{index}", numbered(1000 * index, 50)) for index in range(4)]
    data = {
        "train_corpora": [{"prefix": prefixes[0], "weight": 1}, {"prefix": prefixes[1], "weight": 9}],
        "validation_corpora": [{"prefix": prefixes[2], "weight": 5}],
        "test_corpora": [{"prefix": prefixes[3]}],
    }
    splits = build(data, (200, 10, 0))
    assert share_of(splits.train, 200, 1000, 1050) == pytest.approx(0.9, abs=0.01)
    assert share_of(splits.validation, 10, 2000, 2050) == 1.0
    assert splits.test is None


def test_the_order_depends_on_seed_and_number_of_samples_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_foreign(tmp_path / "c", numbered(0, 400))
    monkeypatch.chdir(tmp_path)
    data = {"corpora": [{"prefix": prefix}], "split": [9, 1, 0]}
    order = tokens_of(build(data, (300, 0, 0)).train, 300)
    assert tokens_of(build(data, (300, 20, 0)).train, 300) == order, "evaluation does not change training"
    assert tokens_of(build({**data, "corpora": [{"prefix": "c"}]}, (300, 0, 0)).train, 300) == order
    assert tokens_of(build({**data, "seed": 5}, (300, 0, 0)).train, 300) != order
    shutil.rmtree(tmp_path / "index_cache")
    assert tokens_of(build(data, (300, 0, 0)).train, 300) == order


def test_index_maps_are_kept_and_used_again(tmp_path: Path) -> None:
    prefix = write_foreign(tmp_path / "c", numbered(0, 100))
    data = {"corpora": [{"prefix": prefix, "weight": 1}, {"prefix": prefix}], "cache_directory": str(tmp_path / "maps")}
    build(data, (50, 0, 0))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "maps").glob("*.npy")}
    assert any("BlendedDataset" in path.name for path in before) and len(before) >= 5
    build(data, (50, 0, 0))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "maps").glob("*.npy")} == before
    assert not (tmp_path / "index_cache").exists()


def test_a_corpus_prepared_again_never_meets_the_maps_of_the_old_one(tmp_path: Path) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 100))}], "split": [1, 0, 0]}
    build(data, (60, 0, 0))
    write_foreign(tmp_path / "c", numbered(500, 25, size=160))
    assert share_of(build(data, (60, 0, 0)).train, 60, 500, 525) == 1.0


def test_maps_that_a_killed_run_cut_short_are_built_again(tmp_path: Path) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 300))}], "split": [1, 0, 0]}
    order = tokens_of(build(data, (200, 0, 0)).train, 200)
    maps = sorted((tmp_path / "index_cache").glob("*.npy"))
    assert len(maps) == 3
    for path in maps:
        content = path.read_bytes()
        for kept in (0, 50, len(content) - 8):
            path.write_bytes(content[:kept])
            assert tokens_of(build(data, (200, 0, 0)).train, 200) == order
            assert path.read_bytes() == content


def test_a_full_disk_is_one_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 100))}]}

    def full(*_: object, **__: object) -> None:
        raise OSError("720 requested and 0 written")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(DataError, match=r"index_cache: 720 requested and 0 written; set data\.cache_directory"):
        build(data, (20, 0, 0))


def build_on_rank(payload: dict[str, Any]) -> list[list[list[int]]]:
    """Body of a rank: build twice (maps absent, then there) and give samples."""
    import os

    import torch

    torch.distributed.init_process_group("gloo")
    results = []
    for _ in range(2):
        splits = build(payload["data"], (100, 10, 0))
        results += [tokens_of(splits.train, 100), tokens_of(splits.validation, 10)]
    assert os.environ["RANK"] == str(torch.distributed.get_rank())
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.ranks
def test_two_ranks_share_the_maps_that_rank_0_writes(tmp_path: Path) -> None:
    prefixes = [write_foreign(tmp_path / name, numbered(1000 * index, 100)) for index, name in enumerate("ab")]
    data = {"corpora": [{"prefix": prefix} for prefix in prefixes], "split": [8, 2, 0]}
    first, second = run_ranks("tests.data.test_corpus:build_on_rank", 2, {"data": data})
    assert first == second and first[:2] == first[2:]
    alone = build({**data, "cache_directory": str(tmp_path / "other")}, (100, 10, 0))
    assert tokens_of(alone.train, 100) == first[0]


def test_integer_corpora_of_other_programs_load_in_every_width(tmp_path: Path) -> None:
    documents = numbered(0, 60)
    expected = None
    for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.int64):
        prefix = write_foreign(tmp_path / dtype.__name__, documents, dtype)
        samples = tokens_of(build({"corpora": [{"prefix": prefix}], "split": [1, 0, 0]}, (40, 0, 0)).train, 40)
        expected = expected or samples
        assert samples == expected
    by_other_tools = [[1] * 40, [2] * 30, [3] * 50]
    with (tmp_path / "sentences.idx").open("wb") as stream:  # several sequences to a document
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 3))
        stream.write(np.array([40, 30, 50], "<i4").tobytes() + np.array([0, 80, 140], "<i8").tobytes())
        stream.write(np.array([0, 2, 3], "<i8").tobytes())
    np.concatenate(by_other_tools).astype("<u2").tofile(tmp_path / "sentences.bin")
    splits = build({"corpora": [{"prefix": str(tmp_path / "sentences")}], "split": [1, 0, 0]}, (3, 0, 0))
    seen = Counter(token for sample in tokens_of(splits.train, 3) for token in sample)
    assert set(seen) <= {1, 2, 3} and sum(seen.values()) == 96


def refused(data: dict[str, Any], **arguments: Any) -> str:
    chosen: dict[str, Any] = {"sequence_length": LENGTH, "vocab_size": 300, **arguments}
    with pytest.raises((ConfigError, DataError)) as caught:
        check_data(DataConfig(**data), **chosen)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_damaged_corpora_are_named_with_the_remedy(tmp_path: Path) -> None:
    data = {"corpora": [{"prefix": str(tmp_path / "c")}]}
    assert "set data.corpora" in refused({})
    message = refused(data)
    assert f"corpus {tmp_path / 'c'} does not exist" in message and "tools/prepare_data.py" in message
    (tmp_path / "c.bin.partial").touch()
    assert "was interrupted there, start it again" in refused(data)
    write_foreign(tmp_path / "c", numbered(0, 9))
    assert "without its ending" in refused({"corpora": [{"prefix": str(tmp_path / "c.bin")}]})
    index, tokens = (tmp_path / "c.idx").read_bytes(), (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes(tokens[:-2])
    assert "c.bin is cut short" in refused(data)
    (tmp_path / "c.bin").write_bytes(tokens)
    (tmp_path / "c.idx").write_bytes(index[:-1])
    assert "c.idx is cut short" in refused(data)
    (tmp_path / "c.idx").write_bytes(b"TNTIDX\x00\x00" + index[8:])
    assert "not an index of Megatron-LM's format" in refused(data)
    (tmp_path / "c.idx").write_bytes(index[:17] + b"\x06" + index[18:])
    assert "token type 6" in refused(data)
    (tmp_path / "c.idx").write_bytes(index)
    check_data(DataConfig(**data), sequence_length=LENGTH, vocab_size=300)  # type: ignore[arg-type]


def test_empty_and_short_corpora_are_named_with_the_remedy(tmp_path: Path) -> None:
    write_foreign(tmp_path / "none", [])
    assert "is empty: it holds no document" in refused({"corpora": [{"prefix": str(tmp_path / "none")}]})
    write_foreign(tmp_path / "blank", [[], []])
    assert "is empty: it holds no token" in refused({"corpora": [{"prefix": str(tmp_path / "blank")}]})
    short = {"train_corpora": [{"prefix": write_foreign(tmp_path / "short", [[1] * LENGTH])}]}
    message = refused(short)
    assert f"short is shorter than one sequence: {LENGTH} tokens, {LENGTH + 1} are needed" in message
    check_data(DataConfig(**short), sequence_length=LENGTH - 1, vocab_size=300)  # type: ignore[arg-type]
    few = {"corpora": [{"prefix": write_foreign(tmp_path / "few", numbered(0, 3, size=100))}]}
    check_data(DataConfig(**few), sequence_length=LENGTH, vocab_size=300)  # type: ignore[arg-type]
    message = refused(few, num_samples=(10, 5, 0))
    assert "the validation split of corpus" in message and "a larger part of data.split" in message
    with pytest.raises(DataError, match="validation split"):
        build(few, (10, 5, 0))


def test_tokens_and_tokenizers_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, corpus: str, bpe: Tokenizer, bpe_directory: Path
) -> None:
    foreign = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 301))}]}
    message = refused(foreign)
    assert "holds token id 300, but model.vocab_size is 300 (first such id at position 12000)" in message
    assert "raise model.vocab_size to at least 301" in message
    check_data(DataConfig(**foreign), sequence_length=LENGTH, vocab_size=301)  # type: ignore[arg-type]
    message = refused(foreign, vocab_size=256)
    assert "the tokenizer bytes gives text or its end ids up to 256, but model.vocab_size is 256" in message
    assert "raise model.vocab_size to 257 or more" in message
    ours = {"corpora": [{"prefix": corpus}], "tokenizer": str(bpe_directory)}
    check_data(DataConfig(**ours), sequence_length=LENGTH, vocab_size=1000)  # type: ignore[arg-type]
    assert "ids up to 999, but model.vocab_size is 999; raise model.vocab_size to 1000" in refused(ours, vocab_size=999)
    message = refused({"corpora": [{"prefix": corpus}]}, vocab_size=1000)
    assert "was made with the tokenizer" in message and bpe.fingerprint[:12] in message
    assert "set data.tokenizer to that one" in message


def test_a_description_of_another_corpus_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    prefix = str(tmp_path / "c")
    prepare([str(tmp_path / "a.txt")], prefix, byte_tokenizer())
    data = {"corpora": [{"prefix": prefix}], "split": [1, 0, 0]}
    check_data(DataConfig(**data), sequence_length=LENGTH, vocab_size=257)  # type: ignore[arg-type]
    write_foreign(prefix, numbered(0, 9))
    assert "they do not belong together" in refused(data)
    (tmp_path / "c.json").write_text(json.dumps({"tokens": 5}))
    assert "cannot read" in refused(data)


def test_other_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    data = {"corpora": [{"prefix": write_foreign(tmp_path / "c", numbered(0, 100))}]}
    assert "data.seed" in refused({**data, "seed": 2**32})
    (tmp_path / "file").touch()
    assert "set data.cache_directory" in refused({**data, "cache_directory": str(tmp_path / "file" / "maps")})
    with pytest.raises(ConfigError, match="at least 1 for training"):
        build(data, (0, 5, 0))
