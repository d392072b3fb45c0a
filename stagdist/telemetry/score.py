"""What a text cost a model, in one form for training, evaluation and n-gram rivals."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TextScore:
    """What a text cost: the sum over its scored tokens."""

    tokens: int
    nats: float
    bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean nats per token."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the scored tokens."""
        return self.nats / math.log(2) / self.bytes

    def as_metrics(self) -> dict[str, float]:
        """Loss (nats per token), perplexity and bits per byte under their names in `metrics.jsonl`."""
        return {
            "loss": self.nats / self.tokens,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "scored_tokens": self.tokens,
            "scored_bytes": self.bytes,
        }

    def __add__(self, other: "TextScore") -> "TextScore":
        """Score of two texts together."""
        return TextScore(self.tokens + other.tokens, self.nats + other.nats, self.bytes + other.bytes)
