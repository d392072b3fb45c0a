"""What the decode benchmark compares: the engine on any model and grid, the plain step, and Hugging Face."""

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from benchmarks.common.conditions import DISTURBED
from benchmarks.decoding.plain_step import Edges, plain_steps
from benchmarks.decoding.site import DecodeSite
from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.layers.runner import Lap
from stagdist.decode.layers.weights import random_reader
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import DEFAULT_CHUNK, EngineOptions, build_stage, plan_decoding
from stagdist.decode.runtime.outcome import Outcome
from stagdist.decode.runtime.stage import Stage
from stagdist.parallel.device import on_cuda
from stagdist.telemetry.spans import SpanRecorder

Name = TypeVar("Name", bound=Hashable)
SEED = 20250
PATIENCE = 2
DROPPED_STEPS = 4
"""First steps of a request that do not count: caches and branch predictors are still cold."""


@dataclass(frozen=True)
class Load:
    """What one run decodes: `steps` measured steps around position `context`, `batch` requests of one length."""

    context: int
    steps: int
    batch: int = 1

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, so that the middle one of the measured steps is at `context`."""
        return max(1, self.context - self.steps // 2 - DROPPED_STEPS)

    @property
    def new_tokens(self) -> int:
        """Tokens of a request: one by the prefill, then those of the steps."""
        return 1 + DROPPED_STEPS + self.steps

    @property
    def admission_steps(self) -> int:
        """Steps of the first request while the prompts of the others are computed, a chunk beside each step."""
        return (self.batch - 1) * -(-self.prompt_length // DEFAULT_CHUNK)

    @property
    def served_context(self) -> int:
        """Mean position of our engine's measured steps: earlier requests are ahead by the steps of later prompts."""
        return self.context + self.admission_steps // 2

    @property
    def length(self) -> int:
        """Positions that a request needs."""
        return self.prompt_length + self.admission_steps + self.new_tokens

    def prompt(self, vocab_size: int, seed: int = SEED) -> tuple[int, ...]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(vocab_size, (self.prompt_length,), generator=generator).tolist())


@dataclass(frozen=True)
class Served:
    """One run, as rank 0 saw it: times between tokens, tokens of the first request. Empty on the other ranks."""

    step_s: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()


class _TimedEngine(Engine):
    """Notes when the tokens of each full step were taken."""

    def __init__(self, stage: Stage, transport, batch: int):  # type: ignore[no-untyped-def]
        super().__init__(stage, transport)
        self.times: list[float] = []
        self._batch, self._admitted = batch, 0

    def took(self, outcome: Outcome) -> None:
        super().took(outcome)
        self._admitted += outcome.first is not None
        if self._admitted == self._batch:
            self.times.append(time.perf_counter())


class EngineContestant:
    """The engine on one model and grid, with random weights.

    Args:
        options: grid, head layout, slots.
        recorder: gets the spans of all runs.
        lap: called at the end of each phase. Steps then run eagerly, because a graph calls it only at its capture.
    """

    def __init__(
        self, site: DecodeSite, model: ModelConfig, options: EngineOptions, *,
        recorder: SpanRecorder | None = None, lap: Lap | None = None,
    ):  # fmt: skip
        self._before, self.grown_bytes = site.held_bytes(), 0
        if lap is not None:
            options = replace(options, graphs=False)
        elif recorder is not None and site.size == 1 and on_cuda(site.device):
            options = replace(options, graphs=True)  # as without a recorder
        self.site, self.model, self.options = site, model, options
        self.plan = plan_decoding(model, options, site.size)
        self.transport = site.transport(options.tensor_parallel_size, combined=model.combine_sections)
        self.stage = build_stage(
            self.plan, random_reader(SEED, site.device), site.device, self.transport, recorder=recorder, lap=lap
        )

    def __call__(self, load: Load) -> Served:
        """Serve one batch of requests from prompt to end."""
        # Enough tokens for the first request to decode in every measured step.
        count = load.new_tokens + load.admission_steps
        params = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_end_of_document=True)
        self.site.barrier()
        if self.site.rank:
            operate(self.stage, self.transport, None)
            return Served()
        engine = _TimedEngine(self.stage, self.transport, load.batch)
        prompts = [load.prompt(self.model.vocab_size, SEED + row) for row in range(load.batch)]
        done = engine.generate([Request(str(row), prompt, params) for row, prompt in enumerate(prompts)])
        return Served(between(engine.times)[: load.steps], done[0].token_ids[: load.new_tokens])

    def warm_up(self, load: Load) -> None:
        """Serve once, untimed, and note how much this process has grown since the contestant was begun."""
        self(load)
        self.grown_bytes = self.site.held_bytes() - self._before


class PlainContestant:
    """The same step without an engine, on the weights and caches of an engine contestant."""

    def __init__(self, engine: EngineContestant, edges: Edges):
        self._engine, self._edges = engine, edges

    def __call__(self, load: Load) -> Served:
        """Prefill with the stage, then plain steps."""
        stage, site = self._engine.stage, self._engine.site
        prompt = load.prompt(self._engine.model.vocab_size)
        with torch.inference_mode():
            site.barrier()
            first = stage.prefill(0, prompt, SamplingParams(temperature=0.0)).tokens
            tokens, times = plain_steps(stage, self._edges, first, len(prompt), load.new_tokens - 1)
            stage.retire([0])
        return Served() if site.rank else Served(between(times), (int(first), *tokens))


class PrefillContestant:
    """Time to the first token of a long prompt, through the engine.

    Args:
        alone: rank 0 holds the complete model, the others are idle.
    """

    def __init__(
        self, site: DecodeSite, model: ModelConfig, options: EngineOptions, prompt_length: int, *, alone: bool
    ):
        self._site, self._alone, self._prompt_length, self._vocab_size = site, alone, prompt_length, model.vocab_size
        self._model, self._options = model, replace(options, max_context=prompt_length + 1, graphs=False)  # no steps
        self._transport = None if alone else site.transport(combined=model.combine_sections)
        self._build(options.chunk_size)

    def _build(self, chunk_size: int) -> None:
        self.chunk_size, self._stage = chunk_size, None
        if not self._alone or self._site.rank == 0:
            options = replace(self._options, chunk_size=chunk_size)
            plan = plan_decoding(self._model, options, 1 if self._alone else self._site.size)
            reader = random_reader(SEED, self._site.device)
            self._stage = build_stage(plan, reader, self._site.device, self._transport)

    def __call__(self) -> float:
        """Seconds to the first token; 0 on the other ranks."""
        self._site.barrier()
        seconds = 0.0 if self._stage is None else self._serve(self._stage)
        self._site.barrier()
        return seconds

    def choose_chunk(self, sizes: tuple[int, ...], repeats: int = 2) -> dict[int, float]:
        """Use the fastest size from now on; seconds of each."""
        readings = {}
        for size in sizes:
            self._build(size)
            readings[size] = self._site.from_first(min(self() for _ in range(repeats)))
        self._build(min(readings, key=lambda size: readings[size]))
        return readings

    def _serve(self, stage: Stage) -> float:
        if self._site.rank:
            operate(stage, self._transport, None)
            return 0.0
        generator = torch.Generator().manual_seed(SEED)
        prompt = tuple(torch.randint(self._vocab_size, (self._prompt_length,), generator=generator).tolist())
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_end_of_document=True)
        (done,) = Engine(stage, self._transport).generate([Request("0", prompt, params)])
        assert done.time_to_first_token_s is not None
        return done.time_to_first_token_s


def alternate(
    contestants: Mapping[Name, Callable[[], Any]],
    rounds: int,
    tell: Callable[[str], None] = lambda text: None,
    others: Callable[[], float] = lambda: 0.0,
) -> dict[Name, list[Any]]:
    """Run every contestant once per round. Odd rounds run backwards, so that a drift of the machine favors none.

    Args:
        others: share of the machine that other programs used since its last call, the same on all ranks. A round that
            they disturbed is run again; in all, at most `PATIENCE` times `rounds` are run.
    """
    readings: dict[Name, list[Any]] = {name: [] for name in contestants}
    spare, done = (PATIENCE - 1) * rounds, 0
    others()
    while done < rounds:
        order = list(contestants)
        answers = {name: contestants[name]() for name in (reversed(order) if done % 2 else order)}
        share = others()
        if share > DISTURBED and spare:
            spare -= 1
            tell(f"other programs used {share:.0%} of the machine: round {done + 1} of {rounds} again")
            continue
        done += 1
        for name, answer in answers.items():
            readings[name].append(answer)
        tell(f"round {done} of {rounds}" + (f", others used {share:.0%} of the machine" if share > DISTURBED else ""))
    return readings


def between(times: Sequence[float]) -> tuple[float, ...]:
    """Times between tokens, without those of the first steps."""
    return tuple(later - earlier for earlier, later in itertools.pairwise(times))[DROPPED_STEPS:]
