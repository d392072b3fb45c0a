"""Stand-ins for Slurm's commands, which start tasks on the hosts of a lab."""

import sys
from pathlib import Path

SRUN = Path(__file__).with_name("srun_stand_in.py")
SCONTROL = """\
#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] || { echo "scontrol: Invalid job list: $*" >&2; exit 1; }
echo node1
echo node2
"""


def write_stand_ins(folder: Path) -> Path:
    """A folder for PATH with srun and scontrol."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    for name, text in (("srun", f"#!{sys.executable}\n{SRUN.read_text()}"), ("scontrol", SCONTROL)):
        (place / name).write_text(text)
        (place / name).chmod(0o700)
    return place


def allocation(folder: Path, path: str) -> dict[str, str]:
    """Variables of a batch script whose allocation has node1 and node2, also those that srun takes for options."""
    return {
        "SLURM_JOB_ID": "10071", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": "1",
        "SLURM_LABELIO": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1",
        "PATH": f"{write_stand_ins(folder)}:{path}",
    }  # fmt: skip
