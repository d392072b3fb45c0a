#!/usr/bin/env python3
"""Milliseconds per token over the one-way latency of the link between the processes.

Staggered with stagger 1 and 2, the sequential pipeline, and tensor parallelism over the same processes alternate within
every round, at every latency. The latency is injected: messages between processes leave late, and each collective takes
one latency longer. With --wire the link itself is slow: see `python -m tests.lab.slow_wire`. With --separate-memories
each process has a core and a share of the memory bus of its own. Predictions use nothing but the steps without latency.
Weights are random.

examples:
  deepspeed --num_accelerators 2 benchmarks/slow_links/links.py --json links.json --png links.png
  deepspeed --num_accelerators 2 benchmarks/slow_links/links.py --separate-memories --json links-separate.json
"""

import argparse
import itertools
import json
import struct
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.command import add_options, main, share_cores

if __name__ == "__main__":
    share_cores()

import torch

from benchmarks.common.conditions import ROOT
from benchmarks.common.results import check_outputs, write_results
from benchmarks.decoding.contestants import Load
from benchmarks.decoding.shapes import balanced_split, changed, parse_split, split_name
from benchmarks.decoding.site import DecodeSite
from benchmarks.hosts.bounded_host import BoundedHost
from benchmarks.slow_links.link_curves import Curve
from benchmarks.slow_links.link_picture import draw_links
from benchmarks.slow_links.link_rounds import LinkRounds, comparison, summary
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, joined_world, plan_decoding
from stagdist.errors import ConfigError
from stagdist.parallel.world import choose_device, join_launcher

DEFAULT_CONFIG = ROOT / "configs" / "bench-decode.yaml"
DEFAULT_DELAYS = "0,0.5,1,2,3,5,7,10"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: configs/bench-decode.yaml")
    add_options(parser, "set", "json", "device", "threads")
    parser.add_argument("--delays-ms", default=DEFAULT_DELAYS, metavar="A,B", help=f"default: {DEFAULT_DELAYS}")
    parser.add_argument("--split", metavar="A+B", help="layers of the sections (default: equal weights)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="measured steps of a run (default: 40)")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="position measured (default: 256)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="limit of waits between ranks")
    parser.add_argument("--png", metavar="FILE.png", help="draw the curves here")
    parser.add_argument("--beside", metavar="FILE", help="results of a run with --wire, to be drawn dotted")
    parser.add_argument("--wire", metavar="FILE", help="the file that sets the latency of a wire, in seconds")
    separate = "bind each process to a core and a share of the memory bus (CPUs only)"
    parser.add_argument("--separate-memories", action="store_true", help=separate)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and on rank 0 print, write and draw. The environment names the rank.

    Raises:
        ConfigError: the request cannot be served.
    """
    world = join_launcher()
    model, load, delays_ms = settings_from(arguments, world.size)
    beside = None if arguments.beside is None else results_beside(arguments.beside)
    options = EngineOptions(precision="fp32", timeout_s=arguments.timeout, max_context=load.length)
    device = choose_device(arguments.device, world.local_rank)
    if arguments.separate_memories and device != "cpu":
        raise ConfigError("--separate-memories is for CPUs, whose cores share a bus; give --device cpu")
    host = BoundedHost(world.local_rank, world.local_size) if arguments.separate_memories else None
    torch.set_num_threads(arguments.threads)
    with joined_world(plan_decoding(model, options, world.size), device) as transport:
        site = DecodeSite(transport, device, arguments.threads, arguments.timeout)
        set_wire = None if arguments.wire is None else _wire_setter(Path(arguments.wire), site)
        with nullcontext() if host is None else host.beside(site):
            rounds = LinkRounds(site, model, options, load, set_wire)
            curves = rounds.measure(delays_ms, arguments.rounds)
        results = site.conditions() | {
            "processes": site.size,
            "share_of_machine_taken_by_others": rounds.others_shares[1:],  # the first is from before the rounds
        }
        site.close()
    if site.rank == 0:
        results |= _results(arguments, model, load, delays_ms, curves) | comparison(curves, delays_ms)
        print(summary(results))
        if arguments.json:
            write_results(arguments.json, results)
        if arguments.png:
            draw_links(results, arguments.png, beside)
    return 0


def settings_from(arguments: argparse.Namespace, processes: int) -> tuple[ModelConfig, Load, tuple[float, ...]]:
    """Model, load and latencies from the command line.

    Raises:
        ConfigError: what cannot work.
    """
    if processes < 2:
        raise ConfigError("links are between processes; start at least two: deepspeed --num_accelerators 2 ...")
    delays_ms = parse_delays(arguments.delays_ms)
    small = min(arguments.rounds, arguments.context, arguments.threads)
    if small < 1 or arguments.steps < 8:
        raise ConfigError("--rounds, --context and --threads start at 1, --steps at 8")
    if arguments.png and not arguments.png.endswith(".png"):
        raise ConfigError(f"--png {arguments.png} is a picture; give a name that ends in .png")
    if arguments.wire is not None and not Path(arguments.wire).is_file():
        raise ConfigError(f"--wire {arguments.wire} is not a file; start `python -m tests.lab.slow_wire`")
    if arguments.separate_memories and arguments.threads > 1:
        raise ConfigError(f"--threads {arguments.threads}: --separate-memories gives each process one core; give 1")
    shape = load_config(arguments.config, arguments.set).model
    if not shape.staggered or shape.share_section_weights or shape.combine_sections:
        raise ConfigError("give a staggered model without shared or combined sections; its baseline is derived from it")
    split = parse_split(arguments.split) if arguments.split else balanced_split(shape, processes)
    if len(split) != processes:
        raise ConfigError(f"--split {split_name(split)} has {len(split)} sections for {processes} processes; one each")
    model, load = changed(shape, {"section_layers": split}), Load(arguments.context, arguments.steps)
    if load.length > model.max_position_embeddings:
        raise ConfigError(f"{load.length} positions are needed, the model knows {model.max_position_embeddings}")
    check_outputs(arguments)
    return model, load, delays_ms


def parse_delays(text: str) -> tuple[float, ...]:
    """`0,0.5,1` as milliseconds, beginning with 0.

    Raises:
        ConfigError: no rising numbers from 0 on.
    """
    try:
        delays = tuple(float(each) for each in text.split(","))
    except ValueError:
        delays = ()
    rises = all(before < after for before, after in itertools.pairwise(delays))
    if len(delays) < 2 or delays[0] != 0 or not rises or delays[-1] == float("inf"):
        raise ConfigError(f"--delays-ms {text!r}: give rising milliseconds from 0 on, such as {DEFAULT_DELAYS}")
    return delays


def results_beside(path: str) -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["benchmark"] == "links":
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"--beside {path} does not hold results of this benchmark; give a file written by --json")


def _results(
    arguments: argparse.Namespace, model: ModelConfig, load: Load, delays_ms: tuple[float, ...], curves: list[Curve]
) -> dict[str, Any]:
    return {
        "benchmark": "links",
        "latency": "injected" if arguments.wire is None else "of packets, by a wire between network namespaces",
        "delays_ms": list(delays_ms),
        "curves": [curve.described(delays_ms) for curve in curves],
        "settings": {
            "model": model.model_dump(mode="json"), "context": load.context, "steps": load.steps,
            "rounds": arguments.rounds, "threads_per_process": arguments.threads,
            "separate_memories": arguments.separate_memories,
        },
    }  # fmt: skip


def _wire_setter(path: Path, site: DecodeSite):  # type: ignore[no-untyped-def]
    """A function that sets the latency of the wire, for all ranks to call together."""

    def set_wire(latency_s: float) -> None:
        site.barrier()
        if site.rank == 0:
            with path.open("r+b") as stream:
                stream.write(struct.pack("d", latency_s))
        site.barrier()

    return set_wire


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
