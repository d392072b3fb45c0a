"""Micro-batches of a run, addressed by the number of samples consumed.

The position in the data is one integer, `consumed_samples`, that does not depend on how many data-parallel ranks
there are: any number of ranks sees the same samples in every global batch, so a run resumes on any grid.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stagdist.errors import DataError

MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""Tokens and labels, each int64 [B, S]."""


@dataclass(frozen=True)
class BatchPlan:
    """Which samples of a global batch this data-parallel rank takes; the sizes divide (`world_problems`)."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def sample_indices(self, consumed_samples: int, micro_batch: int) -> range:
        """Samples of one micro-batch of the step that begins after `consumed_samples`."""
        block = micro_batch * self.data_parallel_size + self.data_parallel_rank
        first = consumed_samples + block * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def on_device(batches: Iterator[MicroBatch], device: str | torch.device) -> Iterator[MicroBatch]:
    """Micro-batches on their way to the device; from pinned memory the host does not wait for the copies."""
    return ((tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)) for tokens, labels in batches)


class Loader:
    """Gives the micro-batches of a step, and reads those of the following step meanwhile in a thread.

    Args:
        dataset: items are dicts with `tokens` and `labels`, int64 [S] (see `Splits`).
        plan: this rank's part of each global batch.
        pin_memory: put batches into page-locked memory (with CUDA only).
        vocab_size: refuse negative token ids and those at or above it; None does not look.
    """

    def __init__(
        self, dataset: Any, plan: BatchPlan, *, pin_memory: bool = False, vocab_size: int | None = None
    ) -> None:
        self.wait_s = 0.0
        """Seconds that consumers have waited for batches so far."""
        self._dataset = dataset
        self._plan = plan
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._vocab_size = vocab_size
        # A thread starts on device 0, where pinning would open a second context.
        prepare = partial(torch.cuda.set_device, torch.cuda.current_device()) if self._pin_memory else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader", initializer=prepare)
        self._ahead: dict[int, deque[Future[MicroBatch]]] = {}

    def step(self, consumed_samples: int) -> Iterator[MicroBatch]:
        """Micro-batches of the step that begins after `consumed_samples`; reading starts with the call.

        Shapes: tokens and labels int64 [micro_batch_size, S], `num_micro_batches` times.

        Raises:
            DataError: while iterating; the data set ends before the step, or holds an id outside the vocabulary.
        """
        futures = self._ahead.pop(consumed_samples, None)
        for stale in self._ahead.values():
            for future in stale:
                future.cancel()
        self._ahead.clear()
        if futures is None:
            futures = self._submit(consumed_samples)
        following = consumed_samples + self._plan.global_batch_size
        if following + self._plan.global_batch_size <= len(self._dataset):
            self._ahead[following] = self._submit(following)
        return self._results(futures)

    def close(self) -> None:
        """Stop the thread; no further step can be asked for."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, consumed_samples: int) -> deque[Future[MicroBatch]]:
        return deque(
            self._thread.submit(self._read, consumed_samples, micro_batch)
            for micro_batch in range(self._plan.num_micro_batches)
        )

    def _results(self, futures: deque[Future[MicroBatch]]) -> Iterator[MicroBatch]:
        while futures:
            started = time.perf_counter()
            batch = futures.popleft().result()  # popped, so that the batch does not outlive its use
            self.wait_s += time.perf_counter() - started
            yield batch

    def _read(self, consumed_samples: int, micro_batch: int) -> MicroBatch:
        indices = self._plan.sample_indices(consumed_samples, micro_batch)
        if indices.stop > len(self._dataset):
            raise DataError(
                f"the data set holds {len(self._dataset)} samples, the step after {consumed_samples} needs sample "
                f"{indices.stop - 1}; train fewer steps"
            )
        items = [self._dataset[index] for index in indices]
        tokens = torch.stack([item["tokens"] for item in items])
        labels = torch.stack([item["labels"] for item in items])
        if self._vocab_size is not None:
            ids = torch.stack([tokens, labels])
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self._vocab_size:
                remedy = f"raise it to at least {high + 1} or use the corpus's own tokenizer"
                raise DataError(
                    f"samples {indices.start} to {indices.stop - 1} hold token id {low if low < 0 else high}, but "
                    f"model.vocab_size is {self._vocab_size}; {remedy if low >= 0 else 'prepare the corpus again'}"
                )
        if self._pin_memory:
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        return tokens, labels
