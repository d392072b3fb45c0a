"""Evaluation during a run: loss, perplexity and bits per byte of held-out sequences, through the pipeline."""

from typing import Any

import numpy as np

from stagdist.config.parts import EvaluationConfig
from stagdist.data.loader import BatchPlan, Loader
from stagdist.parallel.device import on_cuda
from stagdist.telemetry.score import TextScore
from stagdist.training.engine.section_engine import SectionEngine


class HeldOut:
    """One held-out split, the same sequences at every evaluation.

    Sequences do not overlap. All labels are scored, each given the tokens before it in its sequence.

    Args:
        token_bytes: UTF-8 bytes of each id of the model; 0 for ids that the tokenizer lacks.
    """

    def __init__(self, dataset: Any, plan: BatchPlan, evaluation: EvaluationConfig, token_bytes: np.ndarray):
        self._dataset, self._plan, self._token_bytes = dataset, plan, token_bytes
        self._num_batches, self._interval = evaluation.num_batches, evaluation.interval_steps
        self._size: tuple[int, int] | None = None

    def due(self, step: int) -> bool:
        """Whether `evaluation.interval_steps` asks for an evaluation after `step`."""
        return self._interval > 0 and step % self._interval == 0

    def score(self, engine: SectionEngine) -> TextScore:
        """Evaluate on all ranks and return the result on all ranks."""
        loader = Loader(self._dataset, self._plan, pin_memory=on_cuda(engine.device), vocab_size=len(self._token_bytes))
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
