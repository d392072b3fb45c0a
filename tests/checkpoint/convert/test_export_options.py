"""`export --precision`, `--from-master` and `--format torch`."""

from pathlib import Path

import pytest
import torch

from stagdist.checkpoint.convert.find import open_model, open_training
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.config.parts import ModelConfig
from stagdist.errors import CheckpointError, ConfigError
from stagdist.model.precision import DTYPES
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.synthetic import parameters_of, training_checkpoint

OPTIONS = ConversionOptions()
SEQUENTIAL = {"connection": "sequential"}


@pytest.mark.parametrize("from_master", [False, True])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("run", ["fp32", "bf16"])
def test_weights_are_rounded_as_asked(tmp_path: Path, run: str, precision: str | None, from_master: bool) -> None:
    training_checkpoint(tmp_path / "run", {}, (2, 1, 2), run)
    chosen = precision or ("fp32" if from_master else run)
    if from_master and chosen == run:
        with pytest.raises(ConfigError, match=r"--from-master: the fp32 values .* leave --from-master out$"):
            export(tmp_path / "run", tmp_path / "model", OPTIONS, precision=precision, from_master=True)
        assert not (tmp_path / "model").exists()
        return
    result = export(tmp_path / "run", tmp_path / "model", OPTIONS, precision=precision, from_master=from_master)
    source = open_model(result.directory)
    assert source.dtype == DTYPES[chosen]
    values = parameters_of(source.model)
    for spec in model_parameters(source.model):
        trained = values[spec.name] if from_master else values[spec.name].to(DTYPES[run])
        assert torch.equal(source.weight(spec), trained.to(DTYPES[chosen])), spec.name
    assert ("rounded to" in result.checked) == (chosen not in (run, "fp32"))


@pytest.mark.parametrize("model", [{}, SEQUENTIAL, {"tie_word_embeddings": True}], ids=str)
def test_a_state_dict_has_canonical_names_and_loads_without_running_code(
    tmp_path: Path, model: dict[str, bool]
) -> None:
    training_checkpoint(tmp_path / "run", model, (2, 2, 1), "bf16")
    result = export(tmp_path / "run", tmp_path / "model.pt", OPTIONS, precision="fp16", as_state_dict=True)
    assert result.directory == tmp_path / "model.pt" and result.checked.endswith("equal, rounded to fp16")
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    reader = open_training(tmp_path / "run")
    assert list(found) == [spec.name for spec in model_parameters(reader.model)]
    for spec in model_parameters(reader.model):
        assert torch.equal(found[spec.name], reader.weight(spec).half()), spec.name
        assert found[spec.name].untyped_storage().nbytes() == 2 * spec.numel, "it does not hold the file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "run"]


def test_a_state_dict_replaces_only_a_file_and_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training_checkpoint(tmp_path / "run", {})
    path = tmp_path / "model.pt"
    path.write_text("other weights")
    with pytest.raises(CheckpointError, match=r"model\.pt exists; choose another file, or --overwrite"):
        export(tmp_path / "run", path, OPTIONS, as_state_dict=True)
    with pytest.raises(CheckpointError, match=r"run exists"):
        export(tmp_path / "run", tmp_path / "run", ConversionOptions(overwrite=True), as_state_dict=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "load", lambda *_, **__: {name: torch.zeros(1) for name in parameters_of(_model(tmp_path))}
        )
        with pytest.raises(CheckpointError, match=r"embedding\.weight was not written as it was read"):
            export(tmp_path / "run", path, ConversionOptions(overwrite=True), as_state_dict=True)
    assert path.read_text() == "other weights"
    export(tmp_path / "run", path, ConversionOptions(overwrite=True), as_state_dict=True)
    assert torch.load(path, weights_only=True).keys() == parameters_of(_model(tmp_path)).keys()


def _model(folder: Path) -> ModelConfig:
    return open_training(folder / "run").model
