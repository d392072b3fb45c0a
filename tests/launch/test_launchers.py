"""The entry points under every launcher of one machine; other tests of this folder use forked ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.runs import Run, launch, losses, pretrain, tiny_config

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of forked ranks."""
    folder = tmp_path_factory.mktemp("forks")
    run = pretrain(folder, tiny_config(corpus, "run", training={"steps": 2}))
    assert run.wait() == 0, run.text()
    return losses(folder, "run")


# tests/lab/test_launchers.py starts deepspeed and torchrun on two hosts, test_safety.py one process, and
# test_generation_faults.py deepspeed on this machine.
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "python", "torchrun", "mpirun"])
def test_every_launcher_trains_to_the_same_losses(
    corpus: Path, expected: dict[int, float], tmp_path: Path, launcher: str
) -> None:
    grid = ["parallel.pipeline_parallel_size=1"] if launcher == "python" else []
    run = launch(tmp_path, tiny_config(corpus, "run", training={"steps": 2}), *grid, launcher=launcher)
    assert run.wait() == 0, run.text()
    assert "runs/run: finished at step 2 of 2" in run.text() and "Traceback" not in run.text()
    assert losses(tmp_path, "run") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("start", [pretrain, pytest.param(launch, marks=pytest.mark.slow)])
def test_an_error_of_the_user_is_one_line_and_exit_code_2(
    corpus: Path, tmp_path: Path, start: Callable[..., Run]
) -> None:
    run = start(tmp_path, tiny_config(corpus, "bad"), "model.hiden_size=64")
    assert run.wait() == 2, run.text()
    assert len(run.errors()) == 1 and "model.hidden_size" in run.errors()[0] and "Traceback" not in run.text()
    assert not (tmp_path / "runs").exists()
