"""The error that a rank raises when another rank has ended or does not respond."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from stagdist.errors import StagdistError, TransportError
from stagdist.parallel.groups import Groups
from stagdist.parallel.lost_peer_phrases import backend_lost_peer
from stagdist.telemetry.logging import ONLY_IN_FILE

LOG = logging.getLogger(__name__)


@contextmanager
def naming_lost_peers(groups: Groups, timeout_s: float, doing: str) -> Iterator[None]:
    """Replace torch's error about a peer that ended or froze by one with place and remedy.

    Args:
        timeout_s: limit of the collectives inside.
        doing: what the ranks do together, for the message.

    Raises:
        TransportError: replaces the RuntimeError; the stack trace is written to the log file.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, StagdistError) and not isinstance(error, TransportError):
            raise  # a disk can time out too, and its error says so
        if isinstance(error, TransportError):
            says = str(error)
        elif backend_lost_peer(str(error)):
            says = f"another rank ended, or did not answer within parallel.timeout_s = {timeout_s:.0f} s"
        else:
            raise
        LOG.info("%s", doing, exc_info=True, extra=ONLY_IN_FILE)
        raise TransportError(
            f"stage {groups.place.pipe}, rank {dist.get_rank()}, {doing}: {says}. Start the same command again: the "
            "run resumes from its newest checkpoint"
        ) from error
