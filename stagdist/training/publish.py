"""The end of a run: its last checkpoint as a model directory, compared with the engine before it is published."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.checkpoint.convert.model_conversions import NewModel, write_model
from stagdist.checkpoint.convert.proof import any_ids, source_logits, text_ids
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError, SavingError
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Phase, beating
from stagdist.training.engine.agreement import shared, while_others_wait
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.engine_logits import engine_logits

LOG = logging.getLogger(__name__)

LOGIT_LIMITS = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative error of logits that rounding explains. Those of another model are off by about their size."""


def publish_model(
    engine: SectionEngine,
    groups: Groups,
    model: ModelConfig,
    checkpoint: Path,
    tokenizer: Tokenizer,
    directory: Path,
) -> None:
    """Export the checkpoint that was just saved; replaces the model of an earlier end of this run. Called on all ranks.

    Rank 0 writes as `export` does. In addition, the logits of the written directory on some real text, by a plain
    forward pass, must be those of the engine, within its precision.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write, or the directory holds something else. What was
            there before stays, and no temporary files do.
    """
    input_ids = _proof_ids(tokenizer, model)[:, : engine.exchange.hand_off.memory.shape[-2]]
    logits = engine_logits(engine, groups, model.vocab_size, input_ids)
    track = beating(engine.pulse, Phase.EXPORT)
    engine.pulse.beat(Phase.EXPORT)

    def compare(written: ModelReader) -> str:
        limit = max(logit_limit(written.dtype), logit_limit(engine.exchange.hand_off.memory.dtype))
        return _compare_logits(source_logits(written, input_ids, track), logits, limit)

    def export() -> None:
        if dist.get_rank() == 0:
            source = TrainingReader(checkpoint)
            new = NewModel([source], source.model, source.value, source.dtype, prove=compare, check_sources=False)
            result = write_model(new, directory, ConversionOptions(overwrite=True, track=track))
            LOG.info("%s: %s", result.directory, result.checked)

    try:
        while_others_wait(groups.control, export, lambda: engine.pulse.beat(Phase.EXPORT))
    except CheckpointError as error:
        raise shared(
            SavingError(
                f"the model directory was not written, rank 0: {error}; the last checkpoint is complete: remove the "
                "cause or free space, and start the same command again"
            )
        ) from error


def _proof_ids(tokenizer: Tokenizer, model: ModelConfig) -> Tensor:
    """Token ids of some real text; of bytes if the model lacks some of them. Shapes: int64 [1, S]."""
    input_ids = text_ids(tokenizer, model)
    return input_ids if int(input_ids.max()) < model.vocab_size else any_ids(model)


def _compare_logits(found: Tensor, trained: Tensor, limit: float) -> str:
    """Compare logits with those of the engine; returns what was compared, as text.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    difference, tokens = relative_difference(found, trained), trained.shape[1]
    if not difference <= limit:
        raise CheckpointError(
            f"it is not the model that was trained: on {tokens} tokens of text its logits are off by {difference:.2g} "
            f"of their size, more than the {limit:g} of rounding"
        )
    return f"; on {tokens} tokens of text its logits differ from the training's by {difference:.1e} of their size"


def logit_limit(dtype: torch.dtype) -> float:
    """Largest relative error for weights of a dtype. fp32 matrices may be multiplied in a lower precision."""
    reduced = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return LOGIT_LIMITS[torch.float16 if reduced else dtype]


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Root mean square of the difference, divided by that of `expected`; not finite if any value is not."""
    return float((expected - found).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
