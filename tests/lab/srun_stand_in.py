"""Behaves like Slurm's srun: one task on each of the nodes, over the ssh of the lab.

The complete environment is passed on. Standard input goes to the only task, signals to all. A task that fails ends the
others if `--kill-on-bad-exit=1` says so. Options come from variables too: SLURM_LABELIO puts the task's number before
every line. When srun is killed, its tasks lose their pipes.
"""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any

FLAGS = {"--overlap", "--unbuffered"}
KNOWN = {"nodes", "ntasks", "ntasks-per-node", "nodelist", "chdir", "export", "kill-on-bad-exit", "cpus-per-task"}


def options() -> tuple[dict[str, str], list[str]]:
    """Options by name, and the command."""
    words = sys.argv[1:]
    number = next(index for index, word in enumerate(words) if not word.startswith("-"))
    given = dict(word.removeprefix("--").split("=", 1) for word in words[:number] if word not in FLAGS)
    assert set(given) <= KNOWN, f"srun: unknown options among {words[:number]}"
    assert given.get("export", "ALL") == "ALL"
    return given, words[number:]


def nodes(text: str) -> list[str]:
    """Names in `node[1-2]` or `node2`."""
    match = re.fullmatch(r"(\w+)\[(\d+)-(\d+)\]", text)
    return [f"{match[1]}{index}" for index in range(int(match[2]), int(match[3]) + 1)] if match else text.split(",")


def die_with_srun() -> None:
    """The kernel kills the connection when srun is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start(rank: int, host: str, hosts: list[str], place: str, words: list[str]) -> "subprocess.Popen[Any]":
    """One task."""
    step = {
        "STEP_ID": 0, "STEP_NUM_TASKS": len(hosts), "STEP_NUM_NODES": len(hosts), "STEP_NODELIST": ",".join(hosts),
        "STEP_TASKS_PER_NODE": f"1(x{len(hosts)})", "NTASKS": len(hosts), "PROCID": rank, "LOCALID": 0, "NODEID": rank,
    }  # fmt: skip
    variables = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in step.items()}}
    line = shlex.join(["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *words])
    command = f"echo $$ >/tmp/srun-{os.getpid()}; cd {shlex.quote(place)} && exec {line}"
    labels = "SLURM_LABELIO" in os.environ
    task = subprocess.Popen(
        ["ssh", host, command],
        stdin=None if len(hosts) == 1 else subprocess.DEVNULL,
        stdout=subprocess.PIPE if labels else None,
        preexec_fn=die_with_srun,
    )
    if labels:
        threading.Thread(target=label, args=(rank, task), daemon=True).start()
    return task


def label(rank: int, task: "subprocess.Popen[Any]") -> None:
    """Show the output of a task with its number."""
    for line in task.stdout or ():
        sys.stdout.buffer.write(b"%d: %s" % (rank, line))
        sys.stdout.buffer.flush()


def main() -> int:
    """Exit code: the largest of the tasks."""
    given, words = options()
    hosts = nodes(given.get("nodelist", os.environ["SLURM_JOB_NODELIST"]))
    place = given.get("chdir", os.getcwd())
    tasks = [start(rank, host, hosts, place, words) for rank, host in enumerate(hosts)]

    def hand_on(number: int, _: object) -> None:
        for host in hosts:
            subprocess.run(["ssh", host, f"kill -{number} $(cat /tmp/srun-{os.getpid()})"], check=False)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hand_on)
    all_end = given.get("kill-on-bad-exit") == "1"
    while any(task.poll() is None for task in tasks) and not (all_end and any(task.poll() for task in tasks)):
        time.sleep(0.05)
    for task in tasks:
        task.terminate()
    return max(abs(task.wait()) for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
