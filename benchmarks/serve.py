#!/usr/bin/env python3
"""Measure a server of two ranks under load: `python benchmarks/serve.py`. `make clients` installs locust for it.

- tokens/s of 1, 4 and 16 clients, against `launch/generate.py` with as many slots and requests of the same sizes, in
  alternating runs; the ratio is the median of the --rounds. The CPU time per token of the HTTP process and of locust is
  reported beside it: on a machine where the ranks use all cores it is taken from them;
- time between tokens of two clients while a third sends prompts of --prompt-tokens, and without it;
- time to the first token of the second turn of a conversation, against that of the first.

By default the model has the shape of configs/bench-decode.yaml and random weights. Times of one machine with other work
on it vary; compare figures of one run.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common.command import add_options, main
from benchmarks.common.conditions import ROOT, conditions
from benchmarks.common.results import check_outputs, write_results
from benchmarks.common.workers import free_port
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.text_tokens import tokens_of_tokenizer
from stagdist.config.loading import load_config
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import ConfigError, TrainingError
from stagdist.model.initialization import initial_value
from stagdist.parallel.layout import model_parameters

CLIENTS = ROOT / ".venv-clients" / "bin" / "locust"
START_S = 300
ANSWER_TOKENS = 64
LINE = "{:<44} {:>10} {:>10} {:>8}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_options(parser, "json")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory (default: random weights)")
    parser.add_argument("--seconds", type=int, default=20, metavar="S", help="of each measurement (default 20)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="(default 1 4 16)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each ratio (default 3)")
    length = "of long prompts (default 1024)"
    parser.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help=length)
    parser.add_argument("--options", default="", metavar="TEXT", help="more options of launch/serve.py")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    check_outputs(arguments)
    if min(*arguments.clients, arguments.rounds, arguments.seconds, arguments.prompt_tokens) < 1:
        raise ConfigError("--clients, --rounds, --seconds and --prompt-tokens must be at least 1")
    if not CLIENTS.exists():
        raise ConfigError(f"{CLIENTS} is missing; `make clients` installs it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model or random_model(folder / "model")
        results = measure(model, folder, arguments)
    report(results)
    if arguments.json:
        write_results(arguments.json, {**conditions(None, 0), **results})
    return 0


def random_model(folder: Path) -> Path:
    """The model of configs/bench-decode.yaml, initialized."""
    model, tokenizer = load_config(ROOT / "configs" / "bench-decode.yaml").model, byte_tokenizer()
    with ModelDirectoryWriter(folder, model, torch.float32, 0, tokens_of_tokenizer(tokenizer)) as writer:
        for spec in model_parameters(model):
            writer.add(spec.name, initial_value(spec, 0))
        tokenizer.save(writer.folder)
    return folder


def measure(model: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    vocabulary = ModelReader(model).model.vocab_size
    load = Load(folder, vocabulary, arguments.prompt_tokens, arguments.seconds)
    results: dict[str, Any] = {"seconds": arguments.seconds, "prompt_tokens": arguments.prompt_tokens}
    results["tokens_per_s"] = {
        clients: [compare(model, folder, load, clients, arguments.options) for _ in range(arguments.rounds)]
        for clients in arguments.clients
    }
    with serving(model, folder, ["--batch-size", "4", *arguments.options.split()]) as url:
        results["alone"] = load.run(url, DECODERS=2)
        results["with_prompts"] = load.run(url, DECODERS=2, PROMPTERS=1)
        results["turns"] = load.run(url, TALKERS=1)
    return results


def compare(model: Path, folder: Path, load: "Load", clients: int, options: str) -> dict[str, Any]:
    """One round: tokens/s over HTTP, then those of the engine for about as many tokens."""
    with serving(model, folder, ["--batch-size", str(clients), *options.split()]) as url:
        requests = load.run(url, DECODERS=clients)
    over_http = requests["tokens_per_s"]
    engine = engine_alone(model, folder, clients, load.vocabulary, over_http * load.seconds)
    return {"over_http": over_http, "engine": engine, "ratio": over_http / engine, "requests": requests}


class Load:
    """Runs of locust against a server."""

    def __init__(self, folder: Path, vocabulary: int, prompt_tokens: int, seconds: int) -> None:
        self._result = folder / "load.json"
        self.vocabulary, self.seconds = vocabulary, seconds
        sizes: dict[str, object] = {
            "VOCABULARY": vocabulary,
            "PROMPT_TOKENS": prompt_tokens,
            "ANSWER_TOKENS": ANSWER_TOKENS,
        }
        sizes |= {"SECONDS": seconds, "RESULT": self._result}
        self._sizes = {name: str(value) for name, value in sizes.items()}

    def run(self, url: str, **users: int) -> dict[str, Any]:
        """What `benchmarks/serving/load.py` writes.

        Raises:
            TrainingError: a request failed.
        """
        count = str(sum(users.values()))
        words = [str(CLIENTS), "-f", str(ROOT / "benchmarks" / "serving" / "load.py"), "--headless", "--only-summary"]
        words += ["--host", url, "-u", count, "-r", count, "-t", f"{self.seconds + START_S}s", "--stop-timeout", "60"]
        variables = {**os.environ, **self._sizes, **{name: str(number) for name, number in users.items()}}
        before = http_cpu_s(url)
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        result: dict[str, Any] = json.loads(self._result.read_text()) if self._result.exists() else {}
        self._result.unlink(missing_ok=True)
        if not result or result["failures"]:
            raise TrainingError(f"the load failed: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        if not result["tokens_per_s"]:
            raise ConfigError(f"{self.seconds} s are too short: no token came after the warm-up; give more --seconds")
        seconds = {"http_process": http_cpu_s(url) - before, "locust": result.pop("cpu_s")}
        tokens = result.pop("tokens")
        return result | {"cpu_ms_per_token": {name: 1000 * used / tokens for name, used in seconds.items()}}


def http_cpu_s(url: str) -> float:
    """CPU time of the HTTP process so far, in seconds."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        found = re.search(rb"^process_cpu_seconds_total (\S+)", answer.read(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@contextlib.contextmanager
def serving(model: Path, folder: Path, options: Sequence[str]) -> Iterator[str]:
    """A server of two ranks; its address."""
    port, log = free_port(), folder / "server.log"
    words = ["--model", str(model), "--port", str(port), "--device", "cpu", "--no-access-log", *options]
    with log.open("wb") as output:
        server = subprocess.Popen(
            launcher("serve.py", words), stdout=output, stderr=output, cwd=folder, env=environment()
        )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def launcher(script: str, words: Sequence[str]) -> list[str]:
    """A command that starts a script on two ranks."""
    front = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [*front, str(ROOT / "launch" / script), *words]


def environment() -> dict[str, str]:
    """One thread for each process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when /health answers 200.

    Raises:
        TrainingError: the server did not start.
    """
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TrainingError(f"the server did not start: {log.read_text()[-2000:]}")


def engine_alone(model: Path, folder: Path, slots: int, vocabulary: int, tokens: float) -> float:
    """Tokens/s without HTTP of requests like those of `load.py`, as many for each slot as `tokens` take."""
    count = slots * max(1, round(tokens / slots / ANSWER_TOKENS))
    rows = [{"prompt_ids": [1 + (7 * row + place) % (vocabulary - 1) for place in range(32)]} for row in range(count)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(model), "--prompts-file", str(prompts), "--batch-size", str(slots), "--ignore-eos"]
    words += ["--max-new-tokens", str(ANSWER_TOKENS), "--device", "cpu", "--json"]
    done = subprocess.run(
        launcher("generate.py", words), capture_output=True, text=True, cwd=folder, env=environment(), check=False
    )
    if (found := re.search(r"overall ([\d.]+) tokens/s", done.stderr)) is None:
        raise TrainingError(f"generate.py failed: {done.stderr[-2000:]}")
    return float(found[1])


def report(results: dict[str, Any]) -> None:
    """Print a table."""
    print(LINE.format("", "over HTTP", "engine", "ratio"))
    for clients, rounds in results["tokens_per_s"].items():
        row = [statistics.median(each[name] for each in rounds) for name in ("over_http", "engine", "ratio")]
        print(LINE.format(f"tokens/s, {clients} clients", f"{row[0]:.1f}", f"{row[1]:.1f}", f"{row[2]:.2f}"))
        used = [each["requests"]["cpu_ms_per_token"] for each in rounds]
        http, locust = (statistics.median(each[name] for each in used) for name in ("http_process", "locust"))
        print(f"    CPU ms per token: HTTP process {http:.2f}, locust {locust:.2f}")
    print(LINE.format("", "alone", "beside", "ratio"))
    for share in ("p50", "p99"):
        alone, beside = (1000 * results[name]["gap_s"][share] for name in ("alone", "with_prompts"))
        title = f"ms between tokens, {share}, beside long prompts"
        print(LINE.format(title, f"{alone:.1f}", f"{beside:.1f}", f"{beside / alone:.2f}"))
    first, second = (1000 * results["turns"]["first_token_s"][turn] for turn in ("first_turn", "second_turn"))
    print(LINE.format("", "1st turn", "2nd turn", "ratio"))
    print(LINE.format("ms to the first token", f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}"))


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
