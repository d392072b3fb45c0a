"""A model directory as the source of a training checkpoint: its weights and a fresh optimizer state."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.training.content import MASTER, Counters
from stagdist.checkpoint.weight_source import require_finite
from stagdist.config.run_config import RunConfig
from stagdist.model.precision import DTYPES
from stagdist.parallel.layout import ParameterSpec, model_parameters


@dataclass(frozen=True)
class ImportedModel:
    """Weights of `source` as a run with `config` would hold them before its first step."""

    source: ModelReader
    config: RunConfig

    def weight(self, spec: ParameterSpec) -> Tensor:
        """One global parameter in the dtype of the run."""
        if spec.name.startswith("section_mix."):
            section = int(spec.name.rsplit(".", 1)[1])
            stored = self.source.weight(self._specs["section_mix"])[section].reshape(1)
        else:
            stored = self.source.weight(spec)
        return require_finite(stored, spec.name, self.source.directory).to(DTYPES[self.config.training.precision])

    def optimizer_value(self, spec: ParameterSpec, kind: str) -> Tensor:
        """The fp32 copy, rounded as the weight is; the moments are zero."""
        return self.weight(spec).float() if kind == MASTER else torch.zeros(spec.shape)

    def steps(self) -> Tensor:
        """Zero: no update was done."""
        return torch.zeros(())

    def counters(self) -> Counters:
        """The counters of a new run."""
        return Counters(
            global_steps=0,
            global_samples=0,
            skipped_steps=0,
            param_groups=self._param_groups(),
            clip_grad=self.config.optimizer.max_grad_norm,
            loss_scaler={"cur_scale": 1.0, "dynamic": False},
            dynamic_loss_scale=False,
            random=lambda stage, tensor_rank: {"cpu_random_state": torch.get_rng_state()},
        )

    @cached_property
    def _specs(self) -> dict[str, ParameterSpec]:
        return {spec.name: spec for spec in model_parameters(self.source.model)}

    def _param_groups(self) -> list[dict[str, Any]]:
        """The settings of the two groups as AdamW of torch writes them."""
        settings = self.config.optimizer
        groups = [
            {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": decay} for decay in (settings.weight_decay, 0.0)
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
        )
        found: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
        return found
