"""What rank 0 shows and writes about a run. On other ranks the same calls do nothing."""

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
from stagdist.telemetry.progress import Progress
from stagdist.telemetry.score import TextScore


class Reporter:
    """Progress bar, `metrics.jsonl`, TensorBoard, wandb and throughput of one run.

    Args:
        config: the run; written to `config.yaml`.
        resumed_step: step of the checkpoint that the run continues from; None in a new run.
    """

    def __init__(self, config: RunConfig, grid: Grid, *, rank: int, device: str, resumed_step: int | None):
        self._active = rank == 0
        self.heldout: dict[str, TextScore] = {}
        self._interval, training = config.logging.interval_steps, config.training
        self._last_step = training.steps
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
            keys = config.model_dump(mode="json")
            self._metrics = MetricsWriter(
                folder, config.logging, resumed_step=resumed_step, name=config.name, config=keys
            )

    def due(self, step: int) -> bool:
        """Whether `logging.interval_steps` asks for a report after `step`; the last step is always reported."""
        return step == self._last_step or step % self._interval == 0

    def step(self, step: int, values: dict[str, float | None]) -> None:
        """Show and write the metrics of one training step, with throughput and memory."""
        if self._metrics is None:
            return
        kind, size = memory_bytes()
        values = {**values, f"memory_{kind}_bytes": size, **self.meter.reading()}
        self._progress.show(step, values)
        self._metrics.write("train", step, values)

    def held_out(self, split: str, step: int, score: TextScore) -> None:
        """Write an evaluation."""
        self.heldout[split] = score
        if self._metrics is not None:
            self._metrics.write(split, step, score.as_metrics())

    def flush(self) -> None:
        """Write all lines to the disk."""
        if self._metrics is not None:
            self._metrics.flush()

    def close(self) -> None:
        """Close the progress bar and the writers."""
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
