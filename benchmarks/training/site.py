"""One process of a training benchmark: its groups, its data, and the contestants that it can run."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.decoding.shapes import sequential_twin
from benchmarks.training.stage import StageClock, StageModule
from benchmarks.training.torch_pipelining import TorchPipelining
from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.data.compatibility import training_identity
from stagdist.data.corpus import build_splits
from stagdist.data.loader import BatchPlan, Loader, on_device
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.model.megatron import TensorParallel
from stagdist.parallel.device import on_cuda, synchronize
from stagdist.parallel.grid import grid_for
from stagdist.parallel.world import choose_device
from stagdist.training.engine.distributed import start_distributed, stop_distributed
from stagdist.training.engine.pipeline import expected_hand_off
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.resumed_config import resumed_config
from stagdist.training.saving.save import save_checkpoint

Reading = dict[str, float]


class RankSite:
    """Device, grid and process groups of this rank, and the engines made on it."""

    def __init__(self, config: RunConfig):
        self.device = choose_device(config.parallel.device, int(os.environ["LOCAL_RANK"]), option="parallel.device")
        os.environ["DS_ACCELERATOR"] = self.device.partition(":")[0]
        self.synchronize = partial(synchronize, self.device)
        self.groups = start_distributed(
            grid_for(config, int(os.environ["WORLD_SIZE"])), self.device, config.parallel.timeout_s,
            deterministic=config.training.deterministic,
        )  # fmt: skip
        self.started: Any = "ready"
        self._engines: list[SectionEngine] = []

    def engine(self, config: RunConfig) -> SectionEngine:
        """A new engine, closed at the end."""
        self._engines.append(build_engine(config, self.groups))
        return self._engines[-1]

    def close(self) -> None:
        """Close the hand-offs of all engines and leave the world."""
        for engine in self._engines:
            engine.exchange.close()
        stop_distributed()


def random_batches(config: RunConfig, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens on a device, without end; neither memory nor time depends on their values."""
    generator = torch.Generator(device).manual_seed(config.training.seed)
    shape = (config.training.micro_batch_size, config.sequence_length + 1)
    while True:
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator, device=device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class TrainSite(RankSite):
    """A rank of `benchmarks/train.py`. What is expensive is built on first use.

    Args:
        config: the run; its corpus exists. The pipeline spans all processes.
    """

    def __init__(self, config: RunConfig, settings: dict[str, Any]):
        started = time.perf_counter()
        parallel = config.parallel.model_copy(update={"pipeline_parallel_size": int(os.environ["WORLD_SIZE"])})
        config = config.model_copy(update={"parallel": parallel})
        super().__init__(config)
        tokenizer = load_tokenizer(config.data.tokenizer)
        self._identity = training_identity(config.data, tokenizer)
        checkpoint = newest_complete(Path(config.folder) / "checkpoints", self.groups)
        if checkpoint is not None:
            config = resumed_config(config, checkpoint, self._identity, tokenizer.fingerprint)
        self._config, self._data = config, build_splits(
            config.data, sequence_length=config.sequence_length, num_samples=(config.num_samples, 0, 0),
            tokenizer=tokenizer, vocab_size=config.model.vocab_size,
        ).train  # fmt: skip
        if checkpoint is not None:
            load_checkpoint(self.engine(config), self.groups, config.model, checkpoint)
        batch, length = config.training.micro_batch_size, config.sequence_length
        self._carried = tuple(expected_hand_off(config.model, batch, length, torch.float32).memory.shape)
        self._contestants: dict[str, Callable[[], Reading]] = {}
        self.started = {
            "started_s": time.perf_counter() - started,
            "resumed": checkpoint is not None,
            "device_name": torch.cuda.get_device_name() if on_cuda(self.device) else None,
        }

    def run(self, name: str, *, together: bool) -> Reading:
        """Run one contestant once: `staggered`, `sequential`, `rival`, `stage_time` or `save`."""
        if name not in self._contestants:
            self._contestants[name] = getattr(self, f"_build_{name}")()
        if together:
            dist.barrier(group=self.groups.control)
        return self._contestants[name]()

    def _loader(self) -> Loader:
        training, place = self._config.training, self.groups.place
        plan = BatchPlan(training.global_batch_size, training.micro_batch_size, place.data, self.groups.grid.data)
        return Loader(self._data, plan, pin_memory=on_cuda(self.device), vocab_size=self._config.model.vocab_size)

    def _build_staggered(self) -> Callable[[], Reading]:
        return self._trainer(self._config)

    def _build_sequential(self) -> Callable[[], Reading]:
        return self._trainer(self._config.model_copy(update={"model": sequential_twin(self._config.model)}))

    def _trainer(self, config: RunConfig) -> Callable[[], Reading]:
        """Our engine over our loader, one optimizer step per call."""
        engine, loader, done = self.engine(config), self._loader(), [0]

        def step() -> Reading:
            self.synchronize()
            waited, started = loader.wait_s, time.perf_counter()
            samples = done[0] * config.training.global_batch_size
            loss = float(engine.train_batch(engine.micro_batches_of_step(loader, samples)))
            self.synchronize()
            elapsed = time.perf_counter() - started
            done[0] += 1
            times = {name: getattr(engine.times, name) for name in ("compute_s", "pipeline_s", "load_s", "update_s")}
            readings = {"seconds": elapsed, "loss": loss, "gradient_norm": engine.gradient_norm()}
            return readings | {"data_wait_s": loader.wait_s - waited} | times

        if config is self._config:
            self._trained = engine, done
        return step

    def _build_rival(self) -> Callable[[], Reading]:
        """torch.distributed.pipelining over a loader of the same kind, one optimizer step per call."""
        config, loader, done = self._config, self._loader(), [0]
        num = config.training.num_micro_batches(self.groups.grid.data)
        rival = TorchPipelining(config, self._stage(), self._carried, num)

        def step() -> Reading:
            self.synchronize()
            started = time.perf_counter()
            samples = done[0] * config.training.global_batch_size
            loss = rival.step(list(on_device(loader.step(samples), torch.device(self.device))))
            self.synchronize()
            done[0] += 1
            return {"seconds": time.perf_counter() - started, "loss": loss, "gradient_norm": rival.gradient_norm}

        return step

    def _build_stage_time(self) -> Callable[[], Reading]:
        tokens, labels = (tensor.to(self.device) for tensor in next(self._loader().step(0)))
        clock = StageClock(self._stage(), (tokens, labels), self._carried, self.synchronize)
        repeats = self._config.training.num_micro_batches(self.groups.grid.data)
        return lambda: {"seconds": clock.read(repeats)}

    def _build_save(self) -> Callable[[], Reading]:
        engine, done = self._trained
        grid, samples = self.groups.grid, done[0] * self._config.training.global_batch_size
        state = TrainingState(
            done[0], samples, self._config.num_samples, (grid.pipe, grid.data, grid.tensor),
            data_identity=self._identity,
        )  # fmt: skip

        def save() -> Reading:
            started = time.perf_counter()
            save_checkpoint(engine, self.groups, self._config, state)
            return {"seconds": time.perf_counter() - started}

        return save

    def _stage(self) -> StageModule:
        place = self.groups.place.pipe
        stage = StageModule(self._config, self.groups.grid.pipe, place, TensorParallel(self.groups.tensor))
        return stage.to(self.device)
