"""Runs of `launch/generate.py`, on forked ranks or through launchers, for tests."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.text_tokens import TextTokens, tokens_of_tokenizer
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer, byte_tokenizer
from stagdist.parallel.layout import model_parameters
from tests.launch.runs import BIN, ROOT, Forks, Launch, environment, mpirun
from tests.ranks import GUARD_S, free_port
from tests.reference import stagformer as reference

GENERATE = ROOT / "launch" / "generate.py"
Done = subprocess.CompletedProcess[bytes]


def write_model(directory: Path, tokenizer: Tokenizer | None = None, **keys: Any) -> Path:
    """A p=2 model with random weights, by default on bytes."""
    tokenizer = tokenizer or byte_tokenizer()
    body = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "section_layers": [1, 1],
        **keys,
    }
    model = ModelConfig(**body)  # type: ignore[arg-type]
    parameters = reference.random_parameters(body, 0, torch.float32, perturb=True)
    tokens = TextTokens({}, {}) if tokenizer.end_token is None else tokens_of_tokenizer(tokenizer)
    with ModelDirectoryWriter(directory, model, torch.float32, 0, tokens) as writer:
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
        tokenizer.save(writer.folder)
    return directory


def _arguments(model: Path, *arguments: str) -> list[str]:
    return ["--model", str(model), "--device", "cpu", *arguments]


def command(launcher: str, model: Path, *arguments: str, ranks: int = 2) -> list[str]:
    """The command line of a run; `launcher` is python, deepspeed, torchrun or mpirun."""
    port = str(free_port())
    front = {
        "python": [sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--quiet", "--num_accelerators", str(ranks), "--master_port", port],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
        "mpirun": mpirun(port, ranks),
    }[launcher]
    return [*front, str(GENERATE), *_arguments(model, *arguments)]


def generate(launcher: str, model: Path, *arguments: str, given: bytes = b"", ranks: int = 2) -> Done:
    """Run a real command to its end."""
    return subprocess.run(
        command(launcher, model, *arguments, ranks=ranks),
        input=given, capture_output=True, env=environment(), timeout=GUARD_S,
    )  # fmt: skip


def start_ranks(folder: Path, model: Path, *arguments: str, given: bytes | Path = b"", ranks: int = 2) -> Forks:
    """Start a run on forked ranks."""
    return Forks(folder, GENERATE, _arguments(model, *arguments), ranks=ranks, one_file=False, given=given)


def start_command(folder: Path, words: list[str]) -> Launch:
    """Start a real command, whose standard input stays open."""
    return Launch(folder, words, script=GENERATE, one_file=False, interactive=True)


def run_ranks_to_end(
    model: Path,
    *arguments: str,
    given: bytes = b"",
    ranks: int | None = None,
    before: Callable[[], None] | None = None,
) -> Done:
    """Run forked ranks to their end; by default one process without a launcher."""
    with tempfile.TemporaryDirectory() as name:
        words = _arguments(model, *arguments)
        run = Forks(Path(name), GENERATE, words, ranks=ranks, one_file=False, given=given, before=before)
        with contextlib.ExitStack() as stack:
            stack.callback(run.end)
            code = run.wait()
            return Done(words, code, run.out.read_bytes(), run.err.read_bytes())


def error_lines(text: str) -> list[str]:
    """The lines that say what went wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ")]
