"""Real runs of `launch/generate.py`, plain and through launchers, for tests."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from stagdist.checkpoint.published.writer import ModelDirectoryWriter
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.parallel.layout import model_parameters
from tests.launch.runs import ROOT, _environment
from tests.ranks import free_port
from tests.reference import stagformer as reference

GENERATE = ROOT / "launch" / "generate.py"
BIN = Path(sys.executable).parent


def write_model(directory: Path, **keys: object) -> Path:
    """A p=2 model on bytes with random weights."""
    body = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "section_layers": [1, 1],
        **keys,
    }
    model = ModelConfig(**body)  # type: ignore[arg-type]
    parameters = reference.random_parameters(body, 0, torch.float32, perturb=True)
    tokenizer = byte_tokenizer()
    with ModelDirectoryWriter(directory, model, torch.float32, tokenizer.end_of_document) as writer:
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
        tokenizer.save(writer.folder)
    return directory


def command(launcher: str, model: Path, *arguments: str, ranks: int = 2) -> list[str]:
    """The command line of a run; `launcher` is python, deepspeed or torchrun."""
    port = str(free_port())
    front = {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--quiet", "--num_accelerators", str(ranks), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
    }[launcher]
    return [*front, str(GENERATE), "--model", str(model), "--device", "cpu", *arguments]


def generate(
    launcher: str, model: Path, *arguments: str, given: bytes = b"", ranks: int = 2
) -> "subprocess.CompletedProcess[bytes]":
    """Run to the end."""
    return subprocess.run(
        command(launcher, model, *arguments, ranks=ranks),
        input=given, capture_output=True, env=environment(), timeout=120,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """As in `runs`; DeepSpeed does not tell on standard output which device it found."""
    return {**_environment(), "DS_ACCELERATOR": "cpu"}


def error_lines(text: str) -> list[str]:
    """The lines that tell what went wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


class Running:
    """A run that is under way; its output grows in files."""

    def __init__(self, folder: Path, words: list[str]):
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment(), start_new_session=True
            )

    def give(self, line: bytes) -> None:
        """Write to standard input, which stays open."""
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def wait_for(self, num_bytes: int, timeout_s: float = 90) -> bytes:
        """Standard output, once it is at least this long."""
        deadline = time.monotonic() + timeout_s
        while len(text := self.out.read_bytes()) < num_bytes:
            assert self.process.poll() is None, f"ended after {text!r}: {self.errors()}"
            assert time.monotonic() < deadline, f"only {text!r} in {timeout_s} s: {self.errors()}"
            time.sleep(0.02)
        return text

    def errors(self) -> str:
        """Standard error so far."""
        return self.err.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The processes that generate, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.cmdline()[1:3] == ["-u", str(GENERATE)]:
                found[int(child.environ()["RANK"])] = child
        return [found[rank] for rank in sorted(found)]


@contextlib.contextmanager
def running(folder: Path, words: list[str]) -> Iterator[Running]:
    """A run that does not outlive the test."""
    run = Running(folder, words)
    ranks: list[psutil.Process] = []
    try:
        yield run
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(run.process.pid).children(recursive=True)
        for process in (*ranks, run.process):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        run.process.wait()
        if run.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                run.process.stdin.close()
