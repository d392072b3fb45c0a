"""Settings of every test run, and what is skipped where a machine cannot run it."""

import os

# Before torch is imported: ranks share the cores, sums keep one order, and no test uses the network.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

import gc
import ssl

import pytest


def pytest_configure() -> None:
    """Make HTTP clients and imports cheap.

    A client would read the certificates of all authorities in 40 ms, and no test uses TLS. Modules are no garbage.
    """
    ssl.SSLContext.load_verify_locations = lambda *_, **__: None  # type: ignore[method-assign]
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage from now on, and never search what test modules have imported: a million objects."""
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` and `lab` tests, with the reason, where there is no device or no permission to make namespaces."""
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
