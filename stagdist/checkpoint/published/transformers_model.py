"""A model directory as a model of `transformers`, by our own code and never by code that lies in the directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.convert.find import ModelSource, check_tokenizer
from stagdist.errors import CheckpointError

_ADAPTER = "adapter_config.json"
"""With the package `peft` transformers would load the model that this file names in place of the directory's."""


def load_with_transformers(directory: str | Path, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer of a model directory, a Llama's or a StagFormer's.

    The directory is checked as before a conversion, and every weight of the model must come from it.

    Args:
        dtype: of the weights; `auto` for that of the files.

    Raises:
        CheckpointError: the directory is none, is not as it was written, or does not load whole, by the tensor.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    from stagdist.hf.modeling_stagformer import StagFormerForCausalLM

    source = ModelSource(Path(directory))
    source.check()
    check_tokenizer(source.directory)
    if (source.directory / _ADAPTER).exists():
        raise CheckpointError(f"{directory} holds {_ADAPTER}, an adapter to another model; remove it")
    kind: Any = StagFormerForCausalLM if source.model.staggered else LlamaForCausalLM
    try:
        model, loading = kind.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # told in the loading info, by name
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), config=model.config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever files that do not fit make it raise
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from error
    _require_whole(directory, loading)
    return model.eval(), tokenizer


def _require_whole(directory: str | Path, loading: Mapping[str, Any]) -> None:
    """What transformers would fill with random values or leave out is refused.

    Args:
        loading: `output_loading_info` of `from_pretrained`.
    """
    kinds = {"missing_keys": "lacks", "unexpected_keys": "holds besides the model", "mismatched_keys": "has misshapen"}
    for key, told in kinds.items():
        if loading[key]:
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in loading[key])
            raise CheckpointError(
                f"{directory}, as transformers reads it, {told}: {', '.join(names[:3])}"
                f"{' and more' if len(names) > 3 else ''}; export the model again"
            )
