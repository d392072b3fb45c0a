"""Load a model directory as a `transformers` model, with our own code and never with code in the directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stagdist.checkpoint.published.model_json import read_body
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.data.compatibility import check_vocabulary
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError

_ADAPTER = "adapter_config.json"
"""If `peft` is installed, transformers loads the model that this file names instead of that of the directory."""


def load_with_transformers(directory: str | Path, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Load the model (in evaluation mode) and the tokenizer of a model directory: a StagFormer, Llama or Mistral.

    The directory is checked as before a conversion, and every weight of the model must come from it.

    Args:
        dtype: of the weights; `auto` for that of the files.

    Raises:
        CheckpointError: this is no model directory, it was changed, or it does not load completely; the message names
            the tensor.
        DataError: its tokenizer cannot be loaded, or gives ids that the model lacks.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

    from stagdist.hf.modeling_stagformer import StagFormerForCausalLM

    source = ModelReader(directory)
    source.check()
    check_vocabulary(load_tokenizer(directory), directory, source.model.vocab_size, source.directory)
    if (source.directory / _ADAPTER).exists():
        raise CheckpointError(f"{directory} holds {_ADAPTER}, an adapter to another model; remove it")
    kinds: dict[str, Any] = {
        "stagformer": StagFormerForCausalLM, "llama": LlamaForCausalLM, "mistral": MistralForCausalLM
    }  # fmt: skip
    kind = kinds[read_body(directory)["model_type"]]
    try:
        model, loading = kind.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in the loading info, by name
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), config=model.config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for files that do not fit
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from error
    _require_complete(directory, loading)
    return model.eval(), tokenizer


def _require_complete(directory: str | Path, loading: Mapping[str, Any]) -> None:
    """Refuse weights that transformers would fill with random values or leave out.

    Args:
        loading: `output_loading_info` of `from_pretrained`.
    """
    kinds = {"missing_keys": "lacks", "unexpected_keys": "has unknown tensors", "mismatched_keys": "has other shapes"}
    for key, fault in kinds.items():
        if loading[key]:
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in loading[key])
            raise CheckpointError(
                f"{directory}, as transformers reads it, {fault}: {', '.join(names[:3])}"
                f"{' and more' if len(names) > 3 else ''}; export the model again"
            )
