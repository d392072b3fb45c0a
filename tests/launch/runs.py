"""Real training runs through the `deepspeed` command, for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"
UNDER_WAY: list[tuple["subprocess.Popen[str]", Callable[[], None]]] = []
"""What tests have started, and what ends it with all that it started; tests in tests/launch leave nothing running."""


def tiny_config(corpus: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A p=2 model on bytes whose steps take some milliseconds; `sections` are merged in."""
    config: dict[str, Any] = {
        "name": name,
        "model": {
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "section_layers": [1, 1],
        },
        "parallel": {"timeout_s": 60},
        "data": {"tokenizer": "bytes", "corpora": [{"prefix": str(corpus)}], "split": [90, 5, 5]},
        "training": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"num_batches": 1},
        "checkpoint": {"interval_steps": 4, "keep_last": 3},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


@dataclass
class Launch:
    """One call of a launcher in a folder, in a process group of its own."""

    folder: Path
    command: list[str]
    process: "subprocess.Popen[str]" = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.folder / f"output-{time.monotonic_ns()}.txt"
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdout=stream, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, env=_environment(),
            )  # fmt: skip
        UNDER_WAY.append((self.process, self.end))

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with_rank = [part for part in child.cmdline() if part.startswith("--local_rank=")]
            if with_rank and str(PRETRAIN) in child.cmdline():
                found[int(with_rank[0].split("=")[1])] = child
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, metrics: Path, step: int, timeout_s: float = 120) -> None:
        """Return when a training step has been logged."""
        deadline = time.monotonic() + timeout_s
        while not any(line["step"] >= step for line in train_lines(metrics)):
            assert self.process.poll() is None, f"the run ended before step {step}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no step {step} in {timeout_s} s:\n{self.text()}"
            time.sleep(0.02)

    def wait(self, timeout_s: float = 180) -> int:
        """Exit code; a process group that does not end is ended and the test fails."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text()}") from None

    def end(self) -> None:
        """End everything this launch started."""
        family = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def text(self) -> str:
        """Everything printed so far."""
        return self.output.read_text()


def _environment() -> dict[str, str]:
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Store a configuration beside the runs folder."""
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(
    folder: Path, config: dict[str, Any], *overrides: str, ranks: int = 2, prefix: list[str] | None = None
) -> Launch:
    """Start `deepspeed launch/pretrain.py` on this machine."""
    command = [
        *(prefix or []), str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks),
        "--master_port", str(free_port()), str(PRETRAIN), "--config", str(write_config(folder, config)),
    ]  # fmt: skip
    for override in overrides:
        command += ["--set", override]
    return Launch(folder, command)


def train_lines(metrics: Path) -> list[dict[str, Any]]:
    """Complete lines of the training split."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().splitlines(keepends=True)
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in parsed if line["split"] == "train"]


def losses(folder: Path, name: str) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in train_lines(folder / "runs" / name / "metrics.jsonl")}
