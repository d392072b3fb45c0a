"""Supervised runs in the lab: started as a person would, disturbed, and looked at from outside."""

import json
import signal
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagdist.cluster.hosts.hostfile import Host
from stagdist.telemetry.pulse import PULSE_FILE
from tests.lab.hosts import Lab
from tests.lab.inside import Call, HostProcess
from tests.lab.launching import BIN, VARIABLES, hostfile_text
from tests.lab.slurm import allocation
from tests.launch.runs import PRETRAIN, ROOT, losses, write_config

RUN = ROOT / "launch" / "run.py"
HANG_TIMEOUT_S = 8.0
HOST_TIMEOUT_S = 8.0


@dataclass
class Supervised:
    """One supervised run.

    Attributes:
        lab: where.
        folder: shared by the hosts; the run is `folder/runs/run`.
        start_with: ssh or srun; srun is a stand-in that starts tasks on the hosts of the lab.
        slots: per host.
        spares: hosts in reserve.
        options: of launch/run.py, besides the usual ones.
        script: in place of launch/pretrain.py.
        variables: of the shell, besides the usual ones.
    """

    lab: Lab
    folder: Path
    start_with: str = "ssh"
    hosts: Sequence[str] = ("node1", "node2")
    slots: int = 1
    spares: Sequence[str] = ()
    options: Sequence[str] = ()
    script: Path = PRETRAIN
    variables: Mapping[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / "run"

    @property
    def call(self) -> Call:
        """The latest start."""
        return self.calls[-1]

    def start(self, config: dict[str, Any]) -> None:
        """Start the supervisor on the first host."""
        path = write_config(self.folder, config)
        hostfile = self.folder / "hostfile"
        spares = "".join(f"#spare {host} slots={self.slots}\n" for host in self.spares)
        hostfile.write_text(hostfile_text(Host(host, self.slots) for host in self.hosts) + spares)
        words = [sys.executable, str(RUN), "--hostfile", str(hostfile), "--start-with", self.start_with]
        words += ["--hang-timeout-s", f"{HANG_TIMEOUT_S:g}", "--host-timeout-s", f"{HOST_TIMEOUT_S:g}"]
        words += [*self.options, "--", str(self.script), "--config", str(path)]
        shell = {**VARIABLES, **self.variables, "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}
        if self.start_with == "srun":
            shell |= allocation(self.folder, shell["PATH"])
        self.calls.append(self.lab.popen(self.hosts[0], words, env=shell, cwd=self.folder))

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The history so far, of one kind or all."""
        try:
            events: list[dict[str, Any]] = json.loads((self.run / "run.json").read_text())["events"]
        except FileNotFoundError:
            return []
        return [event for event in events if kind in (None, event["event"])]

    def losses(self) -> dict[int, float]:
        """Training losses by step."""
        return losses(self.folder, "run")

    def wait_for_step(self, step: int, timeout_s: float = 120.0) -> None:
        """Return when a step has been logged in the run's file."""
        self.wait_until(lambda: max(self.losses(), default=0) >= step, f"step {step}", timeout_s)

    def wait_for_event(self, kind: str, number: int = 1, timeout_s: float = 120.0) -> dict[str, Any]:
        """The event of this kind with this number, counted from 1, once it has happened."""
        self.wait_until(lambda: len(self.events(kind)) >= number, f"event {kind}", timeout_s)
        return self.events(kind)[number - 1]

    def wait_until_it_trains(self) -> int:
        """The first step that the newest attempt has done, once it has."""
        self.wait_until(lambda: self._first_step() is not None, "step of the newest attempt", 120.0)
        step = self._first_step()
        assert step is not None
        return step

    def _first_step(self) -> int | None:
        known = None
        for event in self.events():
            if event["event"] in ("start", "step"):
                known = event.get("step")  # a start has none
        return known

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint whose files have the sizes that its marker tells; 0 without one."""
        markers = (self.run / "checkpoints").glob("step_*/complete.json")
        return max((int(one.parent.name.removeprefix("step_")) for one in markers if _is_whole(one)), default=0)

    def wait_until(self, condition: Any, what: str, timeout_s: float) -> None:
        """Return when something is so; fail with the output when it takes too long or the run has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.call.poll() is not None and not condition():
                raise AssertionError(f"the run ended before {what}:\n{self.call.text()}")
            assert time.monotonic() < deadline, f"no {what} in {timeout_s:.0f} s:\n{self.call.text()}"
            time.sleep(0.1)

    def scripts(self) -> dict[int, HostProcess]:
        """The training processes by rank: what agents have started, not what these have."""
        found = [one for one in self.lab.processes() if PULSE_FILE in one.environment and one.rank is not None]
        pids = {one.identity.pid for one in found}
        return {one.rank: one for one in found if one.parent_outside not in pids and one.rank is not None}

    def wait_for_script(self, rank: int, timeout_s: float = 60.0) -> HostProcess:
        """The training process of a rank, once it is there."""
        found: dict[int, HostProcess] = {}

        def there() -> bool:
            found.update(self.scripts())
            return rank in found

        self.wait_until(there, f"process of rank {rank}", timeout_s)
        return found[rank]

    def signal_script(self, rank: int, number: int) -> None:
        """Send a signal to a training process, once it is there."""
        self.wait_for_script(rank).signal(number)

    def signal_supervisor(self, number: int) -> None:
        """Send a signal to the supervisor alone."""
        self.lab.signal(self.call, number)

    def orphans(self, patience_s: float = 0.0) -> list[HostProcess]:
        """What still runs on the hosts, whoever started it, after `patience_s` at most."""
        deadline = time.monotonic() + patience_s
        while left := self.lab.processes():
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        return left


def _is_whole(marker: Path) -> bool:
    try:
        files = json.loads(marker.read_text())["files"]
        return all((marker.parent / name).stat().st_size == record["size"] for name, record in files.items())
    except FileNotFoundError:  # it was pruned meanwhile, or a file is missing
        return False


def signs_of_life(script: HostProcess) -> int:
    """How many a training process has given so far: the first number of the file that its agent reads."""
    path = Path(f"/proc/{script.identity.pid}/root{script.environment[PULSE_FILE]}")
    return int(struct.unpack_from("=q", path.read_bytes())[0])


KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
