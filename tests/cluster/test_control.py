"""What agents report arrives complete, whatever a script wrote or a login script printed first."""

import asyncio
import json
import os
import sys
from pathlib import Path

from stagdist.cluster.hosts.reach import StartCommand
from stagdist.cluster.supervision.background_output import LONGEST_SHOWN, TAIL_LINES
from stagdist.cluster.supervision.host_agents import AgentStart, HostAgents, clear
from stagdist.cluster.supervision.messages import Job, encode

JOB = Job("run", "/", 5.0, slots=1)
HELLO = encode("hello", host="a", ranks=[0], ended=2, problem="")


def printing(*pieces: bytes, then: str = "") -> AgentStart:
    """A program in place of an agent, that prints, reads its job, and ends."""
    code = (
        f"import sys; sys.stdout.buffer.write({b''.join(pieces)!r}); sys.stdout.flush(); sys.stdin.readline(); {then}"
    )
    return AgentStart(StartCommand((sys.executable, "-c", code), dict(os.environ)), JOB)


def followed(start: AgentStart) -> HostAgents:
    """The agents after this one has ended."""

    async def talk() -> HostAgents:
        agents = HostAgents({"a": start}, print)
        agents.start()
        while not agents.agents["a"].ended:
            await asyncio.sleep(0.02)
        await agents.stop()
        return agents

    return asyncio.run(asyncio.wait_for(talk(), 30))


def test_the_longest_last_words_arrive() -> None:
    tail = ["\U0001f600" * LONGEST_SHOWN] * TAIL_LINES  # twelve bytes a character in JSON
    assert len(json.dumps(tail)) > 1 << 16
    code = f"import json; tail = ['\\U0001f600' * {LONGEST_SHOWN}] * {TAIL_LINES}; "
    code += "print(json.dumps({'kind': 'exit', 'rank': 0, 'code': 7, 'tail': tail, 'ended': False}))"
    agents = followed(printing(HELLO, then=code))
    assert agents.ranks[0].exit_code == 7 and agents.ranks[0].tail == tuple(tail)
    assert agents.silent_hosts() == []


def test_what_a_login_script_prints_is_no_message() -> None:
    agents = followed(printing(b"Welcome to a!\n[1, 2]\n", HELLO))
    assert list(agents.ranks) == [0] and agents.agents["a"].problem == ""
    assert agents.ranks[0].lost, "its exit was never reported"


def test_a_line_that_does_not_end_breaks_the_connection_alone() -> None:
    agents = followed(printing(HELLO, then="print('x' * (2 << 20))"))
    assert agents.ranks[0].lost and agents.silent_hosts() == ["a"]


def test_hosts_are_cleared_or_named_with_the_reason() -> None:
    def complaining(text: str) -> AgentStart:
        return printing(b"Welcome!\n", then=f"sys.exit({text!r})")

    absent = AgentStart(StartCommand((str(Path("/no/such/program")),), {}), JOB)
    needs = encode("hello", host="d", ranks=[], ended=0, problem="/x is not there")
    starts = {"a": printing(HELLO), "b": complaining("ssh: no route"), "c": absent, "d": printing(needs)}
    ended, dead = asyncio.run(clear({**starts, "e": printing(b"Welcome!\n")}))
    assert ended == 2 and sorted(dead) == ["b", "c", "d", "e"]
    assert dead["b"] == "ssh: no route" and dead["d"] == "/x is not there" and dead["e"] == "Welcome!"
    assert dead["c"] == "/no/such/program cannot be started: No such file or directory"
    assert asyncio.run(clear({})) == (0, {})
