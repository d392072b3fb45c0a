"""Mutated files of model directories and training checkpoints: a refusal of one line, or the weights that are there."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

import tools.convert_checkpoint
from stagdist.checkpoint.convert.find import open_weights
from stagdist.parallel.layout import model_parameters
from tests.checkpoint.convert.test_llama_import import save_llama
from tests.checkpoint.published.directories import INDEX, split
from tests.checkpoint.synthetic import complete, file_contents, model_directory, training_checkpoint
from tests.fuzz.mutations import COUNT, Mutation, Outcome, mutations, run_main

SHARD = "model-00002-of-00002.safetensors"


def convert(*arguments: object) -> Outcome:
    """Run tools/convert_checkpoint.py."""
    return run_main(tools.convert_checkpoint.main, *arguments, "--quiet")


def inspect(folder: Path, mutation: Mutation) -> int:
    """Exit code of `inspect`, which lists problems and never ends with a traceback."""
    outcome = convert("inspect", folder)
    assert "Traceback" not in outcome.errors, (mutation.name, outcome)
    assert outcome.code == ("PROBLEM: " in outcome.output) or outcome.code == 2, (mutation.name, outcome)
    return outcome.code


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a directory or checkpoint."""
    source = open_weights(folder)
    return {spec.name: source.weight(spec).clone() for spec in model_parameters(source.model)}


def assert_imported_or_refused(folder: Path, mutation: Mutation, name: str, expected: dict[str, Tensor]) -> int:
    """Import a directory. Returns the number of values that differ from `expected`; -1 for a refusal."""
    (folder / name).write_bytes(mutation.content)
    before, run = file_contents(folder), folder.parent / "run"
    outcome = convert("import", folder, run, "--tokenizer", "bytes")
    assert file_contents(folder) == before
    inspected = inspect(folder, mutation)
    if outcome.code:
        outcome.assert_refused(folder.name)
        assert not run.exists(), mutation.name
        assert inspected, (mutation.name, outcome)
        return -1
    found = weights(run)
    shutil.rmtree(run)
    assert found.keys() == expected.keys(), mutation.name
    return sum(int((found[key] != value).sum()) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "share"),
    [("model.safetensors", 1.0), ("config.json", 1.0), ("generation_config.json", 0.5), ("complete.json", 0.5)],
)
def test_a_directory_of_ours_keeps_its_weights_or_is_refused(tmp_path: Path, name: str, share: float) -> None:
    folder = model_directory(tmp_path / "model", {"section_layers": [1, 1]})
    expected, content = weights(folder), (folder / name).read_bytes()
    refused = 0
    for mutation in mutations(content, max(5, int(COUNT * share / 6)), seed=1):
        changed = assert_imported_or_refused(folder, mutation, name, expected)
        assert changed <= 0, mutation.name
        refused += changed < 0
    assert refused


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_shards_and_their_index(tmp_path: Path, name: str) -> None:
    folder = model_directory(tmp_path / "model", {"section_layers": [1, 1]})
    split(folder)
    complete(folder)
    expected, content = weights(folder), (folder / name).read_bytes()
    for mutation in mutations(content, max(5, COUNT // 6), seed=2):
        assert assert_imported_or_refused(folder, mutation, name, expected) <= 0, mutation.name


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_llama_without_a_record(tmp_path: Path, name: str) -> None:
    """A changed value is another model; everything else is refused. `generate` reads every directory so."""
    folder = tmp_path / "model"
    save_llama(folder, {})
    expected, content = weights(folder), (folder / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else len(content)
    kept: Sequence[bytes] = [content[:header]] if name.endswith("safetensors") else []
    for mutation in mutations(content, max(5, COUNT // 6), seed=3, others=kept):
        changed = assert_imported_or_refused(folder, mutation, name, expected)
        assert changed <= (mutation.kept >= header), mutation.name


FILES = {"complete.json": 1, "state.json": 1, "config.yaml": 1, "index.json": 2, "part_00000.safetensors": 2}


@pytest.mark.parametrize("recorded", [False, True], ids=["records of before", "records made again"])
def test_a_training_checkpoint_keeps_its_weights_or_is_refused(tmp_path: Path, recorded: bool) -> None:
    folder = training_checkpoint(tmp_path / "run", {"section_layers": [1, 1]})
    intact, expected = file_contents(folder), weights(folder)
    for name, share in FILES.items():
        for mutation in mutations(intact[name], max(5, share * COUNT // 9), seed=4):
            (folder / name).write_bytes(mutation.content)
            if recorded and name != "complete.json":
                complete(folder)
            outcome = convert("export", folder, tmp_path / "out", "--tokenizer", "bytes")
            inspect(folder, mutation)
            if outcome.code:
                outcome.assert_refused("step_00000007")
                assert not (tmp_path / "out").exists()
            else:
                found = weights(tmp_path / "out")
                shutil.rmtree(tmp_path / "out")
                changed = sum(int((found[key] != value).sum()) for key, value in expected.items())
                assert changed <= (recorded and name.startswith("part_")), (name, mutation.name)
            for file, content in intact.items():
                (folder / file).write_bytes(content)
