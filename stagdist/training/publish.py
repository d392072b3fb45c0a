"""The end of a run: the trained weights as a model directory, verified before it is published."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.checkpoint.complete import publish
from stagdist.checkpoint.convert.proof import any_ids, source_logits, text_ids
from stagdist.checkpoint.convert.staging import ConversionOptions, staged_folder
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
from stagdist.checkpoint.safetensors_writer import tensor_sha256
from stagdist.checkpoint.text_tokens import TextTokens, tokens_of_tokenizer
from stagdist.checkpoint.weight_source import Track
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import CheckpointError, SavingError
from stagdist.parallel.groups import Groups
from stagdist.parallel.layout import ParameterSpec, model_parameters, owning_stage
from stagdist.telemetry.pulse import Phase, beating
from stagdist.training.engine.agreement import on_every_rank, shared, while_others_wait
from stagdist.training.engine.distributed import bring_to_first
from stagdist.training.engine.section_engine import SectionEngine
from stagdist.training.engine_logits import engine_logits

LOG = logging.getLogger(__name__)

LOGIT_LIMITS = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative error of logits that rounding explains. Those of another model are off by about their size."""


def export_model(
    engine: SectionEngine,
    groups: Groups,
    model: ModelConfig,
    tokenizer: Tokenizer,
    directory: Path,
    tokens: TextTokens | None = None,
) -> None:
    """Write the weights as a model directory; replaces that of an earlier end of this run. Called on every rank.

    Rank 0 gathers the weights tensor by tensor, writes them to a temporary folder, verifies them, and renames it.
    Every tensor is read back and compared. The logits of the written directory on some real text, by a plain forward
    pass, must be those of the engine, within its precision.

    Args:
        tokens: of the model that the run began from, if it names them.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write, or the directory holds something else. What was
            there before stays, and no temporary files do.
    """
    parameters = {name: parameter.detach() for name, parameter in engine.module.canonical_parameters().items()}
    dtype = next(iter(parameters.values())).dtype
    track = beating(engine.pulse, Phase.EXPORT)
    engine.pulse.beat(Phase.EXPORT)
    with ExitStack() as held:

        def begin() -> _Export | None:
            if dist.get_rank() != 0:
                return None
            staged = held.enter_context(staged_folder(directory, ConversionOptions(overwrite=True)))
            return held.enter_context(_Export(directory, staged, model, dtype, tokenizer, tokens))

        export = on_every_rank(groups.control, begin, _failed)
        for spec in track(model_parameters(model), "gathering"):
            # Gather to the end even when a write has failed: the other ranks are sending.
            tensor = _gather(spec, parameters, groups, model)
            if export is not None:
                export.add(spec, tensor)
        input_ids = _proof_ids(tokenizer, model)[:, : engine.exchange.hand_off.memory.shape[-2]]
        logits = engine_logits(engine, groups, model.vocab_size, input_ids)
        engine.pulse.beat(Phase.EXPORT)
        try:
            while_others_wait(
                groups.control,
                lambda: None if export is None else export.finish(input_ids, logits, track),
                lambda: engine.pulse.beat(Phase.EXPORT),
            )
        except CheckpointError as error:
            raise shared(_failed(f"rank 0: {error}")) from error


def _proof_ids(tokenizer: Tokenizer, model: ModelConfig) -> Tensor:
    """Token ids of some real text; of bytes if the model lacks some of them. Shapes: int64 [1, S]."""
    input_ids = text_ids(tokenizer, model)
    return input_ids if int(input_ids.max()) < model.vocab_size else any_ids(model)


def _failed(reason: str) -> SavingError:
    return SavingError(
        f"the model directory was not written, {reason}; the last checkpoint is complete: remove the cause or free "
        "space, and start the same command again"
    )


class _Export:
    """The model directory as rank 0 writes it: keeps the first failure and the hash of every tensor."""

    def __init__(
        self,
        final: Path,
        staged: Path,
        model: ModelConfig,
        dtype: torch.dtype,
        tokenizer: Tokenizer,
        tokens: TextTokens | None,
    ):
        self._final, self._staged, self._model, self._tokenizer = final, staged, model, tokenizer
        tokens = tokens or tokens_of_tokenizer(tokenizer)
        self._writer = ModelDirectoryWriter(staged, model, dtype, tokenizer.end_of_document, tokens)
        self._given: dict[str, str] = {}
        self._failure: OSError | None = None

    def __enter__(self) -> "_Export":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, spec: ParameterSpec, tensor: Tensor) -> None:
        """Write the next parameter unless an earlier one has failed."""
        if self._failure is not None:
            return
        self._given[spec.name] = tensor_sha256(tensor)
        try:
            self._writer.add(spec.name, tensor)
        except OSError as error:
            self._failure = error

    def finish(self, input_ids: Tensor, logits: Tensor, track: Track[Any]) -> None:
        """Complete the directory, compare it with the tensors that were added and the engine's logits, and publish it.

        Args:
            logits: the engine's for `input_ids`.
            track: iterates over the parameters and reports progress.

        Raises:
            OSError, CheckpointError: it could not be written, or is another model.
        """
        if self._failure is not None:
            raise self._failure
        self._tokenizer.save(self._writer.folder)
        self._writer.commit()
        written = ModelReader(self._staged)
        for spec in track(model_parameters(self._model), "checking"):
            if tensor_sha256(written.weight(spec)) != self._given[spec.name]:
                raise CheckpointError(
                    f"{spec.name} is read back from {self._final} with other values than were written"
                )
        difference = relative_difference(source_logits(written, input_ids, track), logits)
        limit = logit_limit(written.dtype)
        if not difference <= limit:
            raise CheckpointError(
                f"{self._final} is not the model that was trained: on {input_ids.shape[1]} tokens of text its logits "
                f"are off by {difference:.2g} of their size, more than the {limit:g} of rounding"
            )
        LOG.info(
            "%s: %d tensors read back; on %d tokens of text its logits differ from the training's by %.1e of their "
            "size", self._final, len(self._given), input_ids.shape[1], difference,
        )  # fmt: skip
        publish(self._staged, self._final.resolve())


def logit_limit(dtype: torch.dtype) -> float:
    """Largest relative error for weights of a dtype. fp32 matrices may be multiplied in a lower precision."""
    reduced = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return LOGIT_LIMITS[torch.float16 if reduced else dtype]


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Root mean square of the difference, divided by that of `expected`; not finite if any value is not."""
    return float((expected - found).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def _gather(spec: ParameterSpec, parameters: dict[str, Tensor], groups: Groups, model: ModelConfig) -> Tensor:
    """The full parameter on rank 0; an empty tensor elsewhere."""
    if spec.name == "section_mix":
        parts = [ParameterSpec(f"section_mix.{section}", (1,), fill=spec.fill) for section in range(model.num_sections)]
        return torch.cat([_gather(part, parameters, groups, model) for part in parts])
    dtype = next(iter(parameters.values())).dtype
    slices = []
    for tensor_rank in range(1 if spec.shard_dim is None else groups.grid.tensor):
        owner = groups.grid.rank(owning_stage(spec.name, model, groups.grid.pipe), 0, tensor_rank)
        mine = parameters[spec.name] if dist.get_rank() == owner else None
        slices.append(bring_to_first(groups.control, owner, mine, spec.local_shape(groups.grid.tensor), dtype))
    if dist.get_rank() != 0:
        return torch.empty(0)
    full = slices[0] if spec.shard_dim is None else torch.cat(slices, dim=spec.shard_dim)
    return full[: spec.shape[0]] if spec.vocabulary else full
