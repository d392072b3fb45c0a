#!/usr/bin/env python3
"""Decoding on hosts with a memory bus each: one host alone, and two together.

Where all processes share a machine, a host is a core with its share of the machine's bus (see
`benchmarks/hosts/bounded_host.py`). Where every process has a machine of its own, nothing is bound. Weights are
random; contestants alternate within every round, and every ratio is taken between runs of one round.

examples:
  deepspeed --num_accelerators 2 benchmarks/hosts/separate_memories.py --json FILE
  torchrun --nnodes 2 --nproc_per_node 1 ... benchmarks/hosts/separate_memories.py --threads 8 --json FILE
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common.command import add_options, main, share_cores

if __name__ == "__main__":
    share_cores()

import torch

from benchmarks.common.conditions import ROOT, conditions
from benchmarks.common.figures import paired_ratios, spread
from benchmarks.common.results import check_outputs, write_results
from benchmarks.decoding.bounds import bound_s, median_bandwidths, step_bytes
from benchmarks.decoding.contestants import EngineContestant, Load, Served, alternate
from benchmarks.decoding.measurement import FEWER_STEPS, READING, row
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.lineup import RIVALS, Choice
from benchmarks.decoding.rivals.rival import RivalContestant
from benchmarks.decoding.shapes import baseline, changed, parse_split
from benchmarks.decoding.site import DecodeSite
from benchmarks.hosts.bounded_host import BoundedHost
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, joined_world, plan_decoding
from stagdist.errors import ConfigError
from stagdist.parallel.world import join_launcher

STAGGERED = "staggered, all hosts"
PIPELINE = "sequential pipeline, all hosts"
TENSOR = "sequential tensor parallel, all hosts"
ENGINE = "sequential engine, one host"
RIVAL = "llama.cpp, one host"
BANDWIDTHS = ("all_ranks_reading", "one_rank_reading")
TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--config", metavar="FILE", default=str(ROOT / "configs" / "bench-decode.yaml"))
    add_options(parser, "set", "json", "threads")
    parser.add_argument("--split", default="10+6", metavar="A+B", help="layers of each process (default: 10+6)")
    parser.add_argument("--rounds", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="measured steps of a run (default: 40)")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="position measured (default: 256)")
    parser.add_argument("--no-llama-cpp", action="store_false", dest="llama_cpp", help="leave llama.cpp out")


def run(arguments: argparse.Namespace) -> int:
    """Measure; rank 0 prints and writes."""
    check_outputs(arguments)
    if arguments.llama_cpp:
        Choice.parse("llama.cpp", "fp32")  # refuses where it is not installed
    world, split = join_launcher(), parse_split(arguments.split)
    if not 1 < world.size == len(split):
        raise ConfigError(f"--split {arguments.split} needs a process for each section, at least two; start them")
    model = changed(load_config(arguments.config, arguments.set).model, {"section_layers": split})
    if not model.staggered:
        raise ConfigError("model.connection is sequential; give a staggered shape, its baseline is derived from it")
    if min(arguments.rounds, arguments.context) < 1 or arguments.steps < 2:
        raise ConfigError("--rounds and --context start at 1, --steps at 2")
    if arguments.threads > 1 and world.local_size > 1:
        raise ConfigError(f"--threads {arguments.threads}: each process of this machine gets one core; give 1")
    load = Load(arguments.context, arguments.steps)
    torch.set_num_threads(arguments.threads)
    host = BoundedHost(world.local_rank, world.local_size) if world.local_size > 1 else None
    with joined_world(plan_decoding(model, EngineOptions(max_context=load.length), world.size), "cpu") as transport:
        site = DecodeSite(transport, "cpu", arguments.threads, TIMEOUT_S)
        without_neighbors = site.read_bandwidths()
        with nullcontext() if host is None else host.beside(site):
            results = SeparateMemories(site, model, load).measure(arguments.rounds, arguments.llama_cpp)
        site.close()
    if site.rank == 0:
        print(table(results))
        facts = {"benchmark": "separate_memories", "hosts_are_cores": host is not None}
        facts["without_neighbors_bytes_per_s"] = dict(zip(BANDWIDTHS, without_neighbors, strict=True))
        settings = {"split": arguments.split, "load": asdict(load), "model": model.model_dump(mode="json")}
        if arguments.json:
            write_results(arguments.json, {**conditions(None, 0), **facts, **results, "settings": settings})
    return 0


class SeparateMemories:
    """All contestants on hosts with a bus each. All ranks run it together."""

    def __init__(self, site: DecodeSite, model: ModelConfig, load: Load):
        self._site, self._model, self._load = site, model, load
        self._read: dict[str, list[dict[str, int]]] = {}

    def measure(self, rounds: int, llama_cpp: bool) -> dict[str, Any]:
        """Rounds of all contestants; the results are complete on rank 0 only."""
        site, load, plain = self._site, self._load, baseline(self._model, self._site.size)
        few = replace(load, steps=max(2, load.steps // FEWER_STEPS))
        with tempfile.TemporaryDirectory(prefix="stagdist-bench-") as folder:
            runs: dict[str, Callable[[], Served]] = {
                STAGGERED: self._together_on(STAGGERED, self._model, load),
                PIPELINE: self._together_on(PIPELINE, plain, load),
                TENSOR: self._together_on(TENSOR, plain, few, tensor=site.size),
                ENGINE: self._on_one(plain),
            }
            rival = self._rival_on_one(plain, Path(folder)) if llama_cpp else None
            if rival is not None:
                runs[RIVAL] = partial(rival, load)
            alternate(runs, 1)
            tell = partial(print, file=sys.stderr, flush=True) if site.rank == 0 else lambda text: None
            readings = alternate({**runs, READING: site.read_bandwidths}, rounds, tell, site.others)
            if rival is not None:
                rival.close()
        if site.rank:
            return {}
        together, alone = median_bandwidths(readings.pop(READING))
        medians = {name: [statistics.median(each.step_s) for each in readings[name]] for name in runs}
        tokens = {name: readings[name][0].token_ids for name in (PIPELINE, ENGINE, RIVAL) if name in runs}
        others = [name for name in runs if name != STAGGERED]
        return {
            "share_bytes_per_s": dict(zip(BANDWIDTHS, (together, alone), strict=True)),
            "contestants": [row(name, readings[name], load.batch, self._facts(name, together, alone)) for name in runs],
            "speedup_of_staggered": {name: spread(paired_ratios(medians[name], medians[STAGGERED])) for name in others},
            "same_tokens": len(set(tokens.values())) == 1,
        }

    def _together_on(self, name: str, model: ModelConfig, load: Load, tensor: int = 1) -> Callable[[], Served]:
        """An engine over all hosts."""
        options = EngineOptions(max_context=self._load.length, tensor_parallel_size=tensor)
        engine = EngineContestant(self._site, model, options)
        self._read[name] = self._site.gather(step_bytes(engine.stage, load.context, load.batch))
        return partial(engine, load)

    def _on_one(self, model: ModelConfig) -> Callable[[], Served]:
        """The engine on the first host."""
        site, load, engine = self._site, self._load, None
        if site.rank == 0:
            single = DecodeSite(None, "cpu", site.threads, TIMEOUT_S)
            engine = EngineContestant(single, model, EngineOptions(max_context=load.length))
        self._read[ENGINE] = [site.from_first(engine and step_bytes(engine.stage, load.context, load.batch))]

        def serve() -> Served:
            site.barrier()
            served = Served() if engine is None else engine(load)
            site.barrier()
            return served

        return serve

    def _rival_on_one(self, model: ModelConfig, folder: Path) -> RivalContestant:
        """llama.cpp on the first host, in fp32."""
        site, load, rival, read = self._site, self._load, None, None
        if site.rank == 0:
            weights = Baseline(model, "cpu", folder)
            rival = RIVALS["llama.cpp"](weights, "fp32", load, site.threads)
            read = {"weights_bytes": 4 * weights.read_values, "cache_bytes": 4 * weights.cache_values(load)}
        self._read[RIVAL] = [site.from_first(read)]
        return RivalContestant(site, rival, model.vocab_size, site.threads)

    def _facts(self, name: str, together: list[float], alone: list[float]) -> dict[str, Any]:
        """What the ranks read in a step, and the shortest step that follows from it."""
        read, takes_turns = self._read[name], name == PIPELINE
        bandwidth = (alone if takes_turns or len(read) == 1 else together)[: len(read)]
        bytes_of = [sum(each.values()) for each in read]
        bound = bound_s(bytes_of, bandwidth, sequential=takes_turns, stages=len(read))
        return {"read_per_step": read, "bandwidth_bytes_per_s": bandwidth, "bound_ms": 1e3 * bound}


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    shares = results["share_bytes_per_s"]
    lines = [f"share of a host, GB/s: {[round(each / 1e9, 1) for each in shares['one_rank_reading']]}"]
    lines.append(f"{'contestant':40}{'MB per step':>16}{'bound ms':>10}{'ms':>8}{'staggered':>11}")
    for each in results["contestants"]:
        read = "+".join(f"{sum(part.values()) / 1e6:.0f}" for part in each["read_per_step"])
        speedup = results["speedup_of_staggered"].get(each["name"])
        ratio = f"{speedup['median']:.2f}x" if speedup else ""
        lines.append(f"{each['name']:40}{read:>16}{each['bound_ms']:10.1f}{each['ms_per_token']:8.1f}{ratio:>11}")
    if not results["same_tokens"]:
        lines.append("contestants chose different tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
