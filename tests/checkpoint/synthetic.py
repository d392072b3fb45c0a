"""Training checkpoints of random values for any model and grid, made without training anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import checkpoint_files, write_complete
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.training.content import MASTER, Counters
from stagdist.checkpoint.training.directory import CONFIG, TrainingState, checkpoint_name, file_record
from stagdist.checkpoint.training.training_writer import TrainingWriter
from stagdist.config.loading import dump_config
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.model.precision import DTYPES
from stagdist.parallel.grid import Grid
from stagdist.parallel.layout import ParameterSpec, model_parameters
from tests.reference.stagformer import random_parameters

SHAPE: dict[str, Any] = {
    "vocab_size": 259,  # bytes, the end of a document, and padding with two tensor ranks
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "section_layers": [2, 2],
    "rope_theta": 5000.0,
}
STEP = 7


@dataclass(frozen=True)
class RandomSource:
    """Values that depend on the name alone."""

    config: RunConfig
    parameters: dict[str, Tensor]

    def weight(self, spec: ParameterSpec) -> Tensor:
        """The fp32 copy, rounded."""
        return self.optimizer_value(spec, MASTER).to(DTYPES[self.config.training.precision])

    def optimizer_value(self, spec: ParameterSpec, kind: str) -> Tensor:
        """Random; the second moment is positive."""
        name, _, part = spec.name.partition("section_mix.")
        value = self.parameters["section_mix"][int(part)].reshape(1) if part else self.parameters[name]
        return value if kind == MASTER else (value * 3).sin() if kind == "exp_avg" else (value * 5).sin().square()

    def steps(self) -> Tensor:
        """Some."""
        return torch.tensor(float(STEP))

    def counters(self) -> Counters:
        """As of a run after some steps."""
        group: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
        groups = [group | {"params": [0]}, group | {"weight_decay": 0.0, "params": [1]}]
        random = {"cpu_random_state": torch.arange(16, dtype=torch.uint8)}
        dynamic = self.config.training.precision == "fp16"
        scaler: dict[str, Any] = {"cur_scale": 1.0, "dynamic": False}
        if dynamic:
            scaler = {"cur_scale": 4096.0, "dynamic": True, "cur_iter": STEP, "dtype": torch.float16}
        return Counters(STEP, 8 * STEP, 0, groups, 1.0, scaler, dynamic, lambda *_: random)


def run_config(model: dict[str, Any], precision: str = "fp32") -> RunConfig:
    """A run of a model."""
    values = {
        "name": "run",
        "model": SHAPE | model,
        "training": {"steps": 20, "global_batch_size": 8, "precision": precision},
    }
    return RunConfig.model_validate(values)


def training_checkpoint(
    run: Path, model: dict[str, Any], sizes: tuple[int, int, int] = (1, 1, 1), precision: str = "fp32", seed: int = 3
) -> Path:
    """A complete checkpoint in a run's folder."""
    config = run_config(model, precision)
    keys = {"pipeline_parallel_size": sizes[0], "tensor_parallel_size": sizes[2]}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=keys)})
    folder = run / "checkpoints" / checkpoint_name(STEP)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_config(config))
    TrainingState(STEP, 8 * STEP, 160, sizes, data_identity="some").write(folder)
    parameters = random_parameters(config.model, seed, perturb=True)
    TrainingWriter(RandomSource(config, parameters), config, Grid(*sizes), folder).write()
    complete(folder)
    return folder


def complete(folder: Path) -> None:
    """Write the records of whatever the folder holds now."""
    (folder / "complete.json").unlink(missing_ok=True)
    write_complete(folder, {name: file_record(folder / name) for name in checkpoint_files(folder)})


def model_directory(
    folder: Path,
    model: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A model directory of random weights, with the bytes tokenizer unless another is given."""
    config = run_config(model).model
    parameters = random_parameters(config, seed, perturb=True)
    tokenizer = tokenizer or load_tokenizer("bytes")
    with ModelDirectoryWriter(folder, config, dtype, tokenizer.end_of_document) as writer:
        for spec in model_parameters(config):
            writer.add(spec.name, parameters[spec.name])
        tokenizer.save(writer.folder)
    return folder


def parameters_of(model: ModelConfig, seed: int = 3) -> dict[str, Tensor]:
    """The values that both of the above hold."""
    return random_parameters(model, seed, perturb=True)


def file_contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
