#!/usr/bin/env python3
"""A soak of a server of two ranks: hostile and normal clients for some minutes, `python -m tests.launch.serving_soak`.

Memory and open files of the three processes are read every few seconds. The result, as JSON, has them over the time and
what every kind of client saw. The exit code is 1 if a client saw what it must not, or something was left behind.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common.conditions import conditions
from benchmarks.common.results import write_results
from tests.launch.generating import write_model
from tests.launch.hostile_clients import SECRET, Client, Target, UnexpectedError
from tests.launch.hostile_requests import CLIENTS
from tests.launch.serving import Served, serve_by

KEY = "soak-key-4711"
CONTEXT = 2048
MODEL: dict[str, Any] = {"hidden_size": 32, "section_layers": [1, 1], "max_position_embeddings": CONTEXT}
SAMPLE_S = 10.0
IDLE_S = 30.0
"""Time for slots, queue and connections to become empty after the last client."""


class Soak:
    """Clients at a rate, and samples of the processes.

    Args:
        served: a ready server that asks for `KEY`.
        rate: clients per second that begin.
    """

    def __init__(self, served: Served, rate: float):
        self._served, self._rate = served, rate
        self._target = Target(served.port, KEY, CONTEXT)
        ranks = served.run.ranks()
        self.processes = {"http": served.http_process(), "rank 0": ranks[0], "rank 1": ranks[1]}
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.unexpected: list[str] = []
        self.samples: list[dict[str, Any]] = []
        self._begin = time.monotonic()
        self._running = 0

    async def run(self, seconds: float) -> None:
        """Start clients for so long, and wait for the last one."""
        sampler = asyncio.create_task(self._sample())
        names, weights = list(CLIENTS), list(CLIENTS.values())
        async with asyncio.TaskGroup() as clients:
            while time.monotonic() < self._begin + seconds:
                clients.create_task(self._client(random.choices(names, weights)[0]))
                await asyncio.sleep(random.expovariate(self._rate))
        sampler.cancel()

    async def _client(self, client: Client) -> None:
        name = client.__name__  # type: ignore[attr-defined]
        self._running += 1
        try:
            outcome = await client(self._target)
        except* UnexpectedError as errors:
            outcome = "unexpected"
            self.unexpected += [
                f"{time.monotonic() - self._begin:.0f} s, {name}: {error}"[:500] for error in errors.exceptions
            ]
        except* TimeoutError:
            outcome = "hung"
        except* OSError as errors:
            outcome = f"connection: {type(errors.exceptions[0]).__name__}"
        finally:
            self._running -= 1
        self.outcomes[name][outcome] += 1

    async def _sample(self) -> None:
        while True:
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> dict[str, Any]:
        """Memory, in MiB, and open files of all processes now."""
        sample: dict[str, Any] = {"seconds": round(time.monotonic() - self._begin), "clients": self._running}
        for name, process in self.processes.items():
            sample[name] = {"mib": round(process.memory_info().rss / 2**20, 1), "files": process.num_fds()}
        self.samples.append(sample)
        return sample

    def slots(self) -> dict[str, Any]:
        """What the engine says."""
        import httpx

        stats: dict[str, Any] = httpx.get(f"{self._served.url}/slots", timeout=30).json()["stats"]
        return stats

    def settled(self, files: dict[str, int]) -> bool:
        """Wait until no request is left, and no more files are open than before."""
        until = time.monotonic() + IDLE_S
        while time.monotonic() < until:
            stats = self.slots()
            busy = stats["running"] + stats["waiting"] + stats["waiting_tokens"]
            if not busy and all(process.num_fds() <= files[name] for name, process in self.processes.items()):
                return True
            time.sleep(0.05)
        return False


def soak(folder: Path, minutes: float, rate: float) -> dict[str, Any]:
    """Run it; returns the results."""
    keys = folder / "keys"
    keys.write_text(f"another\n{KEY}\n")
    model = write_model(folder / "model", **MODEL)
    options = ["--api-key-file", str(keys), "--chat-template", "plain"]
    served = serve_by("deepspeed", folder, model, *options, access_log=True).wait_ready()
    soaking = Soak(served, rate)
    files = {name: process.num_fds() for name, process in soaking.processes.items()}
    before = soaking.slots()
    asyncio.run(soaking.run(minutes * 60))
    settled = soaking.settled(files)
    soaking.sample()
    after = soaking.slots()
    served.run.ranks()[0].terminate()
    code, log = served.run.wait(), served.run.text()
    return {
        "minutes": minutes,
        "clients_per_second": rate,
        "model": MODEL,
        "server": ["deepspeed --num_accelerators 2 launch/serve.py", *options[2:]],
        "exit_code": code,
        "settled": settled,
        "secrets_in_log": sum(log.count(secret) for secret in (SECRET, KEY)),
        "tracebacks": log.count("Traceback"),
        "unexpected": soaking.unexpected,
        "clients": {name: dict(counts) for name, counts in sorted(soaking.outcomes.items())},
        "engine": {
            key: after[key] - before[key]
            for key in ("operations", "steps", "prompt_tokens_total", "generation_tokens_total", "prefix_hits_total")
        },
        "memory": {name: memory(soaking.samples, name) for name in soaking.processes},
        "samples": soaking.samples,
    }


def memory(samples: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Memory in MiB over the time, and its slope over the second half."""
    values = [sample[name]["mib"] for sample in samples]
    half = samples[len(samples) // 2 :]
    mean_s = sum(sample["seconds"] for sample in half) / len(half)
    spread = sum((sample["seconds"] - mean_s) ** 2 for sample in half) or 1.0
    slope = sum((sample["seconds"] - mean_s) * sample[name]["mib"] for sample in half) / spread
    quarter = values[len(values) // 4] if len(values) > 3 else values[0]
    return {
        "first": values[0],
        "after_a_quarter": quarter,
        "most": max(values),
        "last": values[-1],
        "mib_per_minute_in_the_second_half": round(slope * 60, 3),
    }


def main() -> int:
    """Parse the options, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=3, help="clients per second that begin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "conditions": conditions(None, 0),
            "seed": arguments.seed,
            **soak(Path(folder), arguments.minutes, arguments.rate),
        }
    write_results(arguments.json, results)
    hung = sum(counts.get("hung", 0) for counts in results["clients"].values())
    wrong = results["unexpected"] or results["secrets_in_log"] or results["tracebacks"] or hung
    print({key: results[key] for key in ("settled", "unexpected", "memory", "clients")})
    return 1 if wrong or not results["settled"] or results["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
