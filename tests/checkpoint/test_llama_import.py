"""A Llama of `transformers` goes through import and export with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.model_conversions import export
from stagdist.checkpoint.proof import plain_logits, reader
from stagdist.checkpoint.sources import open_model, open_training
from stagdist.checkpoint.staging import Options
from stagdist.checkpoint.training_conversions import import_model
from stagdist.checkpoint.verification import verify
from stagdist.errors import CheckpointError
from stagdist.parallel.grid import Grid

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMAS: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    {"tie_word_embeddings": True, "head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"num_key_value_heads": 1, "rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
]


def save_llama(folder: Path, keys: dict[str, Any]) -> LlamaForCausalLM:
    """A random Llama with uneven norms, as `transformers` writes it."""
    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": 64, **keys,
        }
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    llama.save_pretrained(folder)
    return llama


@pytest.mark.parametrize("keys", LLAMAS, ids=str)
def test_a_llama_is_imported_and_exported_as_the_same_llama(tmp_path: Path, keys: dict[str, Any]) -> None:
    llama = save_llama(tmp_path / "llama", keys)
    ids = torch.randint(0, 259, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = llama(ids).logits
    tensor = 1 if keys.get("num_key_value_heads") == 1 else 2
    proof = import_model(tmp_path / "llama", tmp_path / "run", Grid(1, 2, tensor), None, Options())
    assert "logits" in proof.checked
    imported = open_training(tmp_path / "run")
    assert (imported.model.connection, imported.model.section_layers) == ("sequential", (3,))
    torch.testing.assert_close(plain_logits(imported.model, reader(imported), ids), expected, atol=1e-5, rtol=1e-5)

    export(tmp_path / "run", tmp_path / "again", Options(tokenizer="bytes"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert isinstance(again, LlamaForCausalLM)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    assert verify(tmp_path / "llama", tmp_path / "again", tokenizer="bytes").largest_difference == 0.0


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}, "rope_type 'linear'"),
    ],
)
def test_what_a_stagformer_lacks_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], complaint: str) -> None:
    save_llama(tmp_path / "llama", keys)
    with pytest.raises(CheckpointError, match=complaint):
        open_model(tmp_path / "llama")
