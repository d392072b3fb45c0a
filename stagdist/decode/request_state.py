"""A request from its submission to its end: tokens that were chosen, text, log-probabilities and times."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagdist.decode.request import FinishReason, RequestOutput, RequestTimes, TokenLogprobs
from stagdist.decode.scheduler import ScheduledRequest
from stagdist.decode.text import TextStream


@dataclass(eq=False)
class RequestState(ScheduledRequest):
    """A request and what is known of its output.

    Attributes:
        text: decodes its tokens; None if the engine has no tokenizer.
        own_stop_ids: stop ids that the client gave; those of `request` include tokens that end every text.
        deadline_s: when it ends with a timeout, in seconds of `time.perf_counter`.
        is_queued: counted among the waiting requests.
        is_reported: its last output was made.
    """

    text: TextStream | None = None
    own_stop_ids: frozenset[int] = frozenset()
    deadline_s: float = float("inf")
    is_queued: bool = True
    is_reported: bool = False
    _submitted_s: float = field(default_factory=time.perf_counter)
    _first_token_s: float | None = None
    _stop_reason: str | int | None = None
    _error: str | None = None
    _fresh: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    _prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])

    def end(self, finish: FinishReason, error: str | None = None) -> None:
        """End it, unless it has ended."""
        if self.finish is None:
            self.finish, self._error = finish, error

    def take_token(self, token: int, logprobs: Sequence[float] | None, now_s: float) -> None:
        """Add a token that was chosen.

        Args:
            logprobs: a row of `Choice.logprobs`.
        """
        params = self.request.params
        self._first_token_s = self._first_token_s or now_s
        if params.max_new_tokens == 0:  # only its prompt was wanted
            self.finish = FinishReason.LENGTH
            return
        self.tokens.append(token)
        self._fresh.append((token, _token_logprobs(token, params.logprobs, logprobs)))
        if token in params.stop_token_ids:
            self.finish = FinishReason.STOP
            self._stop_reason = token if token in self.own_stop_ids else None
        elif len(self.tokens) == self.allowed:
            self.finish = FinishReason.LENGTH

    def take_prompt_scores(self, rows: Sequence[Sequence[float]]) -> None:
        """Add the log-probabilities of the next tokens of the prompt, rows of `merge_prompt_scores`."""
        ids = self.request.prompt_ids[len(self._prompt_logprobs) :]
        for token, row in zip(ids, rows, strict=False):
            self._prompt_logprobs.append(_token_logprobs(token, self.request.params.prompt_logprobs, row))

    def output(self) -> RequestOutput:
        """What is new since the last output."""
        fresh, text = self._decode()
        prompt_logprobs, prompt_tokens = None, len(self.request.prompt_ids)
        if self.request.params.prompt_logprobs is not None and len(self._prompt_logprobs) == prompt_tokens:
            prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        self.is_reported = self.finish is not None
        finished_s = time.perf_counter() if self.is_reported else None
        return RequestOutput(
            self.request.request_id,
            token_ids=tuple(token for token, _ in fresh),
            text=text,
            logprobs=tuple(entry for _, entry in fresh if entry is not None),
            prompt_logprobs=prompt_logprobs,
            finish_reason=self.finish,
            stop_reason=self._stop_reason,
            error=self._error,
            prompt_tokens=prompt_tokens,
            cached_tokens=self.cached_tokens,
            times=RequestTimes(self._submitted_s, self.admitted_s, self._first_token_s, finished_s),
        )

    def _decode(self) -> tuple[list[tuple[int, TokenLogprobs | None]], str]:
        """New tokens and text; a stop string may end the request before its last token."""
        fresh, self._fresh = self._fresh, []
        if self.text is None:
            return fresh, ""
        text, shows_stop = "", self.request.params.include_stop_str_in_output
        for index, (token, _) in enumerate(fresh):
            ends = self.finish is FinishReason.STOP and index == len(fresh) - 1
            text += "" if ends and not shows_stop else self.text.push(token)
            if self.text.stopped_by is not None:
                fresh = fresh[: index + 1]
                break
        if self.finish is not None:
            text += self.text.finish()
        if self.text.stopped_by is not None:
            self.finish, self._stop_reason, self._error = FinishReason.STOP, self.text.stopped_by, None
        return fresh, text


def _token_logprobs(token: int, requested: int | None, values: Sequence[float] | None) -> TokenLogprobs | None:
    """From a row that may hold more likeliest tokens than requested."""
    if requested is None or values is None:
        return None
    count = (len(values) - 1) // 2
    ids, likeliest = values[1 : 1 + requested], values[1 + count : 1 + count + requested]
    return TokenLogprobs(token, values[0], tuple((int(i), value) for i, value in zip(ids, likeliest, strict=True)))
