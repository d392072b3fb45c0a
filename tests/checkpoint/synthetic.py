"""Training checkpoints of random values for any model and grid, made without training anything."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import checkpoint_files, write_complete
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.training.directory import TrainingState, checkpoint_name
from stagdist.checkpoint.training.index import KINDS, VALUE, Fragment, box_numel, index_of
from stagdist.checkpoint.training.reader import stored_box
from stagdist.checkpoint.training.writer import OwnedFragment, part_name, write_fragments
from stagdist.checkpoint.training.writer import complete as describe
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.files import file_record
from stagdist.parallel.grid import Grid
from stagdist.parallel.layout import model_parameters, owning_stage
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


def optimizer_value(value: Tensor, kind: str) -> Tensor:
    """What the optimizer holds of a parameter with these values; the second moment is positive."""
    return value if kind == VALUE else (value * 3).sin() if kind == "exp_avg" else (value * 5).sin().square()


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
    scaler = {"cur_scale": 4096.0, "cur_iter": STEP} if precision == "fp16" else None
    state = TrainingState(STEP, 8 * STEP, 160, sizes, optimizer_steps=STEP, loss_scaler=scaler, data_identity="some")
    parameters = random_parameters(config.model, seed, perturb=True)
    owned, records = [], {}
    grid = Grid(*sizes)
    for rank in range(grid.world_size):
        fragments = fragments_of_rank(config.model, grid, rank, parameters)
        owned += [(one.name, one.place) for one in fragments]
        if fragments:
            records[part_name(rank)] = write_fragments(folder / part_name(rank), fragments)
    specs = model_parameters(config.model)
    describe(folder, config, state, index_of(owned, specs, KINDS), records)
    return folder


def fragments_of_rank(model: ModelConfig, grid: Grid, rank: int, parameters: dict[str, Tensor]) -> list[OwnedFragment]:
    """What a rank stores; replicas divide every tensor unevenly."""
    place, fragments = grid.coordinate(rank), []
    for spec in model_parameters(model):
        parts = [(spec.name, tuple((0, size) for size in spec.shape))]
        if spec.name == "section_mix":
            parts = [(f"section_mix.{section}", ((section, section + 1),)) for section in range(model.num_sections)]
        elif spec.shard_dim is not None:
            parts = [(spec.name, stored_box(spec, place.tensor, grid.tensor))]
        elif place.tensor > 0:
            continue
        for name, box in parts:
            if owning_stage(name, model, grid.pipe) != place.pipe or (spec.shard_dim is None and place.tensor > 0):
                continue
            cuts = [box_numel(box) * data**2 // grid.data**2 for data in range(grid.data + 1)]
            start, stop = cuts[place.data : place.data + 2]
            if start == stop:
                continue
            values = parameters[spec.name][tuple(slice(*side) for side in box)].flatten()[start:stop]
            fragment = Fragment(file=part_name(rank), key=name, box=box, range=(start, stop))
            tensors = {kind: optimizer_value(values, kind) for kind in KINDS}
            fragments.append(OwnedFragment(spec.name, fragment, tensors))
    return fragments


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
