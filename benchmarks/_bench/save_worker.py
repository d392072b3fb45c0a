"""A process of the benchmark of saving: some steps of training, with a save before them or without.

Started by `benchmarks._bench.workers`, with the settings' file as its only argument; it answers every line of standard
input (how and what, see `Site.run`) with one line of JSON through the descriptor STAGDIST_REPLY_FD.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._bench.memory_worker import random_batches
from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.parallel.device import choose_device, synchronize
from stagdist.parallel.grid import grid_for
from stagdist.training.engine.agreement import Agreed, Agreement, StopSignals, Writing
from stagdist.training.engine.distributed import start_distributed, stop_distributed
from stagdist.training.engine.section_engine import build_engine
from stagdist.training.saving.save import Saver


class Site:
    """One rank: the engine, and a saver of either kind."""

    def __init__(self, config: RunConfig, world_size: int, steps: int):
        device = choose_device(config.parallel.device, int(os.environ["LOCAL_RANK"]), option="parallel.device")
        os.environ["DS_ACCELERATOR"] = device.partition(":")[0]
        self._config, self._device, self._steps, self._done = config, device, steps, 0
        self._groups = start_distributed(grid_for(config, world_size), device, config.parallel.timeout_s)
        self.engine = build_engine(config, self._groups)
        self._batches = random_batches(config, device)
        checkpoint = config.checkpoint.model_copy(update={"asynchronous": False})
        waiting = config.model_copy(update={"checkpoint": checkpoint})
        self._savers = {
            "synchronous": Saver(self.engine, self._groups, waiting),
            "asynchronous": Saver(self.engine, self._groups, config),
        }
        self._saver = self._savers["asynchronous"]
        self._agreement = Agreement(
            self._groups.control, StopSignals(), config.training, config.checkpoint, time.monotonic()
        )
        self._agreed = Agreed((), 0, False, False)
        self._train()  # the first step makes the optimizer's moments

    def run(self, contestant: str) -> dict[str, Any]:
        """Save (`synchronous`, `asynchronous`) or not (`plain`), then train the steps of a round.

        Returns: seconds of all (`seconds`), of the save's calls (`save_s`, `finish_s`) and of the steps alone
        (`steps_s`), their number (`steps`); after how many steps the checkpoint was complete (`complete_after`, more
        than all where its files had to be waited for); bytes of the checkpoint that this rank wrote.
        """
        dist.barrier(group=self._groups.control)
        started = time.perf_counter()
        if contestant in self._savers:
            self._saver = self._savers[contestant]
            self._saver.save(self._state())
        save_s = time.perf_counter() - started
        steps_s, finish_s, complete_after = 0.0, 0.0, 0
        for _ in range(self._steps):
            steps_s += self._train()
            if self._saver.under_way and self._agreed.writing is not Writing.RUNNING:
                finish_s += self._finish()
            complete_after += self._saver.under_way
        if self._saver.under_way:
            finish_s += self._finish()
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "save_s": save_s,
            "finish_s": finish_s,
            "steps_s": steps_s,
            "steps": self._steps,
            "complete_after": complete_after + 1 if contestant == "asynchronous" else complete_after,
            "bytes": self._bytes(),
        }

    def _train(self) -> float:
        started = time.perf_counter()
        float(self.engine.train_batch(self._batches, self._gate))
        synchronize(self._device)  # the loss is known before the update is done
        self._done += 1
        return time.perf_counter() - started

    def _finish(self) -> float:
        started = time.perf_counter()
        self._saver.finish()
        return time.perf_counter() - started

    def _gate(self, finite: bool) -> bool:
        self._agreed = self._agreement.agree(finite, self._saver.vote())
        return not self._agreed.bad_ranks

    def _state(self) -> TrainingState:
        grid = self._groups.grid
        samples = self._done * self._config.training.global_batch_size
        return TrainingState(self._done, samples, self._config.num_samples, (grid.pipe, grid.data, grid.tensor))

    def _bytes(self) -> int:
        """Bytes of the newest checkpoint, whoever wrote them, over the number of ranks."""
        folders = sorted(Path(self._config.folder).glob("checkpoints/step_*"))
        size = sum(path.stat().st_size for path in folders[-1].iterdir()) if folders else 0
        return size // dist.get_world_size()


def main() -> None:
    """Answer once at the start and once per line of standard input."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = RunConfig.model_validate(settings["config"])
    with os.fdopen(int(os.environ["STAGDIST_REPLY_FD"]), "w") as replies:
        site = Site(config, int(os.environ["WORLD_SIZE"]), settings["steps"])
        print(json.dumps("ready"), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(site.run(line.split()[1])), file=replies, flush=True)
        site.engine.exchange.close()
        stop_distributed()


if __name__ == "__main__":
    main()
