"""A Llama of `transformers` goes through import and export with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.convert.find import open_model, open_training
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.proof import plain_logits, reader
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.verify import verify
from stagdist.errors import CheckpointError

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
    imported_as = import_model(tmp_path / "llama", tmp_path / "run", None, ConversionOptions())
    assert "tensors are bit-equal" in imported_as.checked
    imported = open_training(tmp_path / "run")
    assert (imported.model.connection, imported.model.section_layers) == ("sequential", (3,))
    torch.testing.assert_close(plain_logits(imported.model, reader(imported), ids), expected, atol=1e-5, rtol=1e-5)

    export(tmp_path / "run", tmp_path / "again", ConversionOptions(tokenizer="bytes"))
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


def rewrite(folder: Path, drop: tuple[str, ...], keys: dict[str, Any]) -> None:
    """Change a `config.json`."""
    path = folder / "config.json"
    body = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(body | keys))


UNTYPED = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}


@pytest.mark.parametrize(
    ("drop", "keys"),
    [
        ((), {"rope_parameters": UNTYPED | {"rope_theta": 1000.0}}),
        (("rope_parameters",), {"rope_scaling": UNTYPED, "rope_theta": 1000.0}),
        (("rope_parameters",), {"rope_scaling": LLAMA3, "rope_theta": 1000.0}),
        (("rope_parameters",), {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1000.0}),
        (("rope_parameters",), {"rope_scaling": {"type": "default"}}),
        (("rope_parameters",), {"rope_scaling": None, "rope_theta": 1000.0}),
        (("rope_parameters",), {}),
        (("rms_norm_eps",), {}),
        (("max_position_embeddings",), {}),
        (("hidden_act", "head_dim", "dtype", "attention_bias", "mlp_bias", "tie_word_embeddings"), {}),
    ],
    ids=str,
)
def test_every_spelling_means_what_it_means_to_transformers(
    tmp_path: Path, drop: tuple[str, ...], keys: dict[str, Any]
) -> None:
    save_llama(tmp_path / "llama", {})
    rewrite(tmp_path / "llama", drop, keys)
    ids = torch.arange(40)[None]
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    with torch.no_grad():
        expected = llama(ids).logits
    source = open_model(tmp_path / "llama")
    torch.testing.assert_close(plain_logits(source.model, reader(source), ids), expected, atol=2e-5, rtol=0)
    for key in ("rms_norm_eps", "max_position_embeddings"):
        assert getattr(source.model, key) == getattr(llama.config, key)


DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("drop", "keys", "complaint"),
    [
        ((), {"rope_parameters": {"type": "yarn", "factor": 2.0}}, "rope_parameters has rope_type 'yarn'"),
        ((), {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}, "which programs read differently"),
        ((), {"rope_parameters": LLAMA3 | {"rope_theta": 7.0}, "rope_scaling": LLAMA3}, "read differently"),
        ((), {"rope_parameters": {"rope_type": "default", "type": "llama3"}}, "rope_type 'default' and type 'llama3'"),
        ((), {"rope_parameters": {"factor": 2.0}}, "has factor but no rope_type"),
        ((), {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor"),
        ((), {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
        ((), {"rope_parameters": {"full_attention": DEFAULT}}, "has full_attention"),
        ((), {"rope_parameters": LLAMA3, "original_max_position_embeddings": 8}, "original_max_position_embeddings 8"),
        ((), {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ((), {"rope_scaling": "x"}, "rope_scaling is 'x'; it must be an object"),
        ((), {"rope_parameters": None, "rope_theta": "x"}, "rope_theta is 'x', must be a number"),
        ((), {"dtype": ["x"]}, r"dtype \['x'\]"),
        ((), {"torch_dtype": "bfloat16"}, "dtype 'float32' and torch_dtype 'bfloat16'"),
        ((), {"connection": "staggered"}, "model_type llama and connection 'staggered'"),
        ((), {"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ((), {"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ((), {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        (("num_hidden_layers",), {}, "num_hidden_layers is None; give"),
        (("intermediate_size",), {}, "json does not describe .*: intermediate_size is missing"),
    ],
    ids=str,
)
def test_what_is_unclear_is_refused_by_name(
    tmp_path: Path, drop: tuple[str, ...], keys: dict[str, Any], complaint: str
) -> None:
    save_llama(tmp_path / "llama", {})
    rewrite(tmp_path / "llama", drop, keys)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        open_model(tmp_path / "llama")
    assert "\n" not in str(caught.value) and "http" not in str(caught.value)


def test_a_tied_llama_may_carry_its_head_only_as_a_copy(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", {"tie_word_embeddings": True})
    path = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    assert open_model(tmp_path / "llama").model.tie_word_embeddings
    for other in (head.bfloat16(), head[:-1].clone(), head + torch.eye(*head.shape)):
        save_file(tensors | {"lm_head.weight": other}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight and .* are both there and differ"):
            open_model(tmp_path / "llama")
