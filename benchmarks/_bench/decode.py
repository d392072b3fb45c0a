"""How fast staggered decoding is: milliseconds per token against the sequential baseline, rivals and the bound.

`deepspeed --num_accelerators 2 launch/bench.py decode --json FILE` runs one section per process; plain `python` puts
all sections into one. Contestants alternate within every round and every ratio is taken between runs of one
round. Weights are random: the time of a step does not depend on them.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks._bench.conditions import ROOT, conditions, usable_cores
from benchmarks._bench.decode_breakdown import PhaseClock
from benchmarks._bench.decode_contestants import DROPPED_STEPS, Load
from benchmarks._bench.decode_instrument import Instrumented, instrument, lanes, phases, with_phases, write_traces
from benchmarks._bench.decode_measure import SEQUENTIAL, Measurement, Settings, as_settings
from benchmarks._bench.decode_shapes import baseline, changed, default_splits, parse_split, with_split
from benchmarks._bench.decode_site import DecodeSite
from benchmarks._bench.decode_sweeps import DEFAULT_AXES, Sweeps, check_axes, describe, parse_axis
from benchmarks._bench.decode_table import table
from benchmarks._bench.results import check_outputs, write_results
from benchmarks._bench.timeline import Panel, draw_timeline
from stagdist.config.device_choice import DEVICE_CHOICES
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, joined_world, place_model
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
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of it")
    parser.add_argument("--json", metavar="FILE", help="write all results here")
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
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=f"{DEVICE_CHOICES} (auto)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each process (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="limit of waits between ranks")
    parser.add_argument(
        "--sweep",
        nargs="*",
        metavar="AXIS=A,B",
        help="also vary one thing at a time; without values: "
        + " ".join(_as_text(*axis) for axis in DEFAULT_AXES.items()),
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, and on rank 0 print and write. The environment says which rank this is.

    Raises:
        ConfigError: the request cannot be served.
        StagdistError: contestants did not do the same work.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings, axes = settings_from(arguments, processes)
    device = choose_device(arguments.device, int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(arguments.threads)
    start = place_model(
        settings.staggered(settings.splits[0]), settings.options_for(settings.load, settings.heads[0]), processes
    )
    with joined_world(start, device) as transport:
        site = DecodeSite(transport, device, arguments.threads, arguments.timeout)
        results = measure(site, settings, axes, trace=arguments.trace, timeline=arguments.timeline)
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
    if wrong or arguments.steps < SHOWN_STEPS + 3:
        raise ConfigError(f"{', '.join(wrong) or f'--steps {arguments.steps}'} is too small; steps start at "
                          f"{SHOWN_STEPS + 3}, the others at 1")  # fmt: skip
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
    settings = Settings(
        _recut(model, sections), load, options, tuple(splits), heads, arguments.rounds, arguments.prefill
    )  # type: ignore[arg-type]
    check_outputs(arguments)
    axes = _axes(arguments.sweep)
    check_axes(axes, processes, model.num_layers)
    _check_places(settings, axes, processes)
    return settings, axes


def measure(
    site: DecodeSite, settings: Settings, axes: dict[str, Any], *, trace: str | None = None, timeline: str | None = None
) -> dict[str, Any]:
    """All rounds, then the instrumented runs and the sweeps; the results, whole on rank 0 only."""
    tell = _teller(site)
    measurement = Measurement(site, settings, tell)
    split_rows = measurement.select()
    ratios, rows = measurement.compare()
    tell("instrumented runs")
    looked_into = _look_into(measurement)
    processes_per_core, gpus = site.processes_per_core(), site.gpus()
    sweeps = {}
    if axes:
        tell("sweeps " + describe(axes, measurement.best[0]))
        sweeps = Sweeps(measurement, max(2, settings.rounds // 2)).run(axes, tell)
    if site.rank:
        return {}
    found, breakdown = looked_into
    if trace:
        write_traces([text for each in found.values() for text in each.trace], trace)
    if timeline:
        _draw(found, timeline)
    batch = settings.load.batch
    (best,) = (row.result(batch) for row in rows if row.name == "staggered")
    written = conditions(torch.cuda.get_device_name(site.device) if gpus else None, gpus) | {
        "benchmark": "decode",
        "processes": site.size,
        "threads_per_process": site.threads,
        # Bounds and `efficiency` suppose that all ranks compute at once: above 1 they cannot.
        "cores": usable_cores(),
        "processes_per_core": processes_per_core,
        "device": site.device,
        "memory_bandwidth_bytes_per_s": {
            "all_ranks_reading": measurement.bandwidth.together,
            "one_rank_reading": measurement.bandwidth.alone,
        },
    }
    return written | {
        "ms_per_token": best["ms_per_token"],
        "ms_per_token_p90": best["ms_per_token_p90"],
        "tokens_per_s": best["tokens_per_s"],
        "slowest_stage_compute_share": found["staggered"].compute_share,
        **ratios,
        "contestants": [row.result(batch) for row in rows],
        "splits": [row.result(batch) for row in split_rows],
        "breakdown": breakdown,
        # A graph has no phases, so these steps are longer than those of a graph.
        "phases_are_of": "eager steps, in runs of their own",
        "left_out": measurement.left_out,
        # The first reading of each half is from before its rounds.
        "share_of_machine_taken_by_others": {half: all_[1:] for half, all_ in measurement.others_shares.items()},
        "sweeps": sweeps,
        "settings": as_settings(settings),
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
        clock = PhaseClock(site.clock())
        whole = measurement.engine(model, settings.load, layout)
        found[name] = instrument(site, whole, settings.load, RECORDED_RUNS)
        parted = measurement.engine(model, settings.load, layout, lap=clock.lap)
        inside = phases(site, parted, clock, settings.load, RECORDED_RUNS)
        breakdown[name] = with_phases(found[name].breakdown, inside)
    return found, breakdown


def _draw(found: dict[str, Instrumented], path: str) -> None:
    titles = {"staggered": "staggered, sections side by side", SEQUENTIAL: "sequential baseline, sections take turns"}
    panels = [Panel(titles[name], lanes(each), each.layers, each.lag) for name, each in found.items()]
    draw_timeline(panels, path, steps=SHOWN_STEPS)


def _recut(model: ModelConfig, sections: int) -> ModelConfig:
    """The model with as many sections as are measured."""
    if model.num_sections == sections:
        return model
    splits = default_splits(changed(model, {"share_section_weights": False}), sections)
    return with_split(model, splits[0])


def _axes(sweep: list[str] | None) -> dict[str, Any]:
    if sweep is None:
        return {}
    return dict(parse_axis(text) for text in sweep) if sweep else dict(DEFAULT_AXES)


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
        place_model(settings.staggered(split), settings.options_for(settings.load), processes)


def _teller(site: DecodeSite) -> Callable[[str], None]:
    return lambda text: None if site.rank else print(text, file=sys.stderr, flush=True)


def _as_text(axis: str, values: tuple[float | None, ...]) -> str:
    return f"{axis}={','.join('none' if value is None else str(value) for value in values)}"
