"""Users of a server, for locust; `benchmarks/serve.py` starts it. Imports nothing of stagdist, since locust lives in
an environment of its own.

Environment: DECODERS, PROMPTERS and TALKERS are numbers of users, VOCABULARY, PROMPT_TOKENS and ANSWER_TOKENS sizes,
SECONDS the duration, RESULT the file to write. A decoder has answers of ANSWER_TOKENS generated; a prompter sends
prompts of PROMPT_TOKENS that have nothing in common; a talker sends such a prompt, then the same with its answer and a
few tokens more.
"""

import json
import os
import random
import time
from typing import Any

import gevent
from locust import FastHttpUser, events, task

TURN_TOKENS = 16

_begun_s = time.process_time()  # after the imports

_tokens: list[float] = []
_gaps: list[tuple[float, float]] = []
_first: dict[str, list[float]] = {"decoder": [], "prompter": [], "first_turn": [], "second_turn": []}


def count(name: str) -> int:
    """A number from the environment."""
    return int(os.environ.get(name, "0"))


def random_ids(length: int) -> list[int]:
    """A prompt that no other one begins like."""
    return [random.randrange(1, count("VOCABULARY")) for _ in range(length)]


class Client(FastHttpUser):
    """Streams completions and keeps the times of their tokens."""

    abstract = True

    def stream(self, name: str, prompt: list[int], max_tokens: int) -> list[int]:
        """Token ids of an answer."""
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        begun, last, ids = time.perf_counter(), None, list[int]()
        with self.client.post(
            "/v1/completions", json=body | {"return_token_ids": True}, name=name, stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(answer.text)
                return []
            while line := answer.stream.readline(b"\n"):
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.failure(chunk["error"]["message"])
                    return []
                now = time.perf_counter()
                ids += chunk["choices"][0]["token_ids"]
                if last is None:
                    _first[name].append(now - begun)
                elif name == "decoder":
                    _gaps.append((now, now - last))
                last = now
                _tokens.append(now)
            answer.success()
        if _tokens[-1] - _tokens[0] > count("SECONDS"):  # locust's own limit counts its start, too
            gevent.spawn(self.environment.runner.quit)
        return ids


class Decoder(Client):
    """Has short prompts continued, one after the other."""

    fixed_count = count("DECODERS")
    abstract = not fixed_count

    @task
    def work(self) -> None:
        """One request."""
        self.stream("decoder", random_ids(32), count("ANSWER_TOKENS"))


class Prompter(Client):
    """Sends long prompts, of which one token is wanted."""

    fixed_count = count("PROMPTERS")
    abstract = not fixed_count

    @task
    def work(self) -> None:
        """One request."""
        self.stream("prompter", random_ids(count("PROMPT_TOKENS")), 1)


class Talker(Client):
    """Has conversations of two turns."""

    fixed_count = count("TALKERS")
    abstract = not fixed_count

    @task
    def work(self) -> None:
        """One conversation."""
        prompt = random_ids(count("PROMPT_TOKENS"))
        answer = self.stream("first_turn", prompt, TURN_TOKENS)
        self.stream("second_turn", [*prompt, *answer, *random_ids(TURN_TOKENS)], TURN_TOKENS)


@events.quitting.add_listener
def write(environment: Any, **_: Any) -> None:
    """Write the figures of everything after the first tenth."""
    begin = (min(_tokens) if _tokens else 0.0) + count("SECONDS") / 10
    tokens = sorted(moment for moment in _tokens if moment >= begin)
    gaps = sorted(gap for moment, gap in _gaps if moment >= begin)
    result = {
        "tokens_per_s": (len(tokens) - 1) / (tokens[-1] - tokens[0]) if len(tokens) > 1 else 0.0,
        "gap_s": {f"p{share}": gaps[len(gaps) * share // 100] for share in (50, 95, 99)} if gaps else {},
        "first_token_s": {name: sorted(times)[len(times) // 2] for name, times in _first.items() if times},
        "requests": environment.stats.total.num_requests,
        "failures": environment.stats.total.num_failures,
        "tokens": len(_tokens),
        "cpu_s": time.process_time() - _begun_s,
    }
    with open(os.environ["RESULT"], "w") as stream:
        json.dump(result, stream)
