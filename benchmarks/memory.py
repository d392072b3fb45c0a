#!/usr/bin/env python3
"""Memory of training: the plan of `--dry-run` against the peak of real ranks, `python benchmarks/memory.py`.

Every case is planned and then started: real processes build the training engine and train some steps on random tokens.
Measured are the bytes of tensors at their peak, on CPUs by torch's memory profiler, on GPUs by its allocator.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.command import add_options, main
from benchmarks.common.conditions import conditions, device_of_ranks
from benchmarks.common.results import check_outputs, write_results
from benchmarks.common.workers import Workers
from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.parallel.grid import grid_for
from stagdist.planning.plan import plan

TOLERANCE = 0.15
"""A prediction that is further off, relative to the measured peak, fails the benchmark."""
TABLE = "{:<24} {:>4}  {:>12}  {:>10}  {:>10}  {:>6}  {}"
SHAPE: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "section_layers": [6, 5],
}
BATCH: dict[str, Any] = {"steps": 100, "global_batch_size": 6, "micro_batch_size": 2, "precision": "fp32"}


@dataclass(frozen=True)
class MemoryCase:
    """One run to measure on `world_size` ranks; its data is not read."""

    name: str
    config: RunConfig
    world_size: int


@dataclass(frozen=True)
class RankResult:
    """Plan and measurement of one rank: parameters, and bytes at the peak (planned with the moment it is reached)."""

    rank: int
    stage: int
    planned_parameters: int
    engine_parameters: int
    predicted_bytes: int
    predicted_moment: str
    measured_bytes: int
    peaks_by_phase: dict[str, int]

    @property
    def ratio(self) -> float:
        """Predicted over measured peak."""
        return self.predicted_bytes / self.measured_bytes

    @property
    def holds(self) -> bool:
        """The parameters are exact and the peak is within the tolerance."""
        return self.planned_parameters == self.engine_parameters and abs(self.ratio - 1) <= TOLERANCE


def _case(name: str, world_size: int, pipe: int, model: Mapping[str, Any], **training: Any) -> MemoryCase:
    keys = {"name": "bench-memory", "model": SHAPE | dict(model), "training": BATCH | training}
    config = RunConfig.model_validate(keys | {"parallel": {"pipeline_parallel_size": pipe}})
    return MemoryCase(name, config, world_size)


def default_cases() -> list[MemoryCase]:
    """Nine small runs, the first three of at least 1 GB per rank."""
    deep = {"section_layers": [13, 9]}
    sequential = deep | {"connection": "sequential"}
    grouped = {"num_key_value_heads": 4, "cross_attention_key_value_heads": 2, "stagger": 2}
    large_vocabulary = {"vocab_size": 32000, "section_layers": [4, 4], "share_section_weights": True}
    return [
        _case("fp32", 2, 2, {}),
        _case("bf16-checkpointed", 2, 2, deep, precision="bf16", activation_checkpointing="layer"),
        _case("shared-weights", 1, 1, large_vocabulary, global_batch_size=4),
        _case("bf16-tied", 2, 2, {"tie_word_embeddings": True}, precision="bf16"),
        _case("sequential-checkpointed", 2, 2, sequential, activation_checkpointing="layer"),
        _case("combined-windowed", 2, 2, {"combine_sections": True, "cross_attention_window": 64}),
        _case("two-replicas", 2, 1, {"section_layers": [4, 3]}, micro_batch_size=1),
        _case("one-micro-batch", 1, 1, {"section_layers": [4, 3]}, global_batch_size=2),
        _case("bf16-grouped-queries", 2, 2, grouped, precision="bf16", global_batch_size=4),
    ]


def measure_case(case: MemoryCase, steps: int, device: str) -> list[RankResult]:
    """Start the ranks of a case and train; the results by rank.

    Raises:
        ConfigError: the ranks do not fit the configuration.
        TrainingError: a rank failed; with the end of its output.
    """
    parallel = case.config.parallel.model_copy(update={"device": device})
    config = case.config.model_copy(update={"parallel": parallel})
    grid, stages = grid_for(config, case.world_size), plan(config, case.world_size).stages
    settings = {"site": "benchmarks.training.memory_site:MemorySite", "config": config.model_dump(mode="json")}
    with Workers(case.world_size, settings | {"steps": steps}) as workers:
        answers = workers.together("train")
    results = []
    for rank, answer in enumerate(answers):
        stage = grid.coordinate(rank).pipe
        parameters, memory, peaks = stages[stage].parameters_per_rank, stages[stage].memory, answer["peak_bytes"]
        assert memory is not None, "a plan whose ranks fit has memory"
        planned = (memory.total, memory.peak_moment)
        results.append(RankResult(rank, stage, parameters, answer["parameters"], *planned, max(peaks.values()), peaks))
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; repeatable (default: all)")
    parser.add_argument("--config", metavar="FILE", help="measure this run instead of the cases; its data is not read")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks for --config (default: the fewest)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="training steps of each case (default: 2)")
    add_options(parser, "json", "set", "device")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; exit code 1 if a prediction does not hold.

    Raises:
        ConfigError: an unknown case, ranks that do not fit, or a file that could not be written.
        TrainingError: a rank failed.
    """
    if arguments.steps < 2:
        raise ConfigError(f"--steps {arguments.steps}: the optimizer's moments exist from step 2 on, train at least 2")
    check_outputs(arguments)
    cases = list(_chosen(arguments))
    device, gpus, gpu_name = device_of_ranks(arguments.device)
    written = conditions(gpu_name, gpus) | {"benchmark": "memory", "device": device, "steps": arguments.steps}
    print(TABLE.format("case", "rank", "parameters", "predicted", "measured", "ratio", "reached in"), flush=True)
    recorded, good = [], True
    for case in cases:
        if 0 < gpus < case.world_size:
            print(f"{case.name}: skipped, it needs {case.world_size} GPUs of {gpus}", file=sys.stderr)
            continue
        results = measure_case(case, arguments.steps, device)
        print("\n".join(_line(case.name, result) for result in results), flush=True)
        good = good and all(result.holds for result in results)
        parts = {"model", "training", "parallel", "deepspeed"}  # what memory depends on
        config = case.config.model_dump(mode="json", exclude_defaults=True, include=parts)
        ranks = [asdict(result) | {"ratio": round(result.ratio, 4)} for result in results]
        recorded.append({"name": case.name, "world_size": case.world_size, "config": config, "ranks": ranks})
    if not recorded:
        raise ConfigError(f"no case fits {gpus} GPUs; pass --device cpu")
    if arguments.json:
        write_results(arguments.json, written | {"cases": recorded})
    return 0 if good else 1


def _chosen(arguments: argparse.Namespace) -> Iterator[MemoryCase]:
    if arguments.config:
        config = load_config(arguments.config, arguments.set)
        fewest = config.pipeline_parallel_size * config.parallel.tensor_parallel_size
        yield MemoryCase(config.name, config, fewest if arguments.world_size is None else arguments.world_size)
        return
    if arguments.set or arguments.world_size is not None:
        raise ConfigError("--set and --world-size change the run of --config; give that too")
    cases = {case.name: case for case in default_cases()}
    for name in arguments.case or cases:
        if name not in cases:
            raise ConfigError(f"--case {name!r} is none of {', '.join(map(repr, cases))}")
        yield cases[name]


def _line(name: str, result: RankResult) -> str:
    difference = result.planned_parameters - result.engine_parameters
    parameters = f"{difference:+,} off" if difference else f"{result.engine_parameters:,}"
    sizes = [f"{size / 2**30:.3f} GiB" for size in (result.predicted_bytes, result.measured_bytes)]
    return TABLE.format(name, result.rank, parameters, *sizes, f"{result.ratio:.3f}", result.predicted_moment)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
