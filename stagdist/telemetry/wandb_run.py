"""Weights & Biases: one run per run folder, online where that can work, otherwise offline.

Keys stay where wandb keeps them (WANDB_API_KEY, netrc); nothing here writes or logs one.
"""

import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from stagdist.errors import ConfigError

RUN_ID_FILE = "wandb_run_id"
"""File of the run folder that holds the id by which a resumed run goes on."""

REACH_TIMEOUT_S = 5.0
FINISH_TIMEOUT_S = 10.0
"""Waiting longer for the last upload would eat the seconds a run has to end after SIGTERM."""

logger = logging.getLogger(__name__)


class WandbTarget(Protocol):
    """What is needed to know where metrics go; `logging.wandb` of the configuration is one."""

    @property
    def enabled(self) -> bool:
        """False sends nothing."""

    @property
    def project(self) -> str:
        """Project of the run."""

    @property
    def entity(self) -> str | None:
        """Team or user; None is the default of the key."""


class WandbRun:
    """An open wandb run.

    `step` is a metric and the x axis of all others instead of wandb's own counter: steps that are done again after
    a resume would be behind that counter, and wandb throws such lines away.

    Args:
        folder: run folder; wandb's files go to `folder/wandb`, the run's id to `folder/wandb_run_id`.
        target: project and entity.
        name: name shown for the run.
        config: resolved configuration shown with the run.
        resumed: go on with the run whose id the folder holds, instead of a new one.

    Raises:
        ConfigError: the package wandb is missing.
    """

    def __init__(
        self, folder: Path, target: WandbTarget, *, name: str, config: Mapping[str, Any], resumed: bool
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logging.wandb.enabled is true, but the package wandb is missing; pip install wandb"
            ) from error
        self._folder = folder
        arguments = {
            "project": target.project,
            "entity": target.entity,
            "name": name,
            "id": claim_run_id(folder, resumed=resumed),
            "resume": "allow",
            "dir": str(folder),
            "config": dict(config),
            "settings": _settings(wandb),
        }
        settings = wandb.setup().settings
        mode, reason = choose_mode(
            os.environ.get("WANDB_MODE") or settings.mode,
            has_key=has_key(settings.base_url, settings.api_key, getattr(settings, "identity_token_file", None)),
            reachable=lambda: is_reachable(settings.base_url, REACH_TIMEOUT_S),
        )
        if reason:
            logger.warning("wandb: offline, because %s", reason)
        self._run = self._open(wandb, mode, arguments)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._announce(mode)

    @property
    def id(self) -> str:
        """The run's id, the same for all attempts of one training run."""
        return str(self._run.id)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send one line of metrics; `step` must be among them."""
        self._run.log(dict(metrics))

    def close(self) -> None:
        """End the run; what was not sent in time stays in `folder/wandb`, for `wandb sync`."""
        self._run.finish()

    def _open(self, wandb: Any, mode: str, arguments: dict[str, Any]) -> Any:
        try:
            return wandb.init(mode=mode, **arguments)
        except wandb.errors.Error as error:
            if mode != "online":
                raise ConfigError(
                    f"wandb cannot start in mode {mode}: {error}; set logging.wandb.enabled false"
                ) from error
            # A refused key or a server in trouble must not cost a training run.
            logger.warning("wandb: offline, because the server did not accept the run: %s", error)
            # wandb's service would still count the id of the failed attempt as taken.
            wandb.teardown()
            return wandb.init(mode="offline", **arguments)

    def _announce(self, mode: str) -> None:
        if mode == "disabled":
            logger.info("wandb: disabled by WANDB_MODE")
        elif self._run.offline:
            logger.info(
                "wandb: run %s is kept offline; send it with `wandb sync %s`", self.id, Path(self._run.dir).parent
            )
        else:
            logger.info("wandb: run %s at %s", self.id, self._run.url)


def choose_mode(requested: str, *, has_key: bool, reachable: Callable[[], bool]) -> tuple[str, str | None]:
    """Mode to run in, and why it is offline if nobody asked for that.

    Args:
        requested: WANDB_MODE or wandb's own default; everything but `online` is taken as it is.
        has_key: whether credentials were found.
        reachable: asks the server, only called when it matters.
    """
    if requested != "online":
        return requested, None
    if not has_key:
        return "offline", "no key was found; `wandb login` or WANDB_API_KEY gives one"
    if not reachable():
        return "offline", "the server cannot be reached from here"
    return "online", None


def has_key(base_url: str, api_key: str | None, identity_token_file: str | None) -> bool:
    """Whether wandb will find credentials for the server: given, in the environment, or in the netrc file."""
    if api_key or identity_token_file or os.environ.get("WANDB_API_KEY"):
        return True
    paths = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    existing = [path for path in (Path(path).expanduser() for path in paths) if path.is_file()]
    try:
        entries = netrc.netrc(str(existing[0])) if existing else None
    except (netrc.NetrcParseError, OSError) as error:
        logger.warning("wandb: cannot read %s: %s", existing[0], error)
        return False
    return entries is not None and any(entries.authenticators(host) for host in _netrc_hosts(base_url))


def is_reachable(base_url: str, timeout_s: float) -> bool:
    """Whether anything answers at the address within the time, through the proxy where one is set."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(base_url, timeout=timeout_s).close()
            answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)  # an error page is an answer
        except (OSError, ValueError) as error:
            # A certificate unknown to Python was still sent by a server; wandb has its own list of certificates.
            answered.append("CERTIFICATE_VERIFY_FAILED" in str(error))

    # In a thread because looking up a name cannot be given a limit.
    asking = threading.Thread(target=ask, daemon=True, name="wandb-reach")
    asking.start()
    asking.join(timeout_s)
    return bool(answered) and answered[0]


def claim_run_id(folder: Path, *, resumed: bool) -> str:
    """Id of the folder's wandb run: the one kept there when resumed, otherwise a new one, kept from now on.

    WANDB_RUN_ID, where set, wins.
    """
    path = folder / RUN_ID_FILE
    kept = path.read_text(encoding="utf-8").strip() if resumed and path.is_file() else ""
    run_id = os.environ.get("WANDB_RUN_ID") or kept or uuid.uuid4().hex[:8]
    if run_id != kept:
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        aside.write_text(run_id + "\n", encoding="utf-8")
        os.replace(aside, path)
    return run_id


def _settings(wandb: Any) -> Any:
    # The console is kept in folder/logs; wandb's copy would wrap the streams the progress bar draws on.
    settings = {"console": "off", "quiet": True}
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # older releases wait without limit
        settings["finish_timeout"] = FINISH_TIMEOUT_S
    return wandb.Settings(**settings)


def _netrc_hosts(base_url: str) -> list[str]:
    """Names under which a key may be kept; the hosted service goes by an old and a new one."""
    host = urlsplit(base_url).netloc
    hosted = host == "api.wandb.ai" or host.endswith("forge.coreweave.com")
    return [host, "api.wandb.ai"] if hosted else [host]
