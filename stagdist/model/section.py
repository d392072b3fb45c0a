"""A section: consecutive layers over one residual stream, with cross-attention to the previous section's output.

This module does not depend on pipelines, ranks or steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stagdist.config.parts import ModelConfig
from stagdist.model.attention import window_mask
from stagdist.model.layer import LayerCore, LayerCross, rms_norm, run_layer
from stagdist.model.megatron import TensorParallel, enter_tensor_parallel
from stagdist.model.rotary import Rotary


def layer_cores(model: ModelConfig, section: int, parallel: TensorParallel) -> nn.ModuleList:
    """Self-attention and SwiGLU of every layer of a section."""
    return nn.ModuleList(LayerCore(model, parallel) for _ in range(model.section_layers[section]))


def shift_memory(memory: Tensor, null_memory: Tensor | None, stagger: int) -> Tensor:
    """Move the memory right by `stagger` positions; the gap holds the null vector.

    Shapes: memory [B, S, H], null_memory [H] -> [B, S, H].
    """
    if stagger == 0:
        return memory
    assert null_memory is not None, "a staggered memory needs its null vector"
    batch, length, hidden = memory.shape
    gap = null_memory.expand(batch, min(stagger, length), hidden)
    return torch.cat((gap, memory[:, : max(length - stagger, 0)]), dim=1)


class Section(nn.Module):
    """The layers of one section, with memory norm and null vector if it has a memory.

    Args:
        model: shape of the full model.
        index: which section, from 0.
        parallel: the tensor axis.
        own_core: False if self-attention and SwiGLU are passed to every call, from layers that all sections share.
        checkpoint_layers: recompute each layer in the backward pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        index: int,
        parallel: TensorParallel,
        *,
        own_core: bool = True,
        checkpoint_layers: bool = False,
    ):
        super().__init__()
        self.index = index
        self.parallel = parallel
        self.stagger = model.stagger
        self.window = model.cross_attention_window
        self.checkpoint_layers = checkpoint_layers
        self.has_memory = model.staggered and index > 0
        self.rotary = Rotary(model)
        self.core = layer_cores(model, index, parallel) if own_core else None
        self.cross = self.memory_norm = self.null_memory = self.mix = None
        if self.has_memory:
            self.cross = nn.ModuleList(LayerCross(model, parallel) for _ in range(model.section_layers[index]))
            self.memory_norm = rms_norm(model, parallel)
            if model.stagger > 0:
                self.null_memory = nn.Parameter(torch.empty(model.hidden_size, dtype=parallel.dtype))
        if model.combine_sections:
            self.mix = nn.Parameter(torch.empty(1, dtype=parallel.dtype))

    def forward(
        self, hidden_states: Tensor, previous: Tensor | None = None, shared_core: nn.ModuleList | None = None
    ) -> Tensor:
        """Run all layers.

        Args:
            hidden_states: [B, S, H], the token embeddings (sequential: the previous section's output).
            previous: [B, S, H], output of the previous section, if this one has a memory.
            shared_core: self-attention and SwiGLU of every layer, if the section has none of its own.

        Returns: [B, S, H], the section's output.
        """
        rotary = self.rotary(hidden_states.shape[1], hidden_states.dtype)
        memory = self._memory(previous) if self.has_memory else None
        mask = window_mask(hidden_states.shape[1], self.window, hidden_states.device) if self.has_memory else None
        cores = self.core if shared_core is None else shared_core
        assert cores is not None, "a section without its own layers needs the shared ones"
        recompute = self.checkpoint_layers and torch.is_grad_enabled()
        # No operation of a layer draws random numbers, and saving the generator's state waits for the device.
        again = partial(checkpoint, run_layer, use_reentrant=False, preserve_rng_state=False)
        run: Callable[..., Any] = again if recompute else run_layer
        for layer, core in enumerate(cores):
            cross = None if self.cross is None else self.cross[layer]
            hidden_states = run(core, cross, self.parallel, hidden_states, memory, rotary, mask)
        return hidden_states

    def _memory(self, previous: Tensor | None) -> Tensor:
        assert previous is not None and self.memory_norm is not None, f"section {self.index} got no previous output"
        memory = shift_memory(self.memory_norm(previous), self.null_memory, self.stagger)
        return enter_tensor_parallel(memory, self.parallel)
