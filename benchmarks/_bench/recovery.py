"""What an upcycled Llama recovers: validation loss while it trains on, against a StagFormer that begins anew.

Everything is done by the commands a person would type: tokenizer and corpora from text, a `sequential` baseline
trained and exported as a Llama, then for every contestant the same number of steps on the same batches, in one process,
from the Llama itself, from its upcycled form, and from scratch. Seeds change initialisation and order of samples.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._bench.conditions import ROOT, conditions
from benchmarks._bench.figures import spread
from benchmarks._bench.results import check_outputs, write_results
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
GLOBAL_BATCH, MICRO_BATCH = 16, 16
BASELINE_RATE = 4e-3
LINE = "{:<30} {:>8}" + " {:>7}" * POINTS

Curve = dict[int, float]
"""Validation loss, nats per token, by steps done."""


@dataclass(frozen=True)
class Contestant:
    """One way to go on.

    Attributes:
        name: said in the table.
        learning_rate: at its peak.
        source: `llama`: the exported baseline as it is; `upcycled`; `scratch`.
        output_scale: of `upcycle`.
    """

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
    parser.add_argument("--json", metavar="FILE", help="write all results here")
    parser.add_argument("--text", nargs="+", metavar="INPUT", help="text (default: Python's own source)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    parser.add_argument("--baseline-steps", type=int, default=600, metavar="N", help="of the Llama (default: 600)")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of every contestant (default: 150)")
    parser.add_argument("--folder", metavar="DIR", help="where runs go (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        ConfigError: an option makes no sense, there is no text, or a place for files will not do.
        TrainingError: a command failed.
    """
    if arguments.seeds < 1 or arguments.baseline_steps < 1:
        raise ConfigError("--seeds and --baseline-steps must be at least 1")
    if arguments.steps < POINTS or arguments.steps % POINTS:
        raise ConfigError(f"--steps must be a multiple of {POINTS}, the number of evaluations")
    check_outputs(arguments)
    with tempfile.TemporaryDirectory(prefix="stagdist-bench-recovery-", dir=arguments.folder) as folder:
        site = Site(Path(folder), arguments.baseline_steps, arguments.steps)
        site.prepare(arguments.text)
        seeds = [site.measure(seed) for seed in range(arguments.seeds)]
    results = figures(seeds)
    _print(results)
    if arguments.json:
        body = conditions(None, 0) | {"benchmark": "recovery", "precision": "fp32", "model": MODEL | _staggered()}
        body |= {"text": "given with --text" if arguments.text else "source of Python's standard library"}
        body |= {"baseline_steps": arguments.baseline_steps, "steps": arguments.steps, "seeds": arguments.seeds}
        body |= {"tokens_per_step": GLOBAL_BATCH * MODEL["max_position_embeddings"], **results}
        write_results(arguments.json, body)
    return 0


def _staggered() -> dict[str, Any]:
    return {"connection": "staggered", "section_layers": SECTIONS}


class Site:
    """A folder in which the commands run.

    Args:
        folder: empty.
        baseline_steps: of the Llama.
        steps: of every contestant.
    """

    def __init__(self, folder: Path, baseline_steps: int, steps: int):
        self._folder, self._baseline_steps, self._steps = folder, baseline_steps, steps

    def prepare(self, inputs: Sequence[str] | None) -> None:
        """Tokenizer and corpora; of Python's own source whole files are held out, of other text documents."""
        files = [str(Path(name).resolve()) for name in inputs] if inputs else python_source()
        self._tool("train_tokenizer", *files, "--output", "tokenizer", "--vocab-size", str(MODEL["vocab_size"]))
        self._tool("prepare_data", *files, "--output", "corpus", "--tokenizer", "tokenizer", "--quiet")

    def measure(self, seed: int) -> dict[str, Any]:
        """Loss of the baseline at its end, and of every contestant on its way."""
        baseline = self._pretrain(
            f"baseline-{seed}",
            {"connection": "sequential", "section_layers": SECTIONS},
            seed,
            BASELINE_RATE,
            self._baseline_steps,
            self._baseline_steps,
        )
        self._tool("convert_checkpoint", "export", f"runs/baseline-{seed}", f"llama-{seed}", "--quiet")
        curves = [self._contest(contestant, seed) for contestant in CONTESTANTS]
        shutil.rmtree(self._folder / f"runs/baseline-{seed}")
        return {"baseline": baseline[self._baseline_steps], "curves": curves}

    def _contest(self, contestant: Contestant, seed: int) -> Curve:
        name, llama = "contestant", f"llama-{seed}"
        model = _staggered()
        if contestant.source == "llama":
            model = {"connection": "sequential", "section_layers": SECTIONS}
        config = self._config(name, model, seed, contestant.learning_rate, self._steps, self._steps // POINTS)
        source = llama
        if contestant.source == "upcycled":
            source, scale = "upcycled", str(contestant.output_scale)
            layers = [str(count) for count in SECTIONS]
            words = ("--section-layers", *layers, "--output-scale", scale, "--overwrite", "--quiet")
            self._tool("convert_checkpoint", "upcycle", llama, source, *words)
        if contestant.source != "scratch":
            self._tool("convert_checkpoint", "import", source, f"runs/{name}", "--config", str(config), "--quiet")
        return self._train(name, config)

    def _pretrain(self, name: str, model: dict[str, Any], seed: int, rate: float, steps: int, interval: int) -> Curve:
        return self._train(name, self._config(name, model, seed, rate, steps, interval))

    def _train(self, name: str, config: Path) -> Curve:
        self._run(str(ROOT / "launch" / "pretrain.py"), "--config", str(config))
        lines = (self._folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        curve = {int(line["step"]): float(line["loss"]) for line in found if line["split"] == "validation"}
        if name == "contestant":
            shutil.rmtree(self._folder / f"runs/{name}")
        return curve

    def _config(self, name: str, model: dict[str, Any], seed: int, rate: float, steps: int, interval: int) -> Path:
        keys = {
            "name": name,
            "model": MODEL | model,
            "parallel": {"pipeline_parallel_size": 1, "device": "cpu"},
            "data": {
                "tokenizer": "tokenizer",
                "corpora": [{"prefix": "corpus"}],
                "split": [1 - VALIDATION_SHARE, VALIDATION_SHARE, 0],
                "seed": seed,
            },
            "training": {
                "steps": steps,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": MICRO_BATCH,
                "seed": seed,
            },
            "optimizer": {"learning_rate": rate},
            "scheduler": {"kind": "cosine", "warmup_steps": max(1, steps // 10)},
            "evaluation": {"interval_steps": interval, "num_batches": 16},
            "checkpoint": {"interval_steps": steps},
        }
        path = self._folder / f"{name}.yaml"
        path.write_text(json.dumps(keys))  # JSON is YAML
        return path

    def _tool(self, name: str, *words: str) -> None:
        self._run(str(ROOT / "tools" / f"{name}.py"), *words)

    def _run(self, *words: str) -> None:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
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


def best(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of every source its lowest median loss at the end."""
    for source in dict.fromkeys(row["source"] for row in results["contestants"]):
        ends = [list(row["validation_loss"].values())[-1] for row in results["contestants"] if row["source"] == source]
        yield source, min(end["median"] for end in ends)


def _print(results: dict[str, Any]) -> None:
    baseline = results["baseline_validation_loss"]
    print(
        f"validation loss, nats per token, median of {baseline['repeats']} seeds; the Llama: {baseline['median']:.3f}"
    )
    steps = list(results["contestants"][0]["validation_loss"])
    print(LINE.format("after steps", "peak lr", *steps))
    for row in results["contestants"]:
        losses = [f"{value['median']:.3f}" for value in row["validation_loss"].values()]
        print(LINE.format(row["name"], f"{row['learning_rate']:g}", *losses))
    for source, loss in best(results):
        print(f"best {source}: {loss:.3f}")
