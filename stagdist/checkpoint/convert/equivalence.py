"""Which keys make two models different functions although their logits on a short text may be the same.

Most keys that differ are settled by any text: sequential sections cut elsewhere, a copy of what was shared, a context
of another length give the same logits or they do not. A few show late, or less than logits are compared to.
"""

import torch

from stagdist.config.loading import differences
from stagdist.config.parts import ModelConfig
from stagdist.model.rotary import inverse_frequencies


def unsettled_keys(first: ModelConfig, second: ModelConfig, tokens: int) -> dict[str, int | None]:
    """Keys that equal logits on a text do not settle, each with the tokens that would; None where no text does.

    A window counts as far as it cuts something off within the context that both have, the rotary embedding by its
    wavelengths: what they do grows with the position, so the whole context must have been read. The epsilon of the
    norms shows where activations are small, on this text or on another.

    Args:
        tokens: of the text that was read.
    """
    changed = differences(first, second)
    context = min(first.max_position_embeddings, second.max_position_embeddings)
    late = []
    if _reach(first, context) != _reach(second, context):
        late.append("cross_attention_window")
    if not torch.equal(inverse_frequencies(first), inverse_frequencies(second)):
        late.append("rope_")
    found: dict[str, int | None] = {}
    if tokens < context:
        found |= {key: context for key in changed if key.startswith(tuple(late))}
    if "rms_norm_eps" in changed:
        found["rms_norm_eps"] = None
    return found


def _reach(model: ModelConfig, context: int) -> int:
    """Slots of the memory that a position sees at most."""
    if not model.staggered or model.num_sections == 1:
        return context
    return min(model.cross_attention_window or context, context)
