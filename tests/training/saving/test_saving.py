"""Saving during training: the same files as by waiting, one save at a time, failures reported on all ranks."""

import mmap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from stagdist.checkpoint.complete import checkpoint_files
from stagdist.checkpoint.training.index import Fragment
from stagdist.checkpoint.training.reader import TrainingReader
from stagdist.checkpoint.training.writer import OwnedFragment
from stagdist.parallel.layout import model_parameters
from stagdist.training.engine.agreement import Writing
from stagdist.training.saving.host_copies import HostCopies
from tests.ranks import run_ranks
from tests.reference.variants import VARIANTS
from tests.training.parity_cases import Case
from tests.training.saving.saving_worker import BROKEN_RANK, HELD_S, SavingReport

CASES = [
    Case("stages", VARIANTS["combined"] | {"tie_word_embeddings": True}, (2, 1, 1)),
    Case("bf16 replicas", {}, (1, 2, 1), precision="bf16"),
]


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the ranks save."""
    yield tmp_path_factory.mktemp("saved")
    launch.cache_clear()


@cache
def launch(folder: Path) -> list[dict[str, SavingReport]]:
    """One launch for all scenarios."""
    return run_ranks("tests.training.saving.saving_worker:run_scenarios", 2, (CASES, folder), timeout_s=200)


def reports(folder: Path, case: Case, scenario: str) -> list[SavingReport]:
    return [rank[f"{case.name}: {scenario}"] for rank in launch(folder)]


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_equal_those_of_a_synchronous_save_although_training_continued(case: Case, shared_folder: Path) -> None:
    found = reports(shared_folder, case, "same content")
    assert all(report.votes == [Writing.RUNNING] * 2 for report in found), "nothing was written during training"
    runs = shared_folder / case.name.replace(" ", "-") / "same-content"
    for step in ("step_00000001", "step_00000002"):
        ours, theirs = (runs / name / "checkpoints" / step for name in ("parity", "parity-synchronous"))
        assert checkpoint_files(ours) == checkpoint_files(theirs)
        for name in checkpoint_files(ours):
            if name != "config.yaml":  # the two runs have different names
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    first, second = (TrainingReader(runs / "parity" / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    stored = sum(path.stat().st_size for path in first.directory.glob("*.safetensors"))
    specs = model_parameters(first.model)
    values = 12 * sum(spec.numel for spec in specs)
    assert values < stored < 1.5 * values, "something is stored twice"
    spec = specs[0]
    assert not torch.equal(first.weight(spec), second.weight(spec)), "training changed nothing between the saves"


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_save_waits_for_the_one_before_it(case: Case, shared_folder: Path) -> None:
    for report in reports(shared_folder, case, "one at a time"):
        assert report.most_at_once == 1
        assert report.seconds["second"] >= HELD_S, "the second save did not wait"
        waits = [line for line in report.log if line.startswith("the save of step 2 waited ")]
        assert len(waits) == 1 and waits[0].endswith(" s for that of step_00000001"), report.log
        assert report.listed == ["step_00000001", "step_00000002"]
        assert sum("during training except for" in line for line in report.log) == 2, report.log


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_under_way_after_a_save_that_waits(case: Case, shared_folder: Path) -> None:
    for report in reports(shared_folder, case, "waited for"):
        assert report.listed == ["step_00000001", "step_00000002"]
        assert not any("during training" in line for line in report.log), report.log


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("disk full", "No space left on device"),
        ("writer broke", "broke: ZeroDivisionError: planted"),
        ("no memory", "could not be copied to host memory (DefaultCPUAllocator: can't allocate memory)"),
    ],
)
def test_a_failure_on_one_rank_is_reported_on_all_and_keeps_the_previous(
    case: Case, scenario: str, says: str, shared_folder: Path
) -> None:
    found = reports(shared_folder, case, scenario)
    assert found[0].error == found[1].error
    assert found[0].error.startswith(f"saving failed on rank {BROKEN_RANK}: ") and says in found[0].error
    for report in found:
        assert report.listed == ["step_00000001"]
        assert report.seconds.get("finish", 0.0) < 10.0, "waited for the files of the other ranks"
    if scenario != "no memory":
        assert [report.votes for report in found] == [[Writing.RUNNING], [Writing.FAILED]]


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_that_another_run_has_changed_is_not_published(case: Case, shared_folder: Path) -> None:
    for report in reports(shared_folder, case, "replaced folder"):
        assert report.error.startswith("saving failed on rank 0: ") and "does another run save there?" in report.error
        assert report.listed == ["step_00000001"]


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_that_ranks_do_not_share_is_refused_in_one_line(case: Case, shared_folder: Path) -> None:
    for report in reports(shared_folder, case, "not shared"):
        assert report.error.startswith(f"saving failed on rank {BROKEN_RANK}: ") and "\n" not in report.error
        assert "is not what rank 0 sees; runs_directory must be on a file system all ranks share" in report.error
        assert report.listed == []


def fragment(values: Tensor) -> OwnedFragment:
    """A fragment that holds these values."""
    place = Fragment(file="part", key="a", box=((0, values.numel()),), range=(0, values.numel()))
    return OwnedFragment("a", place, {"value": values})


def copied(copies: HostCopies, *values: Tensor) -> list[Tensor]:
    """The copies of the values of some fragments."""
    return [one.tensors["value"] for one in copies.copy([fragment(each) for each in values])]


def test_a_copy_holds_the_values_of_its_moment_and_reuses_memory() -> None:
    storage = torch.arange(100.0)
    copies = HostCopies()
    first, other = copied(copies, storage[10:20], storage[:3])
    storage.zero_()
    assert torch.equal(first, torch.arange(10.0, 20.0)) and torch.equal(other, torch.arange(3.0))
    address = first.data_ptr()
    second, _ = copied(copies, storage[10:20], storage[:3])
    assert second.data_ptr() == address and not second.any()
    (larger,) = copied(copies, torch.ones(14))
    assert torch.equal(larger, torch.ones(14))
    assert copies.copy([]) == [], "all of the partition is padding"


class OnDevice(Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_large_buffers_are_registered_with_cuda_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, locked = Mock(), {}
    cuda.cudaHostRegister.side_effect = lambda address, size, _: locked.update({address: size}) or 0
    cuda.cudaHostUnregister.side_effect = lambda address: int(locked.pop(address) is None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None if code == 0 else pytest.fail(f"code {code}"))
    size = 3000
    values = torch.arange(size, dtype=torch.float32)
    copies = HostCopies()
    (first,) = copied(copies, values.as_subclass(OnDevice))
    assert torch.equal(first, values) and locked == {first.data_ptr(): 4 * size}, "not the size of the values"
    assert first.data_ptr() % mmap.PAGESIZE == 0
    assert copied(copies, values.as_subclass(OnDevice))[0].data_ptr() == first.data_ptr()
    (larger,) = copied(copies, torch.ones(2 * size).as_subclass(OnDevice))
    assert locked == {larger.data_ptr(): 8 * size}
    copies.close()
    assert not locked and larger.all(), "a copy is lost before its file is written"
