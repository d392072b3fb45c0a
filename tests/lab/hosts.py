"""Several hosts on one machine: `Lab` for tests; `python -m tests.lab.command` for use by hand.

A host has its own network, process numbers, name, IPC, /dev/shm, /tmp and /run; the rest of the file system is shared,
as on a cluster with NFS. Host K is 10.77.0.K and is called nodeK. All hosts hang on one switch that nothing else is
connected to, so several labs do not meet. The home of root is the lab's own. An ssh server is process 1 of a host;
when it ends, the kernel ends all that runs there, as if the power had failed.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.lab.inside import Call, HostProcess, processes_of, ranks_among
from tests.lab.wiring import (
    MAX_HOSTS,
    ROOT,
    SUBNET,
    ProcessId,
    Record,
    below_tmp,
    must,
    obstacle,
    plug_in,
    running_in,
    start_host,
    take_down,
    write_names,
    write_ssh_files,
)  # fmt: skip

START_S = 10.0
DISK_BYTES = 64 * 2**20


class Lab:
    """Hosts node1 .. nodeN, up when the constructor returns.

    Attributes:
        name: unique on this machine.
        folder: the lab's own; all hosts see it at this path, as they see everything outside /tmp, /run, /dev/shm.
        disk: folder of a small disk of its own that all hosts see.
    """

    def __init__(
        self, num_hosts: int = 2, *, shared: Sequence[Path] = (), disk_bytes: int = DISK_BYTES, keep: bool = False
    ):
        """Bring the hosts up, in less than a second each.

        Args:
            shared: folders below /tmp that the hosts share; of the rest of /tmp every host has its own.
            disk_bytes: size of the small disk.
            keep: leave it up when this process ends.

        Raises:
            RuntimeError: no lab can be brought up here, or a part of it failed.
        """
        if problem := obstacle():
            raise RuntimeError(problem)
        self.name = f"sg{os.urandom(3).hex()}"
        self._record = Record(self.name, None if keep else ProcessId.of(os.getpid()))
        self._shared = below_tmp([ROOT, Path(sys.prefix), Path(sys.base_prefix), *shared])
        self._parents: dict[str, subprocess.Popen[bytes]] = {}
        self._calls = 0
        self._at_end = weakref.finalize(self, _close, self._record, os.getpid())
        try:
            self._prepare(disk_bytes)
            for _ in range(num_hosts):
                self.add_host()
        except BaseException:
            self.close()
            raise
        if keep:
            self._at_end.detach()

    def _prepare(self, disk_bytes: int) -> None:
        self.folder.mkdir(parents=True, mode=0o700)
        self._record.save()
        write_ssh_files(self.folder)
        self.disk.mkdir()
        (self.folder / "calls").mkdir()
        must("mount", "-t", "tmpfs", "-o", f"size={disk_bytes}", "tmpfs", str(self.disk))
        must("ip", "netns", "add", f"{self.name}-sw")
        must("ip", "-n", f"{self.name}-sw", "link", "add", "br0", "type", "bridge")
        must("ip", "-n", f"{self.name}-sw", "link", "set", "br0", "up")

    # --- hosts ------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The lab's folder."""
        return self._record.folder

    @property
    def disk(self) -> Path:
        """The small disk."""
        return self.folder / "disk"

    @property
    def hosts(self) -> list[str]:
        """Names of all hosts, also of those without power."""
        return list(self._parents)

    def address(self, host: str) -> str:
        """IPv4 address of a host."""
        return f"{SUBNET}.{_number(host)}"

    def add_host(self) -> str:
        """Bring up one host more; its name."""
        number = len(self._parents) + 1
        if number > MAX_HOSTS:
            raise RuntimeError(f"a lab has at most {MAX_HOSTS} hosts")
        write_names(self.folder, number, loopback=False)
        plug_in(self.name, number)
        self._boot(f"node{number}")
        return f"node{number}"

    def name_hosts(self, *, loopback: bool) -> None:
        """Choose what a host's own name means to it: its address, or 127.0.1.1 as Debian's installer writes it."""
        for host in self.hosts:
            write_names(self.folder, _number(host), loopback=loopback)

    def is_up(self, host: str) -> bool:
        """Whether a host has power."""
        return self._parents[host].poll() is None

    def power_off(self, host: str) -> None:
        """Pull the plug: the link goes down, then everything on the host ends at once, without a word to anyone."""
        self.cut(host)
        ending = running_in(self._space(host))
        self._parents[host].kill()
        self._parents[host].wait()
        _wait_until(lambda: not any(one.alive() for one in ending), f"{host} to go down")

    def power_on(self, host: str) -> None:
        """Boot a host again; returns when its ssh server listens."""
        if not self.is_up(host):
            self._boot(host)
        self.restore(host)

    def cut(self, host: str) -> None:
        """Take the host off the network. What runs there goes on."""
        must("ip", "-n", f"{self.name}-sw", "link", "set", f"p{_number(host)}", "down")

    def restore(self, host: str) -> None:
        """Put the host back on the network."""
        must("ip", "-n", f"{self.name}-sw", "link", "set", f"p{_number(host)}", "up")

    def _boot(self, host: str) -> None:
        log = self.folder / f"{host}.log"
        parent = start_host(self._record, host, self._shared, log)
        self._parents[host] = parent
        self._record.hosts[host] = ProcessId.of(parent.pid)
        self._record.save()
        _wait_until(lambda: "Server listening" in log.read_text() or parent.poll() is not None, f"{host} to come up")
        if parent.poll() is not None:
            raise RuntimeError(f"{host} did not come up: {log.read_text()}")

    def _space(self, host: str) -> str:
        return f"{self.name}-n{_number(host)}"

    # --- commands ---------------------------------------------------------------------------------------------------

    def popen(
        self, host: str, command: str | Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Call:
        """Log in to a host through ssh and start a command there; text is given to bash.

        The environment is that of a fresh login, as launchers meet it, plus `env`.
        """
        self._calls += 1
        output, pid_file = (self.folder / "calls" / f"{self._calls}.{end}" for end in ("txt", "pid"))
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        script = f"echo $$ >{pid_file}; cd {shlex.quote(str(cwd or self.folder / 'home'))} && exec env "
        with output.open("wb") as stream:
            client = subprocess.Popen(
                [*self.ssh(host), script + shlex.join([*settings, *words])],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Call(client, host, output, pid_file, f"{shlex.join(words)[:200]} on {host}")

    def run(
        self,
        host: str,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60,
    ) -> tuple[int, str]:
        """Run a command to its end; exit code and everything it printed. See `popen`.

        Raises:
            AssertionError: the time is up; what runs on that host has been ended.
        """
        call = self.popen(host, command, env=env, cwd=cwd)
        try:
            return call.wait(timeout_s), call.text()
        finally:
            if call.poll() is None:
                self.end_processes(host)
                call.leave()

    def ssh(self, host: str) -> list[str]:
        """Words that, with a command behind them, run it on a host."""
        config = self.folder / "home" / ".ssh" / "config"
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", "ssh", "-F", str(config), self.address(host)]

    # --- processes --------------------------------------------------------------------------------------------------

    def processes(self, host: str | None = None) -> list[HostProcess]:
        """What runs on a host, or on all: number inside the host, words, environment. Ssh servers are left out."""
        found = []
        for name in [host] if host else self.hosts:
            if self.is_up(name):
                parent = self._parents[name].pid
                for init in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
                    found += processes_of(name, int(init))
        return found

    def ranks(self) -> dict[int, HostProcess]:
        """The ranks of the job that runs, of all hosts."""
        return ranks_among(self.processes())

    def kill_rank(self, rank: int) -> HostProcess:
        """SIGKILL to a rank, wherever it runs."""
        return self._signal_rank(rank, signal.SIGKILL)

    def freeze(self, rank: int) -> HostProcess:
        """SIGSTOP to a rank: it is there, and silent. Returns when it stands still."""
        frozen = self._signal_rank(rank, signal.SIGSTOP)
        _wait_until(lambda: frozen.state == "T", f"rank {rank} to stop")
        return frozen

    def thaw(self, rank: int) -> HostProcess:
        """SIGCONT to a rank."""
        return self._signal_rank(rank, signal.SIGCONT)

    def _signal_rank(self, rank: int, number: int) -> HostProcess:
        ranks = self.ranks()
        assert rank in ranks, f"no rank {rank} runs in the lab; ranks that do: {sorted(ranks)}"
        ranks[rank].signal(number)
        return ranks[rank]

    def signal(self, call: Call, number: int) -> None:
        """Send a signal to the process that a call started, not to what that one started."""
        inside = [one for one in self.processes(call.host) if one.pid == call.pid]
        assert inside, f"{call.what} has ended:\n{call.text()}"
        inside[0].signal(number)

    def end_processes(self, host: str | None = None) -> None:
        """SIGKILL to everything but the ssh servers, on a host or on all; returns when it is gone."""
        deadline = time.monotonic() + START_S
        while remaining := self.processes(host):
            assert time.monotonic() < deadline, f"cannot be ended: {remaining}"
            for one in remaining:
                one.identity.kill()
            time.sleep(0.02)

    # --- disk -------------------------------------------------------------------------------------------------------

    def fill_disk(self, free_bytes: int = 0) -> None:
        """Leave only so many bytes (rounded down to pages) free on the small disk."""
        status = os.statvfs(self.disk)
        with (self.disk / "filler").open("ab") as stream:
            os.posix_fallocate(stream.fileno(), stream.tell(), max(0, status.f_bavail * status.f_frsize - free_bytes))

    def free_disk(self) -> None:
        """Undo `fill_disk`."""
        (self.disk / "filler").unlink(missing_ok=True)

    # --- the end ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """As after bringing it up: all hosts with power and network and nothing running, names right, disk empty."""
        for host in self.hosts:
            self.power_on(host)
        self.end_processes()
        self.name_hosts(loopback=False)
        for path in self.disk.iterdir():
            must("rm", "-rf", str(path))
        (self.folder / "home" / ".deepspeed_env").unlink(missing_ok=True)

    def close(self) -> None:
        """End everything and remove every trace. Also runs by itself when the owner shuts down cleanly."""
        self._at_end.detach()
        take_down(self._record)
        for parent in self._parents.values():
            parent.wait()

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(record: Record, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child that ends
        take_down(record)


def _number(host: str) -> int:
    return int(host.removeprefix("node"))


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {START_S:g} s for {what}")
        time.sleep(0.005)
