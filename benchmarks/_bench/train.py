"""How fast training is: the pipeline against one process, against its bound, and against torch's own pipeline.

Runs alternate, and every ratio is taken between runs of one round, so that a machine whose speed changes slows both
sides of a ratio. All contestants read the same corpus through the same loader and do the same work, which is checked
by their losses and gradient norms.
"""

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._bench.conditions import ROOT, conditions, device_of_ranks
from benchmarks._bench.figures import imbalance, paired_ratios, pipeline_speedup_bound, spread
from benchmarks._bench.results import check_outputs, write_results
from benchmarks._bench.twin import sequential_twin
from benchmarks._bench.workers import Answer, Workers
from stagdist.config.device_choice import DEVICE_CHOICES
from stagdist.config.loading import load_config
from stagdist.config.parts import CorpusConfig, DataConfig
from stagdist.config.run_config import RunConfig
from stagdist.data.prepare.preparation import prepare
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import ConfigError, TrainingError
from stagdist.planning.flops import flops_per_token
from stagdist.telemetry.hardware import Precision, peak_flops

DEFAULT_CONFIG = ROOT / "configs" / "bench-train.yaml"
WARM_UP_ROUNDS = 2
SAME_WORK = 1e-3
"""Relative difference of losses and gradient norms in the first rounds above which contestants do not do the same."""
CORPUS_PACKAGES = ("asyncio", "email", "json", "unittest", "xml")


@dataclass
class Rounds:
    """Readings of all rounds by contestant, one list of answers (by rank) per round."""

    answers: dict[str, list[list[Answer]]] = field(default_factory=dict)

    def add(self, contestant: str, answers: list[Answer]) -> None:
        """Keep what one run answered."""
        self.answers.setdefault(contestant, []).append(answers)

    def slowest(self, contestant: str, reading: str = "seconds") -> list[float]:
        """Largest reading over the ranks, by round."""
        return [max(answer[reading] for answer in answers) for answers in self.answers[contestant]]

    def of_rank(self, contestant: str, rank: int, reading: str = "seconds") -> list[float]:
        """Reading of one rank, by round."""
        return [answers[rank][reading] for answers in self.answers[contestant]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--json", metavar="FILE", help="write all results here")
    parser.add_argument("--config", metavar="FILE", default=str(DEFAULT_CONFIG), help="default: the balanced shape")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of --config")
    parser.add_argument(
        "--micro-batches", type=int, default=8, metavar="M", help="micro-batches of an optimizer step (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="measured rounds (default: 20)")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=f"{DEVICE_CHOICES} (auto)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each process (default: 1)")
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="all sections in one process, no pipeline (what a machine with one GPU does anyway)",
    )


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
    shown = {name: value for name, value in results.items() if isinstance(value, int | float | str)}
    print("\n".join(f"{name:<34} {_shown(value)}" for name, value in shown.items()))
    if arguments.json:
        write_results(arguments.json, results)
    return 0


def on_real_text(config: RunConfig, folder: Path, micro_batches: int, rounds: int, device: str) -> RunConfig:
    """The run over a corpus made in `folder` from Python's own source, one byte per token, with steps for all rounds.

    Micro-batches and rounds of the benchmark replace batch size and steps of the configuration.

    Raises:
        ConfigError: the vocabulary has no room for bytes.
    """
    tokenizer = byte_tokenizer()
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size is {config.model.vocab_size}, bytes need {tokenizer.vocab_size}")
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = str(folder / "corpus")
    prepare([str(library / package) for package in CORPUS_PACKAGES], prefix, tokenizer)
    data = DataConfig(
        corpora=(CorpusConfig(prefix=prefix),),
        split=(100.0, 0.0, 0.0),
        sequence_length=config.sequence_length,
    )
    training = {
        "global_batch_size": micro_batches * config.training.micro_batch_size,
        "steps": WARM_UP_ROUNDS + rounds + 1,
    }
    return config.model_copy(
        update={
            "data": data,
            "runs_directory": str(folder / "runs"),
            "training": config.training.model_copy(update=training),
            "parallel": config.parallel.model_copy(update={"device": device}),
        }
    )


def measure(config: RunConfig, stages: int, rounds: int, *, threads: int, gpus: int) -> dict[str, Any]:
    """Start the processes, run all rounds, and put the results together."""
    settings = {"config": config.model_dump(mode="json")}

    def start(processes: int) -> Workers:
        return Workers(processes, settings, threads=threads)

    readings, startup_s = Rounds(), None
    with start(1) as single, _pipeline(start, stages) as pipeline:
        device_name = single.started[0]["device_name"]
        _run_rounds(single, pipeline, rounds, readings)
        if pipeline is not None:
            pipeline.together("save")
    if stages > 1:
        with start(stages) as resumed:
            assert all(answer["resumed"] for answer in resumed.started), "the saved checkpoint was not found"
            startup_s = max(answer["started_s"] for answer in resumed.started)
    micro_batches = config.training.global_batch_size // config.training.micro_batch_size
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
        results |= pipeline_results(config, readings, stages, micro_batches) | {"startup_s": startup_s}
    return written | results


def _run_rounds(single: Workers, pipeline: Workers | None, rounds: int, readings: Rounds) -> None:
    for index in range(WARM_UP_ROUNDS + rounds):
        answers = _one_round(single, pipeline, backwards=index % 2 == 1)
        if index < WARM_UP_ROUNDS:
            _check_same_work(answers)
            continue
        for contestant, of_ranks in answers.items():
            readings.add(contestant, of_ranks)
        print(f"round {index - WARM_UP_ROUNDS + 1} of {rounds}", file=sys.stderr, flush=True)


def _pipeline(start: Callable[[int], Workers], stages: int) -> AbstractContextManager[Workers | None]:
    return start(stages) if stages > 1 else nullcontext()


def _one_round(single: Workers, pipeline: Workers | None, *, backwards: bool) -> dict[str, list[Answer]]:
    """Every contestant once; odd rounds run backwards, so that a drift of the machine favours nobody."""
    runs: dict[str, Callable[[], list[Answer]]] = {"one_process": lambda: single.together("staggered")}
    if pipeline is not None:
        pipe = pipeline
        runs |= {
            "pipeline": lambda: pipe.together("staggered"),
            "torch_pipelining": lambda: pipe.together("rival"),
            "stage": lambda: pipe.apart("stage_time"),
            "stage_busy": lambda: pipe.together("stage_time"),
        }
    runs["sequential"] = lambda: single.together("sequential")
    order = reversed(runs) if backwards else iter(runs)
    return {name: runs[name]() for name in order}


def _check_same_work(round_: dict[str, list[Answer]]) -> None:
    """Refuse a comparison between contestants that compute different things."""
    expected = round_["one_process"][-1]
    for contestant in ("pipeline", "torch_pipelining"):
        if contestant not in round_:
            continue
        found = round_[contestant][-1]
        for reading in ("loss", "gradient_norm"):
            if abs(found[reading] - expected[reading]) > SAME_WORK * abs(expected[reading]):
                raise TrainingError(
                    f"{contestant} and one_process do not do the same work: {reading} {found[reading]} and "
                    f"{expected[reading]}; their times cannot be compared"
                )


def one_process_results(config: RunConfig, readings: Rounds, device_name: str | None) -> dict[str, Any]:
    """What one process shows: speed, use of the device, and the price of staggering per FLOP."""
    staggered, sequential = readings.slowest("one_process"), readings.slowest("sequential")
    tokens = config.training.global_batch_size * config.sequence_length
    flops = flops_per_token(config.model, config.sequence_length)
    plain_flops = flops_per_token(sequential_twin(config.model), config.sequence_length)
    per_flop = [ratio * plain_flops / flops for ratio in paired_ratios(staggered, sequential)]
    waited = paired_ratios(readings.slowest("one_process", "load_s"), staggered)
    median_s = spread(staggered)["median"]
    peak = peak_flops(device_name, _precision(config))
    return {
        "time_per_flop_vs_sequential": spread(per_flop)["median"],
        "data_wait_share": spread(waited)["median"],
        "one_process_tokens_per_s": tokens / median_s,
        "one_process_tflops_per_s": tokens * flops / median_s / 1e12,
        "mfu": None if peak is None else tokens * flops / median_s / peak,
        "spread": {
            "time_per_flop_vs_sequential": spread(per_flop),
            "data_wait_share": spread(waited),
            "one_process_step_s": spread(staggered),
            "sequential_step_s": spread(sequential),
        },
    }


def pipeline_results(config: RunConfig, readings: Rounds, stages: int, micro_batches: int) -> dict[str, Any]:
    """What the pipeline shows; its spread includes that of one process."""
    one, pipe, torch_pipe = (readings.slowest(name) for name in ("one_process", "pipeline", "torch_pipelining"))
    speedup, over_torch = paired_ratios(one, pipe), paired_ratios(torch_pipe, pipe)
    times = [spread(readings.of_rank("stage", stage)) for stage in range(stages)]
    busy = [spread(readings.of_rank("stage_busy", stage)) for stage in range(stages)]
    alone_s, busy_s = ([stage["median"] for stage in each] for each in (times, busy))
    bound = pipeline_speedup_bound(alone_s, micro_batches)
    bound_busy = pipeline_speedup_bound(alone_s, micro_batches, busy_s)
    waited = paired_ratios(readings.slowest("pipeline", "load_s"), pipe)
    tokens = config.training.global_batch_size * config.sequence_length
    median = spread(speedup)["median"]
    shared = one_process_results(config, readings, None)["spread"]
    return {
        "pipeline_speedup": median,
        "pipeline_speedup_bound": bound,
        "pipeline_efficiency": median / bound,
        "pipeline_speedup_bound_all_busy": bound_busy,
        "pipeline_efficiency_all_busy": median / bound_busy,
        "tokens_per_s": tokens / spread(pipe)["median"],
        "tokens_per_s_vs_torch_pipelining": spread(over_torch)["median"],
        "data_wait_share": spread(waited)["median"],
        "stage_times_s": alone_s,
        "stage_times_all_busy_s": busy_s,
        "stage_imbalance": imbalance(alone_s),
        "spread": shared
        | {
            "pipeline_speedup": spread(speedup),
            "tokens_per_s_vs_torch_pipelining": spread(over_torch),
            "data_wait_share": spread(waited),
            "pipeline_step_s": spread(pipe),
            "torch_pipelining_step_s": spread(torch_pipe),
            "stage_times_s": times,
            "stage_times_all_busy_s": busy,
        },
    }


def _precision(config: RunConfig) -> Precision:
    return config.training.precision


def _shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
