"""A model directory as a model of `transformers`, by our own code and never by code that lies in the directory."""

from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.model_config import model_of, read_body
from stagdist.checkpoint.written_record import read_record
from stagdist.errors import CheckpointError


def load_with_transformers(directory: str | Path, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer of a model directory, a Llama's or a StagFormer's.

    Args:
        dtype: of the weights; `auto` for that of the files.

    Raises:
        CheckpointError: the directory is none, is not as it was written, or does not load.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    from stagdist.hf.modeling_stagformer import StagFormerForCausalLM

    body = read_body(directory)
    shape = model_of(body, Path(directory) / "config.json")
    read_record(Path(directory)).check_config(body, shape)
    kind = StagFormerForCausalLM if shape.staggered else LlamaForCausalLM
    try:
        model = kind.from_pretrained(str(directory), dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), config=model.config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever files that do not fit make it raise
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from error
    return model.eval(), tokenizer
