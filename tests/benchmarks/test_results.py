"""Where benchmarks leave results: what cannot be written is refused before anything is measured."""

import argparse
import json
import os
from pathlib import Path

import pytest

from benchmarks import conversions, memory, recovery, save, train
from benchmarks.common.command import main
from benchmarks.common.results import check_outputs, write_results
from stagdist.errors import ConfigError

BENCHMARKS = {each.__name__.split(".")[-1]: each for each in (conversions, memory, recovery, save, train)}


def start(name: str, *arguments: str) -> int:
    return main("", BENCHMARKS[name].add_arguments, BENCHMARKS[name].run, arguments)


@pytest.mark.parametrize("benchmark", sorted(BENCHMARKS))
def test_every_benchmark_refuses_a_place_that_will_not_do_before_it_measures(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "results.json"
    assert start(benchmark, "--json", str(place)) == 2
    told = capsys.readouterr()
    assert told.err == f"error: --json {place} cannot be written: {place.parent} is a file\n" and told.out == ""


@pytest.mark.parametrize("benchmark", ["conversions", "recovery", "save"])
def test_a_folder_for_runs_must_be_there(benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    assert start(benchmark, "--folder", str(missing)) == 2
    assert capsys.readouterr().err == f"error: --folder {missing} is not a folder that can be written\n"


def test_missing_folders_are_made_and_results_replace_older_ones_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "results.json"
    check_outputs(argparse.Namespace(json=str(path), trace=None))
    for number in (1, 2):
        write_results(path, {"number": number})
        assert json.loads(path.read_text()) == {"number": number} and os.listdir(path.parent) == ["results.json"]


def test_a_folder_is_no_file_for_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--timeline {tmp_path} is a folder; give the name of a file"):
        check_outputs(argparse.Namespace(json=None, timeline=str(tmp_path)))
