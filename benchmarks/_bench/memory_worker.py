"""A process of the memory benchmark: builds the engine, trains a few steps, answers with peaks and parameters.

Started by `benchmarks._bench.workers`, with the settings' file as its only argument; it answers every line of standard
input with one line of JSON through the descriptor STAGDIST_REPLY_FD.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._bench.peaks import peak_bytes
from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import grid_for
from stagdist.parallel.groups import Groups
from stagdist.parallel.world import choose_device
from stagdist.training.engine.distributed import start_distributed, stop_distributed
from stagdist.training.engine.section_engine import SectionEngine, build_engine


def measure(config: RunConfig, groups: Groups, device: str, steps: int) -> dict[str, Any]:
    """Peak bytes of building the engine and of each step, and the values of the parameters that the engine holds."""
    engines: list[SectionEngine] = []
    batches = random_batches(config, device)
    phases: dict[str, Callable[[], object]] = {"start": lambda: engines.append(build_engine(config, groups))}
    phases |= {f"step {step}": lambda: engines[0].train_batch(batches) for step in range(1, steps + 1)}
    peaks = peak_bytes(phases, device)
    return {"peak_bytes": peaks, "parameters": sum(parameter.numel() for parameter in engines[0].module.parameters())}


def random_batches(config: RunConfig, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens on a device, without end; neither memory nor time depends on what they say."""
    generator = torch.Generator(device).manual_seed(config.training.seed)
    shape = (config.training.micro_batch_size, config.sequence_length + 1)
    while True:
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator, device=device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def main() -> None:
    """Answer once at the start and once per line of standard input."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = RunConfig.model_validate(settings["config"])
    device = choose_device(config.parallel.device, int(os.environ["LOCAL_RANK"]), option="parallel.device")
    os.environ["DS_ACCELERATOR"] = device.partition(":")[0]
    with os.fdopen(int(os.environ["STAGDIST_REPLY_FD"]), "w") as replies:
        groups = start_distributed(grid_for(config, int(os.environ["WORLD_SIZE"])), device, config.parallel.timeout_s)
        print(json.dumps("ready"), file=replies, flush=True)
        for _ in sys.stdin:
            print(json.dumps(measure(config, groups, device, settings["steps"])), file=replies, flush=True)
        stop_distributed()


if __name__ == "__main__":
    main()
