"""Conversions keep every value, prove it, and leave nothing behind when they fail."""

import errno
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stagdist.checkpoint.convert import import_model as importing
from stagdist.checkpoint.convert import model_conversions, proof
from stagdist.checkpoint.convert.find import open_model, open_training
from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.inspection import as_table, inspect
from stagdist.checkpoint.convert.model_conversions import export, merge, split
from stagdist.checkpoint.convert.proof import plain_logits, text_ids
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.verify import verify
from stagdist.checkpoint.published.load_model import load_model
from stagdist.checkpoint.published.model_reader import ModelReader
from stagdist.checkpoint.safetensors_writer import SafetensorsWriter
from stagdist.checkpoint.training.directory import read_state
from stagdist.checkpoint.training.index import VALUE
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.config.parts import ModelConfig
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import CheckpointError, ConfigError
from stagdist.model.megatron import TensorParallel
from stagdist.model.precision import DTYPES
from stagdist.parallel.groups import single_process
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.synthetic import (
    SHAPE,
    file_contents,
    model_directory,
    parameters_of,
    run_config,
    training_checkpoint,
)
from tests.reference import stagformer as reference

TIED_COMBINED = {"share_section_weights": True, "tie_word_embeddings": True, "combine_sections": True}
MODELS: list[dict[str, Any]] = [
    {},
    TIED_COMBINED,
    {"section_layers": [1, 1, 1], "stagger": 2, "cross_attention_window": 4},
    {"stagger": 0, "cross_attention_key_value_heads": 4},
    {"connection": "sequential", "tie_word_embeddings": True,
     "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8}},
]  # fmt: skip
OPTIONS = ConversionOptions()


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        pytest.param(model, precision, marks=[pytest.mark.slow] * (number > 1 and precision != "bf16"))
        for number, model in enumerate(MODELS)
        for precision in ("fp32", "bf16", "fp16")
    ],
    ids=str,
)
def test_checkpoints_of_every_grid_export_as_the_same_files(
    tmp_path: Path, model: dict[str, Any], precision: str
) -> None:
    sections = len((SHAPE | model)["section_layers"])
    exported = []
    for sizes in ((1, 1, 1), (sections, 1, 2), (sections, 2, 1), (1, 2, 2), (1, 4, 1)):
        training_checkpoint(tmp_path / f"on-{sizes}", model, sizes, precision)
        exported.append(file_contents(export(tmp_path / f"on-{sizes}", tmp_path / f"of-{sizes}", OPTIONS).directory))
    assert all(one == exported[0] for one in exported)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_export_import_export_is_bit_identical_and_computes_the_model(
    tmp_path: Path, model: dict[str, Any], precision: str
) -> None:
    training_checkpoint(tmp_path / "run", model, (len((SHAPE | model)["section_layers"]), 1, 2), precision)
    first = export(tmp_path / "run", tmp_path / "first", OPTIONS).directory
    imported = import_model(first, tmp_path / "again", None, OPTIONS).directory
    assert (imported.name, read_state(imported).num_samples) == ("step_00000000", 0)
    second = export(tmp_path / "again", tmp_path / "second", OPTIONS).directory
    assert file_contents(first) == file_contents(second)
    assert open_training(imported).index.kinds == (VALUE,), "the moments begin with zero"

    source = open_model(first)
    ids = text_ids(load_tokenizer(first), source.model)
    assert source.dtype == DTYPES[precision]
    parameters = {name: value.to(source.dtype).float() for name, value in parameters_of(source.model).items()}
    with single_process() as groups, torch.no_grad():
        loaded = load_model(first, TensorParallel(groups.tensor))(ids)
    expected = reference.forward(parameters, source.model, ids)
    specs = {spec.name: spec for spec in model_parameters(source.model)}
    plain = plain_logits(source.model, lambda name: source.weight(specs[name]), ids)
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)


def test_a_foreign_program_reads_what_was_exported(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {"section_layers": [1, 1]}, (2, 1, 1), "bf16")
    folder = export(tmp_path / "run", tmp_path / "model", OPTIONS).directory
    with safe_open(folder / "model.safetensors", framework="pt") as stream:
        names = {spec.name for spec in model_parameters(open_model(folder).model)}
        assert set(stream.keys()) == names and stream.metadata() == {"format": "pt"}
        assert stream.get_tensor("embedding.weight").dtype == torch.bfloat16
    assert load_tokenizer(folder).is_bytes


def test_split_sections_compute_what_the_shared_ones_did(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", TIED_COMBINED, (2, 1, 1))
    separate = split(tmp_path / "run", tmp_path / "separate", OPTIONS).directory
    assert not open_model(separate).model.share_section_weights
    weights = load_file(separate / "model.safetensors")
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[f"sections.0.{name}"], weights[f"sections.1.{name}"])
    assert verify(tmp_path / "run", separate).largest_difference == 0.0
    with pytest.raises(CheckpointError, match="nothing to split"):
        split(separate, tmp_path / "twice", OPTIONS)


def test_merging_averages(tmp_path: Path) -> None:
    folders = [model_directory(tmp_path / str(seed), {}, seed=seed) for seed in (1, 2, 3)]
    merged = merge(folders, tmp_path / "merged", OPTIONS).directory
    tensors = [load_file(folder / "model.safetensors") for folder in (*folders, merged)]
    for name, average in tensors[3].items():
        expected = torch.stack([one[name].double() for one in tensors[:3]]).mean(0)
        torch.testing.assert_close(average.double(), expected, atol=1e-7, rtol=1e-6)
    model_directory(tmp_path / "wider", {"intermediate_size": 32})
    with pytest.raises(CheckpointError, match="intermediate_size 24 and 32"):
        merge([folders[0], tmp_path / "wider"], tmp_path / "no", OPTIONS)
    with pytest.raises(CheckpointError, match="merge needs two sources"):
        merge(folders[:1], tmp_path / "no", OPTIONS)


def test_verify_tells_models_apart(tmp_path: Path) -> None:
    one, other = (model_directory(tmp_path / str(seed), {}, seed=seed) for seed in (1, 2))
    assert verify(one, other).largest_difference > 1e-2
    verdict = verify(one, one)
    assert (verdict.largest_difference, verdict.equal_choices, verdict.tokens) == (0.0, 1.0, 32)


def test_verify_takes_the_tokenizer_of_the_one_that_has_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model_directory(tmp_path / name, {})
    for file in (*(tmp_path / "a").glob("tokenizer*"), tmp_path / "a" / "complete.json"):
        file.unlink()
    assert verify(tmp_path / "a", tmp_path / "b").largest_difference == 0
    with pytest.raises(CheckpointError, match=r"a holds no tokenizer\.json nor any other tokenizer; name it with"):
        verify(tmp_path / "a", tmp_path / "a")


# --- failing -------------------------------------------------------------------------------------------------------


def _other_model(directory: Path) -> ModelReader:
    """A directory whose configuration is read as another one."""
    reader = ModelReader(directory)
    reader.model = reader.model.model_copy(update={"rms_norm_eps": 0.5})
    return reader


def test_a_conversion_that_cannot_prove_itself_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    model_directory(tmp_path / "shared", TIED_COMBINED)
    model_directory(tmp_path / "other-model", {})
    with monkeypatch.context() as patch:
        patch.setattr(proof, "source_logits", lambda source, *_: torch.ones(1) * source.model.share_section_weights)
        with pytest.raises(CheckpointError, match="logits .* differ by 1"):
            split(tmp_path / "shared", tmp_path / "model", OPTIONS)
    read = ModelReader.weight
    with monkeypatch.context() as patch:
        patch.setattr(ModelReader, "weight", lambda self, spec: read(self, spec) + (spec.name == "head.weight"))
        with pytest.raises(CheckpointError, match=r"head\.weight was not written as it was read"):
            export(tmp_path / "run", tmp_path / "model", OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(model_conversions, "ModelReader", _other_model)
        with pytest.raises(CheckpointError, match="rms_norm_eps was not written as it was read"):
            export(tmp_path / "run", tmp_path / "model", OPTIONS)
    value = TrainingReader.value
    with monkeypatch.context() as patch:
        patch.setattr(TrainingReader, "value", lambda self, spec: value(self, spec) + (spec.name == "head.weight"))
        with pytest.raises(CheckpointError, match=r"head\.weight was not written as it was read"):
            import_model(tmp_path / "other-model", tmp_path / "other", None, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(importing, "dump_config", lambda config: str(id(config)))
        with pytest.raises(CheckpointError, match="state or configuration was not written"):
            import_model(tmp_path / "other-model", tmp_path / "other", None, OPTIONS)
    assert [path.name for path in tmp_path.rglob("step_*")] == ["step_00000007"]
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "_write", full)
    with pytest.raises(CheckpointError, match=r"model could not be written: .*No space left .* another disk"):
        export(tmp_path / "run", tmp_path / "new" / "model", OPTIONS)
    monkeypatch.undo()
    model_directory(tmp_path / "model", {})
    monkeypatch.setattr(SafetensorsWriter, "_write", full)
    with pytest.raises(CheckpointError, match=r"step_0+ could not be written: .*No space left .* another disk"):
        import_model(tmp_path / "model", tmp_path / "new" / "run", None, OPTIONS)
    assert not (tmp_path / "new").exists()


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "run", {}, (1, 1, 1))
    model_directory(tmp_path / "model", {}, seed=9)
    before = file_contents(tmp_path / "model")
    with pytest.raises(CheckpointError, match="--overwrite"):
        export(tmp_path / "run", tmp_path / "model", OPTIONS)
    with pytest.raises(CheckpointError, match="holds step_00000007, from which a run would continue; choose another"):
        import_model(tmp_path / "model", tmp_path / "run", None, ConversionOptions(overwrite=True))
    assert file_contents(tmp_path / "model") == before
    export(tmp_path / "run", tmp_path / "model", ConversionOptions(overwrite=True))
    assert verify(tmp_path / "run", tmp_path / "model").largest_difference == 0.0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        export(tmp_path / "run", tmp_path / "thesis", ConversionOptions(overwrite=True))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_configurations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = model_directory(tmp_path / "model", {})
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config({"intermediate_size": 32}).model_dump(mode="json")))
    with pytest.raises(ConfigError, match=r"model\.intermediate_size is 32, the directory has 24"):
        import_model(folder, tmp_path / "other", str(config), OPTIONS)
    with pytest.raises(CheckpointError, match="named like step 3"):
        import_model(folder, tmp_path / "checkpoints" / "step_00000003", None, OPTIONS)
    (folder / "complete.json").unlink()
    body = json.loads((folder / "config.json").read_text())
    for change, complaint in (
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    ):
        (folder / "config.json").write_text(json.dumps(body | change))
        with pytest.raises(CheckpointError, match=complaint):
            import_model(folder, tmp_path / "other", None, OPTIONS)
    assert not (tmp_path / "other").exists()


# --- looking ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_there_and_what_is_wrong(tmp_path: Path) -> None:
    folder = training_checkpoint(tmp_path / "run", TIED_COMBINED, (2, 1, 2), "bf16")
    report = inspect(tmp_path / "run")
    assert (report.kind, report.step, report.dtype, report.problems) == ("training checkpoint", 7, "bfloat16", [])
    assert report.grid == {"pipe": 2, "data": 1, "tensor": 2}
    model = ModelConfig(**SHAPE | TIED_COMBINED)
    assert [facts.name for facts in report.tensors] == [spec.name for spec in model_parameters(model)]
    assert report.parameters == sum(spec.numel for spec in model_parameters(model))
    assert json.loads(json.dumps(asdict(report)))["files"]["config.yaml"] > 0
    assert "no problem found" in as_table(report)

    (folder / "part_00001.safetensors").unlink()
    (folder / "notes.txt").write_text("odd")
    assert inspect(folder).problems == ["part_00001.safetensors is missing", "notes.txt does not belong here"]
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="neither checkpoints nor a model"):
        inspect(tmp_path / "run")
