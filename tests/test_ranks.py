"""The multi-process runner itself: results, failures, silence and timeouts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks import BARE, ROOT, RankError, Script, end_processes, fork_script, run_ranks

pytestmark = pytest.mark.ranks


def reduce_cases(cases: list[float]) -> list[float]:
    """Several all-reduces over gloo in one launch."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, sums = dist.get_rank(), []
    for case in cases:
        tensor = torch.tensor([case * (rank + 1)])
        dist.all_reduce(tensor)
        sums.append(tensor.item())
    return sums


def fail_on_rank_1(_: Any) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective and so fails too."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("seven is not a section")
    dist.all_reduce(torch.ones(1))


def die_on_rank_1(_: Any) -> None:
    """Rank 1 is killed while rank 0 waits for it in a collective and so fails too."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def leave_early(_: Any) -> None:
    """Rank 1 exits with code 0, as a script might, instead of returning."""
    if os.environ["RANK"] == "1":
        sys.exit(0)
    time.sleep(60)


def hang_on_rank_1(folder: str) -> str:
    """Rank 1 never returns, and neither does its child."""
    import subprocess

    if os.environ["RANK"] == "0":
        return "done"
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, "pids").write_text(f"{os.getpid()} {child.pid}")
    hang_here()
    return "never"


def hang_here() -> None:
    """A name to find in the stack."""
    time.sleep(600)


def surroundings(names: list[str]) -> dict[str, str]:
    """What a rank finds in its environment."""
    return {name: os.environ[name] for name in names}


def test_results_come_back_by_rank_and_one_launch_runs_many_cases() -> None:
    assert run_ranks("tests.test_ranks:reduce_cases", 3, [1.0, 0.5]) == [[6.0, 3.0]] * 3


def test_the_error_of_the_first_failing_rank_is_raised_not_the_cascade() -> None:
    with pytest.raises(RankError, match="seven is not a section") as failure:
        run_ranks("tests.test_ranks:fail_on_rank_1", 2)
    assert failure.value.rank == 1


def test_a_killed_rank_is_named_and_not_its_victim() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed:\nexit code -9") as failure:
        run_ranks("tests.test_ranks:die_on_rank_1", 2)
    assert failure.value.rank == 1


def test_leaving_without_a_result_is_a_failure_even_with_code_0() -> None:
    with pytest.raises(RankError, match="SystemExit: 0"):
        run_ranks("tests.test_ranks:leave_early", 2)


def test_a_hanging_rank_ends_at_the_limit_with_its_stack_and_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[1\] of 2 did not end within 4 s(.|\n)*hang_here") as failure:
        run_ranks("tests.test_ranks:hang_on_rank_1", 2, str(tmp_path), timeout_s=4)
    assert failure.value.rank == 1
    assert time.monotonic() - started < 20
    for pid in (tmp_path / "pids").read_text().split():
        assert _gone(int(pid))


@pytest.mark.parametrize("fresh", [False, True], ids=["forks", "fresh processes"])
def test_ranks_learn_their_place_and_see_no_gpu_unless_told(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    run_ranks("tests.test_ranks:surroundings", 1, [])  # the server has been started with another environment
    monkeypatch.setenv("EARLIER", "set by the test")
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "EARLIER", "EXTRA"]
    names = names if fresh else names[:-1]
    before = dict(os.environ)
    places = run_ranks("tests.test_ranks:surroundings", 2, names, env={"EXTRA": "yes"} if fresh else None)
    values = [[rank, rank, "2", "1", "", "set by the test", "yes"] for rank in ("0", "1")]
    assert places == [dict(zip(names, row[: len(names)], strict=True)) for row in values]
    assert dict(os.environ) == before


OWNER = """
import sys
from tests.ranks import run_ranks
run_ranks("tests.test_ranks:hang_on_rank_1", 2, sys.argv[1], env={"FRESH": "yes"} if sys.argv[2] == "fresh" else None)
"""


@pytest.mark.parametrize("how", ["fork", "fresh"])
def test_ranks_and_their_server_end_with_a_test_run_that_is_killed(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path), how]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {BARE: "yes"}) as owner:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
                assert owner.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            family = [child.pid for child in psutil.Process(owner.pid).children(recursive=True)]
        finally:
            owner.kill()
    rank, child = map(int, (tmp_path / "pids").read_text().split())
    os.kill(child, signal.SIGKILL)  # processes that a rank has started are not ended
    assert rank in family and all(_gone(pid) for pid in family if pid != child)


def test_a_missing_target_says_so() -> None:
    with pytest.raises(RankError, match="no_such_function"):
        run_ranks("tests.test_ranks:no_such_function", 1)


SCRIPT = """
import os, sys
assert __name__ == "__main__" and sys.argv[0] == __file__
words = [os.environ.get(name, "-") for name in ("RANK", "WORLD_SIZE")] + sys.argv[1:] + [os.path.basename(os.getcwd())]
sys.stdout.write(" ".join(words + [sys.stdin.read()]) + "\\n")
print("an error of " + words[0], file=sys.stderr)
if words[0] == "1":
    sys.stdout.flush()
    os._exit(7)
sys.exit(3 if words[0] == "-" else 0)
"""


@pytest.mark.parametrize(
    ("world_size", "codes", "lines"),
    [(None, [3], ["- - argument run given"]), (2, [0, 7], ["0 2 argument run given", "1 2 argument run given"])],
)
def test_forks_run_a_script_as_python_would(
    tmp_path: Path, world_size: int | None, codes: list[int], lines: list[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    paths = {name: tmp_path / name for name in ("out", "err", "given", "script.py")}
    paths["script.py"].write_text(SCRIPT)
    paths["given"].write_text("given")
    script = Script(paths["script.py"], ("argument",), folder, paths["out"], paths["err"], paths["given"])
    processes = fork_script(script, world_size)
    try:
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == codes
        assert sorted(paths["out"].read_text().splitlines()) == lines
        errors = sorted(paths["err"].read_text().splitlines())
        assert errors == [f"an error of {line[0]}" for line in lines]
    finally:
        end_processes(processes)


def test_a_script_that_hangs_or_raises_is_ended_and_seen(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import os, time\nif os.environ['RANK'] == '0': raise ValueError('seven')\ntime.sleep(600)\n")
    processes = fork_script(Script(path, (), tmp_path, tmp_path / "out", tmp_path / "out"), 2)
    pids = [process.pid or 0 for process in processes]
    processes[0].join(30)
    assert processes[0].exitcode == 1 and "ValueError: seven" in (tmp_path / "out").read_text()
    assert processes[1].exitcode is None
    end_processes(processes)
    assert processes[1].exitcode == -signal.SIGKILL and all(_gone(pid) for pid in pids)


def _gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts as ended."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
