"""What agents tell arrives whole, whatever a script wrote."""

import asyncio
import json

from stagdist.cluster.supervision.background_output import LONGEST_SHOWN, TAIL_LINES
from stagdist.cluster.supervision.messages import encode
from stagdist.cluster.supervision.rank_reports import RankServer


def test_the_longest_last_words_arrive() -> None:
    tail = ["\U0001f600" * LONGEST_SHOWN] * TAIL_LINES  # twelve bytes a character in JSON

    async def talk() -> int | None:
        server = RankServer("token", 1, print)
        _, writer = await asyncio.open_connection("127.0.0.1", await server.start("127.0.0.1"))
        writer.write(encode({"kind": "hello", "token": "token", "attempt": 1, "rank": 0, "host": "a"}))
        writer.write(encode({"kind": "exit", "code": 7, "tail": tail, "ended": False}))
        for _ in range(100):
            await asyncio.sleep(0.02)
            if 0 in server.ranks and server.ranks[0].exit_code is not None:
                break
        code = server.ranks[0].exit_code
        await server.stop()
        writer.close()
        return code

    assert len(json.dumps(tail)) > 1 << 16
    assert asyncio.run(talk()) == 7


def test_a_stranger_is_not_welcomed_and_no_late_agent_of_an_ended_attempt() -> None:
    async def answers() -> list[bytes]:
        server = RankServer("token", 2, print)
        port = await server.start("127.0.0.1")
        found, open_ones = [], []
        for token, attempt in (("token", 2), ("token", 1), ("other", 2), ("token", 2)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(encode({"kind": "hello", "token": token, "attempt": attempt, "rank": 0, "host": "a"}))
            open_ones.append(writer)  # one that nobody holds is closed
            found.append(await asyncio.wait_for(reader.readline(), 5))
        await server.stop()
        return found

    assert asyncio.run(answers()) == [encode({"kind": "welcome"}), b"", b"", b""], "rank 0 is there once"
