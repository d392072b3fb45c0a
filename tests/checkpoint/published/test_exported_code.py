"""A written model directory is all that `transformers` needs: nothing of stagdist is imported to load it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.checkpoint.published import model_writer as model_directory
from stagdist.checkpoint.published.load_model import load_model
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.published.model_writer import CODE_FILES, ModelDirectoryWriter
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.model.megatron import TensorParallel
from stagdist.parallel.groups import single_process
from stagdist.parallel.layout import model_parameters
from tests.reference import stagformer as reference
from tests.reference.variants import BASE, VARIANTS

USUAL = (
    "one section, tied", "stagger 2", "window", "shared", "whole vocabulary", "sequential", "llama3 scaling",
    "three sections with everything",
)  # fmt: skip
"""Variants whose exported code `make test` runs in another process; tests/hf runs the code with all of them."""
EXPORTED = [pytest.param(name, marks=[pytest.mark.slow] * (name not in USUAL)) for name in VARIANTS]
TEXTS = ["To be, or not", "or"]

STRANGER = """
import sys
for name in ("stagdist", "tests", "megatron", "deepspeed"):
    sys.modules[name] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
found = {}
for directory in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    batch = tokenizer(["To be, or not", "or"], return_tensors="pt", padding=True)
    row = tokenizer("To be, or not", return_tensors="pt")
    with torch.no_grad():
        logits = model(row["input_ids"]).logits
    texts = model.generate(**batch, max_new_tokens=8, do_sample=False)
    beams = model.generate(**batch, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    model.save_pretrained(directory + "-saved")
    found[directory] = {
        "class": type(model).__name__, "dtype": str(model.dtype), "ids": row["input_ids"], "logits": logits,
        "texts": texts, "beams": len(beams), "weights": model.state_dict(),
    }
torch.save(found, sys.argv[1])
"""


def write(directory: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A directory of random weights with the byte tokenizer; the weights by canonical name."""
    parameters = reference.random_parameters(model, seed=3, perturb=True)
    tokenizer = byte_tokenizer()
    with ModelDirectoryWriter(directory, model, dtype, tokenizer.end_of_document) as writer:
        tokenizer.save(writer.folder)
        for spec in model_parameters(model):
            writer.add(spec.name, parameters[spec.name])
    return parameters


def shape(variant: str) -> ModelConfig:
    """A variant that reads bytes."""
    return ModelConfig(**BASE | VARIANTS[variant] | {"vocab_size": 257, "max_position_embeddings": 64})


Loaded = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The directory of a variant, and what a process without stagdist found in it."""
    groups = {True: USUAL, False: tuple(name for name in VARIANTS if name not in USUAL)}

    @cache
    def found(usual: bool) -> tuple[Path, dict[str, dict[str, Any]]]:
        return exported(tmp_path_factory.mktemp("exported"), groups[usual])

    def of(variant: str) -> tuple[Path, dict[str, Any]]:
        folder, results = found(variant in USUAL)
        return folder / variant.replace(" ", "-"), results[variant]

    return of


def exported(folder: Path, variants: Sequence[str]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Folder of the directories, and what one process found in all of them, by variant."""
    for number, variant in enumerate(variants):
        with pytest.MonkeyPatch.context() as patch:
            if number % 2:
                patch.setattr(model_directory, "MAX_SHARD_BYTES", 20_000)
            write(folder / variant.replace(" ", "-"), shape(variant))
        assert (folder / variant.replace(" ", "-") / "model.safetensors").is_file() == (number % 2 == 0)
    directories = [str(folder / variant.replace(" ", "-")) for variant in variants]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(folder / "found.pt"), *directories],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(folder / "found.pt", weights_only=True)
    return folder, {variant: found[directory] for variant, directory in zip(variants, directories, strict=True)}


@pytest.mark.parametrize("variant", EXPORTED)
def test_transformers_loads_it_without_stagdist(loaded: Loaded, variant: str) -> None:
    folder, found = loaded(variant)
    model = shape(variant)
    parameters = reference.random_parameters(model, seed=3, perturb=True)
    assert found["class"] == ("StagFormerForCausalLM" if model.staggered else "LlamaForCausalLM")
    assert found["ids"].tolist() == [list(TEXTS[0].encode())]
    expected = reference.forward(parameters, model, found["ids"])
    torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=0)
    with single_process() as groups, torch.no_grad():
        ours = load_model(folder, TensorParallel(groups.tensor))(found["ids"])
    torch.testing.assert_close(found["logits"], ours[..., : model.vocab_size], atol=1e-5, rtol=0)
    for name, value in parameters.items():
        assert found["weights"][model_directory.stored_name(name, model)].equal(value), name


@pytest.mark.parametrize("variant", EXPORTED)
def test_a_padded_batch_is_continued_as_the_reference_would(loaded: Loaded, variant: str) -> None:
    model, (_, found) = shape(variant), loaded(variant)
    parameters = reference.random_parameters(model, seed=3, perturb=True)
    end = byte_tokenizer().end_of_document
    for text, row in zip(TEXTS, found["texts"], strict=True):
        ids = list(text.encode())
        for _ in range(8):
            ids.append(int(reference.forward(parameters, model, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == end:
                break
        new = row.tolist()[len(TEXTS[0]) :]  # the shorter prompt was filled up on its left
        assert new == (ids[len(text) :] + [end] * 8)[: len(new)]
    assert found["beams"] == 4


@pytest.mark.parametrize("variant", EXPORTED)
def test_a_directory_that_transformers_saved_again_reads_as_the_same_model(loaded: Loaded, variant: str) -> None:
    folder, found = loaded(variant)
    again = folder.with_name(folder.name + "-saved")
    model, read = shape(variant), ModelReader(again).model
    resolved = {"head_dim": model.head_width, "num_key_value_heads": model.key_value_heads}
    if model.staggered:
        resolved["cross_attention_key_value_heads"] = model.cross_key_value_heads
    assert read == model.model_copy(update=resolved)
    assert {path.name for path in again.iterdir()} >= (set(CODE_FILES) if model.staggered else set())
    ids = found["ids"]
    with single_process() as groups, torch.no_grad():
        logits = load_model(again, TensorParallel(groups.tensor))(ids)[..., : model.vocab_size]
    torch.testing.assert_close(logits, found["logits"], atol=1e-5, rtol=0)


def test_only_a_staggered_model_carries_code(tmp_path: Path) -> None:
    write(tmp_path / "ours", shape("tied"), torch.bfloat16)
    write(tmp_path / "llama", shape("sequential"))
    assert list((tmp_path / "llama").glob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "llama" / "config.json").read_text())
    assert {path.name for path in (tmp_path / "ours").glob("*.py")} == set(CODE_FILES)
    end = byte_tokenizer().end_of_document
    for kind in ("ours", "llama"):
        body = json.loads((tmp_path / kind / "generation_config.json").read_text())
        assert body == {"eos_token_id": end, "pad_token_id": end}


def test_a_directory_from_before_the_code_travelled_along_is_still_read(tmp_path: Path) -> None:
    write(tmp_path / "model", shape("tied"))
    for name in (*CODE_FILES, "complete.json"):
        (tmp_path / "model" / name).unlink()
    body = json.loads((tmp_path / "model" / "config.json").read_text())
    del body["auto_map"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(body))
    assert ModelReader(tmp_path / "model").model.section_layers == (1, 1)
    with single_process() as groups:
        load_model(tmp_path / "model", TensorParallel(groups.tensor))
