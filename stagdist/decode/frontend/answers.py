"""Output of the generate command: streamed text, JSON lines, errors, a summary."""

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from stagdist.decode.frontend.prompts import Prompt
from stagdist.decode.request import FinishReason, Request, RequestOutput, TokenLogprobs, join_outputs
from stagdist.decode.text import Decode


@dataclass
class _Busy:
    """Time during which at least one request was in a certain state."""

    count: int = 0
    since_s: float = 0.0
    seconds: float = 0.0

    def enter(self, now_s: float) -> None:
        if self.count == 0:
            self.since_s = now_s
        self.count += 1

    def leave(self, now_s: float) -> None:
        self.count -= 1
        if self.count == 0:
            self.seconds += now_s - self.since_s


@dataclass
class _Answer:
    prompt: Prompt
    request: Request
    outputs: list[RequestOutput] = field(default_factory=list)  # for a JSON line
    unseen: list[str] = field(default_factory=list)  # buffered text
    num_tokens: int = 0
    finish: FinishReason | None = None


class Answers:
    """Prints the outputs of the engine. Thread-safe.

    Text is written in the order of the prompts: the first unfinished answer is streamed, later ones are buffered. A
    JSON line is written when its answer is finished, in any order.

    Args:
        out: receives answers only.
        err: receives errors, one line each.
        decode: decodes prompts that were given as token ids.
        on_broken: called when `out` is a broken pipe.

    Attributes:
        failed: prompts that were not served.
        taken: prompts so far.
        broken: `out` is a broken pipe; all further output is dropped.
    """

    def __init__(self, out: TextIO, err: TextIO, decode: Decode, on_broken: Callable[[], None], *, as_json: bool):
        self.failed = self.taken = self._cut_off = 0
        self.broken = False
        self._out, self._err, self._decode, self._on_broken, self._as_json = out, err, decode, on_broken, as_json
        self._answers: dict[str, _Answer] = {}  # unfinished or buffered, in the order of the prompts
        self._lock = threading.Lock()
        self._num_tokens = self._num_later_tokens = 0
        self._first_token_s: list[float] = []
        self._decoding, self._serving = _Busy(), _Busy()

    def end(self) -> int:
        """Write all buffered text; returns the number of unfinished requests."""
        with self._lock:
            for answer in self._answers.values():
                self._cut_off += answer.finish is None
                answer.finish = answer.finish or FinishReason.CANCELLED
            if not self._as_json:  # incomplete answers have no JSON line
                self._show_text()
            return self._cut_off

    def accept(self, prompt: Prompt, request: Request) -> None:
        """Register a request before `Engine.submit`."""
        with self._lock:
            self.taken += 1
            self._answers[request.request_id] = _Answer(prompt, request)
            self._serving.enter(time.perf_counter())

    def refuse(self, prompt: Prompt, error: str) -> None:
        """Report a prompt that is not submitted."""
        with self._lock:
            self.taken += 1
            self.failed += 1
            print(f"error: {error}", file=self._err, flush=True)
            if self._as_json:
                body = {"id": prompt.name, "index": prompt.index, "finish_reason": FinishReason.ERROR, "error": error}
                self._write(json.dumps(body) + "\n")

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """Process outputs of the engine. One with an error comes before the engine raises it, and `end` counts it."""
        with self._lock:
            for output in outputs:
                if output.finish_reason is not FinishReason.ERROR:
                    self._take(self._answers[output.request_id], output)

    def summary(self) -> str:
        """Return statistics of all requests so far, in one line."""
        with self._lock:
            prompts = f"{self.taken} prompt{'s' * (self.taken != 1)}"
            failed = f" ({self.failed} not served)" if self.failed else ""
            parts = [f"{prompts}{failed}, {self._num_tokens} new tokens"]
            if self._first_token_s:
                kind = "time to first token" if len(self._first_token_s) == 1 else "median time to first token"
                parts.append(f"{kind} {1e3 * statistics.median(self._first_token_s):.1f} ms")
            if self._decoding.seconds > 0 and self._num_later_tokens:
                parts.append(f"decoding {self._num_later_tokens / self._decoding.seconds:.1f} tokens/s")
            if self._serving.seconds > 0 and self._num_tokens:
                parts.append(f"overall {self._num_tokens / self._serving.seconds:.1f} tokens/s")
            return "; ".join(parts)

    # --- inside, with the lock ----------------------------------------------------------------------------------

    def _take(self, answer: _Answer, output: RequestOutput) -> None:
        self._measure(answer, output)
        answer.finish = output.finish_reason
        self._cut_off += answer.finish is FinishReason.CANCELLED
        if self._as_json:
            answer.outputs.append(output)
            if answer.finish is not None:
                del self._answers[output.request_id]
                self._write_json(answer)
            return
        if answer.num_tokens == len(output.token_ids) > 0:
            answer.unseen.append(self._echo(answer))
        answer.unseen.append(output.text)
        self._show_text()

    def _measure(self, answer: _Answer, output: RequestOutput) -> None:
        now_s, before = time.perf_counter(), answer.num_tokens
        answer.num_tokens += len(output.token_ids)
        self._num_tokens += len(output.token_ids)
        if answer.num_tokens and not before:
            self._decoding.enter(now_s)
            self._first_token_s += [s for s in [output.time_to_first_token_s] if s is not None]
            self._num_later_tokens -= 1
        self._num_later_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._serving.leave(now_s)
            if answer.num_tokens:
                self._decoding.leave(now_s)

    def _echo(self, answer: _Answer) -> str:
        if answer.prompt.text is not None:
            return answer.prompt.text
        if answer.prompt.messages is not None:
            return ""
        return self._decode(answer.request.prompt_ids)

    def _show_text(self) -> None:
        """Write the leading finished answers and the new text of the first unfinished one."""
        done = []  # later answers, possibly thousands, are not visited
        for request_id, answer in self._answers.items():
            text, answer.unseen = "".join(answer.unseen), []
            if answer.finish is None:
                self._write(text)
                break
            self._write(text + "\n" * (answer.num_tokens > 0))
            done.append(request_id)
        for request_id in done:
            del self._answers[request_id]

    def _write_json(self, answer: _Answer) -> None:
        output, request = join_outputs(answer.outputs), answer.request
        body: dict[str, Any] = {
            "id": answer.prompt.name,
            "index": answer.prompt.index,
            "prompt": self._echo(answer),
            "text": output.text,
            "token_ids": output.token_ids,
            "prompt_tokens": len(request.prompt_ids),
            "prompt_token_ids": request.prompt_ids,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "seed": request.params.seed,
            "time_to_first_token_s": output.time_to_first_token_s,
        }
        if request.params.logprobs is not None:
            body["logprobs"] = [_logprobs(entry) for entry in output.logprobs]
        if output.prompt_logprobs is not None:
            body["prompt_logprobs"] = [entry and _logprobs(entry) for entry in output.prompt_logprobs]
        self._write(json.dumps(body, ensure_ascii=False) + "\n")

    def _write(self, text: str) -> None:
        if not text or self.broken:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            self.broken = True
            self._on_broken()


def _logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    # Id -1 fills up a vocabulary that is smaller than the requested number.
    return {
        "token_id": entry.token_id,
        "logprob": entry.logprob,
        "top": [{"token_id": token, "logprob": value} for token, value in entry.top if token >= 0],
    }
