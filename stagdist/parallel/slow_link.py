"""A link that takes longer, to measure how much of a slow network is hidden: messages leave after a delay.

The sender is not held up, and a link holds any number of messages, as a wire does. A collective is one exchange whose
ranks all wait, so it starts one latency later on each of them (`wait_until`).
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor

from stagdist.parallel.link import Edge, Outbox

SPUN_S = 1e-4
"""The last part of a wait yields instead of sleeping, because the system wakes a process about this late."""


def wait_until(due_s: float) -> None:
    """Return at a time of `time.perf_counter`, within a few microseconds on an idle core; other threads may run."""
    time.sleep(max(0.0, due_s - SPUN_S - time.perf_counter()))
    while time.perf_counter() < due_s:
        time.sleep(0.0)  # lets the other threads have the interpreter


class DelayedOutbox(Outbox):
    """Sends each message from a thread, one latency after it was given.

    Args:
        latency_s: one way, in seconds.
    """

    def __init__(self, edge: Edge, latency_s: float):
        super().__init__(edge)
        self._latency_s = latency_s
        self._sender = ThreadPoolExecutor(1, f"delays {edge.what}")

    def send(self, *tensors: Tensor, in_flight: int) -> None:
        """Send one message; `in_flight` does not count messages that are still on the link.

        Raises:
            TransportError: the peer of an older send ended or does not respond.
        """
        on_link = sum(not all(work.is_completed() for work in works) for works, _ in self._pending)
        super().send(*tensors, in_flight=max(in_flight, on_link))

    def _start(self, tensor: Tensor) -> Any:
        return _Sent(self._sender.submit(self._send_at, time.perf_counter() + self._latency_s, tensor))

    def _send_at(self, due_s: float, tensor: Tensor) -> None:
        wait_until(due_s)
        dist.send(tensor, self._edge.peer, group=self._edge.group)


class _Sent:
    """The handle of a delayed send, with the parts of `dist.Work` that an outbox uses."""

    def __init__(self, future: "Future[None]"):
        self.wait, self.is_completed = future.result, future.done
