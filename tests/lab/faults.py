"""The faults that a supervised run must survive, or shut down from, and how each is planted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.lab.supervised import KILL, STOP, TERM, Supervised, signs_of_life

FAULT_STEP = 33
AGENT = "stagdist.cluster.supervision.agent"
REBOOT_S = 6.0
ENDING_S = 30.0
"""Seconds for ranks to save and end by themselves once the supervisor is gone, or their link for good."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: in the report.
        expected: whether the run goes on by itself.
        plant: does the damage.
        mend: what a person does before starting a stopped run again.
        at_step: planted once this step is logged; None: once the scripts exist.
        options: of the supervisor.
        spare: whether a third host stands by.
        grid: of the run.
        tolerance: of losses against an undisturbed run; 0: to the last bit.
        noticed: whether a fault is noticed at all.
        damages_newest: the newest checkpoint is not whole afterwards.
        ending_s: for what a supervisor leaves that could not end it; where it ended everything, nothing is left.
        on_disk: the run lives on the small disk.
        own_corpus: the run has a copy of the corpus.
        poisoned: the script can be made to see bad losses.
        start_with: ssh or srun.
    """

    name: str
    expected: Literal["recover", "stop"]
    plant: Callable[[Supervised], None]
    mend: Callable[[Supervised], None] = lambda run: None
    at_step: int | None = FAULT_STEP
    options: tuple[str, ...] = ()
    spare: bool = False
    grid: str = "pipe2"
    tolerance: float = 0.0
    noticed: bool = True
    damages_newest: bool = False
    ending_s: float = 2.0
    on_disk: bool = False
    own_corpus: bool = False
    poisoned: bool = False
    start_with: Literal["ssh", "srun"] = "ssh"


def _kill(rank: int) -> Callable[[Supervised], None]:
    return lambda run: run.signal_script(rank, KILL)


def _kill_agent(run: Supervised) -> None:
    """The agent of the second host: its ranks end with it, and the host can be used again at once."""
    (agent,) = (one for one in run.lab.processes("node2") if AGENT in one.command)
    agent.signal(KILL)


def _kill_srun(run: Supervised) -> None:
    """The process on the first host that holds the connection to the second one."""
    (srun,) = (one for one in run.lab.processes("node1") if any(word.endswith("/bin/srun") for word in one.command))
    srun.signal(KILL)


def _freeze_at_start(run: Supervised) -> None:
    for rank in (0, 1):
        run.signal_script(rank, STOP)
    for rank, script in run.scripts().items():
        assert signs_of_life(script) == 0, f"rank {rank} was frozen too late: it has given signs of life"


def _freeze_and_kill_supervisor(run: Supervised) -> None:
    run.signal_script(1, STOP)
    time.sleep(0.5)
    run.signal_supervisor(KILL)


def _blink(run: Supervised) -> None:
    run.lab.cut("node2")
    time.sleep(5)
    run.lab.restore("node2")


def reboot(run: Supervised) -> None:
    """Power off a host, and on again."""
    run.lab.power_off("node2")
    time.sleep(REBOOT_S)
    run.lab.power_on("node2")


def truncate_newest(run: Supervised) -> None:
    """Kill a rank and cut the largest file of the newest checkpoint in half."""
    run.signal_script(1, KILL)
    newest = max(path.parent for path in (run.run / "checkpoints").glob("step_*/complete.json"))
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as stream:
        stream.truncate(largest.stat().st_size // 2)


def _delete_corpus(run: Supervised) -> None:
    for path in run.folder.glob("corpus.*"):
        path.rename(path.with_name(f"gone-{path.name}"))
    run.signal_script(1, KILL)


def _bring_corpus_back(run: Supervised) -> None:
    for path in run.folder.glob("gone-corpus.*"):
        path.rename(path.with_name(path.name.removeprefix("gone-")))


def _poison(how: str) -> Callable[[Supervised], None]:
    def plant(run: Supervised) -> None:
        part = run.folder / "poison.part"
        part.write_text(how)
        part.rename(run.folder / "poison")

    return plant


FAULTS = (
    Fault("kill_rank_0", "recover", _kill(0)),
    Fault("kill_rank_1", "recover", _kill(1)),
    Fault("kill_agent", "recover", _kill_agent),
    Fault("freeze_rank", "recover", lambda run: run.signal_script(1, STOP)),
    # The limit for slow phases would not do here: a stopped process has only the time of a hang.
    Fault("freeze_at_start", "recover", _freeze_at_start, at_step=None, options=("--slow-timeout-s", "30")),
    # Connections need up to 6.4 s to come back: after a lost packet the kernel waits twice as long each time.
    Fault("link_down_5s", "recover", _blink, noticed=False, options=("--host-timeout-s", "15")),
    Fault("link_down_spare", "recover", lambda run: run.lab.cut("node2"), spare=True),
    Fault(
        "link_down_no_spare",
        "stop",
        lambda run: run.lab.cut("node2"),
        lambda run: run.lab.restore("node2"),
        options=("--host-wait-s", "5"),
        ending_s=ENDING_S,
    ),
    Fault("power_off_spare", "recover", lambda run: run.lab.power_off("node2"), spare=True),
    Fault(
        "power_off_fewer_replicas",
        "recover",
        lambda run: run.lab.power_off("node2"),
        options=("--min-data-parallel", "1"),
        grid="pipe2_data2",
        tolerance=1e-5,
    ),
    Fault("power_off_reboot", "recover", reboot),
    Fault("sigterm_supervisor", "stop", lambda run: run.signal_supervisor(TERM), noticed=False),
    Fault("sigkill_supervisor", "stop", lambda run: run.signal_supervisor(KILL), noticed=False, ending_s=ENDING_S),
    Fault("freeze_then_sigkill_supervisor", "stop", _freeze_and_kill_supervisor, noticed=False, ending_s=ENDING_S),
    Fault(
        "disk_full",
        "stop",
        lambda run: run.lab.fill_disk(20_000),
        lambda run: run.lab.free_disk(),
        on_disk=True,
    ),
    Fault("checkpoint_truncated", "recover", truncate_newest, damages_newest=True),
    Fault("loss_not_finite_once", "recover", _poison("once"), poisoned=True),
    Fault(
        "loss_not_finite_always",
        "stop",
        _poison("always"),
        lambda run: (run.folder / "poison").unlink(),
        poisoned=True,
    ),
    Fault("corpus_deleted", "stop", _delete_corpus, _bring_corpus_back, own_corpus=True),
    # What depends on how ranks are started, under srun.
    Fault("srun_kill_rank_1", "recover", _kill(1), start_with="srun"),
    Fault("srun_is_killed", "recover", _kill_srun, start_with="srun"),
    Fault("srun_link_down_spare", "recover", lambda run: run.lab.cut("node2"), spare=True, start_with="srun"),
    Fault(
        "srun_sigkill_supervisor",
        "stop",
        lambda run: run.signal_supervisor(KILL),
        noticed=False,
        ending_s=ENDING_S,
        start_with="srun",
    ),
)
