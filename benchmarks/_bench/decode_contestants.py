"""What the decode benchmark compares: the real engine on any model and grid, the plain step, and Hugging Face."""

import itertools
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from benchmarks._bench.decode_site import DecodeSite
from benchmarks._bench.plain_step import Edges, plain_steps
from benchmarks._bench.quiet import DISTURBED
from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.layers.runner import Lap
from stagdist.decode.layers.weights import random_reader
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions, build_stage, place_model
from stagdist.decode.runtime.slots import Control, Operation
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.sampler import Choice
from stagdist.parallel.device import synchronize
from stagdist.telemetry.spans import SpanRecorder

Name = TypeVar("Name", bound=Hashable)
SEED = 20250
PATIENCE = 2
DROPPED_STEPS = 4
"""First steps of a request that are not counted: caches and branch predictors are still cold."""


@dataclass(frozen=True)
class Load:
    """What one run decodes.

    Attributes:
        context: positions that the measured steps lie around.
        steps: measured steps.
        batch: requests decoded together, all of one length.
    """

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
    def length(self) -> int:
        """Positions that a request needs."""
        return self.prompt_length + self.new_tokens

    def prompt(self, vocab_size: int, seed: int = SEED) -> tuple[int, ...]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(vocab_size, (self.prompt_length,), generator=generator).tolist())


@dataclass(frozen=True)
class Served:
    """One run, as rank 0 saw it; empty on the other ranks.

    Attributes:
        step_s: time between successive tokens.
        token_ids: tokens of the first request.
    """

    step_s: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()


class _TimedEngine(Engine):
    """Notes when the tokens of each full step were taken."""

    def __init__(self, stage: Stage, transport, batch: int):  # type: ignore[no-untyped-def]
        super().__init__(stage, transport)
        self.times: list[float] = []
        self._batch, self._admitted = batch, 0

    def took(self, control: Control, choice: Choice) -> None:
        super().took(control, choice)
        self._admitted += control.operation is Operation.ADMIT
        if self._admitted == self._batch:
            self.times.append(time.perf_counter())


class EngineContestant:
    """The engine over one model on one grid, with random weights.

    Args:
        site: this process.
        model: what it decodes.
        options: grid, head layout, slots.
        delay_s: artificial delay of hand-offs.
        recorder: gets the spans of all runs.
        lap: called at the end of each phase; steps then run eagerly, because a graph calls it only when it is captured.
    """

    def __init__(
        self,
        site: DecodeSite,
        model: ModelConfig,
        options: EngineOptions,
        *,
        delay_s: float = 0.0,
        recorder: SpanRecorder | None = None,
        lap: Lap | None = None,
    ):
        before = site.held_bytes()
        if lap is not None:
            options = replace(options, graphs=False)
        self.site, self.model, self.options = site, model, options
        self.placement = place_model(model, options, site.size)
        self.transport = site.transport(options.tensor_parallel_size, delay_s, combined=model.combine_sections)
        reader = random_reader(SEED, site.device)
        self.stage = build_stage(self.placement, reader, site.device, self.transport, recorder=recorder, lap=lap)
        self._before = before
        self.grown_bytes = 0

    def __call__(self, load: Load) -> Served:
        """Serve one batch of requests from prompt to end."""
        params = SamplingParams(max_new_tokens=load.new_tokens, temperature=0.0, ignore_end_of_document=True)
        self.site.barrier()
        served = Served()
        if self.site.rank == 0:
            engine = _TimedEngine(self.stage, self.transport, load.batch)
            prompts = [load.prompt(self.model.vocab_size, SEED + row) for row in range(load.batch)]
            done = engine.generate([Request(str(row), prompt, params) for row, prompt in enumerate(prompts)])
            served = Served(_between(engine.times), done[0].token_ids)
        else:
            operate(self.stage, self.transport, None)
        return served

    def warm_up(self, load: Load) -> None:
        """Serve once, untimed, and note what this process has grown by since the contestant was begun."""
        self(load)
        self.grown_bytes = self.site.held_bytes() - self._before


class PlainContestant:
    """The same step without an engine, on the weights and caches of an engine contestant."""

    def __init__(self, engine: EngineContestant, edges: Edges):
        self._stage, self._site, self._vocab_size = engine.stage, engine.site, engine.model.vocab_size
        self._edges = edges

    def __call__(self, load: Load) -> Served:
        """Prefill with the stage, then plain steps."""
        prompt = load.prompt(self._vocab_size)
        with torch.inference_mode():
            self._site.barrier()
            first = self._stage.prefill(0, prompt, SamplingParams(temperature=0.0)).tokens
            tokens, times = plain_steps(self._stage, self._edges, first, len(prompt), load.new_tokens - 1)
            self._stage.retire([0])
        if self._site.rank:
            return Served()
        return Served(_between(times), (int(first), *tokens))


class GenerateContestant:
    """`generate()` of transformers on a Llama of the baseline's shape, in rank 0 alone; the others sleep.

    Args:
        threads: that it may use.
    """

    def __init__(self, site: DecodeSite, model: ModelConfig, dtype: torch.dtype, threads: int):
        self._site, self._threads = site, threads
        self._vocab_size = model.vocab_size
        self._llama = None if site.rank else llama_of(model, dtype, site.device)

    def __call__(self, load: Load) -> Served:
        """Generate greedily from one prompt."""
        self._site.barrier()
        served = Served()
        if self._llama is not None:
            torch.set_num_threads(self._threads)
            try:
                served = self._generate(load)
            finally:
                torch.set_num_threads(self._site.threads)
        self._site.barrier()
        return served

    def _generate(self, load: Load) -> Served:
        from transformers import GenerationConfig, LogitsProcessorList

        times: list[float] = []

        def clock(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            synchronize(self._site.device)
            times.append(time.perf_counter())
            return scores

        config = GenerationConfig(
            max_new_tokens=load.new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        prompts = torch.tensor([load.prompt(self._vocab_size, SEED + row) for row in range(load.batch)])
        prompts = prompts.to(self._site.device)
        with torch.inference_mode():
            tokens = self._llama.generate(  # type: ignore[union-attr]
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=config,
                logits_processor=LogitsProcessorList([clock]),  # type: ignore[list-item]
            )
        return Served(_between(times), tuple(tokens[0, load.prompt_length :].tolist()))


class PrefillContestant:
    """Time to the first token of a long prompt, through the engine.

    Args:
        alone: rank 0 holds the whole model, the others sleep.
    """

    def __init__(
        self, site: DecodeSite, model: ModelConfig, options: EngineOptions, prompt_length: int, *, alone: bool
    ):
        self._site, self._alone, self._load = site, alone, Load(prompt_length, 0)
        self._prompt_length, self._vocab_size = prompt_length, model.vocab_size
        self.chunk_size = options.chunk_size
        options = replace(options, max_context=prompt_length + 1, graphs=False)  # no steps
        self._transport = None if alone else site.transport(combined=model.combine_sections)
        self._stage = None
        if not alone or site.rank == 0:
            placement = place_model(model, options, 1 if alone else site.size)
            self._stage = build_stage(placement, random_reader(SEED, site.device), site.device, self._transport)

    def __call__(self, chunk_size: int | None = None) -> float:
        """Seconds to the first token; 0 on the other ranks."""
        self._site.barrier()
        seconds = 0.0
        if self._stage is not None:
            size = chunk_size or self.chunk_size
            self._stage.limits = replace(self._stage.limits, chunk_size=size)
            seconds = self._serve(self._stage)
        self._site.barrier()
        return seconds

    def choose_chunk(self, sizes: tuple[int, ...], repeats: int = 2) -> dict[int, float]:
        """Use the fastest size from now on; seconds of each."""
        readings = {size: min(self(size) for _ in range(repeats)) for size in sizes}
        readings = self._site.from_first(readings)
        self.chunk_size = min(readings, key=lambda size: readings[size])
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


def llama_of(model: ModelConfig, dtype: torch.dtype, device: str):  # type: ignore[no-untyped-def]
    """A Llama of transformers with this shape and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.key_value_heads,
        head_dim=model.head_width,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(device):  # a GPU fills billions of weights in seconds, a CPU in minutes
        return LlamaForCausalLM(config).to(dtype=dtype).eval()  # type: ignore[call-arg]


def alternate(
    contestants: Mapping[Name, Callable[[], Any]],
    rounds: int,
    tell: Callable[[str], None],
    others: Callable[[], float] = lambda: 0.0,
) -> dict[Name, list[Any]]:
    """Run every contestant once per round; odd rounds run backwards, so that a drift of the machine favours nobody.

    Args:
        others: share of the machine that other programs took since it was last called, the same on all ranks. A round
            that they disturbed is run again, `PATIENCE` times as many as were asked for at most.
    """
    readings: dict[Name, list[Any]] = {name: [] for name in contestants}
    spare = (PATIENCE - 1) * rounds
    done = 0
    others()
    while done < rounds:
        order = list(contestants)
        answers = {name: contestants[name]() for name in (reversed(order) if done % 2 else order)}
        share = others()
        if share > DISTURBED and spare:
            spare -= 1
            tell(f"other programs took {share:.0%} of the machine: round {done + 1} of {rounds} again")
            continue
        done += 1
        for name, answer in answers.items():
            readings[name].append(answer)
        tell(f"round {done} of {rounds}" + (f", others took {share:.0%} of the machine" if share > DISTURBED else ""))
    return readings


def _between(times: list[float]) -> tuple[float, ...]:
    """Times between tokens, without those of the first steps."""
    return tuple(later - earlier for earlier, later in itertools.pairwise(times))[DROPPED_STEPS:]
