#!/usr/bin/env python3
"""Speed of decoding: milliseconds per token against the sequential baseline, rivals and the bound.

`deepspeed --num_accelerators 2 benchmarks/decode.py --json FILE` runs one section per process; plain `python` runs all
sections in one. Contestants alternate within every round, and every ratio is taken between runs of one round. Weights
are random: the time of a step does not depend on them.

examples:
  deepspeed --num_accelerators 2 benchmarks/decode.py --json benchmarks/results/decode.json --timeline runs/decode.png
  deepspeed --num_accelerators 2 benchmarks/decode.py --sweep contexts=64,256,1024 stagger=0,1,2
  deepspeed --num_accelerators 2 benchmarks/decode.py --rivals all --rounds 16 --json benchmarks/results/rivals.json
  deepspeed --num_accelerators 2 benchmarks/decode.py --rivals llama.cpp,openvino --rival-precisions fp32,int8
  deepspeed --num_accelerators 2 benchmarks/decode.py --rivals llama.cpp,openvino,ctranslate2 --rival-precisions fp32 \
      --set model.max_position_embeddings=16384 --sweep contexts=256,8192 batches=1,4,16,64

Rivals (`pip install -e .[rivals]`) decode the weights of the sequential baseline on rank 0, with as many threads as all
processes of its host have together, in the rounds of our own contestants. Their first tokens are compared with those of
the baseline in fp32; a rival in fp32 that chooses others is refused, unless the two best are closer than 1e-3.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.command import add_options, main, share_cores

if __name__ == "__main__":
    share_cores()

import torch

from benchmarks.common.conditions import ROOT, usable_cores
from benchmarks.common.results import check_outputs, write_results
from benchmarks.decoding.contestants import DROPPED_STEPS, Load
from benchmarks.decoding.measurement import SEQUENTIAL, Measurement, Settings
from benchmarks.decoding.rivals.lineup import PRECISIONS, RIVALS, Choice
from benchmarks.decoding.shapes import baseline, changed, default_splits, parse_split
from benchmarks.decoding.site import DecodeSite
from benchmarks.decoding.spans import Instrumented, instrument, phases, with_phases, write_traces
from benchmarks.decoding.sweeps import DEFAULT_AXES, Sweeps, check_axes, describe, parse_axis
from benchmarks.decoding.table import table
from benchmarks.decoding.timeline import Panel, draw_timeline
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, joined_world, plan_decoding
from stagdist.decode.topology import HEAD_LAYOUTS
from stagdist.errors import ConfigError
from stagdist.parallel.world import choose_device

DEFAULT_CONFIG = ROOT / "configs" / "bench-decode.yaml"
RECORDED_RUNS = 3
SHOWN_STEPS = 3
"""Steps of the baseline in the picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--config", metavar="FILE", help="shape to measure (default: configs/bench-decode.yaml)")
    shape.add_argument("--model-shape", metavar="FILE", help="the same: random weights of this configuration's shape")
    add_options(parser, "set", "json", "device", "threads")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome/Perfetto trace of all ranks here")
    parser.add_argument("--timeline", metavar="FILE.png", help="draw the stages over a few steps here")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds of each half (default: 10)")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="measured steps of a run (default: 40)")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="position measured (default: 256)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests at a time (default: 1)")
    parser.add_argument("--splits", metavar="A+B,...", help="section splits (default: even to three layers moved)")
    parser.add_argument("--heads", default="last,sharded", metavar="LAYOUTS", help="default: last,sharded")
    parser.add_argument("--prefill", type=int, default=1024, metavar="N", help="prompt of the prefill test, 0: none")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, fp16 or fp64 (default: fp32)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="limit of waits between ranks")
    rivals = f"rivals beside us: all, or some of {','.join(RIVALS)}"
    parser.add_argument("--rivals", nargs="?", const="all", metavar="NAMES", help=rivals)
    precisions = f"of rivals that have them (default: {','.join(PRECISIONS)})"
    parser.add_argument("--rival-precisions", default=",".join(PRECISIONS), metavar="NAMES", help=precisions)
    axes = (f"{name}={','.join(map(str, values)).replace('None', 'none')}" for name, values in DEFAULT_AXES.items())
    sweep = f"also vary one thing at a time; without values: {' '.join(axes)}"
    parser.add_argument("--sweep", nargs="*", metavar="AXIS=A,B", help=sweep)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and on rank 0 print and write. The environment names the rank.

    Raises:
        ConfigError: the request cannot be served.
        StagdistError: contestants did not do the same work.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings, axes = settings_from(arguments, processes)
    choice = Choice.parse(arguments.rivals, arguments.rival_precisions) if arguments.rivals else None
    device = choose_device(arguments.device, int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(arguments.threads)
    options = settings.options_for(settings.load, settings.heads[0])
    start = plan_decoding(settings.staggered(settings.splits[0]), options, processes)
    with joined_world(start, device) as transport:
        site = DecodeSite(transport, device, arguments.threads, arguments.timeout)
        results = measure(site, settings, axes, choice, trace=arguments.trace, timeline=arguments.timeline)
        site.close()
    if site.rank == 0:
        print(table(results))
        if arguments.json:
            write_results(arguments.json, results)
    return 0


def settings_from(arguments: argparse.Namespace, processes: int) -> tuple[Settings, dict[str, Any]]:
    """Settings and sweep from the command line, checked as far as can be without starting anything.

    Raises:
        ConfigError: what cannot work.
    """
    counts = {name: getattr(arguments, name) for name in ("rounds", "context", "batch", "threads")}
    wrong = [f"--{name} {count}" for name, count in counts.items() if count < 1]
    wrong += [f"--prefill {arguments.prefill}"] * (arguments.prefill < 0)
    if arguments.timeline and not arguments.timeline.endswith(".png"):
        raise ConfigError(f"--timeline {arguments.timeline} is a picture; give a name that ends in .png")
    if wrong or arguments.steps < SHOWN_STEPS + 3:
        raise ConfigError(f"{', '.join(wrong) or f'--steps {arguments.steps}'} is too small; steps start at "
                          f"{SHOWN_STEPS + 3}, --prefill at 0, the others at 1")  # fmt: skip
    model = load_config(arguments.config or arguments.model_shape or DEFAULT_CONFIG, arguments.set).model
    if not model.staggered:
        raise ConfigError("model.connection is sequential; give a staggered shape, its baseline is derived from it")
    sections = processes if processes > 1 else model.num_sections
    if processes > 1 and model.num_sections % processes == 0:
        sections = model.num_sections
    if arguments.splits:
        splits = [parse_split(text) for text in arguments.splits.split(",")]
    else:
        splits = [model.section_layers] if processes == 1 else default_splits(_recut(model, sections), sections)
    heads = tuple(arguments.heads.split(","))
    if not set(heads) <= set(HEAD_LAYOUTS):
        raise ConfigError(f"--heads {arguments.heads!r}: give {' or '.join(HEAD_LAYOUTS)}, or both with a comma")
    heads = heads if processes > 1 else ("last",)
    options = EngineOptions(precision=arguments.precision, timeout_s=arguments.timeout)
    load = Load(arguments.context, arguments.steps, arguments.batch)
    shape, prefill = _recut(model, sections), arguments.prefill
    settings = Settings(shape, load, options, tuple(splits), heads, arguments.rounds, prefill)  # type: ignore[arg-type]
    check_outputs(arguments)
    axes = dict(parse_axis(text) for text in arguments.sweep or ())
    if arguments.sweep == []:
        axes = dict(DEFAULT_AXES)
    check_axes(axes, processes, model.num_layers)
    _check_places(settings, axes, processes)
    return settings, axes


def measure(
    site: DecodeSite, settings: Settings, axes: dict[str, Any], choice: Choice | None = None, *,
    trace: str | None = None, timeline: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All rounds, then the instrumented runs and the sweeps; the results, complete on rank 0 only."""
    tell: Callable[[str], None] = lambda text: None if site.rank else print(text, file=sys.stderr, flush=True)  # noqa: E731
    measurement = Measurement(site, settings, tell, choice)
    split_rows = measurement.select()
    ratios, rows = measurement.compare()
    tell("instrumented runs")
    looked_into = _look_into(measurement)
    processes_per_core, conditions = site.processes_per_core(), site.conditions()
    sweeps = {}
    if axes:
        tell("sweeps " + describe(axes, measurement.best[0]))
        sweeps = Sweeps(measurement, max(2, settings.rounds // 2)).run(axes, tell)
    if measurement.rivals is not None:
        measurement.rivals.close()
    if site.rank:
        return {}
    found, breakdown = looked_into
    if trace:
        write_traces([text for each in found.values() for text in each.trace], trace)
    if timeline:
        _draw(found, timeline)
    (best,) = (row for row in rows if row["name"] == "staggered")
    written = conditions | {
        "benchmark": "decode",
        "processes": site.size,
        "threads_per_process": site.threads,
        # Bounds and `efficiency` suppose that all ranks compute at once: above 1 they cannot.
        "cores": usable_cores(),
        "processes_per_core": processes_per_core,
        "device": site.device,
        "memory_bandwidth_bytes_per_s": {
            "all_ranks_reading": measurement.together,
            "one_rank_reading": measurement.alone,
        },
    }
    return written | {
        "ms_per_token": best["ms_per_token"],
        "ms_per_token_p90": best["ms_per_token_p90"],
        "tokens_per_s": best["tokens_per_s"],
        "slowest_stage_compute_share": found["staggered"].compute_share,
        **ratios,
        "contestants": rows,
        "splits": split_rows,
        "breakdown": breakdown,
        # A graph has no phases, so these steps are longer than those of a graph.
        "phases_are_of": "eager steps, in runs of their own",
        "left_out": measurement.left_out,
        # The first reading of each half is from before its rounds.
        "share_of_machine_taken_by_others": {half: all_[1:] for half, all_ in measurement.others_shares.items()},
        "sweeps": sweeps,
        "settings": settings.described(),
    }


def _look_into(measurement: Measurement) -> tuple[dict[str, Instrumented], dict[str, Any]]:
    """Breakdown of the best split and of the baseline."""
    settings, site, (split, head) = measurement.settings, measurement.site, measurement.best
    models = {
        "staggered": (settings.staggered(split), head),
        SEQUENTIAL: (baseline(settings.model, len(split)), "last"),
    }
    found, breakdown = {}, {}
    for name, (model, layout) in models.items():
        build = partial(measurement.engine, model, settings.load, layout)
        found[name] = instrument(site, build, settings.load, RECORDED_RUNS)
        inside = phases(site, build, settings.load, RECORDED_RUNS)
        breakdown[name] = with_phases(found[name].breakdown, inside)
    return found, breakdown


def _draw(found: dict[str, Instrumented], path: str) -> None:
    titles = {"staggered": "staggered, sections side by side", SEQUENTIAL: "sequential baseline, sections take turns"}
    panels = [
        Panel(titles[name], [stretch.spans for stretch in each.stretches], each.layers, each.lag)
        for name, each in found.items()
    ]
    draw_timeline(panels, path, steps=SHOWN_STEPS)


def _recut(model: ModelConfig, sections: int) -> ModelConfig:
    """The model with as many sections as are measured."""
    if model.num_sections == sections:
        return model
    splits = default_splits(changed(model, {"share_section_weights": False}), sections)
    return changed(model, {"section_layers": splits[0]})


def _check_places(settings: Settings, axes: dict[str, Any], processes: int) -> None:
    """Everything that will be built fits, or is refused now."""
    loads = [settings.load]
    loads += [replace(settings.load, context=context) for context in axes.get("contexts", ())]
    for load in loads:
        if load.length > settings.model.max_position_embeddings:
            raise ConfigError(
                f"context {load.context} with {load.steps + DROPPED_STEPS} steps needs {load.length} positions "
                f"and the model knows {settings.model.max_position_embeddings}; lower --context or --steps"
            )
    if settings.prefill_tokens >= settings.model.max_position_embeddings:
        raise ConfigError(
            f"--prefill {settings.prefill_tokens} leaves no room in {settings.model.max_position_embeddings} positions;"
            " give fewer tokens, or 0 for none"
        )
    for split in settings.splits:
        plan_decoding(settings.staggered(split), settings.options_for(settings.load), processes)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
