"""A directory whose vocabulary `transformers` has enlarged is read, and generates text, as any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.data.tokenizer import byte_tokenizer
from stagdist.errors import CheckpointError
from tests.checkpoint.published.test_exported_code import shape, write
from tests.launch.generating import run_ranks_to_end
from tests.reference.variants import BASE


def resized(source: Path, destination: Path, rows: int) -> Any:
    """The model of `source` with so many rows, saved with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    ids = torch.tensor([list(b"to be")])
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(rows)
        after = model(ids).logits
    assert after.shape[-1] == rows
    torch.testing.assert_close(after[..., : before.shape[-1]], before, atol=1e-6, rtol=0)
    model.save_pretrained(destination)
    byte_tokenizer().save(destination)
    return model


def foreign_llama(folder: Path, tied: bool) -> None:
    """A Llama of 250 rows, fewer than the tokenizer has tokens."""
    shape = {key: BASE[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=250, num_hidden_layers=2, tie_word_embeddings=tied)
    ).save_pretrained(folder)


@pytest.mark.parametrize("rows", [264, 320])
@pytest.mark.parametrize(
    "kind", ["stagger 2", "tied", "three sections with everything", "sequential", "a Llama", "a Llama, tied"]
)
def test_more_rows_are_read_and_generate_text(tmp_path: Path, kind: str, rows: int) -> None:
    if kind.startswith("a Llama"):
        foreign_llama(tmp_path / "model", tied="tied" in kind)
    else:
        write(tmp_path / "model", shape(kind))
    model = resized(tmp_path / "model", tmp_path / "more", rows)
    assert ModelReader(tmp_path / "more").model.vocab_size == rows
    arguments = ["--prompt", "to be", "--max-new-tokens", "8", "--temperature", "0", "--ignore-eos", "--json"]
    done = run_ranks_to_end(tmp_path / "more", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    ids = torch.tensor([list(b"to be")])
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert json.loads(done.stdout)["token_ids"] == expected[0, 5:].tolist()


def test_a_resized_model_over_its_own_directory_is_refused_until_the_record_is_removed(tmp_path: Path) -> None:
    write(tmp_path / "model", shape("tied"))
    resized(tmp_path / "model", tmp_path / "model", 264)
    with pytest.raises(CheckpointError, match=r"model: .* were written; .* remove complete\.json if the change"):
        ModelReader(tmp_path / "model")
    (tmp_path / "model" / "complete.json").unlink()
    assert ModelReader(tmp_path / "model").model.vocab_size == 264
