"""What a benchmark process can be told to run once, each answering with a flat dictionary of readings."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks._bench.rival import TorchPipelining
from benchmarks._bench.stage import StageClock, StageModule
from benchmarks._bench.twin import sequential_twin
from stagdist.checkpoint.training.directory import TrainingState
from stagdist.config.run_config import RunConfig
from stagdist.data.compatibility import training_identity
from stagdist.data.corpus import build_splits
from stagdist.data.loader import BatchPlan, Loader, on_device
from stagdist.data.tokenizer import load_tokenizer
from stagdist.model.megatron import TensorParallel
from stagdist.parallel.device import choose_device, on_cuda, synchronize
from stagdist.parallel.grid import grid_for
from stagdist.parallel.groups import Groups
from stagdist.telemetry.pulse import Pulse
from stagdist.training.engine.distributed import start_distributed
from stagdist.training.engine.pipeline import expected_hand_off
from stagdist.training.engine.section_engine import build_engine
from stagdist.training.saving.other_grid import on_this_grid
from stagdist.training.saving.resume import load_checkpoint, newest_complete
from stagdist.training.saving.resumed_config import resumed_config
from stagdist.training.saving.save import save_checkpoint

Reading = dict[str, float]


class Site:
    """One process of a benchmark: its groups, its data, and the contestants it can run.

    Everything expensive is built on first use, so a process holds only what it is asked for.

    Args:
        config: the run; its corpus exists.
        world_size: processes that start together; the pipeline stretches over all of them.
    """

    def __init__(self, config: RunConfig, world_size: int):
        started = time.perf_counter()
        parallel = config.parallel.model_copy(update={"pipeline_parallel_size": world_size})
        self._config = config.model_copy(update={"parallel": parallel})
        self._grid = grid_for(self._config, world_size)
        self._device = choose_device(config.parallel.device, int(os.environ["LOCAL_RANK"]), option="parallel.device")
        os.environ["DS_ACCELERATOR"] = self._device.partition(":")[0]
        self._synchronize = partial(synchronize, self._device)
        self.groups = start_distributed(
            self._grid, self._device, config.parallel.timeout_s, deterministic=config.training.deterministic
        )
        self.device_name = torch.cuda.get_device_name() if on_cuda(self._device) else None
        tokenizer = load_tokenizer(config.data.tokenizer)
        self._identity = training_identity(config.data, tokenizer)
        checkpoint = newest_complete(Path(config.folder) / "checkpoints", self.groups)
        if checkpoint is not None:
            self._config = resumed_config(self._config, checkpoint, self._identity, tokenizer.fingerprint)
        self._data = build_splits(
            config.data,
            sequence_length=config.sequence_length,
            num_samples=(config.num_samples, 0, 0),
            tokenizer=tokenizer,
            vocab_size=config.model.vocab_size,
        ).train
        self._contestants: dict[str, Callable[[], Reading]] = {}
        self.resumed = checkpoint is not None
        if checkpoint is not None:
            with on_this_grid(checkpoint, self._config, self.groups, Pulse()) as fitting:
                load_checkpoint(build_engine(self._config, self.groups), fitting, self._config.optimizer)
        self._carried = _carried(self._config)
        self.started_s = time.perf_counter() - started

    def run(self, name: str, *, together: bool) -> Reading:
        """Run one contestant once: `staggered`, `sequential`, `rival`, `stage_time` or `save`.

        Args:
            together: all ranks run it, and begin at the same time.
        """
        if name not in self._contestants:
            builders = {
                "staggered": self._build_staggered,
                "sequential": self._build_sequential,
                "rival": self._build_rival,
                "stage_time": self._build_stage_time,
                "save": self._build_save,
            }
            self._contestants[name] = builders[name]()
        if together:
            dist.barrier(group=self.groups.control)
        return self._contestants[name]()

    def close(self) -> None:
        """Close the hand-offs of all engines."""
        for contestant in self._contestants.values():
            if isinstance(contestant, EngineContestant):
                contestant.engine.exchange.close()

    def _loader(self) -> Loader:
        training, place = self._config.training, self.groups.place
        plan = BatchPlan(training.global_batch_size, training.micro_batch_size, place.data, self._grid.data)
        return Loader(self._data, plan, pin_memory=on_cuda(self._device), vocab_size=self._config.model.vocab_size)

    def _build_staggered(self) -> Callable[[], Reading]:
        return EngineContestant(self._config, self.groups, self._loader(), self._synchronize)

    def _build_sequential(self) -> Callable[[], Reading]:
        config = self._config.model_copy(update={"model": sequential_twin(self._config.model)})
        return EngineContestant(config, self.groups, self._loader(), self._synchronize)

    def _build_rival(self) -> Callable[[], Reading]:
        return RivalContestant(self._config, self.groups, self._stage(), self._loader(), self._synchronize)

    def _build_stage_time(self) -> Callable[[], Reading]:
        micro_batch = next(self._loader().step(0))
        tokens, labels = (tensor.to(self._device) for tensor in micro_batch)
        clock = StageClock(self._stage(), (tokens, labels), self._carried, self._synchronize)
        repeats = self._config.training.num_micro_batches(self._grid.data)
        return lambda: {"seconds": clock.read(repeats)}

    def _build_save(self) -> Callable[[], Reading]:
        engine = self._contestants["staggered"]
        assert isinstance(engine, EngineContestant), "train at least one step before saving"

        def save() -> Reading:
            started = time.perf_counter()
            grid = (self._grid.pipe, self._grid.data, self._grid.tensor)
            state = TrainingState(
                engine.steps,
                engine.consumed_samples,
                self._config.num_samples,
                grid,
                data_identity=self._identity,
            )
            save_checkpoint(engine.engine, self.groups, self._config, state)
            return {"seconds": time.perf_counter() - started}

        return save

    def _stage(self) -> StageModule:
        stage = StageModule(self._config, self._grid.pipe, self.groups.place.pipe, TensorParallel(self.groups.tensor))
        return stage.to(self._device)


class EngineContestant:
    """Our engine over our loader, one optimizer step per call."""

    def __init__(self, config: RunConfig, groups: Groups, loader: Loader, synchronize: Callable[[], None]):
        self.engine = build_engine(config, groups)
        self.steps = self.consumed_samples = 0
        self._loader, self._synchronize, self._batch = loader, synchronize, config.training.global_batch_size

    def __call__(self) -> Reading:
        """One step."""
        self._synchronize()
        waited, started = self._loader.wait_s, time.perf_counter()
        loss = float(self.engine.train_batch(self.engine.micro_batches_of_step(self._loader, self.consumed_samples)))
        self._synchronize()
        elapsed = time.perf_counter() - started
        self.steps += 1
        self.consumed_samples += self._batch
        times = self.engine.times
        return {
            "seconds": elapsed,
            "loss": loss,
            "gradient_norm": self.engine.gradient_norm(),
            "data_wait_s": self._loader.wait_s - waited,
            "compute_s": times.compute_s,
            "pipeline_s": times.pipeline_s,
            "load_s": times.load_s,
            "update_s": times.update_s,
        }


class RivalContestant:
    """torch.distributed.pipelining over a loader of the same kind, one optimizer step per call."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        stage: StageModule,
        loader: Loader,
        synchronize: Callable[[], None],
    ):
        num = config.training.num_micro_batches(groups.grid.data)
        self._rival = TorchPipelining(config, stage, _carried(config), num)
        self._device = stage.embedding.embedding.weight.device
        self._loader, self._synchronize, self._batch = loader, synchronize, config.training.global_batch_size
        self._consumed_samples = 0

    def __call__(self) -> Reading:
        """One step."""
        self._synchronize()
        started = time.perf_counter()
        loss = self._rival.step(list(on_device(self._loader.step(self._consumed_samples), self._device)))
        self._synchronize()
        elapsed = time.perf_counter() - started
        self._consumed_samples += self._batch
        return {"seconds": elapsed, "loss": loss, "gradient_norm": self._rival.gradient_norm}


def _carried(config: RunConfig) -> tuple[int, ...]:
    """Shape of the float tensor that a stage hands to the next."""
    batch = config.training.micro_batch_size
    return tuple(expected_hand_off(config.model, batch, config.sequence_length, torch.float32).memory.shape)
