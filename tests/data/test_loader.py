"""Micro-batches: the same samples for every number of ranks, resumable anywhere, read ahead in order."""

import threading
import time
from typing import Any

import pytest
import torch

from stagdist.config.parts import DataConfig
from stagdist.data.corpus import build_splits
from stagdist.data.loader import BatchPlan, Loader
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import DataError

GLOBAL_BATCH = 24


class Counting:
    """Samples that hold their own index; keeps the order and the threads of reading."""

    def __init__(self, size: int, bad: int | None = None, delay_s: float = 0.0) -> None:
        self.size, self.bad, self.delay_s = size, bad, delay_s
        self.read: list[int] = []
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        self.threads.add(threading.get_ident())
        time.sleep(self.delay_s)
        if index == self.bad:
            raise OSError(f"sample {index} cannot be read")
        return {"tokens": torch.full((4,), index), "labels": torch.full((4,), index + 1)}


def plan(rank: int = 0, size: int = 1, micro: int = 2) -> BatchPlan:
    return BatchPlan(GLOBAL_BATCH, micro, rank, size)


def indices(batches: Any) -> list[list[int]]:
    return [tokens[:, 0].tolist() for tokens, _ in batches]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_global_batch_is_the_same_set_for_every_data_parallel_size(micro: int) -> None:
    for consumed in (0, 240):
        for size in (1, 2, 4):
            plans = [plan(rank, size, micro) for rank in range(size)]
            steps = plans[0].num_micro_batches
            assert steps == GLOBAL_BATCH // (micro * size)
            taken = [
                index for each in plans for number in range(steps) for index in each.sample_indices(consumed, number)
            ]
            assert sorted(taken) == list(range(consumed, consumed + GLOBAL_BATCH))


def test_the_index_follows_the_written_formula() -> None:
    assert list(BatchPlan(24, 3, 1, 4).sample_indices(100, 1)) == [100 + (1 * 4 + 1) * 3 + j for j in range(3)]


def test_a_run_resumed_anywhere_gets_exactly_the_later_batches(corpus: str, bpe: Tokenizer) -> None:
    data = DataConfig(corpora=[{"prefix": corpus}], split=(1, 0, 0))  # type: ignore[arg-type, list-item]
    splits = build_splits(data, sequence_length=16, num_samples=(240, 0, 0), tokenizer=bpe, vocab_size=1000)
    whole = Loader(splits.train, plan(1, 2))
    steps = [list(whole.step(consumed)) for consumed in range(0, 240, GLOBAL_BATCH)]
    whole.close()
    assert all(len(step) == 6 for step in steps)
    tokens, labels = steps[0][0]
    assert tokens.shape == labels.shape == (2, 16) and tokens.dtype == labels.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    for start in (1, 4, 9):
        resumed = Loader(splits.train, plan(1, 2))
        for number in range(start, 10):
            again = list(resumed.step(number * GLOBAL_BATCH))
            for (tokens, labels), (old_tokens, old_labels) in zip(again, steps[number], strict=True):
                assert torch.equal(tokens, old_tokens) and torch.equal(labels, old_labels)
        resumed.close()
    four = [Loader(splits.train, plan(rank, 4)) for rank in range(4)]
    rows = [row.tolist() for loader in four for tokens, _ in loader.step(48) for row in tokens]
    one = Loader(splits.train, plan())
    assert sorted(rows) == sorted(row.tolist() for tokens, _ in one.step(48) for row in tokens)
    for loader in [*four, one]:
        loader.close()


def test_the_following_step_is_read_in_the_background_in_order() -> None:
    dataset = Counting(96, delay_s=0.02)
    loader = Loader(dataset, plan())
    assert indices(loader.step(0)) == [[2 * number, 2 * number + 1] for number in range(12)]
    deadline = time.monotonic() + 10
    while len(dataset.read) < 48 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert dataset.read == list(range(48)), "one step ahead, no further"
    assert threading.get_ident() not in dataset.threads and len(dataset.threads) == 1
    waited = loader.wait_s
    list(loader.step(24))
    assert loader.wait_s - waited < 24 * 0.02 / 2
    loader.close()


def test_time_that_the_consumer_waits_is_counted() -> None:
    loader = Loader(Counting(48, delay_s=0.005), plan())
    list(loader.step(0))
    assert loader.wait_s >= 24 * 0.005 * 0.9
    loader.close()


def test_another_step_than_the_one_read_ahead_is_right_too() -> None:
    dataset = Counting(240)
    loader = Loader(dataset, plan())
    list(loader.step(0))
    assert indices(loader.step(120))[0] == [120, 121]
    assert indices(loader.step(0)) == [[2 * number, 2 * number + 1] for number in range(12)]
    loader.close()


def test_an_error_in_the_thread_reaches_the_consumer_at_its_batch() -> None:
    loader = Loader(Counting(96, bad=29), plan())
    assert len(list(loader.step(0))) == 12
    batches = loader.step(24)
    assert indices([next(batches), next(batches)]) == [[24, 25], [26, 27]]
    with pytest.raises(OSError, match="sample 29 cannot be read"):
        next(batches)
    loader.close()


def test_the_end_of_the_data_is_named_with_the_remedy() -> None:
    loader = Loader(Counting(47), plan())
    assert len(list(loader.step(0))) == 12
    with pytest.raises(DataError, match="holds 47 samples, .* needs sample 47; train fewer steps"):
        list(loader.step(24))
    loader.close()


def test_ids_outside_the_vocabulary_are_refused_where_it_is_known() -> None:
    loader = Loader(Counting(24), plan(), vocab_size=24)
    with pytest.raises(DataError, match=r"hold token id 24, but model\.vocab_size is 24"):
        list(loader.step(0))
    loader.close()
    enough = Loader(Counting(24), plan(), vocab_size=25)
    assert len(list(enough.step(0))) == 12
    enough.close()


def test_no_thread_is_left_after_close() -> None:
    before = threading.active_count()
    loader = Loader(Counting(240, delay_s=0.002), plan())
    next(loader.step(0))
    loader.close()
    assert threading.active_count() == before


@pytest.mark.gpu
def test_batches_are_page_locked_where_asked() -> None:
    loader = Loader(Counting(24), plan(), pin_memory=True)
    assert all(tokens.is_pinned() and labels.is_pinned() for tokens, labels in loader.step(0))
    loader.close()
