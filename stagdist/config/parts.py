"""The parts of a run's configuration: every key with its type, default and description.

Each part checks its own values; `cross_checks` holds the checks between parts. No framework is imported, so reading a
configuration takes milliseconds.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stagdist.config.base import (
    ConfigPart,
    NonNegative,
    NonNegativeFloat,
    Number,
    PathText,
    Positive,
    PositiveFloat,
    Share,
    report_problems,
)


class RopeScaling(ConfigPart):
    """Llama 3's frequency-dependent stretching of the rotary wavelengths."""

    rope_type: Literal["llama3"] = Field("llama3", description="The only scaling supported; null switches it off.")
    factor: PositiveFloat = Field(8.0, description="Long wavelengths are divided by this factor.")
    low_freq_factor: PositiveFloat = Field(1.0, description="Wavelengths above original length / this are stretched.")
    high_freq_factor: PositiveFloat = Field(4.0, description="Wavelengths below original length / this are kept.")
    original_max_position_embeddings: Positive = Field(8192, description="Context length before stretching, tokens.")


class ModelConfig(ConfigPart):
    """Shape of the model: a Llama divided into sections."""

    vocab_size: Positive = Field(..., description="Rows of the embedding; one for each id that a text can have.")
    hidden_size: Positive = Field(..., description="Width of the residual stream.")
    intermediate_size: Positive = Field(..., description="Width inside the SwiGLU.")
    num_attention_heads: Positive = Field(..., description="Query heads of every attention.")
    num_key_value_heads: Positive | None = Field(
        None, description="Key/value heads of self-attention; null means as many as query heads."
    )
    head_dim: Positive | None = Field(None, description="Width of a head; null means hidden_size / heads.")
    rope_theta: PositiveFloat = Field(10000.0, description="Base of the rotary wavelengths.")
    rope_scaling: RopeScaling | None = Field(None, description="Llama 3's stretching of the wavelengths, or null.")
    rms_norm_eps: PositiveFloat = Field(1e-5, description="Added to the mean square in every RMSNorm.")
    max_position_embeddings: Positive = Field(..., description="Longest context, tokens.")
    tie_word_embeddings: bool = Field(False, description="The head uses the embedding's matrix.")
    section_layers: tuple[Annotated[int, Field(ge=1, le=10_000), Number], ...] = Field(
        ..., min_length=1, description="Layers of each section; the number of entries is p."
    )
    connection: Literal["staggered", "sequential"] = Field(
        "staggered", description="staggered: StagFormer. sequential: the plain Transformer divided at the same layers."
    )
    stagger: Annotated[int, Field(ge=0, le=2), Number] = Field(
        1, description="Positions by which the memory lags; 0 is a control that cannot decode in parallel."
    )
    cross_attention_window: Positive | None = Field(
        None, description="Slots of the shifted memory that a position sees; null means all earlier ones."
    )
    cross_attention_key_value_heads: Positive | None = Field(
        None, description="Key/value heads of cross-attention; null means num_key_value_heads."
    )
    share_section_weights: bool = Field(
        False,
        description="Equal sections share self-attention and MLP; cross-attention is never shared.",
    )
    combine_sections: bool = Field(
        False, description="The head reads a learned linear combination of all section outputs."
    )

    @property
    def num_sections(self) -> int:
        """p, the number of sections."""
        return len(self.section_layers)

    @property
    def num_layers(self) -> int:
        """Layers of all sections together."""
        return sum(self.section_layers)

    @property
    def key_value_heads(self) -> int:
        """Key/value heads of self-attention, resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def cross_key_value_heads(self) -> int:
        """Key/value heads of cross-attention, resolved."""
        return self.cross_attention_key_value_heads or self.key_value_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head, resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def staggered(self) -> bool:
        """True for a StagFormer, False for the sequential baseline."""
        return self.connection == "staggered"

    @model_validator(mode="after")
    def _consistent(self, found: ValidationInfo) -> "ModelConfig":
        report_problems(self.problems(), found)
        return self

    def problems(self) -> list[str]:
        """Every contradiction between the keys of this part."""
        heads, problems = self.num_attention_heads, []
        not_a_multiple = f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads {heads}"
        if self.head_dim is None and self.hidden_size % heads:
            problems.append(f"{not_a_multiple}; change one of them or set model.head_dim")
        elif self.hidden_size % heads and not self.staggered:
            problems.append(
                f"{not_a_multiple}; a sequential model is exported as a Llama, and transformers refuses to load one "
                "with these sizes, whatever model.head_dim is: change one of them"
            )
        if self.head_width % 2:
            problems.append(f"the head width {self.head_width} is odd, but rotary embeddings rotate pairs of values")
        for key, value in (
            ("num_key_value_heads", self.key_value_heads),
            ("cross_attention_key_value_heads", self.cross_key_value_heads),
        ):
            if heads % value:
                problems.append(f"model.num_attention_heads {heads} is not a multiple of model.{key} {value}")
        if not self.staggered:
            problems += [
                f"model.{key} is {getattr(self, key)!r}, but only a staggered model has it; "
                "remove it or set model.connection: staggered"
                for key in STAGGERED_ONLY
                if getattr(self, key) != type(self).model_fields[key].default
            ]
        if self.share_section_weights and len(set(self.section_layers)) > 1:
            problems.append(
                f"model.share_section_weights needs equal sections, model.section_layers is {list(self.section_layers)}"
            )
        if self.cross_attention_window is not None and self.cross_attention_window > self.max_position_embeddings:
            problems.append(
                f"model.cross_attention_window {self.cross_attention_window} is longer than "
                f"model.max_position_embeddings {self.max_position_embeddings}; use null for no window"
            )
        return problems


STAGGERED_ONLY = (
    "stagger",
    "cross_attention_window",
    "cross_attention_key_value_heads",
    "share_section_weights",
    "combine_sections",
)
"""Keys that a sequential model must leave at their defaults."""


class ParallelConfig(ConfigPart):
    """How ranks are laid out; the data-parallel size is the world size divided by the other two."""

    pipeline_parallel_size: Positive | None = Field(
        None, description="Pipeline stages; divides the number of sections. null: one stage per section."
    )
    tensor_parallel_size: Positive = Field(1, description="Ranks that split every matrix inside a section.")
    device: str = Field(
        "auto",
        description="auto, cpu, cuda or cuda:N. auto: CUDA (nccl) where torch sees a device, otherwise CPU (gloo). "
        "cuda:N: this device for every rank, for trials of several ranks on one.",
    )
    timeout_s: PositiveFloat = Field(600.0, description="Limit of every collective on every process group, seconds.")


class CorpusConfig(ConfigPart):
    """One tokenized corpus and its share of a blend."""

    prefix: PathText = Field(..., description="Path of the .bin/.idx pair without the extension.")
    weight: PositiveFloat = Field(1.0, le=1e30, description="Relative weight in the blend.")


class DataConfig(ConfigPart):
    """Where tokens come from and in which order."""

    tokenizer: PathText = Field(
        "bytes", description="Directory or tokenizer.json of the tokenizer; `bytes` for one token per byte."
    )
    corpora: tuple[CorpusConfig, ...] = Field(
        (), description="Corpora blended by weight and divided into train, validation and test by data.split."
    )
    split: tuple[float, float, float] = Field(
        (98.0, 1.0, 1.0), description="Shares of the documents for train, validation and test (with data.corpora)."
    )
    train_corpora: tuple[CorpusConfig, ...] = Field((), description="Corpora for training only, instead of corpora.")
    validation_corpora: tuple[CorpusConfig, ...] = Field((), description="Corpora for evaluation during training.")
    test_corpora: tuple[CorpusConfig, ...] = Field((), description="Corpora for the evaluation at the end.")
    sequence_length: Positive | None = Field(
        None, description="Tokens of a training sequence; null means model.max_position_embeddings."
    )
    num_samples: Positive | None = Field(
        None,
        description="Training sequences for which the order of samples is computed; fixed for a run. A longer run "
        "continues in another order (docs/checkpoints.md). null means training.steps * training.global_batch_size "
        "when the run begins.",
    )
    cache_directory: PathText | None = Field(
        None, description="Where index maps are stored; shared by all ranks. null: next to the first corpus."
    )
    seed: NonNegative = Field(1234, description="Seed of the order of samples.")

    @model_validator(mode="after")
    def _consistent(self, found: ValidationInfo) -> "DataConfig":
        problems = []
        separate = self.train_corpora or self.validation_corpora or self.test_corpora
        if self.corpora and separate:
            problems.append(
                "data.corpora (divided by data.split) excludes data.train_corpora, data.validation_corpora and "
                "data.test_corpora; use one or the other"
            )
        elif separate and not self.train_corpora:
            problems.append("data.train_corpora is empty, but data.validation_corpora or data.test_corpora is not")
        report_problems(problems, found)
        return self

    @field_validator("split")
    @classmethod
    def _shares(cls, split: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(0 <= share <= 1e30 for share in split) or split[0] < 1e-12:  # 12 places are used
            raise ValueError(f"data.split {list(split)} must be 0 to 1e30 and needs a share for training")
        return split


class OptimizerConfig(ConfigPart):
    """AdamW; every matrix decays, no vector does."""

    learning_rate: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="Decay of the first and the second moment.")
    eps: PositiveFloat = Field(1e-8, description="Added to the root of the second moment.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decoupled decay of matrices, per unit rate.")
    max_grad_norm: NonNegativeFloat = Field(
        1.0, description="Gradients are scaled to at most this global norm; 0 switches clipping off."
    )


class SchedulerConfig(ConfigPart):
    """Learning rate as a pure function of the step."""

    kind: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = Field(
        "cosine", description="Shape after the warm-up."
    )
    warmup_steps: NonNegative = Field(0, description="Steps of the linear rise from 0.")
    decay_steps: Positive | None = Field(
        None,
        description="cosine, linear: step at which the minimum is reached (null: training.steps). "
        "warmup_stable_decay: length of the final linear decay (null: a tenth of training.steps).",
    )
    minimum_ratio: Share = Field(0.1, description="Lowest learning rate as a share of the peak.")


class TrainingConfig(ConfigPart):
    """Length, batch, precision and safety of a run."""

    steps: Positive = Field(..., description="Optimizer steps of the run.")
    global_batch_size: Positive = Field(..., description="Sequences per optimizer step over all replicas.")
    micro_batch_size: Positive = Field(1, description="Sequences that pass through the pipeline together.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Weights and activations; bf16 accumulates in fp32, fp16 scales the loss (GPU only)."
    )
    activation_checkpointing: Literal["none", "layer"] = Field(
        "none", description="layer: keep only the input of each layer and recompute it in the backward pass."
    )
    seed: NonNegative = Field(1234, description="Seed of the initialization.")
    deterministic: bool = Field(
        False,
        description="Use only deterministic kernels, so that a run on GPUs can be repeated exactly with the same grid, "
        "GPUs and libraries; slower. No effect on CPUs, which are deterministic. May change on resume.",
    )
    max_bad_steps: NonNegative = Field(
        3, description="Steps with a loss or gradient that is not finite before the run stops without saving."
    )
    audit_steps: NonNegative = Field(
        100,
        description="Compare the replicas every N steps: their weights, and whether gradients were averaged. A "
        "difference stops the run, and nothing is saved. 0 switches it off.",
    )
    max_minutes: PositiveFloat | None = Field(
        None, description="Wall-clock limit; the run saves and shuts down cleanly when it is reached."
    )

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches that every replica computes in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * data_parallel_size)


class EvaluationConfig(ConfigPart):
    """Evaluation on the validation split during the run and on the test split at the end."""

    interval_steps: NonNegative = Field(0, description="Evaluate every N steps; 0 switches it off.")
    num_batches: Positive = Field(4, description="Global batches per evaluation.")


class CheckpointConfig(ConfigPart):
    """When training state is saved, and whether a run resumes."""

    interval_steps: NonNegative = Field(0, description="Save every N steps; 0: only at the end.")
    interval_minutes: PositiveFloat | None = Field(None, description="Save every M minutes as well.")
    keep_last: NonNegative = Field(2, description="Number of complete checkpoints to keep; 0 keeps all.")
    asynchronous: bool = Field(
        True,
        description="Write files in the background; training pauses only for the copy to host memory, which needs room "
        "for one more copy of the training state. false: training waits for the disk.",
    )
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: resume from the newest complete checkpoint. never: refuse a run that has one.",
    )


class WandbConfig(ConfigPart):
    """Weights & Biases; offline without a key or a network."""

    enabled: bool = Field(False, description="Send metrics to wandb.")
    project: str = Field("stagdist", description="Project of the run.")
    entity: str | None = Field(None, description="Team or user; null is the default of the key.")


class LoggingConfig(ConfigPart):
    """Progress, metrics and where they are reported."""

    interval_steps: Positive = Field(1, description="Write metrics every N steps.")
    progress_bar: bool = Field(True, description="Show a progress bar on rank 0.")
    tensorboard: bool = Field(False, description="Write TensorBoard events under the run folder.")
    wandb: WandbConfig = Field(WandbConfig(), description="Weights & Biases.")
