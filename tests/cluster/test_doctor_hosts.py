"""What a host tells of itself, and how it is asked."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagdist.cluster.doctor import host_probe
from stagdist.cluster.doctor.examination import ask_all, ask_host
from stagdist.cluster.doctor.facts import HostFacts
from stagdist.errors import TransportError
from tests.cluster.doctor_cases import facts


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def pretended_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ssh` that runs its last word here; `dead` does not answer, `noisy` greets first, `broken` has no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(
        folder / "ssh",
        f"""#!/bin/bash
host="${{@: -2:1}}"; line="${{@: -1}}"
case $host in
  dead) echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255;;
  noisy) echo "Welcome to noisy!";;
  broken) line="${{line//{sys.executable}//nowhere/python}}";;
  unequipped) line="${{line/ -m / -S -m }}";;
  bare) line="${{line/cd -- /cd -- /nowhere}}";;
esac
exec /bin/sh -c "$line"
""",
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_facts_survive_json() -> None:
    assert HostFacts.model_validate_json(facts().model_dump_json()) == facts()


def test_hosts_are_examined_and_leave_nothing_behind(pretended_hosts: Path) -> None:
    kept = pretended_hosts / "new" / "checkpoints"
    answers = ask_all(dict.fromkeys(["node1", "noisy", "dead", "broken", "bare"], 1), kept, 8)
    assert list(answers.facts) == ["node1", "noisy"]
    facts = answers.facts["noisy"]
    assert facts.hostname == socket.gethostname() and facts.versions["torch"]
    assert facts.folder and facts.versions == answers.facts["node1"].versions
    assert facts.storage.write_mb_s > 0 and not facts.storage.problem and facts.storage.shared
    assert abs(facts.clock_offset_s) <= facts.clock_error_s + 0.001
    assert "No route to host" in answers.silent["dead"] and "try `ssh dead true`" in answers.silent["dead"]
    assert "same paths on every host" in answers.silent["broken"]
    assert "same paths on every host" in answers.silent["bare"]
    assert not (pretended_hosts / "new").exists()


def test_the_clock_of_a_host_is_known_within_the_time_of_its_answer(pretended_hosts: Path) -> None:
    ahead = "import time; time.sleep(0.5); print(time.time() + 100); time.sleep(0.2)"
    executable(pretended_hosts / "bin" / "date", f"#!/bin/sh\nexec {sys.executable} -c '{ahead}'\n")
    (answer,) = ask_all({"noisy": 1}, pretended_hosts, 4).facts.values()
    assert 0.35 <= answer.clock_error_s < 5
    assert abs(answer.clock_offset_s - 100) <= answer.clock_error_s


def test_an_examination_that_fails_says_how_to_see_it(pretended_hosts: Path) -> None:
    with pytest.raises(TransportError, match="its examination failed .*TypeError.*run `"):
        ask_host("node1", {"nonsense": 1})


def test_a_host_without_the_packages_is_reported_in_one_line(pretended_hosts: Path) -> None:
    with pytest.raises(TransportError, match="lacks a package .*ModuleNotFoundError.*; install it there: pip install"):
        ask_host("unequipped", {})


def test_a_folder_that_is_there_stays_with_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "step_00000001").mkdir()
    kept = host_probe.examine_storage(tmp_path, tmp_path / "step_00000001", 4)
    assert (kept.problem, kept.shared, kept.path) == ("", True, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_mark_that_does_not_appear_is_waited_for_and_then_not_shared(tmp_path: Path) -> None:
    started = time.monotonic()
    kept = host_probe.examine_storage(tmp_path / "new" / "runs", tmp_path / "made", 4, visible_s=0.5)
    assert 0.5 <= time.monotonic() - started < 3
    assert (kept.problem, kept.shared) == ("", False) and kept.write_mb_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = host_probe.examine_storage(tmp_path / "file" / "runs", tmp_path / "made", 4, visible_s=0)
    assert "Not a directory" in kept.problem


def test_a_change_of_any_source_file_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    before = host_probe.fingerprint(tmp_path)
    (tmp_path / "a" / "x.txt").write_text("1")
    assert host_probe.fingerprint(tmp_path) == before
    (tmp_path / "a" / "x.py").write_text("2")
    changed = host_probe.fingerprint(tmp_path)
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    assert len({before, changed, host_probe.fingerprint(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("script", "devices", "driver"),
    [
        ("echo '570.1, 81559, 81000, NVIDIA H100, 80GB'; echo '570.1, 81559, 7, NVIDIA H100, 80GB'", 2, "570.1"),
        ("echo '580.2, [N/A], [N/A], NVIDIA GB10'", 1, "580.2"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", 0, "failed: Failed to initi"),
        ("exit 9", 0, "failed: exit code 9"),
    ],
)
def test_devices_come_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, devices: int, driver: str
) -> None:
    executable(tmp_path / "nvidia-smi", f"#!/bin/sh\n{script}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found, version = host_probe.gpus()
    assert len(found) == devices and version is not None and version.startswith(driver)
    if devices == 2:
        assert [(one.name, one.free_mib) for one in found] == [("NVIDIA H100, 80GB", 81000), ("NVIDIA H100, 80GB", 7)]


def test_names_addresses_and_routes_of_this_machine() -> None:
    known = host_probe.network_interfaces()
    assert "127.0.0.1" in known["lo"]
    assert host_probe.address_of("localhost") in ("127.0.0.1", "::1")
    assert host_probe.address_of("no-such-host.invalid") is None
    assert host_probe.route_to("127.0.0.1", known) == "lo"
    assert host_probe.route_to(None, known) is None
    with socket.socket() as listener:
        listener.bind(("", host_probe.free_port()))


def test_the_probe_imports_no_framework() -> None:
    code = f"import sys, {host_probe.__name__}; print([n for n in ('torch', 'deepspeed', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
