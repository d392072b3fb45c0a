#!/usr/bin/env python3
"""What saving costs training, and what loading costs: `python benchmarks/save.py`.

Every round trains the same number of steps three times, in changing order: without a save, after a synchronous save,
after an asynchronous one. The time lost is that of a round minus that of the same round without a save. An
asynchronous save loses time twice: in the pause (copy to host memory, and the end, when the ranks publish the
checkpoint) and in steps that are slower while files are written. At the end every round loads the newest checkpoint:
the ranks compare all files with their records and fill their engines.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.command import add_options, main
from benchmarks.common.conditions import conditions, device_of_ranks
from benchmarks.common.figures import paired_ratios, spread
from benchmarks.common.results import check_outputs, write_results
from benchmarks.common.workers import Answer, Workers
from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.parallel.grid import grid_for

CONTESTANTS = ("plain", "synchronous", "asynchronous")
LOAD = "load"
MODEL = {
    "vocab_size": 8000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "section_layers": [3, 2],
}
KEYS: dict[str, Any] = {
    "name": "bench-save",
    "model": MODEL,
    "training": {"steps": 100, "global_batch_size": 2, "micro_batch_size": 1},
    "checkpoint": {"keep_last": 2},
}
LINE = "{:<42} {:>9.3f}   {:.3f} to {:.3f}"

Round = dict[str, list[Answer]]
"""Answers by rank, of every contestant."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--config", metavar="FILE", help="save this run instead; its data is not read")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks (default: the fewest)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="measured rounds (default: 20)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps after each save (default: 4)")
    add_options(parser, "json", "set", "folder", "device")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ConfigError: the configuration does not fit, or files cannot be written.
        TrainingError: a process failed.
    """
    if arguments.rounds < 1 or arguments.steps < 1:
        raise ConfigError(f"--rounds {arguments.rounds} and --steps {arguments.steps} must be at least 1")
    if arguments.set and not arguments.config:
        raise ConfigError(f"--set {arguments.set[0]} changes a key of --config; give that too")
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="stagdist-bench-save-", dir=arguments.folder) as folder:
        device, gpus, gpu_name = device_of_ranks(arguments.device)
        config = load_config(arguments.config, arguments.set) if arguments.config else RunConfig.model_validate(KEYS)
        changes = {
            "runs_directory": folder,
            "parallel": config.parallel.model_copy(update={"device": device}),
            "checkpoint": config.checkpoint.model_copy(update={"asynchronous": True}),
        }
        config = config.model_copy(update=changes)
        fewest = config.pipeline_parallel_size * config.parallel.tensor_parallel_size
        world_size = fewest if arguments.world_size is None else arguments.world_size
        grid_for(config, world_size)  # refuses what does not fit
        settings = {"site": "benchmarks.training.save_site:SaveSite", "config": config.model_dump(mode="json")}
        with Workers(world_size, settings | {"steps": arguments.steps}) as workers:
            first = {name: workers.together(name) for name in (*CONTESTANTS, LOAD)}
            rounds = [
                {
                    name: workers.together(name)
                    for name in (*CONTESTANTS[number % 3 :], *CONTESTANTS[: number % 3], LOAD)
                }
                for number in range(arguments.rounds)
            ]
    results = figures(rounds, first)
    _print(results)
    if arguments.json:
        described = config.model_dump(mode="json", exclude_defaults=True, include={"model", "training", "parallel"})
        written = conditions(gpu_name, min(gpus, world_size)) | {"benchmark": "save", "world_size": world_size}
        write_results(arguments.json, written | {"steps": arguments.steps, "config": described, **results})
    return 0


def figures(rounds: Sequence[Round], first: Round) -> dict[str, Any]:
    """Results in seconds unless they are ratios; of several ranks the slowest counts.

    Args:
        first: the round before the measured ones, which uses host memory for the first time.
    """

    def slowest(contestant: str, *readings: str) -> list[float]:
        return [max(sum(answer[key] for key in readings) for answer in each[contestant]) for each in rounds]

    def over_plain(contestant: str, reading: str) -> list[float]:
        pairs = zip(slowest(contestant, reading), slowest("plain", reading), strict=True)
        return [after - before for after, before in pairs]

    lost = {name: over_plain(name, "seconds") for name in CONTESTANTS[1:]}
    synchronous, pause = slowest("synchronous", "save_s"), slowest("asynchronous", "save_s", "finish_s")
    steps = rounds[0]["plain"][0]["steps"]
    return {
        "bytes_per_rank": rounds[-1]["synchronous"][0]["bytes"],
        "synchronous_save_s": spread(synchronous),
        "asynchronous_copy_s": spread(slowest("asynchronous", "save_s")),
        "asynchronous_pause_s": spread(pause),
        "asynchronous_slower_steps_s": spread(over_plain("asynchronous", "steps_s")),
        "lost_s": {name: spread(values) for name, values in lost.items()},
        "load_s": spread(slowest(LOAD, "seconds")),
        "step_s": spread([seconds / steps for seconds in slowest("plain", "seconds")]),
        "steps_until_complete": spread(slowest("asynchronous", "complete_after")),
        "ratio_of_pauses": spread(paired_ratios(pause, synchronous)),
        "ratio_of_lost_time": spread(paired_ratios(lost["asynchronous"], lost["synchronous"])),
        "first_save": {
            "synchronous_save_s": max(answer["save_s"] for answer in first["synchronous"]),
            "asynchronous_pause_s": max(answer["save_s"] + answer["finish_s"] for answer in first["asynchronous"]),
        },
        "rounds": list(rounds),
    }


def _print(results: dict[str, Any]) -> None:
    lines = {
        "a step": results["step_s"],
        "synchronous save": results["synchronous_save_s"],
        "asynchronous save: copy": results["asynchronous_copy_s"],
        "  pause (copy and end)": results["asynchronous_pause_s"],
        "  slower steps, sum": results["asynchronous_slower_steps_s"],
        "load (check and fill)": results["load_s"],
        "lost by a synchronous save": results["lost_s"]["synchronous"],
        "lost by an asynchronous save": results["lost_s"]["asynchronous"],
        "pause over a synchronous save": results["ratio_of_pauses"],
        "lost time over a synchronous save's": results["ratio_of_lost_time"],
    }
    first = results["first_save"]
    print(f"{results['bytes_per_rank'] / 1e6:.0f} MB per rank; median and quartiles, seconds")
    for name, values in lines.items():
        print(LINE.format(name, values["median"], values["quartile_low"], values["quartile_high"]))
    print(
        f"the first save, into fresh memory: pause {first['asynchronous_pause_s']:.3f} s, synchronous "
        f"{first['synchronous_save_s']:.3f} s"
    )


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
