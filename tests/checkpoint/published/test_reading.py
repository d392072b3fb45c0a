"""All of a model directory is checked before anything is built, and it is read slice by slice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.errors import CheckpointError
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.published.directories import FILE, INDEX, LLAMA, change, split, write, write_index
from tests.reference import stagformer as reference
from tests.reference.variants import VARIANTS


@pytest.mark.parametrize("several_files", [False, True])
@pytest.mark.parametrize(
    "name", ["unequal sections", "three sections with everything", "sequential, tied", "wide heads"]
)
def test_slices_are_those_of_the_parameters(tmp_path: Path, name: str, several_files: bool) -> None:
    model, parameters = write(tmp_path / "model", VARIANTS[name])
    if several_files:
        split(tmp_path / "model")
    reader = ModelReader(tmp_path / "model")
    assert reference.shape_of(reader.model) == reference.shape_of(model)
    for spec in model_parameters(model):
        for dim, length in enumerate(spec.shape):
            start, stop = length // 3, max(1, 2 * length // 3)
            expected = parameters[spec.name].narrow(dim, start, stop - start)
            assert torch.equal(reader.read(spec, dim, start, stop), expected)
        assert torch.equal(reader.read(spec, 0, 0, spec.shape[0]), parameters[spec.name])


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "sections.1.memory_norm.weight"),
        ({"combine_sections": True}, "section_mix"),
        ({}, "head.weight"),
        (LLAMA, "model.layers.1.mlp.up_proj.weight"),
        (LLAMA, "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, keys: dict[str, Any], name: str) -> None:
    write(tmp_path / "model", keys)
    ModelReader(tmp_path / "model")
    change(tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"model lacks the tensor {name}"):
        ModelReader(tmp_path / "model")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    name = "sections.0.layers.0.mlp.down_proj.weight"
    change(tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(16, 23)}))
    with pytest.raises(CheckpointError, match=rf"{name} in .* has shape \[16, 23\], config.json asks \[16, 24\]"):
        ModelReader(tmp_path / "model")


def test_a_configuration_of_another_size_than_the_tensors_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 38}))
    with pytest.raises(CheckpointError, match=r"embedding.weight .* has shape \[37, 16\], config.json asks \[38, 16\]"):
        ModelReader(tmp_path / "model")


def test_more_layers_than_tensors_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    many = {"section_layers": [9999, 9999], "num_hidden_layers": 2 * 9999}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | many))
    with pytest.raises(CheckpointError, match=r"config\.json says 19998 layers, the weights are \d+ tensors"):
        ModelReader(tmp_path / "model")


def test_a_bias_of_a_llama_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "model", LLAMA)
    name = "model.layers.0.self_attn.q_proj.bias"
    change(tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(16)}))
    with pytest.raises(CheckpointError, match=f"does not have: {name}"):
        ModelReader(tmp_path / "model")


def test_many_unknown_tensors_are_not_all_listed(tmp_path: Path) -> None:
    write(tmp_path / "model", LLAMA)
    extra = {f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.zeros(16) for layer in (0, 1) for part in "qkv"}
    change(tmp_path / "model", lambda tensors: tensors.update(extra))
    with pytest.raises(CheckpointError, match=r"0\.self_attn\.v_proj\.bias and more$"):
        ModelReader(tmp_path / "model")


def test_what_old_and_tied_llamas_carry_along_is_accepted(tmp_path: Path) -> None:
    model, parameters = write(tmp_path / "model", LLAMA | {"tie_word_embeddings": True})
    carried = {
        "lm_head.weight": parameters["embedding.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    change(tmp_path / "model", lambda tensors: tensors.update(carried))
    reader = ModelReader(tmp_path / "model")
    embedding = model_parameters(model)[0]
    assert torch.equal(reader.read(embedding, 0, 3, 9), parameters["embedding.weight"][3:9])


def test_a_tied_llama_may_store_its_head_alone(tmp_path: Path) -> None:
    model, parameters = write(tmp_path / "model", LLAMA | {"tie_word_embeddings": True})
    change(tmp_path / "model", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    reader = ModelReader(tmp_path / "model", hashing=True)
    assert torch.equal(reader.weight(model_parameters(model)[0]), parameters["embedding.weight"])
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model.embed_tokens.weight, parameters["embedding.weight"])


def test_a_head_of_a_stagformer_that_says_it_is_tied_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", {"tie_word_embeddings": True})
    change(tmp_path / "model", lambda tensors: tensors.update({"head.weight": torch.zeros(37, 16)}))
    with pytest.raises(CheckpointError, match=r"does not have: head\.weight"):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    write(tmp_path / "model", {})
    content = (tmp_path / "model" / FILE).read_bytes()
    (tmp_path / "model" / FILE).write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(CheckpointError, match=FILE):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "[]",
        '{"a": 5}',
        '{"a": {"data_offsets": ["a", "b"]}}',
        '{"a": {"data_offsets": [0, "b"]}, "c": {"data_offsets": [0, 9000]}}',
        '{"a": {"data_offsets": [0]}}',
    ],
    ids=lambda header: header[:40],
)
def test_a_header_that_is_none_is_named_in_one_line(tmp_path: Path, header: str) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / FILE).write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=rf"{FILE} cannot be read") as caught:
        ModelReader(tmp_path / "model")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_header_larger_than_any_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    with (tmp_path / "model" / FILE).open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_100)  # takes no space on the disk
    with pytest.raises(CheckpointError, match=rf"{FILE} cannot be read: .*header"):
        ModelReader(tmp_path / "model")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"has no {FILE} nor {INDEX}: get the model"):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "model", {})
    split(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX} cannot be read"):
        ModelReader(tmp_path / "model")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    split(tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        ModelReader(tmp_path / "model")


def test_a_file_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    where = split(tmp_path / "model")
    write_index(tmp_path / "model", where | {"head.weight": "model-00003-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-00003-of-00002\.safetensors"):
        ModelReader(tmp_path / "model")


def test_a_tensor_that_lies_in_another_file_than_the_index_says_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    where = split(tmp_path / "model")
    other = next(file for file in where.values() if file != where["head.weight"])
    write_index(tmp_path / "model", where | {"head.weight": other})
    with pytest.raises(CheckpointError, match=rf"{other} lacks the tensor head\.weight of the index"):
        ModelReader(tmp_path / "model")


def test_a_tensor_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    where = split(tmp_path / "model")
    where.pop("output_norm.weight")
    write_index(tmp_path / "model", where)
    with pytest.raises(CheckpointError, match=r"lacks the tensor output_norm\.weight"):
        ModelReader(tmp_path / "model")


def test_a_directory_without_configuration_is_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        ModelReader(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "llama"}', "num_hidden_layers is None; give"),
        ('{"model_type": "llama", "num_hidden_layers": "2"}', "num_hidden_layers is '2'; give"),
        ('{"model_type": "llama", "num_hidden_layers": 1}', "vocab_size is missing"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        ModelReader(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *((key, json.loads(text), f"{key} is {text}, must be")
          for key in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
          for text in ("16.0", "true", "-1", "[1]", "{}")),
        ("hidden_size", "16", "hidden_size is '16', must be an integer"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5', must be a number"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no', must be true or false"),
        ("dtype", "auto", "dtype 'auto'; say that of the weights, one of ['float32'"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    """`transformers` refuses them too, some by blaming the tokenizer."""
    write(tmp_path / "model", LLAMA)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        ModelReader(tmp_path / "model")


def test_a_tensor_of_a_file_that_the_index_does_not_have_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    where = split(tmp_path / "model")
    file = tmp_path / "model" / sorted(set(where.values()))[1]
    save_file(load_file(file) | {"extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors holds the tensor extra\.weight"):
        ModelReader(tmp_path / "model")


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", {})
    single = (tmp_path / "model" / FILE).read_bytes()
    split(tmp_path / "model")
    (tmp_path / "model" / FILE).write_bytes(single)
    with pytest.raises(CheckpointError, match="read differently; remove the wrong one"):
        ModelReader(tmp_path / "model")


NO_FILES = ["", "..", "/x.safetensors", "../model.safetensors", "config.json", "a\0b.safetensors", "\ud800.safetensors"]


@pytest.mark.parametrize("where", [[1], {"embedding.weight": 5}, *({"embedding.weight": name} for name in NO_FILES)])
def test_an_index_that_names_no_files_of_the_directory_is_refused(tmp_path: Path, where: Any) -> None:
    write(tmp_path / "model", {})
    (tmp_path / "model" / FILE).unlink()
    write_index(tmp_path / "model", where)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read: weight_map"):
        ModelReader(tmp_path / "model")
