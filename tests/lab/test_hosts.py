"""The lab is what it claims to be: separate hosts that can fail, and that leave nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stagdist.cluster.hosts.hostfile import Host, read_hostfile
from tests.lab.hosts import Lab
from tests.lab.wiring import LABS, ROOT, ProcessId, Record, must, obstacle, records, sweep

pytestmark = pytest.mark.lab
FAKE_RANK = "import time; print('started', flush=True); time.sleep(300)"


def started(lab: Lab, host: str, rank: int) -> int:
    """A process that looks like a rank, and its number inside the host."""
    call = lab.popen(host, [sys.executable, "-c", FAKE_RANK], env={"RANK": str(rank)})
    eventually(lambda: "started" in call.text())
    return call.pid


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait until something holds; fail where it does not come to it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.01)


def test_hosts_are_separate_machines_that_share_their_files(lab: Lab, tmp_path: Path) -> None:
    own = {}
    for host in ("node1", "node2"):
        question = "hostname; hostname -I; for n in net uts ipc pid mnt; do readlink /proc/self/ns/$n; done"
        code, text = lab.run(host, question)
        assert code == 0, text
        own[host] = text.split()
        assert own[host][:2] == [host, lab.address(host)]
    outside = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "uts", "ipc", "pid", "mnt")]
    assert not set(own["node1"][2:]) & set(own["node2"][2:]) and not set(outside) & set(own["node1"])
    lab.run("node1", f"touch /tmp/own /dev/shm/own /run/own {tmp_path}/shared")
    assert (
        lab.run("node2", f"ls /tmp/own /dev/shm/own /run/own {tmp_path}/shared 2>/dev/null")[1].split()
        == [f"{tmp_path}/shared"]
    )  # fmt: skip


def test_hosts_know_each_other_by_name_and_log_in_without_password(lab: Lab) -> None:
    assert lab.run("node1", "ssh node2 hostname && ssh 10.77.0.2 hostname && ssh node1 hostname") == (
        0, "node2\nnode2\nnode1\n",
    )  # fmt: skip


def test_a_login_brings_no_variables_of_the_shell_that_started_the_lab(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    code, text = lab.run("node1", "env", env={"GIVEN": "a b"})
    names = {line.split("=")[0] for line in text.splitlines()}
    assert code == 0 and "GIVEN=a b" in text.splitlines()
    assert not names & {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "VIRTUAL_ENV", "PYTHONPATH", "PYTEST_CURRENT_TEST"}
    assert f"HOME={lab.folder}/home" in text.splitlines()


def test_exit_codes_and_output_come_back(lab: Lab) -> None:
    assert lab.run("node2", "echo out; echo err >&2; exit 7", cwd=Path("/")) == (7, "out\nerr\n")
    assert lab.run("node2", ["printf", "%s|", "two words", "$HOME"], cwd=Path("/")) == (0, "two words|$HOME|")


def test_a_command_that_takes_too_long_fails_the_test_and_is_ended(clean_lab: Lab) -> None:
    with pytest.raises(AssertionError, match=r"sleep 100 on node1 still runs after 0\.5 s"):
        clean_lab.run("node1", ["sleep", "100"], timeout_s=0.5)
    assert clean_lab.processes("node1") == []


def test_a_rank_is_found_frozen_thawed_and_killed_wherever_it_runs(clean_lab: Lab) -> None:
    pids = {rank: started(clean_lab, host, rank) for rank, host in enumerate(("node1", "node2"))}
    ranks = clean_lab.ranks()
    assert {rank: (one.host, one.pid, one.command[-1]) for rank, one in ranks.items()} == {
        0: ("node1", pids[0], FAKE_RANK), 1: ("node2", pids[1], FAKE_RANK),
    }  # fmt: skip
    assert clean_lab.freeze(1).state == "T" and ranks[0].state == "S"
    thawed = clean_lab.thaw(1)
    eventually(lambda: thawed.state == "S")
    clean_lab.kill_rank(1)
    eventually(lambda: list(clean_lab.ranks()) == [0])
    with pytest.raises(AssertionError, match=r"no rank 1 runs in the lab; ranks that do: \[0\]"):
        clean_lab.kill_rank(1)
    with pytest.raises(ProcessLookupError, match="of node2 has ended"):
        ranks[1].signal(signal.SIGTERM)


def test_what_a_rank_starts_does_not_count_as_a_rank(clean_lab: Lab) -> None:
    parent = clean_lab.popen("node1", f"{sys.executable} -c '{FAKE_RANK.replace(chr(39), chr(34))}'; true",
                             env={"RANK": "3"})  # fmt: skip
    eventually(lambda: len(clean_lab.processes("node1")) == 2)
    assert [(rank, one.pid) for rank, one in clean_lab.ranks().items()] == [(3, parent.pid)]


def test_a_signal_reaches_the_process_that_a_call_started(clean_lab: Lab) -> None:
    call = clean_lab.popen("node2", "trap 'echo told; exit 3' TERM; echo ready; while true; do sleep 0.05; done")
    eventually(lambda: "ready" in call.text())
    clean_lab.signal(call, signal.SIGTERM)
    assert call.wait(10) == 3 and call.text().endswith("told\n")
    with pytest.raises(AssertionError, match="has ended"):
        clean_lab.signal(call, signal.SIGTERM)


def test_a_lost_connection_does_not_end_what_runs(clean_lab: Lab) -> None:
    call = clean_lab.popen("node1", ["sleep", "100"])
    pid = call.pid
    call.leave()
    assert [one.pid for one in clean_lab.processes("node1")] == [pid]
    clean_lab.end_processes()
    assert clean_lab.processes() == []


def test_a_cut_host_is_silent_and_goes_on(clean_lab: Lab) -> None:
    ping = "timeout 1 bash -c 'echo >/dev/tcp/node2/22'"
    assert clean_lab.run("node1", ping)[0] == 0
    clean_lab.cut("node2")
    assert clean_lab.run("node1", ping)[0] != 0
    assert clean_lab.run("node2", "hostname") == (0, "node2\n")  # from inside it looks alive
    clean_lab.restore("node2")
    assert clean_lab.run("node1", "ssh node2 hostname") == (0, "node2\n")


def test_power_off_ends_everything_at_once_and_power_on_boots_a_fresh_host(clean_lab: Lab) -> None:
    started(clean_lab, "node2", 1)
    clean_lab.run("node2", "touch /tmp/before")
    outside = clean_lab.ranks()[1].identity
    clean_lab.power_off("node2")
    assert not outside.alive() and not clean_lab.is_up("node2") and clean_lab.processes("node2") == []
    assert clean_lab.run("node1", "ssh -o ConnectTimeout=1 node2 true")[0] == 255
    clean_lab.power_on("node2")
    assert clean_lab.run("node1", "ssh node2 ls /tmp/before 2>/dev/null; hostname") == (0, "node1\n")


def test_a_third_host_joins_a_lab_that_runs(lab: Lab) -> None:
    with Lab(1) as other:
        assert other.add_host() == "node2"
        assert other.run("node1", "ssh node2 hostname") == (0, "node2\n")
        # Two labs have the same addresses and do not meet.
        assert other.run("node2", "hostname -I")[1] == lab.run("node2", "hostname -I")[1]
        assert other.name != lab.name


def test_a_host_comes_up_in_less_than_a_second() -> None:
    with Lab(1) as lab:
        fastest_s = float("inf")
        for number in range(2, 10):  # it takes a tenth; on a busy machine one of them has luck
            start = time.monotonic()
            assert lab.add_host() == f"node{number}"
            fastest_s = min(fastest_s, time.monotonic() - start)
            if fastest_s < 1:
                break
        assert fastest_s < 1


def test_the_small_disk_runs_full_for_all_hosts(clean_lab: Lab) -> None:
    write = f"head -c 100000 /dev/zero >{clean_lab.disk}/file"
    clean_lab.fill_disk(free_bytes=20 * 4096)
    for host in ("node1", "node2"):
        code, text = clean_lab.run(host, write)
        assert code != 0 and "No space left on device" in text
    clean_lab.free_disk()
    assert clean_lab.run("node2", write) == (0, "")
    assert clean_lab.run("node1", f"stat -c %s {clean_lab.disk}/file") == (0, "100000\n")


def test_a_host_may_take_its_own_name_for_a_loopback_address(clean_lab: Lab) -> None:
    clean_lab.name_hosts(loopback=True)
    assert clean_lab.run("node1", "getent hosts node1 | cut -d' ' -f1; getent hosts node2 | cut -d' ' -f1") == (
        0, "127.0.1.1\n10.77.0.2\n",
    )  # fmt: skip


def traces(name: str) -> list[str]:
    """What a lab has left on this machine."""
    spaces = [line.split()[0] for line in must("ip", "netns", "list").splitlines() if line.startswith(name)]
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if name in line]
    return spaces + mounts + ([name] if (LABS / name).exists() else [])


def test_a_closed_lab_leaves_nothing() -> None:
    with Lab(2) as lab:
        lab.popen("node1", "setsid sleep 300").pid  # noqa: B018 -- wait until it runs
        lab.power_off("node2")
        outside = [one.identity for one in lab.processes()] + list(lab._record.hosts.values())
        assert traces(lab.name) and len(outside) >= 3
        lab.close()
        assert not any(one.alive() for one in outside) and traces(lab.name) == []


def test_a_lab_that_fails_to_come_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    prepare = Lab._prepare

    def half(self: Lab, disk_bytes: int) -> None:
        prepare(self, disk_bytes)
        names.append(self.name)
        (self.folder / "sshd_config").write_text("Nonsense yes\n")

    monkeypatch.setattr(Lab, "_prepare", half)
    with pytest.raises(RuntimeError, match=r"node1 did not come up: (?s:.*)Nonsense"):
        Lab(2)
    assert len(names) == 1 and traces(names[0]) == []


OWNER = """
import os, signal, sys
from tests.lab.hosts import Lab
lab = Lab(1)
lab.popen("node1", ["sleep", "300"]).pid
print(lab.name, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "forks" and not os.fork():
    sys.exit(0)
if sys.argv[1] == "forks":
    os.wait()
    print(lab.run("node1", "hostname")[1].strip(), flush=True)
"""


def owned(how: str) -> "subprocess.CompletedProcess[str]":
    """A process that brings a lab up and ends."""
    return subprocess.run([sys.executable, "-c", OWNER, how], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_lab_ends_with_its_owner_but_not_with_a_child_of_it() -> None:
    done = owned("forks")
    name, said = done.stdout.split()
    assert (done.returncode, said) == (0, "node1"), done.stderr
    assert traces(name) == []


@pytest.mark.parametrize("way", ["sweep", "command"])
def test_a_lab_whose_owner_was_killed_is_taken_down_from_its_record(way: str) -> None:
    name = owned("killed").stdout.strip()
    assert traces(name)
    if way == "sweep":
        sweep()
    else:
        assert by_hand("down", name).returncode == 0
    assert traces(name) == []


def by_hand(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m tests.lab.command`."""
    return subprocess.run(
        [sys.executable, "-m", "tests.lab.command", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_lab_by_hand_stays_up_tells_how_to_enter_and_is_taken_down(tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    done = by_hand("up", "--hosts", "2", "--slots", "3", "--spares", "1", "--shared", str(tmp_path))
    name = done.stdout.split()[1]
    try:
        assert done.returncode == 0 and done.stderr == ""
        hostfile = LABS / name / "hostfile"
        assert hostfile.read_text() == "node1 slots=3\nnode2 slots=3\n#spare node3 slots=3\n"
        assert read_hostfile(hostfile).spares == (Host("node3", 3),)
        enter = next(line.split()[3] for line in done.stdout.splitlines() if "enter a host" in line)
        for host in ("node2", "node3"):
            asked = subprocess.run(
                [enter, host, f"hostname; ls {tmp_path}"], capture_output=True, text=True, timeout=20
            )
            assert asked.stdout.split() == [host, "seen"]
        listed = [line.split() for line in by_hand("list").stdout.splitlines()]
        assert [name, "node1,", "node2,", "node3", "stays", "up"] in listed
        sweep()
        assert traces(name)
    finally:
        down = next(line.split("down", 1)[1].split() for line in done.stdout.splitlines() if "take it down" in line)
        subprocess.run(down, cwd=ROOT, check=True, timeout=60)
    assert traces(name) == []
    missing = by_hand("down", name)
    assert missing.returncode == 1 and missing.stderr.startswith(f"error: no lab is called '{name}'")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shared", "/tmp/no-such-folder"], "error: /tmp/no-such-folder is no folder that hosts could share"),
        (["--shared", "/run"], "error: /run cannot be shared: every host has its own /run and /dev/shm"),
        (["--spares", "15"], "error: a lab has at most 16 hosts"),
        (["--slots", "0"], "error: a lab has at least one host of one slot"),
    ],
)
def test_a_lab_that_cannot_be_is_refused_and_leaves_nothing(arguments: list[str], says: str) -> None:
    before = [record.name for record in records() if record.owner is None]
    done = by_hand("up", *arguments)
    assert done.returncode != 0 and done.stderr.strip().endswith(says)
    assert [record.name for record in records() if record.owner is None] == before


def test_a_process_number_that_was_used_again_is_not_killed() -> None:
    bystander = subprocess.Popen(["sleep", "30"])
    try:
        now = ProcessId.of(bystander.pid)
        ProcessId(now.pid, now.started - 1).kill()
        time.sleep(0.05)
        assert bystander.poll() is None and now.alive()
        now.kill()
        assert bystander.wait(5) == -signal.SIGKILL and not now.alive()
    finally:
        bystander.kill()
        bystander.wait()


def test_the_reason_is_told_where_no_lab_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle() == ""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "pdsh" else f"/bin/{name}")
    assert "needs pdsh: apt-get install pdsh" in obstacle()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert obstacle() == "a lab of several hosts needs root"
    with pytest.raises(RuntimeError, match="needs root"):
        Lab(1)


def test_the_switch_reaches_no_further_than_its_hosts(lab: Lab) -> None:
    with socket.socket() as outside:
        outside.bind(("0.0.0.0", 0))
        outside.listen()
        port = outside.getsockname()[1]
        assert lab.run("node1", f"timeout 2 bash -c 'echo >/dev/tcp/127.0.0.1/{port}'")[0] != 0
    assert lab.run("node1", "ip route | wc -l") == (0, "1\n")


def test_the_record_of_a_lab_survives_reading_and_writing(lab: Lab) -> None:
    assert Record.load(lab.name) == lab._record
