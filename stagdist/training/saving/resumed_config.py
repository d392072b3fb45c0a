"""What a run may resume: whether its configuration fits a checkpoint, and the configuration to continue with."""

import logging
from dataclasses import replace
from pathlib import Path

from stagdist.checkpoint.training.directory import CONFIG, TrainingState, read_state
from stagdist.config.loading import differences, load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.training.engine.agreement import shared
from stagdist.training.engine.optimizer import learning_rate

LOG = logging.getLogger(__name__)

_MAY_CHANGE = ("num_samples", "cache_directory", "tokenizer", "validation_corpora", "test_corpora")
"""Keys of `data` that do not change the training samples; tokenizer and corpora are compared by content."""


def resumed_config(config: RunConfig, checkpoint: Path, data_identity: str, tokenizer: str) -> RunConfig:
    """The configuration to continue with: that of the new start, with the sample order of the checkpoint.

    An imported checkpoint has seen no samples, so it continues with any samples of its tokenizer.

    Args:
        tokenizer: fingerprint of this run's tokenizer.

    Raises:
        ConfigError: the checkpoint is of another model or tokenizer, or of other samples; on every rank.
    """
    before, state = load_config(checkpoint / CONFIG), read_state(checkpoint)
    problem = _model_problem(before, config) or (
        _tokenizer_problem(state, config, tokenizer)
        if _imported(state)
        else _samples_problem(before, config, state, data_identity)
    )
    if problem:
        raise shared(ConfigError(f"{checkpoint} {problem}"))
    if _imported(state):
        return config
    _log_schedule(before, config, state.step)
    data = config.data.model_copy(update={"num_samples": state.num_samples})
    return config.model_copy(update={"data": data})


def _model_problem(before: RunConfig, config: RunConfig) -> str | None:
    changed = differences(before.model, config.model)
    if not changed:
        return None
    listed = ", ".join(f"model.{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
    return f"is a checkpoint of another model: {listed}; choose another name for the run"


def _samples_problem(before: RunConfig, config: RunConfig, state: TrainingState, data_identity: str) -> str | None:
    """Why the run would not see the samples it would have seen."""
    changed = {
        f"data.{key}": values
        for key, values in differences(before.data, config.data).items()
        if not key.startswith(_MAY_CHANGE) and not key.endswith(".prefix")
    }
    batches = before.training.global_batch_size, config.training.global_batch_size
    if batches[0] != batches[1]:
        changed["training.global_batch_size"] = batches
    if config.data.num_samples not in (None, state.num_samples):
        changed["data.num_samples"] = (state.num_samples, config.data.num_samples)
    if changed:
        listed = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        return f"would not continue with the same samples: {listed}; restore it, or begin a new run"
    if data_identity != state.data_identity:
        return "was trained on other corpora, or with another tokenizer, than those now at their paths; restore them"
    if state.step > config.training.steps:
        return f"is of step {state.step}, but training.steps is {config.training.steps}; set it to {state.step} or more"
    return None


def _log_schedule(before: RunConfig, config: RunConfig, step: int) -> None:
    """Log how the learning rate changes because `training.steps` changed; nothing if it does not."""
    old, new = (
        learning_rate(step, steps=run.training.steps, optimizer=config.optimizer, scheduler=config.scheduler)
        for run in (before, config)
    )
    if old != new:
        LOG.info(
            "training.steps was %d, is %d: this moves the end of the schedule, so the learning rate of step %d is %.4g "
            "instead of %.4g; see \"Training longer\" in docs/checkpoints.md",
            before.training.steps, config.training.steps, step + 1, new, old,
        )  # fmt: skip


def _imported(state: TrainingState) -> bool:
    return state.num_samples == 0


def _tokenizer_problem(state: TrainingState, config: RunConfig, tokenizer: str) -> str | None:
    """Why an imported model would misread the ids of this run. Nothing is compared where no tokenizer was recorded."""
    if state.tokenizer in ("", tokenizer):
        return None
    named = config.data.tokenizer
    return (
        f"was imported with another tokenizer than data.tokenizer {named} holds: its sha256 is "
        f"{state.tokenizer[:12]}, that of {named} {tokenizer[:12]}; set data.tokenizer to the one of the import, or "
        f"import the model again with --tokenizer {named}"
    )


def begun(state: TrainingState, config: RunConfig, data_identity: str, tokenizer: str = "") -> TrainingState:
    """The state to continue with: an imported checkpoint takes the samples of this run."""
    if not _imported(state):
        return state
    return replace(state, num_samples=config.num_samples, data_identity=data_identity, tokenizer=tokenizer)
