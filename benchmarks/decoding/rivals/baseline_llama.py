"""The weights of the sequential baseline as a Llama of transformers, so that every rival decodes the same model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding.contestants import SEED, Load
from stagdist.checkpoint.published.model_reader import ReadSlice
from stagdist.checkpoint.published.model_writer import stored_name
from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.weights import random_reader
from stagdist.errors import ConfigError
from stagdist.parallel.layout import model_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "tie_word_embeddings",
)  # fmt: skip


def baseline_weights(model: ModelConfig, read: ReadSlice) -> dict[str, Tensor]:
    """fp32 weights of a sequential model by their names in transformers."""
    return {stored_name(spec.name, model): read(spec, 0, 0, spec.shape[0]) for spec in model_parameters(model)}


@dataclass
class Baseline:
    """The model that rivals decode.

    Attributes:
        model: sequential.
        device: of the rivals that torch runs.
        folder: for files in the formats of the rivals; each writes its own once.

    Raises:
        ConfigError: a rival would compute something else.
    """

    model: ModelConfig
    device: str
    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.model.rope_scaling is not None:
            raise ConfigError("--rivals cannot export model.rope_scaling; set model.rope_scaling=null")
        self.weights = baseline_weights(self.model, random_reader(SEED, self.device))

    def on_cpu(self) -> dict[str, Tensor]:
        """The weights in memory of the host."""
        return {name: weight.cpu() for name, weight in self.weights.items()}

    def llama(self, precision: str):  # type: ignore[no-untyped-def]
        """A `LlamaForCausalLM` with these weights, in evaluation mode."""
        from transformers import LlamaConfig, LlamaForCausalLM

        model = self.model
        keys: dict[str, Any] = {key: getattr(model, key) for key in LLAMA_KEYS}
        keys |= {"num_hidden_layers": model.num_layers, "num_key_value_heads": model.key_value_heads}
        keys |= {"head_dim": model.head_width, "bos_token_id": None, "eos_token_id": None}
        with torch.device(self.device):  # a GPU fills billions of weights in seconds, a CPU in minutes
            llama = LlamaForCausalLM(LlamaConfig(**keys)).eval()  # type: ignore[call-arg]
        missing = llama.load_state_dict(self.weights, strict=not self.model.tie_word_embeddings)
        assert set(missing.missing_keys) <= {"lm_head.weight"}
        return llama.to(DTYPES[precision])

    @property
    def read_values(self) -> int:
        """Weights that a step reads: all but the embedding, of which it looks up one row for each request."""
        held = sum(weight.numel() for weight in self.weights.values())
        return held - (0 if self.model.tie_word_embeddings else self.model.vocab_size * self.model.hidden_size)

    def cache_values(self, load: Load) -> int:
        """Keys and values that a step reads at the position of the load."""
        model = self.model
        return 2 * model.num_layers * model.key_value_heads * model.head_width * load.context * load.batch

    @torch.inference_mode()
    def margin(self, load: Load, chosen: tuple[int, ...]) -> float:
        """Distance between the two best logits of the first request, in fp32, after its prompt and chosen tokens."""
        tokens = torch.tensor([(*load.prompt(self.model.vocab_size), *chosen)], device=self.device)
        best, second = self.llama("fp32")(tokens, logits_to_keep=1).logits[0, -1].topk(2).values.tolist()
        return best - second
