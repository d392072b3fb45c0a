"""The shapes whose speed is measured, and an engine over random weights that notes when each token came."""

import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.layers.weights import random_reader
from stagdist.decode.request import Request, RequestOutput, SamplingParams
from stagdist.decode.runtime.build import EngineOptions, build_stage, plan_decoding
from stagdist.parallel.device import on_cuda
from stagdist.telemetry.clocks import EventClock
from stagdist.telemetry.spans import SpanRecorder
from tests.gpu.checks.environment import ROOT
from tests.gpu.checks.setting import Numbers, Setting
from tests.gpu.checks.timing import device_ms

SEQUENTIAL, STAGGERED, SHARED, HALF = "36 layers", "2x18", "shared 2x18", "18 layers"
SHAPES = {
    SEQUENTIAL: "paper-baseline-36l-2.8b",
    STAGGERED: "paper-stagformer-2x18-2.9b",
    SHARED: "paper-stagformer-shared-2x18",
    HALF: "paper-baseline-18l-1.6b",
}
WITH, WITHOUT = "with kernels", "without kernels"
TINY = (
    "vocab_size=320",
    "hidden_size=32",
    "intermediate_size=64",
    "num_attention_heads=2",
    "max_position_embeddings=64",
    "section_layers=[2, 2]",
)
COLD_TOKENS = 4
"""First tokens of a request whose gaps are not counted."""
STALL_MS = 5.0


def kernel_ways(setting: Setting) -> dict[str, bool | None]:
    """Values of `EngineOptions.kernels` to compare, by name; a CPU has no kernels of Triton."""
    return {WITH: None, WITHOUT: False} if setting.on_gpu else {WITHOUT: False}


def shape(setting: Setting, name: str) -> ModelConfig:
    """The model of a shape; in a rehearsal a tiny one of the same kind."""
    overrides = [] if setting.on_gpu else [f"model.{key}" for key in TINY]
    return load_config(ROOT / "configs" / f"{SHAPES[name]}.yaml", overrides).model


def span_recorder(device: str, rank: int = 0, stage: int = 0) -> SpanRecorder:
    """A recorder for work on a device, as `launch/generate.py --trace` makes it."""
    return SpanRecorder(rank=rank, stage=stage, clock=EventClock() if on_cuda(device) else None)


@dataclass
class Decoded:
    """One request: its tokens, and milliseconds between successive ones."""

    tokens: list[int] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Milliseconds per token."""
        return statistics.median(self.gaps_ms)

    def as_numbers(self) -> Numbers:
        """Number of gaps, their median, 90th percentile and maximum, and how many were stalls."""
        return {
            "tokens": len(self.tokens),
            "ms_per_token": self.median_ms,
            "p90_ms": sorted(self.gaps_ms)[int(0.9 * (len(self.gaps_ms) - 1))],
            "max_ms": max(self.gaps_ms),
            "gaps": len(self.gaps_ms),
            "stalls": sum(gap > STALL_MS for gap in self.gaps_ms),
        }


class Decoder:
    """An engine in bf16 with random weights, all sections in this process.

    Args:
        graphs: run steps as CUDA graphs; on a CPU the same fixed step runs without being captured.
        kernels: as in `EngineOptions`.
        recorder: gets the spans of all instructions.
    """

    def __init__(
        self,
        setting: Setting,
        model: ModelConfig,
        *,
        graphs: bool = True,
        kernels: bool | None = None,
        recorder: SpanRecorder | None = None,
    ):
        plan = plan_decoding(model, EngineOptions(precision="bf16", graphs=graphs, kernels=kernels), 1)
        device, self._vocab_size = setting.device, model.vocab_size
        self.stage = build_stage(plan, random_reader(0, device), device, None, recorder=recorder)

    def run(self, prompt_length: int, new_tokens: int, **params: Any) -> Decoded:
        """Serve one request, greedy unless its sampling parameters say otherwise."""
        generator = torch.Generator().manual_seed(prompt_length)
        prompt = tuple(torch.randint(self._vocab_size, (prompt_length,), generator=generator).tolist())
        params = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_end_of_document": True} | params
        decoded, times = Decoded(), []

        def take(outputs: Sequence[RequestOutput]) -> None:
            (output,) = outputs
            assert output.error is None, output.error
            decoded.tokens += output.token_ids
            times.extend([time.perf_counter()] * bool(output.token_ids))

        engine = Engine(self.stage)
        engine.submit(Request("0", prompt, SamplingParams(**params)))
        engine.close()
        engine.run(take)
        assert len(times) == len(decoded.tokens) == new_tokens, f"{len(times)} outputs, {len(decoded.tokens)} tokens"
        decoded.gaps_ms = [1e3 * (end - begin) for begin, end in itertools.pairwise(times)][COLD_TOKENS:]
        return decoded

    @contextmanager
    def sampling(self, **params: Any) -> Iterator[None]:
        """Inside, slot 0 has these sampling parameters, although no request is served."""
        self.stage.readout.sampler.admit(0, SamplingParams(**{"temperature": 0.0} | params), ())
        try:
            yield
        finally:
            self.stage.readout.sampler.retire(0)

    def close(self) -> None:
        """Free the graphs, the weights and the caches."""
        self.stage.close()
        del self.stage
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass
class Graphs:
    """CUDA graphs that were captured and replayed while `watched_graphs` looked on; empty on a CPU.

    Attributes:
        capture_ms: of each capture, the warm-up runs before it not counted.
        last: the one that was replayed last.
    """

    capture_ms: list[float] = field(default_factory=list)
    last: torch.cuda.CUDAGraph | None = None

    def replay_ms(self, device: str) -> float | None:
        """Device time of the last graph alone, from replays right after each other; None without one."""
        return None if self.last is None else device_ms(device, self.last.replay, calls=20)


@contextmanager
def watched_graphs() -> Iterator[Graphs]:
    """Note what happens to CUDA graphs inside, whoever holds them. Drop the result before the engine is closed."""
    graphs, kind = Graphs(), torch.cuda.CUDAGraph
    began: list[float] = []
    replay, begin, end = kind.replay, kind.capture_begin, kind.capture_end

    def noted_replay(graph: torch.cuda.CUDAGraph) -> None:
        graphs.last = graph
        replay(graph)

    def noted_begin(graph: torch.cuda.CUDAGraph, *arguments: object, **options: object) -> None:
        began.append(time.perf_counter())
        begin(graph, *arguments, **options)  # type: ignore[arg-type]

    def noted_end(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)
        graphs.capture_ms.append(1e3 * (time.perf_counter() - began.pop()))

    kind.replay, kind.capture_begin, kind.capture_end = noted_replay, noted_begin, noted_end  # type: ignore[method-assign, assignment]
    try:
        yield graphs
    finally:
        kind.replay, kind.capture_begin, kind.capture_end = replay, begin, end  # type: ignore[method-assign]
