"""One process of the benchmark of saving: some steps of training, with a save before them or without."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.training.site import RankSite, random_batches
from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.training.engine.agreement import Agreed, Agreement, StopSignals, Writing
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.save import Saver


class SaveSite(RankSite):
    """A rank of `benchmarks/save.py`: the engine, and a saver of either kind."""

    def __init__(self, config: RunConfig, settings: dict[str, Any]):
        super().__init__(config)
        self._config, self._steps, self._done = config, settings["steps"], 0
        self._batches = random_batches(config, self.device)
        self._engine = self.engine(config)
        waiting = config.checkpoint.model_copy(update={"asynchronous": False})
        kinds = {"synchronous": config.model_copy(update={"checkpoint": waiting}), "asynchronous": config}
        self._savers = {name: Saver(self._engine, self.groups, each) for name, each in kinds.items()}
        self._saver = self._savers["asynchronous"]
        signals, started = StopSignals(), time.monotonic()
        self._agreement = Agreement(self.groups.control, signals, config.training, config.checkpoint, started)
        self._agreed = Agreed((), 0, False, False)
        self._train()  # the first step makes the optimizer's moments

    def run(self, name: str, *, together: bool) -> dict[str, Any]:
        """Save (`synchronous`, `asynchronous`) or not (`plain`), then train the steps of a round; or `load`.

        Returns: seconds of all (`seconds`), of the save's calls (`save_s`, `finish_s`) and of the steps alone
        (`steps_s`), their number (`steps`); after how many steps the checkpoint was complete (`complete_after`, more
        than all if the files had to be waited for); bytes of the checkpoint per rank.
        """
        dist.barrier(group=self.groups.control)
        started = time.perf_counter()
        if name == "load":
            return {"seconds": self._load()}
        if name in self._savers:
            self._saver = self._savers[name]
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
        return {
            "seconds": time.perf_counter() - started,
            "save_s": save_s,
            "finish_s": finish_s,
            "steps_s": steps_s,
            "steps": self._steps,
            "complete_after": complete_after + 1 if name == "asynchronous" else complete_after,
            "bytes": self._bytes(),
        }

    def _load(self) -> float:
        """Seconds to check the newest checkpoint and to fill the engine from it."""
        started = time.perf_counter()
        checkpoint = newest_complete(Path(self._config.folder) / "checkpoints", self.groups)
        assert checkpoint is not None
        load_checkpoint(self._engine, self.groups, self._config.model, checkpoint)
        self.synchronize()
        return time.perf_counter() - started

    def _train(self) -> float:
        started = time.perf_counter()
        float(self._engine.train_batch(self._batches, self._gate))
        self.synchronize()  # the loss is known before the update is done
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
        grid, samples = self.groups.grid, self._done * self._config.training.global_batch_size
        return TrainingState(self._done, samples, self._config.num_samples, (grid.pipe, grid.data, grid.tensor))

    def _bytes(self) -> int:
        """Bytes of the newest checkpoint, divided by the number of ranks."""
        folders = sorted(Path(self._config.folder).glob("checkpoints/step_*"))
        size = sum(path.stat().st_size for path in folders[-1].iterdir()) if folders else 0
        return size // dist.get_world_size()
