"""Write the files of a training checkpoint."""

import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagdist.checkpoint.complete import write_complete
from stagdist.checkpoint.published.model_writer import MAX_SHARD_BYTES, shard_plan
from stagdist.checkpoint.safetensors_writer import SafetensorsWriter, tensor_sha256
from stagdist.checkpoint.training.directory import CONFIG, STATE, TrainingState
from stagdist.checkpoint.training.index import INDEX, VALUE, CheckpointIndex, Fragment, index_of
from stagdist.checkpoint.weight_source import Track, WeightSource, require_finite, untracked
from stagdist.config.loading import dump_config
from stagdist.config.run_config import RunConfig
from stagdist.files import FileRecord, file_record, writing
from stagdist.parallel.layout import model_parameters


@dataclass(frozen=True)
class OwnedFragment:
    """A part of a global tensor that one rank stores.

    Attributes:
        name: canonical name of the tensor.
        place: file, key, box and range.
        tensors: flat fp32 values by kind; moments are absent before the first update.
    """

    name: str
    place: Fragment
    tensors: Mapping[str, Tensor] = field(repr=False)


def write_fragments(
    path: Path, fragments: Sequence[OwnedFragment], given_up: threading.Event | None = None
) -> FileRecord:
    """Write the fragments of one rank to one file, and wait until it has reached the disk.

    Raises:
        OSError: it could not be written, or was given up; the message has the free space.
    """
    stored = [(f"{one.place.key}.{kind}", values) for one in fragments for kind, values in one.tensors.items()]
    try:
        writer = SafetensorsWriter(path, [(key, tuple(v.shape)) for key, v in stored], torch.float32, given_up)
        try:
            for key, values in stored:
                writer.add(key, values)
            return writer.finish()
        finally:
            writer.close()
    except OSError as error:
        free_gb = shutil.disk_usage(path.parent).free / 1e9 if path.parent.exists() else 0.0
        raise OSError(f"{path} could not be written, {free_gb:.1f} GB are free: {error.strerror or error}") from error


def complete(
    folder: Path, config: RunConfig, state: TrainingState, index: CheckpointIndex, records: Mapping[str, FileRecord]
) -> None:
    """Write configuration, state, index and at last `complete.json`.

    Args:
        records: of the safetensors files, which have reached the disk.
    """
    texts = {CONFIG: dump_config(config), STATE: state.as_text(), INDEX: index.as_text()}
    for name, text in texts.items():
        with writing(folder / name, sync=True) as stream:
            stream.write(text)
    write_complete(folder, {**records, **{name: file_record(folder / name) for name in texts}})


def write_values(
    folder: Path, source: WeightSource, config: RunConfig, state: TrainingState, track: Track[Any] = untracked
) -> dict[str, str]:
    """Write a complete checkpoint of weights alone in an empty folder: the optimizer begins with moments of zero.

    Returns:
        The sha256 of every tensor in fp32, by name.

    Raises:
        CheckpointError: a weight is not finite.
        OSError: the disk failed.
    """
    specs, sums = model_parameters(source.model), dict[str, str]()
    files = {part_name(n): shard for n, shard in enumerate(shard_plan(specs, 4, MAX_SHARD_BYTES))}
    file_of = {spec.name: file for file, shard in files.items() for spec in shard}
    records: dict[str, FileRecord] = {}
    with ExitStack() as opened:
        for spec in track(specs, "writing"):
            if spec is files[file := file_of[spec.name]][0]:
                entries = [(f"{s.name}.{VALUE}", (s.numel,)) for s in files[file]]
                writer = SafetensorsWriter(folder / file, entries, torch.float32)
                opened.callback(writer.close)
            weight = require_finite(source.weight(spec), spec.name, source.directory)
            sums[spec.name] = tensor_sha256(weight, torch.float32)
            writer.add(f"{spec.name}.{VALUE}", weight.flatten())
            if writer.full:
                records[file] = writer.finish()
    owned = [
        (s.name, Fragment(file=file_of[s.name], key=s.name, box=tuple((0, n) for n in s.shape), range=(0, s.numel)))
        for s in specs
    ]
    complete(folder, config, state, index_of(owned, specs, [VALUE]), records)
    return sums


def part_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"part_{rank:05d}.safetensors"
