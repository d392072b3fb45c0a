#!/usr/bin/env python3
"""Speed of training: the pipeline against one process, its bound, and torch.distributed.pipelining.

Runs alternate, and every ratio is taken between runs of one round, so that a machine whose speed changes slows both
sides of a ratio. All contestants read the same corpus through the same loader. Their losses and gradient norms show
that they do the same work.

examples:
  python benchmarks/train.py --json benchmarks/results/train.json
  python benchmarks/train.py --rounds 40 --micro-batches 16 --set training.micro_batch_size=1
  python benchmarks/train.py --one-process --config configs/pythia-410m-staggered.yaml \\
      --set training.precision=bf16 --json runs/gpu.json
"""

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.command import add_options, main
from benchmarks.common.conditions import ROOT, conditions, device_of_ranks
from benchmarks.common.figures import paired_ratios, pipeline_speedup_bound, spread
from benchmarks.common.results import check_outputs, write_results
from benchmarks.common.workers import Answer, Workers
from benchmarks.decoding.shapes import sequential_twin
from stagdist.config.loading import load_config
from stagdist.config.parts import CorpusConfig, DataConfig
from stagdist.config.run_config import RunConfig
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import ConfigError, TrainingError
from stagdist.planning.flops import flops_per_token
from stagdist.telemetry.hardware import peak_flops

DEFAULT_CONFIG = ROOT / "configs" / "bench-train.yaml"
WARM_UP_ROUNDS = 2
SAME_WORK = 1e-3
"""Largest relative difference of losses and gradient norms between contestants in the first rounds."""
CORPUS_PACKAGES = ("asyncio", "email", "json", "unittest", "xml")

Rounds = dict[str, list[list[Answer]]]
"""By contestant, for every round the answers by rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--config", metavar="FILE", default=str(DEFAULT_CONFIG), help="default: the balanced shape")
    parser.add_argument(
        "--micro-batches", type=int, default=8, metavar="M", help="micro-batches of an optimizer step (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="measured rounds (default: 20)")
    parser.add_argument("--one-process", action="store_true", help="all sections in one process, no pipeline")
    add_options(parser, "json", "set", "device", "threads")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ConfigError: the configuration does not fit the benchmark.
        TrainingError: a process failed, or contestants did not do the same work.
    """
    counts = {"--rounds": arguments.rounds, "--threads": arguments.threads, "--micro-batches": arguments.micro_batches}
    if min(counts.values()) < 1:
        raise ConfigError(f"{', '.join(f'{name} {count}' for name, count in counts.items())}: none may be below 1")
    config = load_config(arguments.config, arguments.set)
    device, gpus, _ = device_of_ranks(arguments.device)
    stages = 1 if arguments.one_process or 0 < gpus < config.pipeline_parallel_size else config.pipeline_parallel_size
    if stages != 1 and config.parallel.tensor_parallel_size != 1:
        raise ConfigError("the pipeline is compared without tensor parallelism; set parallel.tensor_parallel_size: 1")
    if stages != 1 and config.training.precision != "fp32":
        raise ConfigError(
            f"training.precision is {config.training.precision}, but torch's pipelining has no mixed precision; set "
            "training.precision: fp32 or pass --one-process"
        )
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="stagdist-bench-") as folder:
        prepared = on_real_text(config, Path(folder), arguments.micro_batches, arguments.rounds, device)
        results = measure(prepared, stages, arguments.rounds, threads=arguments.threads, gpus=gpus)
    for name, value in results.items():
        if isinstance(value, int | float | str):
            print(f"{name:<34} {f'{value:.4g}' if isinstance(value, float) else value}")
    if arguments.json:
        write_results(arguments.json, results)
    return 0


def on_real_text(config: RunConfig, folder: Path, micro_batches: int, rounds: int, device: str) -> RunConfig:
    """The run on a corpus made in `folder` from Python's own source, one byte per token, with steps for all rounds.

    Raises:
        ConfigError: the vocabulary has no room for bytes.
    """
    tokenizer = byte_tokenizer()
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size is {config.model.vocab_size}, bytes need {tokenizer.vocab_size}")
    library, prefix = Path(sysconfig.get_paths()["stdlib"]), str(folder / "corpus")
    prepare([str(library / package) for package in CORPUS_PACKAGES], prefix, tokenizer)
    length = config.sequence_length
    data = DataConfig(corpora=(CorpusConfig(prefix=prefix),), split=(100.0, 0.0, 0.0), sequence_length=length)
    batch, steps = micro_batches * config.training.micro_batch_size, WARM_UP_ROUNDS + rounds + 1
    changes = {
        "data": data,
        "runs_directory": str(folder / "runs"),
        "training": config.training.model_copy(update={"global_batch_size": batch, "steps": steps}),
        "parallel": config.parallel.model_copy(update={"device": device}),
    }
    return config.model_copy(update=changes)


def measure(config: RunConfig, stages: int, rounds: int, *, threads: int, gpus: int) -> dict[str, Any]:
    """Start the processes, run all rounds, and combine the results."""
    settings = {"site": "benchmarks.training.site:TrainSite", "config": config.model_dump(mode="json")}
    startup_s = None
    with (
        Workers(1, settings, threads=threads) as single,
        Workers(stages, settings, threads=threads) if stages > 1 else nullcontext() as pipeline,
    ):
        device_name = single.started[0]["device_name"]
        readings = _run_rounds(single, pipeline, rounds)
        if pipeline is not None:
            pipeline.together("save")
    if stages > 1:
        with Workers(stages, settings, threads=threads) as resumed:
            assert all(answer["resumed"] for answer in resumed.started), "the saved checkpoint was not found"
            startup_s = max(answer["started_s"] for answer in resumed.started)
    micro_batches = config.training.num_micro_batches(1)
    written = conditions(device_name, min(gpus, stages)) | {
        "benchmark": "train",
        "device": config.parallel.device,
        "processes": stages,
        "threads_per_process": threads,
        "rounds": rounds,
        "num_micro_batches": micro_batches,
        "config": config.model_dump(mode="json", exclude_defaults=True, include={"model", "training", "optimizer"}),
    }
    results = one_process_results(config, readings, device_name)
    if stages > 1:
        pipelined = pipeline_results(config, readings, stages, micro_batches)
        pipelined["spread"] = results["spread"] | pipelined["spread"]
        results |= pipelined | {"startup_s": startup_s}
    return written | results


def _run_rounds(single: Workers, pipeline: Workers | None, rounds: int) -> Rounds:
    """Every contestant once per round. Odd rounds run backwards, so that a drift of the machine favors none."""
    runs: dict[str, Callable[[], list[Answer]]] = {"one_process": lambda: single.together("staggered")}
    if pipeline is not None:
        runs |= {
            "pipeline": lambda: pipeline.together("staggered"),
            "torch_pipelining": lambda: pipeline.together("rival"),
            "stage": lambda: pipeline.apart("stage_time"),
            "stage_busy": lambda: pipeline.together("stage_time"),
        }
    runs["sequential"] = lambda: single.together("sequential")
    readings: Rounds = {name: [] for name in runs}
    for index in range(-WARM_UP_ROUNDS, rounds):
        answers = {name: runs[name]() for name in (reversed(runs) if index % 2 else iter(runs))}
        if index < 0:
            _check_same_work(answers)
            continue
        for name, of_ranks in answers.items():
            readings[name].append(of_ranks)
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return readings


def _check_same_work(answers: dict[str, list[Answer]]) -> None:
    """Refuse to compare contestants that compute different things."""
    expected = answers["one_process"][-1]
    for name in {"pipeline", "torch_pipelining"} & answers.keys():
        found = answers[name][-1]
        for reading in ("loss", "gradient_norm"):
            if abs(found[reading] - expected[reading]) > SAME_WORK * abs(expected[reading]):
                raise TrainingError(
                    f"{name} and one_process do not do the same work: {reading} {found[reading]} and "
                    f"{expected[reading]}; their times cannot be compared"
                )


def slowest(readings: Rounds, contestant: str, reading: str = "seconds") -> list[float]:
    """Largest reading over the ranks, by round."""
    return [max(answer[reading] for answer in answers) for answers in readings[contestant]]


def one_process_results(config: RunConfig, readings: Rounds, device_name: str | None) -> dict[str, Any]:
    """Results of one process: speed, use of the device, and time per FLOP against the baseline."""
    staggered, sequential = slowest(readings, "one_process"), slowest(readings, "sequential")
    tokens = config.training.global_batch_size * config.sequence_length
    flops = flops_per_token(config.model, config.sequence_length)
    plain_flops = flops_per_token(sequential_twin(config.model), config.sequence_length)
    per_flop = spread([ratio * plain_flops / flops for ratio in paired_ratios(staggered, sequential)])
    waited = spread(paired_ratios(slowest(readings, "one_process", "load_s"), staggered))
    median_s = spread(staggered)["median"]
    peak = peak_flops(device_name, config.training.precision)
    return {
        "time_per_flop_vs_sequential": per_flop["median"],
        "data_wait_share": waited["median"],
        "one_process_tokens_per_s": tokens / median_s,
        "one_process_tflops_per_s": tokens * flops / median_s / 1e12,
        "mfu": None if peak is None else tokens * flops / median_s / peak,
        "spread": {
            "time_per_flop_vs_sequential": per_flop,
            "data_wait_share": waited,
            "one_process_step_s": spread(staggered),
            "sequential_step_s": spread(sequential),
        },
    }


def pipeline_results(config: RunConfig, readings: Rounds, stages: int, micro_batches: int) -> dict[str, Any]:
    """Results of the pipeline."""
    one, pipe, torch_pipe = (slowest(readings, name) for name in ("one_process", "pipeline", "torch_pipelining"))
    speedup, over_torch = spread(paired_ratios(one, pipe)), spread(paired_ratios(torch_pipe, pipe))
    times, busy = (
        [spread([answers[stage]["seconds"] for answers in readings[name]]) for stage in range(stages)]
        for name in ("stage", "stage_busy")
    )
    alone_s, busy_s = ([stage["median"] for stage in each] for each in (times, busy))
    bound = pipeline_speedup_bound(alone_s, micro_batches)
    bound_busy = pipeline_speedup_bound(alone_s, micro_batches, busy_s)
    waited = spread(paired_ratios(slowest(readings, "pipeline", "load_s"), pipe))
    return {
        "pipeline_speedup": speedup["median"],
        "pipeline_speedup_bound": bound,
        "pipeline_efficiency": speedup["median"] / bound,
        "pipeline_speedup_bound_all_busy": bound_busy,
        "pipeline_efficiency_all_busy": speedup["median"] / bound_busy,
        "tokens_per_s": config.training.global_batch_size * config.sequence_length / spread(pipe)["median"],
        "tokens_per_s_vs_torch_pipelining": over_torch["median"],
        "data_wait_share": waited["median"],
        "stage_times_s": alone_s,
        "stage_times_all_busy_s": busy_s,
        "stage_imbalance": max(alone_s) / min(alone_s) - 1.0,
        "spread": {
            "pipeline_speedup": speedup,
            "tokens_per_s_vs_torch_pipelining": over_torch,
            "data_wait_share": waited,
            "pipeline_step_s": spread(pipe),
            "torch_pipelining_step_s": spread(torch_pipe),
            "stage_times_s": times,
            "stage_times_all_busy_s": busy,
        },
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
