"""Settings of every test run, and what is skipped where a machine cannot run it."""

import os

# Before torch is imported: ranks share the cores, sums keep one order, and no test reaches for the network.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SERIAL = {
    "tests/decode": "decode",
    "tests/lab": "lab",
    "tests/training/test_parity.py": "parity",
    "tests/training/test_negative_controls.py": "parity",
}
"""What must not run beside itself, there being one lab, or shares launches; other files are groups of their own."""


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what runs in one worker, and skip `gpu` and `lab` tests, with the reason, where a machine cannot run them."""
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        group = next((name for place, name in SERIAL.items() if path.startswith(place)), path)
        item.add_marker(pytest.mark.xdist_group(group))
    for marker, reason in (("gpu", _without_gpu), ("lab", _without_namespaces)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (problem := reason()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=problem))


def _without_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"


def _without_namespaces() -> str:
    from tests.lab.wiring import obstacle

    return obstacle()
