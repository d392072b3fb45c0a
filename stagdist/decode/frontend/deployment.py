"""A model on the ranks of a command, checked before any process group exists."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stagdist.checkpoint.published.model_json import read_text_tokens
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.data.compatibility import check_vocabulary
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.decode.engine import Engine
from stagdist.decode.runtime.build import DecodePlan, EngineOptions, build_stage, default_precision, plan_decoding
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.errors import ConfigError, StagdistError
from stagdist.parallel.world import World, choose_device
from stagdist.telemetry.pulse import Pulse
from stagdist.telemetry.spans import SpanRecorder

_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")
"""In the texts of torch, on a CPU and on a GPU."""

HEARTBEAT_S = 1.0
"""An idle engine sends a sign of life to the other ranks this often, and three times within the timeout."""


@dataclass(frozen=True)
class Deployment:
    """What `deploy` has checked; nothing is built yet.

    Attributes:
        end_tokens: tokens that end a text: the tokenizer's end of document, as in training, and those that
            `transformers` uses.
    """

    reader: ModelReader
    device: str
    plan: DecodePlan
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    rank: int

    def build(self, transport: Transport | None, pulse: Pulse, *, recorder: SpanRecorder | None = None) -> Stage:
        """Load this rank's stage; rank 0 shows the progress of capturing graphs.

        Raises:
            ConfigError: there is too little memory.
            StagdistError: the memory of the GPU is full, perhaps of another process.
        """
        progress = show_captures if self.rank == 0 else None
        try:
            return build_stage(
                self.plan, self.reader.read, self.device, transport, recorder=recorder, pulse=pulse, progress=progress
            )
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
                raise
            limits, reason = self.plan.limits, " ".join(str(error).split())[:200]
            kind = StagdistError if self.device.startswith("cuda") else ConfigError  # another process may leave a GPU
            raise kind(
                f"rank {self.rank}: the weights and {limits.num_slots} x {limits.max_context} positions (--batch-size, "
                f"--max-context) do not fit into memory: {reason}; lower either, or start more ranks"
            ) from error

    def engine(self, stage: Stage, transport: Transport | None, **limits: Any) -> Engine:
        """The engine on rank 0; `limits` of its queue."""
        return Engine(
            stage,
            transport,
            tokenizer=self.tokenizer,
            end_tokens=self.end_tokens,
            heartbeat_s=min(HEARTBEAT_S, self.plan.options.timeout_s / 3),
            **limits,
        )

    def grid_text(self) -> str:
        """Grid, sections, head, precision and device for people."""
        grid, options = self.plan.grid, self.plan.options
        layout = "1 process" if grid.world_size == 1 else f"pipe {grid.pipe} x tensor {grid.tensor}"
        head = f", {options.head} head" if grid.pipe > 1 else ""
        device = self.device.partition(":")[0]
        weights = "" if options.weights is None else f" with {options.weights} weights"
        return f"{layout}, {self.plan.model.num_sections} sections{head}, {options.precision}{weights} on {device}"


def deploy(model: Path, options: EngineOptions, world: World, device: str) -> Deployment:
    """Check a model directory, its tokenizer, the grid and the device.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: the model directory is incomplete or of another shape; names the tensor. Or the tokens that
            end texts are not tokens; names the key.
        DataError: it has no tokenizer, or one that gives ids that the model lacks.
        ConfigError: the grid or the device does not fit.
    """
    reader = ModelReader(model)
    chosen = choose_device(device, world.local_rank)
    plan = plan_decoding(
        reader.model, replace(options, precision=options.precision or default_precision(chosen)), world.size
    )
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, model, reader.model.vocab_size, model)
    return Deployment(reader, chosen, plan, tokenizer, _end_tokens(model, tokenizer), world.rank)


def show_captures(done: int, total: int) -> None:
    """Progress of capturing CUDA graphs: one line that is overwritten on a terminal, the last one elsewhere."""
    terminal = sys.stderr.isatty()
    if terminal or done == total:
        text = f"captured {done} of {total} CUDA graphs"
        print(f"\r{text}" if terminal else text, end="\n" if done == total else "", file=sys.stderr, flush=True)


def _end_tokens(model: Path, tokenizer: Tokenizer) -> frozenset[int]:
    recorded = read_text_tokens(model)
    tokens = None if recorded is None else recorded.generation.get("eos_token_id")
    several = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    return frozenset(several) if tokenizer.end_token is None else frozenset([tokenizer.end_of_document, *several])
