"""Evaluation during a run: loss, perplexity and bits per byte of held-out sequences, through the pipeline."""

from typing import Any

import numpy as np

from stagdist.data.loader import BatchPlan, Loader
from stagdist.parallel.device import on_cuda
from stagdist.telemetry.score import TextScore
from stagdist.training.engine.section_engine import SectionEngine


class HeldOut:
    """One held-out split, the same sequences at every evaluation.

    Every sequence is a window without overlap: all its labels are scored, given what stands before them inside it.
    """

    def __init__(self, dataset: Any, plan: BatchPlan, num_batches: int, token_bytes: np.ndarray):
        self._dataset, self._plan, self._num_batches = dataset, plan, num_batches
        self._token_bytes = token_bytes
        self._size: tuple[int, int] | None = None

    def score(self, engine: SectionEngine) -> TextScore:
        """Evaluate on all ranks; every rank gets the result."""
        loader = Loader(self._dataset, self._plan, pin_memory=on_cuda(engine.device))
        try:
            means = []
            for batch in range(self._num_batches):
                batches = engine.micro_batches_of_step(loader, batch * self._plan.global_batch_size)
                means.append(float(engine.eval_batch(batches)))
        finally:
            loader.close()
        tokens, size = self._extent()
        return TextScore(tokens, sum(means) / len(means) * tokens, size)

    def _extent(self) -> tuple[int, int]:
        """Scored tokens and their UTF-8 bytes, counted once."""
        if self._size is None:
            tokens = size = 0
            for index in range(self._num_batches * self._plan.global_batch_size):
                labels = self._dataset[index]["labels"].numpy()
                tokens += labels.size
                size += int(self._token_bytes[labels].sum())
            self._size = tokens, size
        return self._size
