"""The command `launch/serve.py` from end to end on a small model, through HTTP."""

import http.client
import itertools
import json
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu.checks.generate import COMMAND_S, SIZES, start_script
from tests.gpu.checks.setting import Numbers, Setting
from tests.launch.generating import write_model

SLOTS = 4
CONTEXT = {True: 2048, False: 256}
PROMPT_CHARACTERS = {True: 1024, False: 64}
"""Of a long prompt, on a GPU and in a rehearsal; the tokenizer has about one token for two of them."""
NEW_TOKENS = {True: 256, False: 16}


def serve(setting: Setting) -> Numbers:
    """Streams of one and of several clients, a long prompt beside a stream, a second turn, and SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="stagdist-check-") as name:
        context, port = CONTEXT[setting.on_gpu], _free_port()
        sizes = SIZES if setting.on_gpu else {}
        model = write_model(Path(name) / "model", max_position_embeddings=context, **sizes)
        options = ("--precision", setting.precision, "--batch-size", str(SLOTS), "--device", setting.device)
        began = time.perf_counter()
        process = start_script("serve.py", model, *options, "--port", str(port), "--no-access-log")
        try:
            _wait_until_ready(process, port, COMMAND_S[setting.on_gpu])
            numbers: Numbers = {"ready_s": time.perf_counter() - began}
            numbers |= _measure(setting, port)
            setting.keep(numbers)
            process.send_signal(signal.SIGTERM)
            began = time.perf_counter()
            _, errors = process.communicate(timeout=COMMAND_S[setting.on_gpu])
        finally:
            process.kill()
            process.wait()
    text = errors.decode(errors="replace")
    assert process.returncode == 0, f"SIGTERM gives exit code {process.returncode}: {text[-2000:]}"
    return numbers | {"ended_s": time.perf_counter() - began}


def _measure(setting: Setting, port: int) -> Numbers:
    new, long = NEW_TOKENS[setting.on_gpu], "import os\n" * (PROMPT_CHARACTERS[setting.on_gpu] // 10)
    _token_times(port, "def main(", new)  # the first request of every shape loads its kernels
    alone = _token_times(port, "def main(", new)
    began = time.perf_counter()
    with ThreadPoolExecutor(SLOTS) as clients:
        together = list(clients.map(lambda number: _token_times(port, f"def main{number}(", new), range(SLOTS)))
        seconds = time.perf_counter() - began
        stream = clients.submit(_token_times, port, "class A:", new)
        first = _completion(port, long, 1)
        beside = stream.result()
    again = _completion(port, long + "def", 1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "the second turn computed its prompt again"
    assert all(len(times) == new for times in (alone, beside, *together)), "a stream lost tokens"
    return {
        "tokens_per_s_alone": (new - 1) / (alone[-1] - alone[0]),
        f"tokens_per_s_of_{SLOTS}_clients": SLOTS * new / seconds,
        "longest_gap_alone_ms": _longest_gap_ms(alone),
        "longest_gap_beside_a_long_prompt_ms": _longest_gap_ms(beside),
        "long_prompt_tokens": first["usage"]["prompt_tokens"],
        "long_prompt_ms": first["milliseconds"],
        "second_turn_ms": again["milliseconds"],
    }


def _longest_gap_ms(times: list[float]) -> float:
    return 1e3 * max(after - before for before, after in itertools.pairwise(times))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            text = process.communicate()[1].decode(errors="replace")
            raise AssertionError(f"the server ended with code {process.returncode}: {text[-2000:]}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"/health did not answer 200 within {limit_s:g} s")


def _post(port: int, prompt: str, new: int, *, stream: bool) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=COMMAND_S[True])
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == http.client.OK, f"status {response.status}: {response.read()!r}"
    return response


def _completion(port: int, prompt: str, new: int) -> Numbers:
    began = time.perf_counter()
    answer = json.loads(_post(port, prompt, new, stream=False).read())
    return answer | {"milliseconds": 1e3 * (time.perf_counter() - began)}


def _token_times(port: int, prompt: str, new: int) -> list[float]:
    """When each chunk of a stream came; there is one for every token."""
    return list(_chunk_times(_post(port, prompt, new, stream=True)))


def _chunk_times(response: http.client.HTTPResponse) -> Iterator[float]:
    for line in response:
        if line.startswith(b"data: {"):
            assert b'"error"' not in line, line
            yield time.perf_counter()
