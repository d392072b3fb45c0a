"""A model that trains and decodes in a moment, as a configuration file."""

from pathlib import Path

SHAPE = """
name: tiny
model:
  vocab_size: 300
  hidden_size: 32
  intermediate_size: 48
  num_attention_heads: 2
"""


def write_tiny(path: Path, *, model: str, rest: str) -> Path:
    """Write it to `path`, with further keys of the model and further sections of the file, each in YAML."""
    path.write_text(f"{SHAPE}{''.join(f'  {line}' for line in model.splitlines(keepends=True))}{rest}")
    return path
