"""Saving during training: the same files as by waiting, one save at a time, failures reported on all ranks."""

import mmap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from stagdist.checkpoint.complete import checkpoint_files
from stagdist.checkpoint.training.layout_checks import check_layout
from stagdist.checkpoint.training.pickles import load_file
from stagdist.checkpoint.training.training_reader import TrainingReader
from stagdist.training.engine.agreement import Writing
from stagdist.training.saving.host_copies import LARGE_BYTES, HostCopies
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


def difference(found: Any, expected: Any, where: str) -> list[str]:
    """Every place in which two contents of files differ in type or in a bit."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
        same = same and found.requires_grad == expected.requires_grad and torch.equal(found, expected)
        return [] if same else [where]
    if type(found) is not type(expected):
        return [f"{where}: {type(found)} instead of {type(expected)}"]
    if isinstance(expected, dict):
        if list(found) != list(expected):
            return [f"{where}: {list(found)} instead of {list(expected)}"]
        return [line for key in expected for line in difference(found[key], expected[key], f"{where}.{key}")]
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} instead of {len(expected)}"]
        pairs = zip(found, expected, strict=True)
        return [line for index, (one, other) in enumerate(pairs) for line in difference(one, other, f"{where}.{index}")]
    plain = (vars(found), vars(expected)) if hasattr(expected, "__dict__") else (found, expected)
    return [] if plain[0] == plain[1] else [where]


def storage_bytes(content: Any) -> list[tuple[int, int]]:
    """Bytes of every tensor's values and of its storage."""
    if isinstance(content, Tensor):
        return [(content.numel() * content.element_size(), content.untyped_storage().nbytes())]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [pair for value in values for pair in storage_bytes(value)]


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
            if name.endswith(".pt"):
                content = load_file(ours / name)
                assert difference(content, load_file(theirs / name), name) == []
                assert all(shown == stored for shown, stored in storage_bytes(content)), (
                    f"{name} stores more than the values of its tensors"
                )
        check_layout(TrainingReader(ours))
    first, second = (TrainingReader(runs / "parity" / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    spec = next(first.specs())
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


def test_a_copy_holds_the_values_of_its_moment_and_reuses_memory() -> None:
    storage = torch.arange(100.0)
    part = storage[10:20]
    content = {"part": part, "again": part, "groups": [{"lr": 0.1}], "step": torch.tensor(3.0)}
    copies = HostCopies()
    first = copies.copy(content, "file")
    storage.zero_()
    content["groups"][0]["lr"] = 0.2  # type: ignore[index]
    assert torch.equal(first["part"], torch.arange(10.0, 20.0)) and first["groups"] == [{"lr": 0.1}]
    assert first["again"] is first["part"], "a tensor that occurs twice stays one"
    assert first["part"].untyped_storage().nbytes() == 40, "the rest of the storage was copied as well"
    address = first["part"].data_ptr()
    second = copies.copy(content, "file")
    assert second["part"].data_ptr() == address and not second["part"].any()
    other = copies.copy(content, "other file")
    assert other["part"].data_ptr() != address
    larger = copies.copy({"part": torch.ones(11)}, "file")
    assert torch.equal(larger["part"], torch.ones(11))


class OnDevice(Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_large_buffers_are_registered_with_cuda_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, locked = Mock(), {}
    cuda.cudaHostRegister.side_effect = lambda address, size, _: locked.update({address: size}) or 0
    cuda.cudaHostUnregister.side_effect = lambda address: int(locked.pop(address) is None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None if code == 0 else pytest.fail(f"code {code}"))
    size = LARGE_BYTES // 2 + 1
    weights = torch.arange(size, dtype=torch.bfloat16)
    copies = HostCopies()
    first = copies.copy({"weights": weights.as_subclass(OnDevice)}, "file")["weights"]
    assert torch.equal(first, weights) and locked == {first.data_ptr(): 2 * size}, "not the tensor's size"
    assert first.data_ptr() % mmap.PAGESIZE == 0
    assert copies.copy({"weights": weights.as_subclass(OnDevice)}, "file")["weights"].data_ptr() == first.data_ptr()
    larger = copies.copy({"weights": torch.ones(2, size).as_subclass(OnDevice)}, "file")["weights"]
    assert locked == {larger.data_ptr(): 8 * size} and larger.shape == (2, size)
    copies.close()
    assert not locked and larger.all(), "a copy is lost before its file is written"
