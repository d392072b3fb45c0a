"""Completions: texts and token ids to requests, and outputs to answers, as the legacy endpoint of OpenAI has them."""

import secrets
from collections.abc import Sequence
from typing import Any

from stagdist.serving.api.prepared import (
    LOWEST_LOGPROB,
    PreparedRequest,
    check_choices,
    draw_seed,
    end_of,
    submissions_of,
)
from stagdist.serving.api.problems import ProblemError
from stagdist.serving.api.served_model import ModelView
from stagdist.serving.api.token_texts import TextOffsets
from stagdist.serving.api.wire import CompletionRequest, parse_model
from stagdist.serving.protocol import Output, ScoredToken

DEFAULT_MAX_TOKENS = 16


def prepare_completion(body: Any, served: ModelView, max_choices: int) -> PreparedRequest:
    """Check a body and encode its prompts.

    Raises:
        ProblemError: it cannot be served.
    """
    fields = parse_model(CompletionRequest, body)
    name = served.check_name(fields.model)
    prompts = _prompts(fields.prompt)
    n, seed, echo = fields.n or 1, draw_seed(fields), bool(fields.echo)
    check_choices(len(prompts) * n, max_choices)
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    if max_tokens == 0 and not echo:
        raise ProblemError(400, "max_tokens is 0, which only scores the prompt; add echo", param="max_tokens")
    more: dict[str, Any] = {"logprobs": fields.logprobs}
    if echo and (fields.logprobs is not None or max_tokens == 0):
        more["prompt_logprobs"] = fields.logprobs or 0
    submissions, writers = [], []
    special = {"add_special_tokens": fields.add_special_tokens, "parse_special": fields.parse_special}
    for number, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else None
        ids = prompt if isinstance(prompt, list) else served.encode(prompt, **special)
        submissions += submissions_of(fields, served, ids, max_new_tokens=max_tokens, seed=seed, **more)
        writers += [_CompletionWriter(number * n + choice, fields, served, ids, text) for choice in range(n)]
    return PreparedRequest(
        id=f"cmpl-{secrets.token_hex(12)}",
        objects=("text_completion", "text_completion"),
        name=name,
        fingerprint=served.fingerprint,
        fields=fields,
        n=n,
        seed=seed,
        submissions=submissions,
        writers=writers,
    )


def _prompts(given: Any) -> list[str | list[int]]:
    """The four forms of `prompt`: a text, token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        kinds = set(map(type, given))
        if kinds == {int}:
            return [given]
        if kinds <= {str, list}:
            for number, prompt in enumerate(given):
                if isinstance(prompt, list) and set(map(type, prompt)) - {int}:
                    raise ProblemError(400, f"prompt.{number} must be a text or token ids", param="prompt")
            return given
    if given == []:
        raise ProblemError(400, "the prompt is empty; give at least one token", param="prompt")
    raise ProblemError(400, "prompt must be a text, token ids, or a list of either", param="prompt")


class _CompletionWriter:
    """Writes one choice; what its text begins with comes with the first output."""

    def __init__(
        self, index: int, fields: CompletionRequest, served: ModelView, prompt: Sequence[int], text: str | None
    ) -> None:
        self._index, self._fields, self._served, self._prompt = index, fields, served, prompt
        self._first = True
        skip = fields.skip_special_tokens is not False
        self._echo = ""
        if fields.echo:
            self._echo = served.tokenizer.decode(prompt, skip_special_tokens=skip) if text is None else text
        self._offsets = TextOffsets(
            served.texts, skip_special_tokens=skip, text=self._echo if fields.echo else None, first=prompt
        )

    def chunks(self, output: Output) -> list[dict[str, Any]]:
        return [self.complete(output)]

    def complete(self, output: Output) -> dict[str, Any]:
        first, self._first = self._first, False
        choice = {
            "index": self._index,
            "text": self._echo + output["text"] if first else output["text"],
            "logprobs": self._logprobs(output),
            **end_of(output),
        }
        if self._fields.return_token_ids:
            choice["token_ids"] = output["tokens"]
            if first:
                choice["prompt_token_ids"] = list(self._prompt)
        return choice

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if self._fields.logprobs is None:
            return None
        entries: list[tuple[int, ScoredToken | None]] = []
        if self._fields.echo and output["prompt_logprobs"]:
            entries += zip(self._prompt, output["prompt_logprobs"], strict=True)
        entries += [(entry[0], entry) for entry in output["logprobs"] or ()]
        return {
            "tokens": [self._name(token) for token, _ in entries],
            "token_logprobs": [None if entry is None else max(entry[1], LOWEST_LOGPROB) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
            "text_offset": [self._offsets.next(token) for token, _ in entries],
        }

    def _name(self, token: int) -> str:
        return self._served.texts.name(token, as_id=bool(self._fields.return_tokens_as_token_ids))

    def _top(self, entry: ScoredToken) -> dict[str, float]:
        """The likeliest tokens and the chosen one, with the same number as in `token_logprobs`.

        Tokens of one name share an entry, which has the largest number.
        """
        top: dict[str, float] = {}
        for token, logprob in [*entry[2], (entry[0], entry[1])]:
            name = self._name(token)
            top[name] = max(top.get(name, LOWEST_LOGPROB), logprob)
        return top
