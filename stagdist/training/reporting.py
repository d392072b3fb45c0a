"""What rank 0 tells people and files about a run; other ranks keep silent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from stagdist.config.loading import dump_config
from stagdist.config.run_config import RunConfig
from stagdist.parallel.device import on_cuda
from stagdist.parallel.grid import Grid
from stagdist.planning.flops import flops_per_token
from stagdist.telemetry.hardware import memory_bytes, peak_flops
from stagdist.telemetry.meters import ThroughputMeter
from stagdist.telemetry.metrics import MetricsWriter
from stagdist.telemetry.progress import Progress, StepReport
from stagdist.telemetry.score import TextScore


@dataclass(frozen=True)
class StepRecord:
    """What one training step gave.

    Attributes:
        step: steps done.
        loss: nats per token.
        learning_rate: of this update.
        grad_norm: global norm before clipping; None when the update was skipped.
        bubble: share of the pipelined phase without compute.
        data_wait_s: seconds rank 0 waited for micro-batches.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    bubble: float
    data_wait_s: float


class Reporter:
    """Progress bar, `metrics.jsonl`, TensorBoard, wandb and throughput of one run."""

    def __init__(self, config: RunConfig, grid: Grid, *, rank: int, device: str, resumed_step: int | None):
        self._active = rank == 0
        self.heldout: dict[str, TextScore] = {}
        training = config.training
        name = torch.cuda.get_device_name(device) if on_cuda(device) else None
        self.meter = ThroughputMeter(
            flops_per_token=flops_per_token(config.model, config.sequence_length),
            tokens_per_step=training.global_batch_size * config.sequence_length,
            num_devices=grid.world_size,
            peak_flops=peak_flops(name, training.precision),
            total_steps=training.steps,
        )
        self._progress = Progress(
            training.steps, first_step=resumed_step or 0, enabled=self._active and config.logging.progress_bar
        )
        self._metrics: MetricsWriter | None = None
        if self._active:
            folder = Path(config.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(dump_config(config))
            self._metrics = MetricsWriter(
                folder,
                resumed_step=resumed_step,
                tensorboard=config.logging.tensorboard,
                wandb=config.logging.wandb,
                name=config.name,
                config=config.model_dump(mode="json"),
            )

    def start(self, step: int) -> None:
        """Start the clock after `step` steps."""
        self.meter.start(step)

    def step_done(self, step: int) -> None:
        """Count a step for the throughput."""
        self.meter.record(step)

    def step(self, record: StepRecord) -> None:
        """Write one training step."""
        if self._metrics is None:
            return
        throughput, memory = self.meter.reading(), memory_bytes()
        self._progress.show(
            StepReport(record.step, record.loss, record.learning_rate, record.grad_norm, throughput, memory)
        )
        values = {
            "loss": record.loss,
            "learning_rate": record.learning_rate,
            "grad_norm": record.grad_norm,
            "pipeline_bubble": record.bubble,
            "data_wait_s": record.data_wait_s,
            f"memory_{memory.kind}_bytes": memory.bytes,
        }
        self._metrics.write("train", record.step, values | throughput.as_metrics())

    def held_out(self, split: str, step: int, score: TextScore) -> None:
        """Write an evaluation."""
        self.heldout[split] = score
        if self._metrics is not None:
            self._metrics.write(split, step, score.as_metrics())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training."""
        with self.meter.paused():
            yield

    def flush(self) -> None:
        """Make all lines durable."""
        if self._metrics is not None:
            self._metrics.flush()

    def close(self) -> None:
        """End bar and writers; may be called twice."""
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
