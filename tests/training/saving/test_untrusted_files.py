"""A checkpoint that a run did not write itself runs no program while it is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stagdist.checkpoint.training.pickles import load_file
from stagdist.errors import CheckpointError
from stagdist.training.saving.resume import load_checkpoint_file
from tests.checkpoint.synthetic import training_checkpoint


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_files_of_deepspeed_load_as_its_own_types(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    for precision, kind in (("fp32", LossScaler), ("fp16", DynamicLossScaler)):
        folder = training_checkpoint(tmp_path / precision, {}, (1, 1, 1), precision)
        path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        states = load_checkpoint_file(str(path), map_location="cpu")["optimizer_state_dict"]
        assert type(states["loss_scaler"]) is kind
        assert type(next(iter(states["param_slice_mappings"][0].values()))) is fragment_address
        plain = load_file(path)["optimizer_state_dict"]
        assert vars(plain["loss_scaler"]) == vars(states["loss_scaler"])


def test_a_file_that_is_trusted_is_loaded_with_what_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": None, "extra": Bomb(tmp_path / "ran")}, path)
    assert load_checkpoint_file(str(path), trust_pickle=True)["module"] is None
    assert (tmp_path / "ran").exists()


def test_a_program_in_a_checkpoint_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": None, "extra": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt would run .*--trust-pickle"):
        load_checkpoint_file(str(path))
    assert not (tmp_path / "ran").exists()


class AsEarlyPython311:
    """Pickles as a member of an enum, or as any attribute, in the way of Python 3.11.2."""

    def __init__(self, *arguments: object):
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return getattr, self.arguments


def test_members_of_enums_as_early_python_stores_them_are_read_and_no_other_attribute(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "states.pt"
    torch.save({"zero_stage": AsEarlyPython311(ZeroStageEnum, "optimizer_states")}, path)
    assert load_checkpoint_file(str(path))["zero_stage"] is ZeroStageEnum.optimizer_states
    assert load_file(path)["zero_stage"] == 1
    for unknown in (AsEarlyPython311(ZeroStageEnum, "__subclasses__"), AsEarlyPython311({}, "get")):
        torch.save({"zero_stage": unknown}, path)
        for read in (load_file, load_checkpoint_file):
            with pytest.raises(CheckpointError, match="is no plain tensor file"):
                read(path)  # type: ignore[arg-type, operator]
