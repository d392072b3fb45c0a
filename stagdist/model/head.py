"""The end of the model: final norm and the projection to the vocabulary."""

from torch import Tensor, nn

from stagdist.config.parts import ModelConfig
from stagdist.model.layer import rms_norm
from stagdist.model.megatron import ColumnParallel, TensorParallel, enter_tensor_parallel
from stagdist.parallel.layout import padded_vocab_size


class Head(nn.Module):
    """Logits of this rank's slice of the vocabulary; padded entries are minus infinity.

    Shapes: [B, S, H] -> [B, S, V].
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel):
        super().__init__()
        self.parallel = parallel
        padded = padded_vocab_size(model.vocab_size, parallel.size)
        per_rank = padded // parallel.size
        self.num_valid = min(max(model.vocab_size - parallel.rank * per_rank, 0), per_rank)
        self.norm = rms_norm(model, parallel)
        self.projection = ColumnParallel(model.hidden_size, padded, parallel, own_weight=not model.tie_word_embeddings)

    def forward(self, hidden_states: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """Apply to the last hidden states, with the embedding's matrix when the head is tied."""
        normed = enter_tensor_parallel(self.norm(hidden_states), self.parallel)
        logits = self.projection(normed, tied_weight)
        if self.num_valid < logits.shape[-1]:
            logits[..., self.num_valid :] = float("-inf")
        return logits
