"""Chat completions: conversations to requests, and outputs to answers."""

import secrets
from typing import Any

from stagdist.serving.api.chat_template import PLAIN_STOP
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
from stagdist.serving.api.wire import ChatRequest, parse_model
from stagdist.serving.protocol import Output, ScoredToken


def prepare_chat(body: Any, served: ModelView, max_choices: int) -> PreparedRequest:
    """Check a body and encode its conversation.

    Raises:
        ProblemError: it cannot be served.
    """
    fields = parse_model(ChatRequest, body)
    name = served.check_name(fields.model)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ProblemError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    n, seed = fields.n or 1, draw_seed(fields)
    check_choices(n, max_choices)
    ids = served.encode_chat(
        [message.model_dump() for message in fields.messages],
        add_generation_prompt=fields.add_generation_prompt,
        variables=fields.chat_template_kwargs,
    )
    if served.plain_chat:
        fields = fields.model_copy(update={"stop": [*(fields.stop or []), PLAIN_STOP]})
    submissions = submissions_of(
        fields,
        served,
        ids,
        max_new_tokens=fields.max_completion_tokens or fields.max_tokens,
        seed=seed,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    return PreparedRequest(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        objects=("chat.completion", "chat.completion.chunk"),
        name=name,
        fingerprint=served.fingerprint,
        fields=fields,
        n=n,
        seed=seed,
        submissions=submissions,
        writers=[_ChatWriter(index, fields, served) for index in range(n)],
    )


class _ChatWriter:
    """Writes one choice; the role comes with its first output, since clients measure the time of the first chunk."""

    def __init__(self, index: int, fields: ChatRequest, served: ModelView) -> None:
        self._index, self._fields, self._served = index, fields, served
        self._first = True

    def chunks(self, output: Output) -> list[dict[str, Any]]:
        chunks = []
        if self._first:
            self._first = False
            role = {"role": "assistant", "content": ""}
            chunks.append({"index": self._index, "delta": role, "logprobs": None, "finish_reason": None})
        chunks.append(self._choice("delta", {"content": output["text"]}, output))
        return chunks

    def complete(self, output: Output) -> dict[str, Any]:
        message = {"role": "assistant", "content": output["text"], "refusal": None}
        return self._choice("message", message, output)

    def _choice(self, key: str, content: dict[str, Any], output: Output) -> dict[str, Any]:
        choice = {"index": self._index, key: content, "logprobs": self._logprobs(output), **end_of(output)}
        if self._fields.return_token_ids:
            choice["token_ids"] = output["tokens"]
        return choice

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._fields.logprobs:
            return None
        return {"content": [self._entry(entry) for entry in output["logprobs"] or ()], "refusal": None}

    def _entry(self, entry: ScoredToken) -> dict[str, Any]:
        top = entry[2][: self._fields.top_logprobs or 0]
        return {
            **self._token(entry[0], entry[1]),
            "top_logprobs": [self._token(token, logprob) for token, logprob in top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._served.texts.bytes_of(token)
        as_id = bool(self._fields.return_tokens_as_token_ids)
        text = f"token_id:{token}" if as_id else data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}
