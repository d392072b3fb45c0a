"""The command `launch/generate.py` from end to end on a small model."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu.checks.environment import ROOT
from tests.gpu.checks.setting import Numbers, Setting
from tests.launch.generating import write_model

COMMAND_S = {True: 50.0, False: 100.0}
"""Limit of a command, on a GPU and in a rehearsal."""
PROMPTS = ["def main(", "import os", "for line in", "class A:", "return", "x = [1, 2"]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "section_layers": [4, 4],
}
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
INTERRUPTED = 130


def generate(setting: Setting) -> Numbers:
    """Answer a file of prompts in bf16, four at a time; and end another run by SIGINT."""
    with tempfile.TemporaryDirectory(prefix="stagdist-check-") as name:
        folder = Path(name)
        model = write_model(folder / "model", max_position_embeddings=1024, **(SIZES if setting.on_gpu else {}))
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        options = ("--precision", "bf16", "--batch-size", "4", "--ignore-eos", "--device", setting.device)
        began = time.perf_counter()
        # Both at once: most of their time is that of imports.
        asked = ("--json", "--max-new-tokens", "32", "--prompts-file", str(prompts))
        whole = start_script("generate.py", model, *options, *asked)
        interrupted = start_script("generate.py", model, *options, "--max-new-tokens", "100")
        try:
            numbers: Numbers = {"interrupted_s": _interrupt(interrupted, COMMAND_S[setting.on_gpu])}
            output, errors = whole.communicate(timeout=COMMAND_S[setting.on_gpu])
        finally:
            for process in (whole, interrupted):
                process.kill()
                process.wait()
    numbers |= {"seconds": time.perf_counter() - began, "exit_code": whole.returncode}
    assert whole.returncode == 0, f"exit code {whole.returncode}: {errors.decode(errors='replace')[-2000:]}"
    answers = [json.loads(line) for line in output.decode().splitlines()]
    assert len(answers) == len(PROMPTS), f"{len(answers)} answers to {len(PROMPTS)} prompts"
    return numbers | {"answers": len(answers), "summary": errors.decode(errors="replace").strip().splitlines()[-1]}


def start_script(script: str, model: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a script of `launch/` that runs a model, as a user would."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / script), "--model", str(model), *arguments],
        env=kept,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _interrupt(process: "subprocess.Popen[bytes]", limit_s: float) -> float:
    """Send SIGINT once the first answer has begun and more prompts may come; seconds until the end."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"def main(\n")
    process.stdin.flush()
    if not process.stdout.read(len("def main(") + 1):
        raise AssertionError(f"no answer: {process.communicate(timeout=limit_s)[1].decode(errors='replace')[-2000:]}")
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    _, errors = process.communicate(timeout=limit_s)
    text = errors.decode(errors="replace")
    assert process.returncode == INTERRUPTED, f"SIGINT gives exit code {process.returncode}: {text[-2000:]}"
    assert "interrupted" in text, f"nothing is said about the interrupt: {text[-2000:]}"
    return time.perf_counter() - began
