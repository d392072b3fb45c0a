"""One stage of a StagFormer as a plain torch module, without a pipeline around it."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.model.megatron import TensorParallel
from stagdist.model.stagformer import fill_parameters, head_canonical_name, section_canonical_name
from stagdist.parallel.layout import stage_layout
from stagdist.training.engine.pipeline import EmbeddingLayer, HandOff, HeadLayer, SectionInput, SectionLayer, mean_nats


class StageModule(nn.Module):
    """Embedding, sections and (last stage) head of one stage, with the initial weights of the run.

    Raises:
        ConfigError: the model shares weights between sections, or is not a StagFormer.
    """

    def __init__(self, config: RunConfig, num_stages: int, stage: int, parallel: TensorParallel):
        super().__init__()
        if config.model.share_section_weights or not config.model.staggered:
            raise ConfigError(
                "the benchmark's plain stages are those of a staggered model without shared weights; "
                "set model.connection: staggered and model.share_section_weights: false"
            )
        layout = stage_layout(config.model, num_stages, stage)
        self.first, self.parallel, self.tied_head = stage == 0, parallel, layout.tied_head
        self.embedding = EmbeddingLayer(config.model, parallel)
        self.sections = nn.ModuleList(SectionLayer(config.model, index, parallel) for index in layout.sections)
        self.head = HeadLayer(config.model, parallel) if layout.head else None
        fill_parameters(self._canonical_parameters(), config.model, parallel, config.training.seed)

    def forward(self, carry: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Run the stage. The first one gets its tokens as `carry`, later ones the memory and, by name, the tokens.

        Returns: what the next stage starts from; logits on the last stage.
        """
        if self.first:
            tokens = carry
        assert tokens is not None, "a later stage needs its tokens by name"
        memory = None if self.first else carry
        for section in self.sections:
            memory = section(SectionInput(memory, tokens, self.embedding.embedding(tokens))).memory
        assert memory is not None
        if self.head is None:
            return memory
        handed = HandOff(memory, tokens)
        return self.head((handed, self.embedding.embedding.weight) if self.tied_head else handed)

    def _canonical_parameters(self) -> dict[str, nn.Parameter]:
        named: dict[str, nn.Parameter] = {"embedding.weight": self.embedding.embedding.weight}
        for layer in self.sections:
            assert isinstance(layer, SectionLayer)
            for name, parameter in layer.section.named_parameters():
                named[section_canonical_name(layer.section.index, name, shared=False)] = parameter
        for name, parameter in self.head.head.named_parameters() if self.head is not None else ():
            named[head_canonical_name(name)] = parameter
        return named


class StageClock:
    """Forward and backward pass of one stage alone: no peer, no hand-off, no update.

    Args:
        micro_batch: tokens and labels, each int64 [B, S].
        carried: shape of what the previous stage hands over.
        synchronize: waits for the device.
    """

    def __init__(
        self, stage: StageModule, micro_batch: tuple[Tensor, Tensor], carried: tuple[int, ...],
        synchronize: Callable[[], None],
    ):  # fmt: skip
        self._stage, self._synchronize = stage, synchronize
        self._tokens, self._labels = micro_batch
        generator = torch.Generator().manual_seed(0)
        self._carried = torch.randn(carried, generator=generator).to(stage.embedding.embedding.weight)

    def read(self, repeats: int) -> float:
        """Seconds per micro-batch, mean of `repeats` in a row."""
        self._synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            self._pass()
        self._synchronize()
        elapsed = time.perf_counter() - started
        self._stage.zero_grad(set_to_none=True)
        return elapsed / repeats

    def _pass(self) -> None:
        memory = self._carried.detach().requires_grad_()
        output = self._stage(self._tokens) if self._stage.first else self._stage(memory, tokens=self._tokens)
        if self._stage.head is None:
            output.backward(self._carried)
        else:
            mean_nats(output, self._labels, self._stage.parallel).backward()
