"""What a rank says when another one has ended or does not answer."""

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
    """Give what torch says of a peer that ended or froze a name, a place and a remedy.

    Args:
        timeout_s: limit of the collectives inside.
        doing: what the ranks do together, for a person.

    Raises:
        TransportError: in place of the RuntimeError; its stack trace goes to the log file.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, StagdistError) and not isinstance(error, TransportError):
            raise  # a disk may time out too, and says so itself
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
