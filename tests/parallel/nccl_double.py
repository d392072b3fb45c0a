"""gloo that behaves like NCCL: `wait` neither blocks for long nor raises, and a device that a lost message stops.

A rank of a test plays its part in a child process, so that it can be killed or frozen and still report.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from stagdist.decode.engine import Engine
from stagdist.decode.loading import build_stage
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.stage import Stage
from stagdist.decode.transport import Transport
from stagdist.errors import TransportError
from stagdist.parallel.link import GLOO, NCCL
from stagdist.training.engine import build_engine
from stagdist.training.peers import naming_lost_peers
from tests.parallel.nccl_decoding import Layout, read_constant
from tests.training.parity_cases import Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

PATIENCE_S = 1.0
"""How long a wait waits for a message that may only be late."""
FAULTY_STEP = 3
REQUEST = Request("0", (1, 2, 3, 4), SamplingParams(max_new_tokens=12, temperature=0.0, ignore_end_of_document=True))
END_S = 9.0
START_S = 30.0


class Stream:
    """The compute stream of a device: it stands still from a message on that does not come."""

    def __init__(self) -> None:
        self._stuck_at: Work | None = None

    def wait(self, work: "Work") -> None:
        """Let the stream wait, and the host for a moment: the message may only be late."""
        if not self.query():
            return
        work.join()
        self._stuck_at = work

    def query(self) -> bool:
        """Whether the stream has done everything."""
        return self._stuck_at is None or self._stuck_at.is_completed()


class Work:
    """A handle like NCCL's: its message stops the device, not the host.

    Args:
        post: starts the operation; None where the stream stands still, so that it never begins.
    """

    def __init__(self, post: Callable[[], Any] | None, stream: Stream):
        self._stream, self._came = stream, False
        self._work = None if post is None else post()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, timeout: Any = None) -> bool:
        """Return soon, whatever happened."""
        self._stream.wait(self)
        return True

    def join(self) -> None:
        """Wait a moment for the message."""
        self._thread.join(PATIENCE_S)

    def is_completed(self) -> bool:
        """Whether the message came."""
        return self._came

    def _run(self) -> None:
        if self._work is None:
            return
        try:
            self._work.wait()
            self._came = True
        except RuntimeError:
            pass  # NCCL says nothing either


@contextmanager
def like_nccl() -> Iterator[None]:
    """Inside, messages and events are NCCL's."""
    stream = Stream()
    irecv, isend = dist.irecv, dist.isend

    def posted(operation: Callable[..., Any], tensor: Tensor, peer: int, group: Any, **options: Any) -> Any:
        if dist.get_backend(group) != "gloo" or group in hosts:
            return operation(tensor, peer, group=group, **options)
        if operation is irecv:
            tensor.zero_()
        post = partial(operation, tensor, peer, group=group, **options)
        return Work(post if stream.query() else None, stream)

    hosts: set[Any] = set()
    new_group = dist.new_group

    def noting(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        group = new_group(ranks, timeout=timeout, backend=backend, **options)
        if backend == "gloo":
            hosts.add(group)
        return group

    with (
        mock.patch.object(dist, "irecv", lambda tensor, src, group=None, **more: posted(irecv, tensor, src, group)),
        mock.patch.object(dist, "isend", lambda tensor, dst, group=None, **more: posted(isend, tensor, dst, group)),
        mock.patch.object(dist, "new_group", noting),
        mock.patch("stagdist.parallel.link.record_event", lambda device: stream),
        mock.patch("stagdist.training.exchange.rules_of", lambda device: NCCL),
    ):
        yield


@dataclass(frozen=True)
class Fault:
    """What happens to one rank in the middle of a run.

    Attributes:
        how: `killed`, `frozen`, `silent` (alive, but stuck), or `none`.
        rank: to whom.
        nccl: on the double; otherwise plain gloo.
        training: in a step of training; otherwise while decoding.
        port: where the ranks meet.
    """

    how: str
    rank: int
    nccl: bool
    training: bool
    port: int
    timeout_s: float = 3.0

    def strike(self) -> None:
        """Let it happen, if this is the rank."""
        if dist.get_rank() != self.rank:
            return
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "silent":
            time.sleep(END_S)


def play(payload: tuple[list[Fault], Path]) -> list[dict[str, Any]]:
    """Every fault in a child of its own; what this rank heard, and after how many seconds.

    The payload has a folder through which the ranks meet before each fault.
    """
    faults, folder = payload
    heard = []
    for number, fault in enumerate(faults):
        (folder / f"{number}.{os.environ['RANK']}").touch()
        while len(list(folder.glob(f"{number}.*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)
        heard.append(_in_child(fault))
    return heard


def _in_child(fault: Fault) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _report(fault, writing)
    os.close(writing)
    deadline_s = time.monotonic() + END_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline_s:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    with os.fdopen(reading) as stream:
        text = stream.read()
    heard: dict[str, Any] = json.loads(text) if text else {"says": "nothing"}
    return heard


def _report(fault: Fault, writing: int) -> None:
    """In the child: run, and say what was heard."""
    code = 1
    try:
        os.environ["MASTER_PORT"] = str(fault.port)
        run = _train if fault.training else _decode
        dist.init_process_group("gloo", timeout=timedelta(seconds=60)) if not fault.training else None
        began_s = time.monotonic()
        try:
            if fault.nccl:
                with like_nccl():
                    says = run(fault)
            else:
                says = run(fault)
        except TransportError as error:
            says = str(error)
        os.write(writing, json.dumps({"says": says, "seconds": time.monotonic() - began_s}).encode())
        time.sleep(0.5)  # the others must not take this end for the fault
        code = 0
    finally:
        os._exit(code)


def _decode(fault: Fault) -> str:
    """Decode with three stages; the fault comes at the beginning of a step."""
    placement = Layout(3).placement()
    transport = Transport(placement.grid, "cpu", fault.timeout_s, rules=NCCL if fault.nccl else GLOO)
    stage = build_stage(placement, read_constant, "cpu", transport)
    _strike_in_step(stage, fault)
    says = "no error"
    if transport.rank:
        operate(stage, transport, None)
    else:
        says = str([each.token_ids for each in Engine(stage, transport).generate([REQUEST])])
    transport.close()
    return says


def _strike_in_step(stage: Stage, fault: Fault) -> None:
    step = stage.step

    def struck() -> Any:
        if stage.step_number == FAULTY_STEP:
            fault.strike()
        return step()

    stage.step = struck  # type: ignore[method-assign]


def _train(fault: Fault) -> str:
    """Train with three stages; the fault comes before a step."""
    case = Case("fault", {"section_layers": [1, 1, 1]}, (3, 1, 1))
    groups = World(max(START_S, fault.timeout_s)).groups(case.grid)
    config = case.config()
    parallel = config.parallel.model_copy(update={"timeout_s": fault.timeout_s})
    config = config.model_copy(update={"parallel": parallel})
    engine = build_engine(config, groups)
    losses = []
    for number, (tokens, labels) in enumerate(case.batches(), start=1):
        if number == FAULTY_STEP:
            fault.strike()
        with naming_lost_peers(groups, fault.timeout_s, f"step {number}"):
            losses.append(float(engine.train_batch(micro_batches(case, groups, tokens, labels))))
    dist.barrier(group=groups.control)
    engine.exchange.close()
    return str(losses)
