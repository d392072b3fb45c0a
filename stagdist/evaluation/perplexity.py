"""Perplexity and bits per byte of a text file, for a model directory or a training checkpoint, on one or more ranks.

Ranks split the matrices (tensor parallelism), and the groups that hold a complete model split the windows of the text.
The score does not depend on the number of ranks, apart from rounding.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.checkpoint.convert.find import open_weights, source_tokenizer
from stagdist.checkpoint.published.load_model import build_model
from stagdist.checkpoint.weight_source import WeightSource
from stagdist.config.cross_checks import tensor_parallel_problems
from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError, DataError
from stagdist.evaluation.bits_per_byte import TokenNats, count_windows, read_text, score_text
from stagdist.model.cross_entropy import token_nats
from stagdist.model.megatron import TensorParallel
from stagdist.model.precision import STORED_DTYPES
from stagdist.parallel.groups import Groups, world_groups
from stagdist.parallel.world import choose_device
from stagdist.telemetry.score import TextScore


@dataclass(frozen=True)
class Scoring:
    """How a text is scored.

    Attributes:
        window: tokens that the model sees at once; None for the maximum of the model.
        stride: tokens from the start of one window to the next; None for `window`, so that windows do not overlap.
        batch_size: windows per forward pass and rank.
        dtype: a name of `STORED_DTYPES`; None for the dtype of the stored weights.
        device: as for `choose_device`.
        tensor_parallel_size: ranks that split every matrix; the world divided by it splits the windows.
        tokenizer: path of the tokenizer; None for the tokenizer of the model.
        timeout_s: limit of every collective.
    """

    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    device: str = "auto"
    tensor_parallel_size: int = 1
    tokenizer: str | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Scored:
    """The score of a text, and the window and stride that were used."""

    score: TextScore
    window: int
    stride: int


OpenNats = Callable[[WeightSource, str, torch.dtype, int], TokenNats]
"""Loads a complete model: (source, device, dtype, window) -> loss of every label, on that device."""


def score_file(
    model: str | Path,
    text: str | Path,
    scoring: Scoring,
    report: Callable[[int, int], None] = lambda done, total: None,
    open_nats: OpenNats | None = None,
) -> Scored:
    """Score a UTF-8 text as one document. Called on every rank of the world in the environment (RANK, WORLD_SIZE).

    Args:
        model: model directory, training checkpoint, or the folder of a run for its newest complete checkpoint.
        text: file to read.
        report: called with the number of windows that this rank has scored, and their total.
        open_nats: None for the model as training computes it. Others do not split matrices.

    Raises:
        ConfigError: a setting does not fit the model or the world.
        DataError: the text cannot be read or scored, or the tokenizer gives ids that the model lacks.
        CheckpointError: the model cannot be read.
    """
    if open_nats is not None and scoring.tensor_parallel_size > 1:
        raise ConfigError("--weights scores complete models; leave out --tensor-parallel-size")
    content = read_text(text)
    source = open_weights(model)
    window, stride = _checked(scoring, source.model)
    tokenizer = source_tokenizer(source, scoring.tokenizer)
    device = choose_device(scoring.device, int(os.environ.get("LOCAL_RANK", "0")))
    ids = [*tokenizer.begin_ids, *tokenizer.encode(content)]  # as a document of the training begins
    if len(ids) < 2:
        raise DataError(f"{text} has {len(ids)} tokens; the first is not scored, give at least two")
    with world_groups(scoring.tensor_parallel_size, device, scoring.timeout_s) as groups:
        dtype = source.dtype if scoring.dtype is None else STORED_DTYPES[scoring.dtype]
        if open_nats is None:
            nats_of = _trained(source, device, dtype, groups)
        else:
            nats_of = open_nats(source, device, dtype, window)
        source.check()
        part = (groups.place.data, groups.grid.data)
        windows = len(range(part[0], count_windows(len(ids), window, stride), part[1]))
        done = 0

        def nats(input_ids: Tensor, labels: Tensor) -> Tensor:
            nonlocal done
            losses = nats_of(input_ids.to(device), labels.to(device))
            done += len(input_ids)
            report(done, windows)
            return losses

        score = score_text(
            nats, ids, window=window, stride=stride, token_bytes=tokenizer.token_bytes(),
            batch_size=scoring.batch_size, part=part,
        )  # fmt: skip
        return Scored(_sum(score, groups), window, stride)


def _trained(source: WeightSource, device: str, dtype: torch.dtype, groups: Groups) -> TokenNats:
    """The model as training computes it."""
    parallel = TensorParallel(groups.tensor, dtype)
    runner = build_model(source, parallel).to(device)
    return lambda input_ids, labels: token_nats(runner(input_ids), labels, parallel)


def _checked(scoring: Scoring, model: ModelConfig) -> tuple[int, int]:
    """The window and stride to use."""
    window = model.max_position_embeddings if scoring.window is None else scoring.window
    stride = window if scoring.stride is None else scoring.stride
    if not 1 <= window <= model.max_position_embeddings:
        raise ConfigError(f"--window is {window}; the model supports 1 to {model.max_position_embeddings} positions")
    if not 1 <= stride <= window:
        raise ConfigError(f"--stride is {stride}; it must be between 1 and the window, {window}")
    if scoring.batch_size < 1:
        raise ConfigError(f"--batch-size is {scoring.batch_size}; it must be at least 1")
    tensor, world_size = scoring.tensor_parallel_size, int(os.environ.get("WORLD_SIZE", "1"))
    if tensor < 1 or world_size % tensor:
        raise ConfigError(
            f"{world_size} processes cannot be split into tensor groups of {tensor}; start more with torchrun or "
            "deepspeed, or change --tensor-parallel-size"
        )
    if problems := tensor_parallel_problems(model, tensor, "--tensor-parallel-size"):
        raise ConfigError("; ".join(problems))
    return window, stride


def _sum(score: TextScore, groups: Groups) -> TextScore:
    """The sum of the scores of all parts; the ranks of a tensor group have the same part."""
    parts: list[tuple[int, TextScore] | None] = [None] * groups.grid.world_size
    dist.all_gather_object(parts, (groups.place.tensor, score), group=groups.control)
    return sum((part[1] for part in parts if part is not None and part[0] == 0), TextScore(0, 0.0, 0))
