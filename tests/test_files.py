"""Files written at once or not at all, and locks between processes."""

import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stagdist.files import FileRecord, file_record, locked, replacing, writing


def test_a_file_is_replaced_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with writing(path) as stream:
        stream.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), writing(path) as stream:
        stream.write("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]


def test_a_private_file_is_private_although_a_readable_leftover_has_its_name(tmp_path: Path) -> None:
    leftover = tmp_path / "keys.partial"
    leftover.write_text("")
    leftover.chmod(0o644)
    with writing(tmp_path / "keys", private=True) as stream:
        stream.write("secret")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def test_bytes_are_hashed_and_counted(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    with writing(tmp_path / "weights", "wb", sync=True) as stream:
        stream.write(content)
    expected = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    assert file_record(tmp_path / "weights", sync=True) == expected


HOLDER = """
import sys, time
from pathlib import Path
from stagdist.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_refused_while_held_and_free_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match=r"lock is held by another process"), locked(path):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked(path):
        pass
