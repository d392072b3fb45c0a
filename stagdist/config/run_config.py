"""The configuration of a run: all parts together, and the checks between them."""

from typing import Any

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from stagdist.config import cross_checks
from stagdist.config.base import ConfigPart, PathText, report_problems
from stagdist.config.parts import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SchedulerConfig,
    TrainingConfig,
)

OWNED_DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "scheduler.*",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "data_types": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "zero_allow_untested_optimizer": "optimizer.*",
    "pipeline": "parallel.*",
    "steps_per_print": "logging.interval_steps",
    "wall_clock_breakdown": "logging.*",
    "timers": "logging.*",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "checkpoint": "checkpoint.*",
    "seed": "training.seed",
}
"""Keys of DeepSpeed that stagdist derives, with the stagdist key to use instead."""


class RunConfig(ConfigPart):
    """The configuration of one run."""

    name: PathText = Field(..., min_length=1, description="Name of the run; its folder is runs_directory/name.")
    runs_directory: PathText = Field("runs", description="Folder of all runs.")
    model: ModelConfig = Field(..., description="Shape of the model.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="Layout of the ranks.")
    data: DataConfig = Field(DataConfig(), description="Corpora and tokenizer.")
    training: TrainingConfig = Field(..., description="Length, batch, precision, safety.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW and clipping.")
    scheduler: SchedulerConfig = Field(SchedulerConfig(), description="Learning rate over the steps.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Evaluation during training.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="Saving and resuming.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Progress, metrics, TensorBoard, wandb.")
    deepspeed: dict[str, JsonValue] = Field(
        {},
        description="Further keys of DeepSpeed's JSON, passed on unchanged; a key that stagdist derives is refused.",
    )

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence, resolved."""
        return self.data.sequence_length or self.model.max_position_embeddings

    @property
    def pipeline_parallel_size(self) -> int:
        """Pipeline stages, resolved."""
        return self.parallel.pipeline_parallel_size or self.model.num_sections

    @property
    def num_samples(self) -> int:
        """Training sequences the order of samples is made for, resolved."""
        return self.data.num_samples or self.training.steps * self.training.global_batch_size

    @property
    def folder(self) -> str:
        """Folder of this run."""
        return f"{self.runs_directory}/{self.name}"

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if "/" in name or name in (".", ".."):
            raise ValueError(f"is {name!r}, a path; give the name of the run's folder inside runs_directory")
        return name

    @field_validator("deepspeed")
    @classmethod
    def _not_owned(cls, keys: dict[str, Any]) -> dict[str, Any]:
        owned = [f"deepspeed.{key} (use {OWNED_DEEPSPEED_KEYS[key]})" for key in keys if key in OWNED_DEEPSPEED_KEYS]
        if owned:
            raise ValueError("stagdist sets these DeepSpeed keys itself: " + ", ".join(owned))
        return keys

    @model_validator(mode="after")
    def _consistent(self, found: ValidationInfo) -> "RunConfig":
        report_problems(
            cross_checks.layout_problems(self.model, self.pipeline_parallel_size, self.parallel.tensor_parallel_size)
            + cross_checks.training_problems(self.model, self.parallel, self.training, self.sequence_length)
            + cross_checks.zero_problems(self.deepspeed)
            + cross_checks.scheduler_problems(self.scheduler, self.training.steps),
            found,
        )
        return self

    def world_problems(self, world_size: int) -> list[str]:
        """Why a valid configuration cannot run on `world_size` ranks."""
        training, pipe, tensor = self.training, self.pipeline_parallel_size, self.parallel.tensor_parallel_size
        ranks = pipe * tensor
        if world_size < 1:
            return [f"world size {world_size} is not a number of ranks; start {ranks} or a multiple of it"]
        if world_size % ranks:
            return [
                f"world size {world_size} is not a multiple of pipeline {pipe} x tensor {tensor} = {ranks}; "
                f"start {ranks} or a multiple of it"
            ]
        data = world_size // ranks
        per_round = data * training.micro_batch_size
        if training.global_batch_size % per_round:
            return [
                f"training.global_batch_size {training.global_batch_size} is not a multiple of data-parallel size "
                f"{data} x training.micro_batch_size {training.micro_batch_size} = {per_round}"
            ]
        return []
