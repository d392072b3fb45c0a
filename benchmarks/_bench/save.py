"""What saving costs training: waiting for the disk against writing beside the training.

Every round trains the same number of steps three times, in changing order: without a save, after a synchronous save,
after an asynchronous one. What a round lost is its time over that of the same round without a save; of an
asynchronous save it has two parts, the pause (copy to host memory, and the end, when the ranks make the files a
checkpoint) and the steps that were slower because files were written beside them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks._bench.conditions import conditions, device_of_ranks
from benchmarks._bench.figures import paired_ratios, spread
from benchmarks._bench.results import check_outputs, write_results
from benchmarks._bench.workers import Answer, Workers
from stagdist.config.device_choice import DEVICE_CHOICES
from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.parallel.grid import grid_for

CONTESTANTS = ("plain", "synchronous", "asynchronous")
KEYS: dict[str, Any] = {
    "name": "bench-save",
    "model": {
        "vocab_size": 8000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
        "section_layers": [3, 2],
    },
    "training": {"steps": 100, "global_batch_size": 2, "micro_batch_size": 1},
    "checkpoint": {"keep_last": 2},
}
LINE = "{:<42} {:>9.3f}   {:.3f} to {:.3f}"

Round = dict[str, list[Answer]]
"""Answers by rank, of every contestant."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--json", metavar="FILE", help="write all results here")
    parser.add_argument("--config", metavar="FILE", help="save this run instead; its data is not read")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of --config")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks (default: the fewest)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="measured rounds (default: 20)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps after each save (default: 4)")
    parser.add_argument("--folder", metavar="DIR", help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=f"{DEVICE_CHOICES} (auto)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ConfigError: the configuration does not fit the benchmark, or a place for files will not do.
        TrainingError: a process failed.
    """
    if arguments.rounds < 1 or arguments.steps < 1:
        raise ConfigError(f"--rounds {arguments.rounds} and --steps {arguments.steps} must be at least 1")
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="stagdist-bench-save-", dir=arguments.folder) as folder:
        device, gpus, gpu_name = device_of_ranks(arguments.device)
        config = _config(arguments, folder, device)
        world_size = arguments.world_size or config.pipeline_parallel_size * config.parallel.tensor_parallel_size
        grid_for(config, world_size)  # refuses what does not fit
        settings = {"config": config.model_dump(mode="json"), "steps": arguments.steps}
        module = "benchmarks._bench.save_worker"
        with Workers(world_size, settings, module=module) as workers:
            first = {name: workers.together(name) for name in CONTESTANTS}
            rounds = [_round(workers, number) for number in range(arguments.rounds)]
    results = figures(rounds, first)
    _print(results)
    if arguments.json:
        described = config.model_dump(mode="json", exclude_defaults=True, include={"model", "training", "parallel"})
        written = conditions(gpu_name, min(gpus, world_size)) | {"benchmark": "save", "world_size": world_size}
        written |= {"steps": arguments.steps, "config": described, **results}
        write_results(arguments.json, written)
    return 0


def figures(rounds: Sequence[Round], first: Round) -> dict[str, Any]:
    """What the rounds say, in seconds unless it is a ratio; of several ranks the slowest counts.

    Args:
        first: the round before the measured ones, in which host memory is used for the first time.
    """
    plain = _slowest(rounds, "plain", "seconds")
    lost = {
        name: [after - before for after, before in zip(_slowest(rounds, name, "seconds"), plain, strict=True)]
        for name in CONTESTANTS[1:]
    }
    synchronous = _slowest(rounds, "synchronous", "save_s")
    pause = [max(answer["save_s"] + answer["finish_s"] for answer in answers["asynchronous"]) for answers in rounds]
    slower = [
        after - before
        for after, before in zip(
            _slowest(rounds, "asynchronous", "steps_s"), _slowest(rounds, "plain", "steps_s"), strict=True
        )
    ]
    return {
        "bytes_per_rank": rounds[-1]["synchronous"][0]["bytes"],
        "synchronous_save_s": spread(synchronous),
        "asynchronous_copy_s": spread(_slowest(rounds, "asynchronous", "save_s")),
        "asynchronous_pause_s": spread(pause),
        "asynchronous_slower_steps_s": spread(slower),
        "lost_s": {name: spread(values) for name, values in lost.items()},
        "step_s": spread([seconds / rounds[0]["plain"][0]["steps"] for seconds in plain]),
        "steps_until_complete": spread(_slowest(rounds, "asynchronous", "complete_after")),
        "ratio_of_pauses": spread(paired_ratios(pause, synchronous)),
        "ratio_of_lost_time": spread(paired_ratios(lost["asynchronous"], lost["synchronous"])),
        "first_save": {
            "synchronous_save_s": max(answer["save_s"] for answer in first["synchronous"]),
            "asynchronous_pause_s": max(answer["save_s"] + answer["finish_s"] for answer in first["asynchronous"]),
        },
        "rounds": list(rounds),
    }


def _round(workers: Workers, number: int) -> Round:
    order = CONTESTANTS[number % 3 :] + CONTESTANTS[: number % 3]
    return {name: workers.together(name) for name in order}


def _slowest(rounds: Sequence[Round], contestant: str, reading: str) -> list[float]:
    return [max(answer[reading] for answer in answers[contestant]) for answers in rounds]


def _config(arguments: argparse.Namespace, folder: str, device: str) -> RunConfig:
    config = load_config(arguments.config, arguments.set) if arguments.config else RunConfig.model_validate(KEYS)
    changes = {
        "runs_directory": folder,
        "parallel": config.parallel.model_copy(update={"device": device}),
        "checkpoint": config.checkpoint.model_copy(update={"asynchronous": True}),
    }
    return config.model_copy(update=changes)


def _print(results: dict[str, Any]) -> None:
    lines = {
        "a step": results["step_s"],
        "synchronous save": results["synchronous_save_s"],
        "asynchronous save: copy": results["asynchronous_copy_s"],
        "  pause (copy and end)": results["asynchronous_pause_s"],
        "  slower steps, sum": results["asynchronous_slower_steps_s"],
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
