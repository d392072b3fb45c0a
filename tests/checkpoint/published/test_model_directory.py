"""A model directory holds canonical whole tensors and comes back as the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from stagdist.checkpoint.convert.staging import ConversionOptions, staged_folder
from stagdist.checkpoint.published import model_writer as model_directory
from stagdist.checkpoint.published.load_model import load_model
from stagdist.checkpoint.published.model_json import read_text_tokens
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter, shard_plan
from stagdist.checkpoint.text_tokens import TextTokens
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError
from stagdist.model.megatron import TensorParallel
from stagdist.parallel.groups import single_process
from stagdist.parallel.layout import model_parameters
from tests.reference import stagformer as reference

SHAPE: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 16, "section_layers": [2, 2], "rope_theta": 5000.0,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "stagger": 2, "cross_attention_window": 3},
    {"share_section_weights": True, "combine_sections": True},
    {"stagger": 0, "cross_attention_key_value_heads": 1, "head_dim": 6},
    {"connection": "sequential", "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8}},
]


def write(directory: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A directory of random weights, which are returned by canonical name."""
    parameters = reference.random_parameters(model, seed=3, perturb=True)
    with ModelDirectoryWriter(directory, model, dtype, end_of_document=0) as writer:
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
    return parameters


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_directory_loads_as_the_model_that_was_written(tmp_path: Path, variant: dict[str, Any]) -> None:
    model = ModelConfig(**SHAPE | variant)
    parameters = write(tmp_path / "model", model)
    ids = torch.randint(0, 37, (2, 16), generator=torch.Generator().manual_seed(0))
    with single_process() as groups, torch.no_grad():
        loaded = load_model(tmp_path / "model", TensorParallel(groups.tensor))
        logits = loaded(ids)
    torch.testing.assert_close(logits, reference.forward(parameters, model, ids), atol=1e-5, rtol=1e-5)
    read = ModelReader(tmp_path / "model").model
    assert (read.section_layers, read.connection, read.stagger) == (
        model.section_layers,
        model.connection,
        model.stagger,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_sequential_baseline_is_a_llama_to_transformers(tmp_path: Path) -> None:
    model = ModelConfig(**SHAPE, connection="sequential")
    parameters = write(tmp_path / "model", model)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(llama).__name__ == "LlamaForCausalLM"
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, reference.forward(parameters, model, ids), atol=1e-5, rtol=1e-5)


def test_large_models_are_cut_into_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_directory, "MAX_SHARD_BYTES", 6000)
    model = ModelConfig(**SHAPE)
    parameters = write(tmp_path / "model", model)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and index["weight_map"].keys() == parameters.keys()
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in parameters.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "model" / file, framework="pt") as stream:
            assert stream.get_tensor(name).equal(parameters[name])
    with single_process() as groups:
        load_model(tmp_path / "model", TensorParallel(groups.tensor))


def test_a_shard_never_exceeds_the_limit_unless_one_tensor_does() -> None:
    specs = model_parameters(ModelConfig(**SHAPE))
    for limit in (1, 3000, 10**9):
        shards = shard_plan(specs, 4, limit)
        assert [spec for shard in shards for spec in shard] == specs
        assert all(len(shard) == 1 or sum(4 * spec.numel for spec in shard) <= limit for shard in shards)


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    model = ModelConfig(**SHAPE)
    write(tmp_path / "model", model)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with (
        pytest.raises(RuntimeError, match="stop"),
        staged_folder(tmp_path / "model", ConversionOptions(overwrite=True)) as staged,
        ModelDirectoryWriter(staged, model, torch.float32, 0) as writer,
    ):
        writer.add("embedding.weight", torch.zeros(37, 16))
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_directory_whose_writing_was_interrupted_is_refused(tmp_path: Path) -> None:
    model = ModelConfig(**SHAPE)
    with (
        pytest.raises(RuntimeError, match="stop"),
        ModelDirectoryWriter(tmp_path / "model", model, torch.float32, 0) as writer,
    ):
        for spec in model_parameters(model):
            writer.add(spec.name, torch.zeros(spec.shape))
        raise RuntimeError("stop")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        ModelReader(tmp_path / "model")


def test_wrong_directories_are_refused_by_name(tmp_path: Path) -> None:
    model = ModelConfig(**SHAPE)
    write(tmp_path / "model", model)
    (tmp_path / "model" / "complete.json").unlink()
    body = json.loads((tmp_path / "model" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="absent"):
        ModelReader(tmp_path / "absent")
    for change, complaint in (
        ({"hidden_size": 20}, r"embedding\.weight|shape"),
        ({"section_layers": [2, 3], "num_hidden_layers": 5}, r"lacks the tensor sections\.1\.layers\.2"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"num_attention_heads": 3}, "multiple"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(body | change))
        with single_process() as groups, pytest.raises(CheckpointError, match=complaint):
            load_model(tmp_path / "model", TensorParallel(groups.tensor))


def test_the_tokens_of_the_directory_that_it_is_made_of_go_along(tmp_path: Path) -> None:
    model = ModelConfig(**SHAPE)
    parameters = reference.random_parameters(model, seed=3)
    tokens = TextTokens(
        {"bos_token_id": 1, "eos_token_id": [2, 3]}, {"eos_token_id": [2, 3], "temperature": 0.6, "pad_token_id": 4}
    )
    with ModelDirectoryWriter(tmp_path / "model", model, torch.float32, 0, tokens) as writer:
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
    assert read_text_tokens(tmp_path / "model") == tokens
    (tmp_path / "model" / "generation_config.json").unlink()
    assert read_text_tokens(tmp_path / "model") == TextTokens(tokens.config, tokens.config)
    ModelReader(tmp_path / "model")
