#!/usr/bin/env python3
"""Times between the tokens of running requests while long prompts arrive, and what a reused prefix saves.

For each setting two requests decode for `--seconds`, first alone, then while prompts arrive one after the other.
Weights are random.

examples:
  deepspeed --num_accelerators 2 benchmarks/decoding/token_gaps.py --targets none,60,90 --json FILE
"""

import argparse
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common.command import add_options, main, share_cores

if __name__ == "__main__":
    share_cores()

import torch

from benchmarks.common.conditions import ROOT, conditions
from benchmarks.common.results import check_outputs, write_results
from stagdist.config.loading import load_config
from stagdist.decode.engine import Engine
from stagdist.decode.layers.weights import random_reader
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, RequestOutput, SamplingParams
from stagdist.decode.runtime.build import EngineOptions, build_stage, joined_world, plan_decoding
from stagdist.decode.runtime.warm_up import dry_pass
from stagdist.errors import ConfigError
from stagdist.parallel.world import choose_device

RUNNING = 2
SEED = 20250


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--config", metavar="FILE", default=str(ROOT / "configs" / "bench-decode.yaml"))
    add_options(parser, "set", "json", "device", "threads")
    parser.add_argument("--prompt", type=int, default=1024, metavar="N", help="tokens of a prompt (default: 1024)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each half (default: 8)")
    parser.add_argument("--chunk", type=int, default=128, metavar="N", help="largest chunk (default: 128)")
    parser.add_argument("--targets", default="none,60", metavar="MS,..", help="inter-token targets (default: none,60)")


def run(arguments: argparse.Namespace) -> int:
    """Measure every setting; rank 0 prints and writes."""
    check_outputs(arguments)
    model = load_config(arguments.config, arguments.set).model
    targets = _targets(arguments.targets)
    if not 1 <= arguments.prompt < model.max_position_embeddings or arguments.seconds <= 0:
        last = model.max_position_embeddings - 1
        raise ConfigError(f"--prompt is {arguments.prompt}, give 1 to {last}; --seconds {arguments.seconds}, above 0")
    device = choose_device(arguments.device, int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(arguments.threads)
    options = EngineOptions(num_slots=RUNNING + 2, chunk_size=arguments.chunk)
    rows: list[dict[str, Any]] = []
    plan = plan_decoding(model, options, int(os.environ.get("WORLD_SIZE", "1")))
    with joined_world(plan, device) as transport:
        for target_ms in targets:
            own = plan_decoding(model, replace(options, inter_token_target_ms=target_ms), plan.grid.world_size)
            stage = build_stage(own, random_reader(SEED, device), device, transport)
            dry_pass(stage)
            if transport is not None and transport.rank > 0:
                operate(stage, transport, None)
            else:
                load = _Load(Engine(stage, transport), model.vocab_size, arguments.prompt, arguments.seconds)
                rows.append({"target_ms": target_ms, **load.measure()})
                print(rows[-1], flush=True)
            stage.close()
    if rows and arguments.json:
        settings = {"prompt": arguments.prompt, "chunk": arguments.chunk, "processes": plan.grid.world_size}
        write_results(arguments.json, conditions(None, 0) | {"benchmark": "token_gaps", **settings, "rows": rows})
    return 0


def _targets(text: str) -> list[float | None]:
    try:
        return [None if word == "none" else float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--targets is {text!r}; give milliseconds or `none`, separated by commas") from None


class _Load:
    """The clients of one engine."""

    def __init__(self, engine: Engine, vocab_size: int, prompt_length: int, seconds: float):
        self._engine, self._vocab_size, self._length, self._seconds = engine, vocab_size, prompt_length, seconds
        self._times: dict[str, list[float]] = {}
        self._done: dict[str, RequestOutput] = {}
        self._ended = threading.Condition()

    def measure(self) -> dict[str, Any]:
        """Serve; the percentiles of both halves in milliseconds, and times to the first token in seconds."""
        marks: list[float] = []
        first_token_s: dict[str, list[float]] = {"new": [], "same beginning": []}

        def clients() -> None:
            for row in range(RUNNING):
                self._submit(f"running {row}", self._prompt(8, row), 10**6)
            time.sleep(1.0)
            marks.append(time.perf_counter())
            time.sleep(self._seconds)
            marks.append(time.perf_counter())
            for number in itertools.count(RUNNING):
                prompt = self._prompt(self._length, number)
                first_token_s["new"].append(self._first_token_s(f"{number}", prompt))
                first_token_s["same beginning"].append(self._first_token_s(f"{number} again", (*prompt, 1, 2, 3)))
                if time.perf_counter() - marks[1] > self._seconds:
                    break
            marks.append(time.perf_counter())
            self._engine.stop()

        thread = threading.Thread(target=clients)
        thread.start()
        self._engine.run(self._take)
        thread.join()
        return {
            "alone": self._gaps(marks[0], marks[1]),
            "prompts_arrive": self._gaps(marks[1], marks[2]),
            **{f"first_token_s, {kind}": statistics.median(values) for kind, values in first_token_s.items()},
        }

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        now = time.perf_counter()
        with self._ended:
            for output in outputs:
                self._times.setdefault(output.request_id, []).append(now)
                if output.finish_reason is not None:
                    self._done[output.request_id] = output
            self._ended.notify_all()

    def _submit(self, name: str, prompt: tuple[int, ...], count: int) -> None:
        params = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_end_of_document=True)
        self._engine.submit(Request(name, prompt, params))

    def _first_token_s(self, name: str, prompt: tuple[int, ...]) -> float:
        self._submit(name, prompt, 1)
        with self._ended:
            self._ended.wait_for(lambda: name in self._done)
        seconds = self._done[name].time_to_first_token_s
        assert seconds is not None
        return seconds

    def _prompt(self, length: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(SEED + seed)
        return tuple(torch.randint(self._vocab_size, (length,), generator=generator).tolist())

    def _gaps(self, begin: float, end: float) -> dict[str, float]:
        """Milliseconds between the tokens of the running requests."""
        gaps = sorted(
            1e3 * (later - earlier)
            for row in range(RUNNING)
            for earlier, later in itertools.pairwise(self._times[f"running {row}"])
            if begin <= earlier and later <= end
        )
        at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {"tokens": len(gaps)} | {name: gaps[int(share * (len(gaps) - 1))] for name, share in at.items()}


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
