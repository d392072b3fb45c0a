"""Rivals that torch runs: `generate()` of transformers, and its Llama over a static cache, compiled or as a graph."""

import os
import shlex
import shutil
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from benchmarks.decoding.contestants import Load
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.rival import Decoded, Prompts, Rival
from stagdist.parallel.device import on_cuda, synchronize

MOST_COMPILATIONS = 64
"""Limit for one step: each precision and shape of a sweep needs one. Beyond it `fullgraph` makes compilation fail."""


class Transformers(Rival):
    """`generate()` with its default cache, which grows by a copy in every step."""

    title, kinds = "transformers", ("cpu", "cuda")
    packages = ()
    weight_bytes = cache_bytes = {"fp32": 4.0, "bf16": 2.0}
    timed_by = "callback of each step"

    def __init__(self, baseline: Baseline, precision: str, load: Load, threads: int):
        self._llama: Any = baseline.llama(precision)

    def decode(self, prompts: Prompts, new_tokens: int) -> Decoded:
        """One call."""
        times, tokens = _generate(self._llama, prompts, new_tokens)
        return Decoded(tuple(times), tuple(map(tuple, tokens.tolist())))

    def close(self) -> None:
        """Free the model."""
        self._llama = None


class CompiledStaticCache(Rival):
    """A step of the Llama over `StaticCache`, through `torch.compile`."""

    title, packages = "torch.compile", ()
    kinds: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    weight_bytes = cache_bytes = {"fp32": 4.0, "bf16": 2.0}
    timed_by = "clock after each step"

    def __init__(self, baseline: Baseline, precision: str, load: Load, threads: int):
        from transformers import StaticCache

        self._device, self._llama = baseline.device, baseline.llama(precision)
        self._cache = StaticCache(config=self._llama.config, max_cache_len=load.length)
        self._token = torch.zeros(load.batch, 1, dtype=torch.long, device=self._device)
        self._position = torch.zeros(1, dtype=torch.long, device=self._device)
        self._all = torch.arange(load.length, device=self._device)
        self._run: Callable[[], None] | None = None

    @staticmethod
    def obstacle(precision: str) -> str | None:
        """It needs a compiler of C++ for CPUs."""
        found = shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) or shutil.which("clang++")
        return None if found else "torch.compile finds no compiler of C++"

    def decode(self, prompts: Prompts, new_tokens: int) -> Decoded:
        """The prompts without compilation, then repeated compiled steps."""
        with torch.inference_mode():
            tokens = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
            self._prefill(tokens)
            if self._run is None:
                self._run = self._made()
                self._prefill(tokens)
            times, steps = [], []
            for step in range(new_tokens):
                if step:
                    self._run()
                steps.append(self._token[:, 0].tolist())  # waits for a GPU
                times.append(time.perf_counter())
        return Decoded(tuple(times), tuple(zip(*steps, strict=True)))

    def _prefill(self, tokens: torch.Tensor) -> None:
        self._cache.reset()
        logits = self._llama(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self._position.fill_(tokens.shape[1])

    def _advance(self) -> None:
        """One step; token, position and caches keep their places in memory."""
        seen = (self._all <= self._position)[None, None, None]
        logits = self._llama(
            self._token, attention_mask=seen, position_ids=self._position[None], past_key_values=self._cache,
            use_cache=True,
        ).logits  # fmt: skip
        self._token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self._position.add_(1)

    def _made(self) -> Callable[[], None]:
        """The step, ready to be timed. It has run: the caches are used up."""
        torch._dynamo.config.recompile_limit = MOST_COMPILATIONS
        step = torch.compile(
            self._advance, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_cuda(self._device) else None
        )
        for _ in range(3):
            step()
        return step

    def close(self) -> None:
        """Free the model."""
        self._run = self._llama = self._cache = None


class GraphStaticCache(CompiledStaticCache):
    """The same step without a compiler, captured as one CUDA graph."""

    title, kinds = "CUDA graph", ("cuda",)

    @staticmethod
    def obstacle(precision: str) -> str | None:
        """Runs on every GPU."""
        return None

    def _made(self) -> Callable[[], None]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up outside of the capture
            for _ in range(3):
                self._advance()
        torch.cuda.current_stream().wait_stream(aside)
        synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            self._advance()
        return graph.replay


def _generate(llama: Any, prompts: Prompts, new_tokens: int) -> tuple[list[float], torch.Tensor]:
    """`generate()` of a model of transformers: when each step was done, and the new tokens [B, new_tokens]."""
    from transformers import GenerationConfig, LogitsProcessorList

    times: list[float] = []

    def clock(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        synchronize(str(scores.device))
        times.append(time.perf_counter())
        return scores

    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    rows = torch.tensor([list(prompt) for prompt in prompts], device=llama.device)
    with torch.inference_mode():
        tokens = llama.generate(
            rows, attention_mask=torch.ones_like(rows), generation_config=config,
            logits_processor=LogitsProcessorList([clock]),  # type: ignore[list-item]
        )  # fmt: skip
    return times, tokens[:, rows.shape[1] :]
