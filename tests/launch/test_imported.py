"""A run that begins from an imported model directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.config.loading import load_config
from stagdist.data.tokenizer import train_bpe
from stagdist.training.saving.resumed_config import resumed_config
from tests.checkpoint.synthetic import model_directory
from tests.launch.runs import losses, pretrain, tiny_config

pytestmark = pytest.mark.ranks


def test_a_run_begins_from_an_imported_model_on_its_own_data_and_grid(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(
        corpus,
        "tuned",
        training={"steps": 2},
        # So small that the weights stay what they were, up to rounding.
        optimizer={"learning_rate": 1e-9},
        checkpoint={"interval_steps": 0},
    )
    source = model_directory(tmp_path / "source", config["model"] | {"num_key_value_heads": 2, "rope_theta": 10000.0})
    generation = {"eos_token_id": [3, 256], "pad_token_id": 0, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    import_model(source, tmp_path / "runs" / "tuned", None, ConversionOptions())
    run = pretrain(tmp_path, config)
    assert run.wait() == 0, run.text()
    assert "was saved on pipe x data x tensor 1x1x1, this run has pipe 2 x data 1 x tensor 1" in run.text()
    assert "resumed from runs/tuned/checkpoints/step_00000000" in run.text()
    assert sorted(losses(tmp_path, "tuned")) == [1, 2]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "runs/tuned/model"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "runs/tuned/model/generation_config.json").read_text()) == generation
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items()), "it was not trained"


def test_a_run_with_another_tokenizer_than_the_import_is_refused_once_until_that_is_said(
    corpus: Path, tmp_path: Path
) -> None:
    """The vocabularies are equally large, so nothing else would show that the ids mean something else."""
    config = tiny_config(corpus, "tuned", training={"steps": 1}, checkpoint={"interval_steps": 0})
    keys = config["model"] | {"num_key_value_heads": 2, "rope_theta": 10000.0}
    source = model_directory(tmp_path / "source", keys, tokenizer=train_bpe(["no merge of two"], 257))
    imported = import_model(source, tmp_path / "runs" / "tuned", None, ConversionOptions()).directory
    run = pretrain(tmp_path, config)
    assert run.wait() == 2, run.text()
    errors = run.errors()
    assert len(errors) == 1 and "was imported with another tokenizer than data.tokenizer bytes holds" in errors[0], (
        errors
    )
    assert "import the model again with --tokenizer bytes" in errors[0] and "Traceback" not in run.text()

    shutil.rmtree(imported)
    import_model(source, tmp_path / "runs" / "tuned", None, ConversionOptions(tokenizer="bytes"))
    again = pretrain(tmp_path, config)
    assert again.wait() == 0, again.text()
    assert sorted(losses(tmp_path, "tuned")) == [1]


def test_a_checkpoint_that_was_imported_without_a_tokenizer_goes_with_any(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", {})
    for name in ("tokenizer.json", "tokenizer_config.json", "complete.json"):
        (source / name).unlink()
    imported = import_model(source, tmp_path / "run", None, ConversionOptions()).directory
    config = load_config(imported / "config.yaml")
    assert resumed_config(config, imported, "some data", "some tokenizer") == config
