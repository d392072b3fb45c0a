"""How torch, gloo, NCCL and stagdist report a lost peer. Imports no framework, so that the supervisor can use it."""

import re

_CLOSED = ("Connection closed", "Connection reset", "Broken pipe")
"""The backend saw the peer's process end."""

_BACKEND = (*_CLOSED, "Timed out", "timed out", "NCCL error")
"""The peer's process ended or does not respond."""

_REPORTED = (*_BACKEND, "collective operation timeout", "did not meet", "another rank ended", "the transfer failed")
"""Also what NCCL's watchdog and stagdist's own errors say about other ranks."""


def peer_closed(text: str) -> bool:
    """Whether an error says that the peer's process ended, so that this rank was not the first to fail."""
    return any(phrase in text for phrase in _CLOSED)


def backend_lost_peer(text: str) -> bool:
    """Whether an error of gloo or NCCL says that a peer ended or does not respond."""
    return any(phrase in text for phrase in _BACKEND)


def reports_lost_peer(text: str) -> bool:
    """Whether a line in the output of a rank says that it failed because of another rank."""
    return any(phrase in text for phrase in _REPORTED)


def short_reason(error: Exception) -> str:
    """The message of a gloo or NCCL error, without the position in their source and without general advice."""
    first = str(error).partition("\n")[0]
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", first).partition(". This is typically")[0] or type(error).__name__
