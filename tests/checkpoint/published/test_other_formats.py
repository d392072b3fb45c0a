"""Directories whose weights are in a format that is not read: the message names it, and its remedy works."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stagdist.checkpoint.convert.find import open_model
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import CheckpointError
from tests.checkpoint.convert.test_llama_import import rewrite, save_llama
from tests.checkpoint.published.directories import FILE, INDEX, split
from tests.checkpoint.synthetic import model_directory, training_checkpoint


def problem(folder: Path) -> str:
    """Why a directory is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def follow(message: str, folder: Path, new: Path) -> None:
    """Run the command of a message, and put the files of the tokenizer beside the result."""
    (command,) = re.findall(r"AutoModelForCausalLM\.from_pretrained\(.*\)\.save_pretrained\(NEW\)", message)
    assert str(folder) in command
    exec(command, {"AutoModelForCausalLM": AutoModelForCausalLM, "NEW": new})
    byte_tokenizer().save(new)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_named_and_the_remedy_converts_them(tmp_path: Path, sharded: bool) -> None:
    folder = tmp_path / "llama"
    save_llama(folder, {})
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    if sharded:
        where = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(tensors)}
        for file in set(where.values()):
            torch.save({name: tensors[name] for name in where if where[name] == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    message = problem(folder)
    assert f"{folder} has no {FILE} nor {INDEX}: its weights are in pytorch_model" in message
    follow(message, folder, tmp_path / "new")
    open_model(tmp_path / "new")
    written = load_file(tmp_path / "new" / FILE)
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "name",
    ["consolidated.00.pth", "consolidated.safetensors", "llama-q4.gguf", "flax_model.msgpack", "tf_model.h5",
     "weights.pt", "model.bin", "model.onnx", "model.ckpt", "adapter_model.safetensors",
     "model-00001-of-00002.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("has_config", [True, False])
def test_other_formats_are_named(tmp_path: Path, name: str, has_config: bool) -> None:
    save_llama(tmp_path / "llama", {})
    (tmp_path / "llama" / FILE).rename(tmp_path / "llama" / name)
    if not has_config:
        (tmp_path / "llama" / "config.json").unlink()
    message = problem(tmp_path / "llama")
    assert f"its weights are in {name}; " in message
    assert re.search(r"; (get the model with model\*\.safetensors|they change|their index)", message)
    assert has_config == ("there is no config.json" not in message)


@pytest.mark.parametrize(
    "place",
    ["__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp", "global_step10/mp_rank_00_model_states.pt",
     "iter_0000100/mp_rank_00/model_optim_rng.pt"],
)  # fmt: skip
def test_training_checkpoints_of_other_programs_are_named(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"x")
    assert f"its weights are in {place}; a training checkpoint of another program" in problem(tmp_path)
    with pytest.raises(CheckpointError, match="a training checkpoint of another program"):
        ModelReader(tmp_path)


@pytest.mark.parametrize("parts", [("snapshots/a", "snapshots/b"), ("checkpoint-500", "checkpoint-1000"), ("model",)])
def test_a_folder_of_model_directories_names_one(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """The cache of a hub, the output of a trainer, a run without checkpoints."""
    for part in parts:
        save_llama(tmp_path / part, {})
    assert problem(tmp_path).endswith(f": give a folder in it, such as {tmp_path / parts[-1]}")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: there is none; give a folder in it"):
        ModelReader(tmp_path)
    open_model(tmp_path / parts[-1])


def test_what_is_no_model_directory_of_ours_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a training checkpoint: export it with tools/convert_checkpoint"):
        ModelReader(training_checkpoint(tmp_path / "run", {}))
    folder = model_directory(tmp_path / "model", {})
    for name in ("complete.json", "config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing: get it from their source"):
        ModelReader(folder)


def test_a_directory_without_weights_says_so(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", {})
    (tmp_path / "llama" / FILE).unlink()
    assert "get the model with model*.safetensors from its source" in problem(tmp_path / "llama")


@pytest.mark.parametrize("place", [".cache/huggingface/download/a1b2.incomplete", "../../blobs/a1b2.incomplete"])
@pytest.mark.parametrize("sharded", [False, True])
def test_remains_of_a_download_are_named(tmp_path: Path, place: str, sharded: bool) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    save_llama(folder, {})
    if sharded:
        split(folder)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_bytes(b"part")
    assert "its download did not finish (it left a1b2.incomplete); start the download again" in problem(folder)


def test_a_dtype_that_lies_is_corrected_as_the_message_says(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", {})
    rewrite(tmp_path / "llama", ("dtype",), {"torch_dtype": "float16"})
    message = problem(tmp_path / "llama")
    assert "float32 such as model." in message
    assert "config.json says float16; set dtype or torch_dtype there to float32" in message
    rewrite(tmp_path / "llama", (), {"torch_dtype": "float32"})
    assert open_model(tmp_path / "llama").dtype == torch.float32


def test_mixed_types_are_named_and_the_remedy_converts_them(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    save_llama(folder, {})
    tensors = {name: t if "norm" in name else t.bfloat16() for name, t in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    rewrite(folder, (), {"dtype": "bfloat16"})
    message = problem(folder)
    assert "7 float32 such as model.layers.0.input_layernorm.weight" in message and "23 bfloat16 such as" in message
    follow(message, folder, tmp_path / "new")
    assert open_model(tmp_path / "new").dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "remedy"), [(torch.float64, "dtype='float32'"), (torch.int8, "before quantization")])
def test_types_that_are_not_read_have_a_remedy(tmp_path: Path, dtype: torch.dtype, remedy: str) -> None:
    save_llama(tmp_path / "llama", {})
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "llama" / FILE).items()}
    save_file(tensors, tmp_path / "llama" / FILE, metadata={"format": "pt"})
    message = problem(tmp_path / "llama")
    assert remedy in message
    if dtype == torch.float64:
        follow(message, tmp_path / "llama", tmp_path / "new")
        assert open_model(tmp_path / "new").dtype == torch.float32
