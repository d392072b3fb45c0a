"""What a lab is made of: namespaces, cables, ssh files, and the record by which it can always be taken down."""

import contextlib
import dataclasses
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LABS = Path("/var/tmp/stagdist-labs")
"""One folder per lab. Not below /tmp, of which every host has its own."""

SUBNET = "10.77.0"
MAX_HOSTS = 16
SSHD = "/usr/sbin/sshd"
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
TAKE_DOWN_S = 20.0

SSH_CONFIG = """\
Host *
    User root
    IdentityFile {home}/.ssh/id_ed25519
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 5
    ServerAliveInterval 5
    ServerAliveCountMax 3
"""
SSHD_CONFIG = """\
AddressFamily inet
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
MaxSessions 100
AuthorizedKeysFile .ssh/authorized_keys
HostKey {folder}/host_key
PidFile none
"""
# Runs as process 1 of a host: name, folder of the lab, then the paths below /tmp that stay shared.
INIT = """\
set -e
hostname "$1"
mount --make-rprivate /
mount -t sysfs sysfs /sys
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount --bind "$2/$1.hosts" /etc/hosts
mount --bind "$2/passwd" /etc/passwd
mount -t tmpfs tmpfs /run
mkdir /run/sshd /run/kept
for path in "${@:3}"; do mkdir -p "/run/kept$path"; mount --bind "$path" "/run/kept$path"; done
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp
for path in "${@:3}"; do mkdir -p "$path"; mount --move "/run/kept$path" "$path"; done
exec /usr/sbin/sshd -D -e -f "$2/sshd_config"
"""


def obstacle() -> str:
    """Why no lab can be brought up here; empty where one can."""
    if os.geteuid() != 0:
        return "a lab of several hosts needs root"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    capabilities = int(line.split()[1], 16)
    for name, bit in (("CAP_NET_ADMIN", CAP_NET_ADMIN), ("CAP_SYS_ADMIN", CAP_SYS_ADMIN)):
        if not capabilities >> bit & 1:
            return f"a lab of several hosts needs the capability {name}"
    missing = [name for name in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh") if not shutil.which(name)]
    missing += [] if Path(SSHD).exists() else [SSHD]
    if missing:
        return f"a lab of several hosts needs {', '.join(missing)}: apt-get install pdsh openssh-server iproute2"
    cables = "ip link add br0 type bridge && ip link add p1 type veth peer name p2"
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c", cables],
        capture_output=True, text=True,
    )  # fmt: skip
    return "" if probe.returncode == 0 else f"no namespaces, bridges or cables here: {probe.stderr.strip()}"


@dataclasses.dataclass(frozen=True)
class ProcessId:
    """A process, told from a later one of the same number by the time it started (clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The process that has this number now.

        Raises:
            ProcessLookupError: none has.
        """
        try:
            return cls(pid, int(stat_fields(pid)[19]))
        except FileNotFoundError:
            raise ProcessLookupError(pid) from None

    def alive(self) -> bool:
        """Whether it still runs; one that only waits to be fetched by its parent does not."""
        try:
            fields = stat_fields(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return int(fields[19]) == self.started and fields[0] not in "ZX"

    def kill(self) -> None:
        """End it, and no other."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: [0] state, [1] parent, [3] session, [19] start."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclasses.dataclass
class Record:
    """Everything needed to take a lab down, kept in its folder.

    Attributes:
        name: prefix of all its namespaces.
        owner: the process whose end is the lab's end; None for a lab that stays until it is taken down.
        hosts: by name, the process that holds the host's namespaces.
    """

    name: str
    owner: ProcessId | None
    hosts: dict[str, ProcessId] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of the lab."""
        return LABS / self.name

    @property
    def namespaces(self) -> list[str]:
        """Names of all network namespaces that exist."""
        listed = must("ip", "netns", "list").split("\n")
        return [line.split()[0] for line in listed if line.startswith(f"{self.name}-")]

    def save(self) -> None:
        """Write it down, whole or not at all."""
        part = self.folder / "record.part"
        part.write_text(json.dumps(dataclasses.asdict(self)))
        part.rename(self.folder / "record.json")

    @classmethod
    def load(cls, name: str) -> "Record":
        """The record of a lab.

        Raises:
            FileNotFoundError: there is no such lab.
        """
        try:
            body = json.loads((LABS / name / "record.json").read_text())
        except FileNotFoundError:
            names = ", ".join(record.name for record in records()) or "none"
            raise FileNotFoundError(f"no lab is called {name!r}; labs that are up: {names}") from None
        owner = ProcessId(**body["owner"]) if body["owner"] else None
        return cls(body["name"], owner, {host: ProcessId(**one) for host, one in body["hosts"].items()})


def records() -> Iterator[Record]:
    """All labs of this machine."""
    for path in sorted(LABS.glob("*/record.json")):
        with contextlib.suppress(FileNotFoundError):
            yield Record.load(path.parent.name)


def sweep() -> None:
    """Take down the labs whose owner was ended before it could."""
    for record in records():
        if record.owner is not None and not record.owner.alive():
            take_down(record)


def take_down(record: Record) -> None:
    """End everything in the hosts and remove every trace; no harm where that has been done already.

    Raises:
        TimeoutError: something in the hosts cannot be ended.
        RuntimeError: a namespace or the small disk cannot be removed.
    """
    seen = {one for space in record.namespaces for one in running_in(space)}
    for process in record.hosts.values():
        process.kill()
    deadline = time.monotonic() + TAKE_DOWN_S
    while True:
        seen |= {one for space in record.namespaces for one in running_in(space)}
        left = [one for one in seen if one.alive()]
        if not left:
            break
        if time.monotonic() > deadline:
            pids = ", ".join(str(one.pid) for one in left)
            raise TimeoutError(f"lab {record.name}: processes {pids} did not end in {TAKE_DOWN_S:g} s")
        for one in left:  # also of a host that was starting when its lab ended, and so is not in the record
            one.kill()
        time.sleep(0.02)
    for space in record.namespaces:
        with contextlib.suppress(RuntimeError):  # somebody else may be taking the lab down just now
            must("ip", "netns", "del", space)
    if kept := record.namespaces:
        raise RuntimeError(f"lab {record.name}: the network namespaces {', '.join(kept)} cannot be removed")
    while (record.folder / "disk").is_mount():
        must("umount", str(record.folder / "disk"))
    shutil.rmtree(record.folder, ignore_errors=True)


def running_in(space: str) -> set[ProcessId]:
    """The processes of a network namespace, process 1 of the host among them.

    A process that is ending has left its namespaces already and is not listed, although it is still there: whoever
    waits for the end keeps what was listed before and asks `alive`. Process 1 ends as the last of its host.
    """
    found = set()
    for pid in must("ip", "netns", "pids", space).split():
        with contextlib.suppress(ProcessLookupError):
            found.add(ProcessId.of(int(pid)))
    return found


def must(*command: str) -> str:
    """Standard output of a command that has to succeed.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def write_ssh_files(folder: Path) -> None:
    """A home for the hosts' root, keys, and the configuration of ssh and sshd."""
    home = folder / "home"
    ssh = home / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    for key in (ssh / "id_ed25519", folder / "host_key"):
        must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(key))
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    (ssh / "config").write_text(SSH_CONFIG.format(home=home))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (home / ".hushlogin").touch()
    # Only read by interactive logins: commands through ssh see the bare environment that launchers meet.
    (home / ".bash_profile").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\ncd {ROOT}\n")
    users = [
        ":".join([user.pw_name, "x", str(user.pw_uid), str(user.pw_gid), user.pw_gecos, place, user.pw_shell])
        for user in pwd.getpwall()
        for place in [str(home) if user.pw_uid == 0 else user.pw_dir]
    ]
    (folder / "passwd").write_text("\n".join(users) + "\n")
    for one in (home, ssh):
        one.chmod(0o700)


def write_names(folder: Path, number: int, *, loopback: bool) -> None:
    """The /etc/hosts of a host; `loopback` writes Debian's line that gives the own name a loopback address."""
    lines = ["127.0.0.1 localhost"]
    for other in range(1, MAX_HOSTS + 1):
        own_loopback = loopback and other == number
        lines.append(f"{'127.0.1.1' if own_loopback else f'{SUBNET}.{other}'} node{other}")
    # In place: running hosts have this very file mounted.
    (folder / f"node{number}.hosts").write_text("\n".join(lines) + "\n")


def plug_in(name: str, number: int) -> None:
    """A network namespace for a host, with a cable to the lab's switch."""
    space, switch, port = f"{name}-n{number}", f"{name}-sw", f"p{number}"
    must("ip", "netns", "add", space)
    must("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
    must("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
    must("ip", "-n", space, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
    must("ip", "-n", space, "link", "set", "eth0", "up")
    must("ip", "-n", space, "link", "set", "lo", "up")


def below_tmp(paths: Sequence[Path]) -> list[str]:
    """Those paths that a host's own /tmp would hide, outermost only."""
    inside = sorted({path.resolve() for path in paths if path.resolve().is_relative_to("/tmp")})
    return [str(path) for path in inside if not any(other in path.parents for other in inside)]


def start_host(record: Record, host: str, shared: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start process 1 of a host. Its parent here is in no namespace but the network's, and takes it along."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{record.name}-n{host.removeprefix('node')}",
             "unshare", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc",
             "bash", "-c", INIT, "init", host, str(record.folder), *shared],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, cwd="/", env={},
        )  # fmt: skip
