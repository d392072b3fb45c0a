"""Perplexity and bits per byte of a text file, for a model directory or a training checkpoint, on one or more ranks.

Ranks split the matrices (tensor parallelism) and then the windows of the text; the score does not depend on how many
there are, apart from rounding.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.checkpoint.convert.find import WeightSource, open_weights, source_tokenizer
from stagdist.config.checks import tensor_parallel_problems
from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError, DataError
from stagdist.evaluation.bits_per_byte import count_windows, read_text, score_text
from stagdist.model.cross_entropy import token_nats
from stagdist.model.megatron import TensorParallel
from stagdist.model.precision import STORED_DTYPES
from stagdist.model.stagformer import StagFormer, canonical_slice
from stagdist.parallel.grid import Grid
from stagdist.parallel.groups import (
    Groups,
    build_groups,
    set_default_timeout,
    single_process,
)
from stagdist.parallel.layout import model_parameters
from stagdist.parallel.world import choose_device, join_world
from stagdist.telemetry.score import TextScore

"""What a model may be run in."""


@dataclass(frozen=True)
class Scoring:
    """How a text is scored.

    Attributes:
        window: tokens the model sees at once; None for all it was made for.
        stride: tokens from window to window; None for `window`, that is no overlap.
        batch_size: windows per forward pass and rank.
        dtype: a name of `STORED_DTYPES`; None for that of the stored weights.
        device: auto, cpu or cuda.
        tensor_parallel_size: ranks that split every matrix; the rest of the world splits the windows.
        tokenizer: where the tokenizer is, unless the model says it.
        trust_pickle: read checkpoints whose files can run code.
        timeout_s: limit of every collective.
    """

    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    device: str = "auto"
    tensor_parallel_size: int = 1
    tokenizer: str | None = None
    trust_pickle: bool = False
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Scored:
    """The score of a text, with the window and stride that it was scored with."""

    score: TextScore
    window: int
    stride: int


def score_file(
    model: str | Path, text: str | Path, scoring: Scoring, report: Callable[[int, int], None] = lambda done, total: None
) -> Scored:
    """Score a UTF-8 text as one document. Called on every rank of the world that RANK and WORLD_SIZE name.

    Args:
        model: model directory, training checkpoint, or a run's folder for its newest complete checkpoint.
        text: file to read.
        report: told how many of how many windows this rank has read.

    Raises:
        ConfigError: a setting does not fit the model or the world.
        DataError: the text cannot be read or scored.
        CheckpointError: the model cannot be read.
    """
    content = read_text(text)
    source = open_weights(model, trust_pickle=scoring.trust_pickle)
    window, stride = _checked(scoring, source.model)
    tokenizer = source_tokenizer(source, scoring.tokenizer)
    if tokenizer.vocab_size > source.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}; it is another's"
        )
    device = choose_device(scoring.device, int(os.environ.get("LOCAL_RANK", "0")))
    ids = tokenizer.encode(content)
    with world_groups(scoring.tensor_parallel_size, device, scoring.timeout_s) as groups:
        dtype = source.dtype if scoring.dtype is None else STORED_DTYPES[scoring.dtype]
        parallel = TensorParallel(groups.tensor, dtype)
        runner = load_weights(source, parallel).to(device)
        part = (groups.place.data, groups.grid.data)
        windows = len(range(part[0], count_windows(len(ids), window, stride), part[1]))
        done = 0

        def nats(input_ids: Tensor, labels: Tensor) -> Tensor:
            nonlocal done
            losses = token_nats(runner(input_ids.to(device)), labels.to(device), parallel)
            done += len(input_ids)
            report(done, windows)
            return losses

        score = score_text(
            nats, ids, window=window, stride=stride, token_bytes=tokenizer.token_bytes(),
            batch_size=scoring.batch_size, part=part,
        )  # fmt: skip
        return Scored(_sum(score, groups), window, stride)


def load_weights(source: WeightSource, parallel: TensorParallel) -> StagFormer:
    """The whole model with this tensor rank's slices, in evaluation mode and in `parallel.dtype`."""
    model = StagFormer(source.model, parallel)
    specs = {spec.name: spec for spec in model_parameters(source.model)}
    with torch.no_grad():
        for name, parameter in model.canonical_parameters().items():
            parameter.copy_(canonical_slice(specs, name, source.weight, parallel))
    return model.eval()


@contextmanager
def world_groups(tensor_size: int, device: str, timeout_s: float) -> Iterator[Groups]:
    """The groups of this world: tensor axis of the given size, data axis for the rest; no sockets in a world of one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        with single_process(timeout_s, device) as groups:
            yield groups
        return
    set_default_timeout(timeout_s)
    join_world(device, timeout_s)
    yield build_groups(Grid(1, world_size // tensor_size, tensor_size), timeout_s)
    # After an error the process ends, which tells the others; taking groups down could wait for a rank that is gone.
    dist.destroy_process_group()


def _checked(scoring: Scoring, model: ModelConfig) -> tuple[int, int]:
    """Window and stride.

    Raises:
        ConfigError: a setting does not fit.
    """
    window = model.max_position_embeddings if scoring.window is None else scoring.window
    stride = window if scoring.stride is None else scoring.stride
    if not 1 <= window <= model.max_position_embeddings:
        raise ConfigError(f"--window is {window}; the model knows 1 to {model.max_position_embeddings} positions")
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
    """The scores of all parts together; the ranks of a tensor group have the same one."""
    parts: list[tuple[int, TextScore] | None] = [None] * groups.grid.world_size
    dist.all_gather_object(parts, (groups.place.tensor, score), group=groups.control)
    return sum((part[1] for part in parts if part is not None and part[0] == 0), TextScore(0, 0.0, 0))
