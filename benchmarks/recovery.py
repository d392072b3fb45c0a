#!/usr/bin/env python3
"""Loss of an upcycled Llama in further training against a StagFormer from scratch, `python benchmarks/recovery.py`.

Everything runs through the commands of a user: tokenizer and corpora from text, a `sequential` baseline that is trained
and exported as a Llama, then for every contestant the same number of steps on the same batches, in one process: from
the Llama itself, from its upcycled form, and from scratch. Seeds change initialization and order of samples.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.command import add_options, main
from benchmarks.common.conditions import ROOT, conditions
from benchmarks.common.figures import spread
from benchmarks.common.results import check_outputs, write_results
from stagdist.errors import ConfigError, TrainingError

POINTS = 6
"""Evaluations of a contestant, evenly spaced; the last is at the end."""
VALIDATION_SHARE = 0.02
MODEL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SECTIONS = [2, 2]
STAGGERED = {"connection": "staggered", "section_layers": SECTIONS}
SEQUENTIAL = {"connection": "sequential", "section_layers": SECTIONS}
GLOBAL_BATCH, MICRO_BATCH = 16, 16
BASELINE_RATE = 4e-3
LINE = "{:<30} {:>8}" + " {:>7}" * POINTS

Curve = dict[int, float]
"""Validation loss, nats per token, by steps done."""


@dataclass(frozen=True)
class Contestant:
    """One way to continue: name in the table, peak learning rate, source (`llama`, `upcycled`, `scratch`), `upcycle`'s
    scale."""

    name: str
    learning_rate: float
    source: str
    output_scale: float = 0.0


CONTESTANTS = (
    Contestant("the Llama, continued", 2e-3, "llama"),
    *(Contestant("upcycled, scale 0", rate, "upcycled") for rate in (8e-3, 4e-3, 2e-3, 1e-3)),
    Contestant("upcycled, scale 0.5", 4e-3, "upcycled", 0.5),
    Contestant("upcycled, scale 1", 4e-3, "upcycled", 1.0),
    *(Contestant("from scratch", rate, "scratch") for rate in (8e-3, 4e-3, 2e-3)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--text", nargs="+", metavar="INPUT", help="text (default: Python's own source)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    parser.add_argument("--baseline-steps", type=int, default=600, metavar="N", help="of the Llama (default: 600)")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of every contestant (default: 150)")
    add_options(parser, "json", "folder", folder="where runs go (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ConfigError: an option cannot work, there is no text, or files cannot be written.
        TrainingError: a command failed.
    """
    if arguments.seeds < 1 or arguments.baseline_steps < 1:
        raise ConfigError("--seeds and --baseline-steps must be at least 1")
    if arguments.steps < POINTS or arguments.steps % POINTS:
        raise ConfigError(f"--steps must be a multiple of {POINTS}, the number of evaluations")
    if missing := [name for name in arguments.text or () if not Path(name).exists()]:
        raise ConfigError(f"--text {missing[0]} does not exist; give files or folders with text")
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="stagdist-bench-recovery-", dir=arguments.folder) as folder:
        study = Study(Path(folder), arguments.baseline_steps, arguments.steps)
        study.prepare(arguments.text)
        seeds = [study.measure(seed) for seed in range(arguments.seeds)]
    results = figures(seeds)
    _print(results)
    if arguments.json:
        body = conditions(None, 0) | {"benchmark": "recovery", "precision": "fp32", "model": MODEL | STAGGERED}
        body |= {"text": "given with --text" if arguments.text else "source of Python's standard library"}
        body |= {"baseline_steps": arguments.baseline_steps, "steps": arguments.steps, "seeds": arguments.seeds}
        body |= {"tokens_per_step": GLOBAL_BATCH * MODEL["max_position_embeddings"], **results}
        write_results(arguments.json, body)
    return 0


@dataclass(frozen=True)
class Study:
    """The commands in an empty folder, with the steps of the Llama and of every contestant."""

    folder: Path
    baseline_steps: int
    steps: int

    def prepare(self, inputs: Sequence[str] | None) -> None:
        """Tokenizer and corpora. Of Python's own source, complete files are held out; of other text, documents."""
        files = [str(Path(name).resolve()) for name in inputs] if inputs else python_source()
        self._tool("train_tokenizer", *files, "--output", "tokenizer", "--vocab-size", str(MODEL["vocab_size"]))
        self._tool("prepare_data", *files, "--output", "corpus", "--tokenizer", "tokenizer", "--quiet")

    def measure(self, seed: int) -> dict[str, Any]:
        """Final loss of the baseline, and the curve of every contestant."""
        name, steps = f"baseline-{seed}", self.baseline_steps
        baseline = self._train(name, self._config(name, SEQUENTIAL, seed, BASELINE_RATE, steps, steps))
        self._tool("convert_checkpoint", "export", f"runs/{name}", f"llama-{seed}", "--quiet")
        curves = [self._contest(contestant, seed) for contestant in CONTESTANTS]
        shutil.rmtree(self.folder / "runs" / name)
        return {"baseline": baseline[steps], "curves": curves}

    def _contest(self, contestant: Contestant, seed: int) -> Curve:
        name, source = "contestant", f"llama-{seed}"
        model = SEQUENTIAL if contestant.source == "llama" else STAGGERED
        config = self._config(name, model, seed, contestant.learning_rate, self.steps, self.steps // POINTS)
        if contestant.source == "upcycled":
            words = ["--section-layers", *map(str, SECTIONS), "--output-scale", str(contestant.output_scale)]
            self._tool("convert_checkpoint", "upcycle", source, "upcycled", *words, "--overwrite", "--quiet")
            source = "upcycled"
        if contestant.source != "scratch":
            self._tool("convert_checkpoint", "import", source, f"runs/{name}", "--config", str(config), "--quiet")
        curve = self._train(name, config)
        shutil.rmtree(self.folder / "runs" / name)
        return curve

    def _train(self, name: str, config: Path) -> Curve:
        self._run(str(ROOT / "launch" / "pretrain.py"), "--config", str(config))
        found = map(json.loads, (self.folder / f"runs/{name}/metrics.jsonl").read_text().splitlines())
        return {int(line["step"]): float(line["loss"]) for line in found if line["split"] == "validation"}

    def _config(self, name: str, model: dict[str, Any], seed: int, rate: float, steps: int, interval: int) -> Path:
        split = [1 - VALIDATION_SHARE, VALIDATION_SHARE, 0]
        batch = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH}
        keys = {
            "name": name,
            "model": MODEL | model,
            "parallel": {"pipeline_parallel_size": 1, "device": "cpu"},
            "data": {"tokenizer": "tokenizer", "corpora": [{"prefix": "corpus"}], "split": split, "seed": seed},
            "training": {"steps": steps, **batch, "seed": seed},
            "optimizer": {"learning_rate": rate},
            "scheduler": {"kind": "cosine", "warmup_steps": max(1, steps // 10)},
            "evaluation": {"interval_steps": interval, "num_batches": 16},
            "checkpoint": {"interval_steps": steps},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(keys))  # JSON is YAML
        return path

    def _tool(self, name: str, *words: str) -> None:
        self._run(str(ROOT / "tools" / f"{name}.py"), *words)

    def _run(self, *words: str) -> None:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise TrainingError(f"{' '.join(words[:4])} ended with {done.returncode}: {done.stderr[-2000:]}")


def python_source() -> list[str]:
    """Modules of Python's standard library, shuffled, so that those held out are of all kinds."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise ConfigError("there is no source of Python's standard library here; name a text with --text")
    random.Random(0).shuffle(files)
    return [str(path) for path in files]


def figures(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread over the seeds."""
    rows = []
    for index, contestant in enumerate(CONTESTANTS):
        curves: list[Curve] = [seed["curves"][index] for seed in seeds]
        losses = {str(step): spread([curve[step] for curve in curves]) for step in sorted(curves[0])}
        rows.append(asdict(contestant) | {"validation_loss": losses})
    return {"baseline_validation_loss": spread([seed["baseline"] for seed in seeds]), "contestants": rows}


def best(results: dict[str, Any]) -> dict[str, float]:
    """The lowest final median loss of each source."""
    found: dict[str, float] = {}
    for row in results["contestants"]:
        end = list(row["validation_loss"].values())[-1]["median"]
        found[row["source"]] = min(end, found.get(row["source"], end))
    return found


def _print(results: dict[str, Any]) -> None:
    baseline = results["baseline_validation_loss"]
    seeds, median = baseline["repeats"], baseline["median"]
    print(f"validation loss, nats per token, median of {seeds} seeds; the Llama: {median:.3f}")
    print(LINE.format("after steps", "peak lr", *results["contestants"][0]["validation_loss"]))
    for row in results["contestants"]:
        losses = [f"{value['median']:.3f}" for value in row["validation_loss"].values()]
        print(LINE.format(row["name"], f"{row['learning_rate']:g}", *losses))
    for source, loss in best(results).items():
        print(f"best {source}: {loss:.3f}")


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
