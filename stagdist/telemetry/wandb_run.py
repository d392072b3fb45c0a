"""Weights & Biases: one run per run folder, online if possible, otherwise offline.

Keys stay where wandb keeps them (WANDB_API_KEY, netrc); nothing here writes or logs one.
"""

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stagdist.config.parts import WandbConfig
from stagdist.errors import ConfigError
from stagdist.files import writing

RUN_ID_FILE = "wandb_run_id"
"""File of the run folder that holds the id with which a resumed run continues."""

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 10.0
"""A longer wait for the last upload would use up the seconds that a run has to shut down after SIGTERM."""

LOG = logging.getLogger(__name__)


def start_wandb(folder: Path, target: WandbConfig, *, name: str, config: Mapping[str, Any], resumed: bool) -> Any:
    """Start a wandb run; no key, a refused key or a server that cannot be reached must not cost a training run.

    `step` is a metric and the x axis of all others instead of wandb's own counter: steps that are repeated after a
    resume would be behind that counter, and wandb drops such lines.

    Args:
        folder: run folder; wandb's files go to `folder/wandb`, the run's id to `folder/wandb_run_id`.
        config: resolved configuration shown with the run.
        resumed: continue the run whose id is in the folder, instead of a new one.

    Returns:
        The `wandb.Run`. What it has not sent when it is finished stays in `folder/wandb`, for `wandb sync`.

    Raises:
        ConfigError: the package wandb is missing, or it cannot start.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "logging.wandb.enabled is true, but the package wandb is missing; pip install wandb"
        ) from error
    settings = wandb.Settings(
        console="off",  # the console output is in folder/logs; a copy would wrap the streams of the progress bar
        quiet=True,
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)),
        finish_timeout=FINISH_TIMEOUT_S,
    )
    start = partial(
        wandb.init,
        project=target.project,
        entity=target.entity,
        name=name,
        id=claim_run_id(folder, resumed=resumed),
        resume="allow",
        dir=str(folder),
        config=dict(config),
        settings=settings,
    )
    run = _online_or_offline(wandb, start)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if run.disabled:
        LOG.info("wandb: disabled by WANDB_MODE")
    elif run.offline:
        LOG.info("wandb: run %s is kept offline; send it with `wandb sync %s`", run.id, Path(run.dir).parent)
    else:
        LOG.info("wandb: run %s at %s", run.id, run.url)
    return run


def _online_or_offline(wandb: Any, start: Callable[..., Any]) -> Any:
    try:
        return start()
    except wandb.errors.Error as error:
        LOG.warning("wandb: offline, because the run could not start online: %s", " ".join(str(error).split()))
    wandb.teardown()  # its service would still count the id of the failed attempt as taken
    try:
        return start(mode="offline")
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb cannot start: {error}; set logging.wandb.enabled: false") from error


def claim_run_id(folder: Path, *, resumed: bool) -> str:
    """Id of the folder's wandb run: the stored one when resumed, otherwise a new one, stored from now on.

    WANDB_RUN_ID has priority.
    """
    path = folder / RUN_ID_FILE
    kept = path.read_text(encoding="utf-8").strip() if resumed and path.is_file() else ""
    run_id = os.environ.get("WANDB_RUN_ID") or kept or uuid.uuid4().hex[:8]
    if run_id != kept:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(path) as stream:
            stream.write(run_id + "\n")
    return run_id
