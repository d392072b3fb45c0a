"""The order of samples beyond those that a run was begun for."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from stagdist.data.loader import BatchPlan, Loader
from stagdist.errors import DataError
from tests.data.test_corpus import LENGTH, build, numbered, share_of, tokens_of, write_foreign
from tests.ranks import run_ranks

SAMPLES = 20
"""Samples that the runs of these tests are begun for."""


def one_corpus(folder: Path, documents: int = 60) -> dict[str, Any]:
    return {"corpora": [{"prefix": write_foreign(folder / "c", numbered(0, documents))}], "split": [8, 1, 1]}


def blend(folder: Path, weights: list[float]) -> dict[str, Any]:
    """Corpora whose tokens have other thousands."""
    return {
        "train_corpora": [
            {"prefix": write_foreign(folder / f"c{index}", numbered(1000 * index, 7 + 40 * index)), "weight": weight}
            for index, weight in enumerate(weights)
        ]
    }


def order(data: dict[str, Any], read_samples: int, sizes: tuple[int, int, int] = (SAMPLES, 0, 0)) -> list[list[int]]:
    """The samples of a run that reads so many."""
    return tokens_of(build(data, sizes, read_samples=read_samples).train, max(read_samples, sizes[0]))


def test_a_longer_run_begins_with_the_samples_of_the_shorter_one(tmp_path: Path) -> None:
    data = one_corpus(tmp_path)
    longest = order(data, 1000)
    for read_samples in (0, SAMPLES, SAMPLES + 1, 59, 60, 61, 200, 999):
        assert longest[: max(read_samples, SAMPLES)] == order(data, read_samples)


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [1, 3, 7], [0.1, 0.2, 0.3, 0.4], [1e-3, 1, 1 / 3]])
def test_a_longer_blend_begins_with_the_samples_of_the_shorter_one_and_keeps_its_weights(
    tmp_path: Path, weights: list[float]
) -> None:
    data = blend(tmp_path, weights)
    longest = build(data, (SAMPLES, 0, 0), read_samples=900).train
    expected = tokens_of(longest, 900)
    for read_samples in (0, SAMPLES + 3, 150, 400):
        assert expected[: max(read_samples, SAMPLES)] == order(data, read_samples)
    for index, weight in enumerate(weights):
        share = share_of(longest, 900, 1000 * index, 1000 * index + 1000)
        assert share == pytest.approx(weight / sum(weights), abs=0.005)


def test_each_corpus_is_read_to_its_end_before_it_is_read_again(tmp_path: Path) -> None:
    """A document of each sample's length + 1 token: a sample shows which documents were read."""
    corpora = [
        {"prefix": write_foreign(tmp_path / name, numbered(first, 50, size=LENGTH)), "weight": weight}
        for name, first, weight in (("a", 0, 2), ("b", 100, 1))
    ]
    for data in ({"train_corpora": corpora[:1]}, {"train_corpora": corpora}):
        seen = [Counter(sample).most_common(1)[0][0] for sample in order(data, 300)]
        first = [document for document in seen if document < 50]
        rounds = [first[begin : begin + 49] for begin in range(0, len(first) - 49, 49)]
        assert len(rounds) >= 3
        assert len({tuple(one) for one in rounds}) == len(rounds), "in another order"
        assert len(set(rounds[0])) >= 48, "no document twice in the first pass"


def test_further_rounds_depend_on_the_seed_and_on_the_first_number_of_samples(tmp_path: Path) -> None:
    data = one_corpus(tmp_path, documents=10)
    longer = order(data, 200)
    assert order({**data, "seed": 5}, 200) != longer
    assert order(data, 200, (100, 0, 0)) != longer


def test_held_out_samples_do_not_depend_on_the_length(tmp_path: Path) -> None:
    data = one_corpus(tmp_path)
    short, longer = build(data, (SAMPLES, 5, 5)), build(data, (SAMPLES, 5, 5), read_samples=500)
    for one, other in ((short.validation, longer.validation), (short.test, longer.test)):
        assert tokens_of(one, 5) == tokens_of(other, 5)


def test_a_run_a_thousand_times_longer_has_few_rounds(tmp_path: Path) -> None:
    data = one_corpus(tmp_path, documents=5)
    splits = build(data, (2, 0, 0), read_samples=2000)
    assert len(splits.train.datasets) <= 12  # type: ignore[attr-defined]
    assert splits.train[1999]["tokens"].shape == (LENGTH,)


def test_micro_batches_cross_the_border_of_rounds_on_any_number_of_ranks(tmp_path: Path) -> None:
    data = one_corpus(tmp_path, documents=10)
    train = build(data, (6, 0, 0), read_samples=48).train
    border = len(train.datasets[0])  # type: ignore[attr-defined]
    assert border % 4, "the border lies within a micro-batch"
    rows = {}
    for ranks in (1, 2, 3):
        loaders = [Loader(train, BatchPlan(24, 4, rank, ranks)) for rank in range(ranks)]
        by_step = []
        for consumed in (0, 24):
            batches = zip(*(loader.step(consumed) for loader in loaders), strict=True)
            by_step.append(torch.cat([tokens for micro in batches for tokens, _ in micro]).tolist())
        rows[ranks] = by_step
        for loader in loaders:
            loader.close()
    assert rows[1] == rows[2] == rows[3]
    assert rows[1][0] + rows[1][1] == tokens_of(train, 48)


def build_on_rank(payload: dict[str, Any]) -> list[list[list[int]]]:
    """Body of a rank: build twice (maps absent, then there) and give samples."""
    torch.distributed.init_process_group("gloo")
    results = [order(payload["data"], 300) for _ in range(2)]
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.ranks
def test_two_ranks_have_the_rounds_of_one(tmp_path: Path) -> None:
    data = blend(tmp_path, [3, 1])
    first, second = run_ranks("tests.data.test_further_rounds:build_on_rank", 2, {"data": data})
    alone = order({**data, "cache_directory": str(tmp_path / "other")}, 300)
    assert first == second == [alone, alone]


def test_more_samples_than_fit_in_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = one_corpus(tmp_path)
    for sizes, read_samples in (((1 << 50, 0, 0), 0), ((2, 0, 0), 1 << 50)):
        with pytest.raises(DataError, match=r"needs \d+ GiB of memory, this machine has \d+ GiB; lower training.steps"):
            build(data, sizes, read_samples=read_samples)

    def fail(*_: object) -> None:
        raise MemoryError("Unable to allocate 19.1 GiB")

    monkeypatch.setattr("stagdist.data.corpus._build", fail)
    with pytest.raises(DataError, match=r"does not fit in memory: Unable to allocate 19.1 GiB; lower training.steps"):
        build(data, (2, 0, 0))
