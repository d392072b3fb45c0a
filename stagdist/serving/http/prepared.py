"""Requests that were checked and can be submitted: one submission for each choice, and how to write its answer."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stagdist.decode.request import MAX_SEED, Request, check_request
from stagdist.errors import ConfigError
from stagdist.serving.http.generation import Generation, Submission
from stagdist.serving.http.problems import ProblemError, problem_of_params
from stagdist.serving.http.served_model import ModelView
from stagdist.serving.http.wire import SamplingFields
from stagdist.serving.protocol import Output

LOWEST_LOGPROB = -9999.0
"""Instead of minus infinity, which JSON cannot write."""

FINISH_REASONS = {"cancelled": "abort"}


class ChoiceWriter(Protocol):
    """Writes the answer of one choice."""

    def chunks(self, output: Output) -> list[dict[str, Any]]:
        """Entries of `choices` in a stream, for one output."""

    def complete(self, output: Output) -> dict[str, Any]:
        """The entry of `choices`, for all outputs as one."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose choices can be submitted.

    Attributes:
        objects: `object` of the answer, and of a chunk.
        name: of the model.
        n: choices for each prompt.
        seed: of the first choice; choice i of a prompt has `seed` + i.
        writers: one per choice.
    """

    id: str
    objects: tuple[str, str]
    name: str
    fingerprint: str
    fields: SamplingFields
    n: int
    seed: int
    submissions: list[Submission]
    writers: Sequence[ChoiceWriter]
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """What the answer and all chunks begin with."""
        return {
            "id": self.id,
            "object": self.objects[chunk],
            "created": self.created,
            "model": self.name,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
        }

    def usage(self, generation: Generation) -> dict[str, Any]:
        """Tokens so far; each prompt counts once."""
        prompt = sum(len(each.prompt) for each in self.submissions[:: self.n])
        completion = sum(generation.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(generation.cached[:: self.n])},
        }


def parse_json(body: bytes) -> Any:
    """A request's body.

    Raises:
        ProblemError: it is not JSON, or holds half a pair of surrogates, which is no text.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ProblemError(400, "the body holds half of a surrogate pair, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise ProblemError(400, f"the body is not JSON: {str(error)[:200] or 'too deep'}") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def draw_seed(fields: SamplingFields) -> int:
    """The seed of a request; one is drawn if it has none, so that requests differ."""
    return fields.seed if fields.seed is not None else secrets.randbelow(MAX_SEED)


def check_choices(count: int, limit: int) -> None:
    """Refuse a request that can never be taken.

    Raises:
        ProblemError: it has more choices than may wait.
    """
    if count > limit:
        raise ProblemError(400, f"the request has {count} choices in all; at most {limit} may wait at once", param="n")


def submissions_of(
    fields: SamplingFields,
    served: ModelView,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None,
    seed: int,
    **more: Any,
) -> list[Submission]:
    """The choices of one prompt; they end with the context.

    Args:
        max_new_tokens: None fills the context.
        more: further fields of `SamplingParams`.

    Raises:
        ProblemError: the model cannot serve it.
    """
    context = served.model["max_context"]
    if len(prompt) > context:
        message = (
            f"this model's maximum context length is {context} tokens, and the prompt has {len(prompt)}; "
            f"shorten it by at least {len(prompt) - context} tokens"
        )
        raise ProblemError(400, message, param="prompt", code="context_length_exceeded")
    room = context - len(prompt) + 1  # the last token is never fed back
    new = room if max_new_tokens is None else min(room, max_new_tokens)
    choices = [
        Submission(prompt, fields.sampling(max_new_tokens=new, seed=seed + choice, **more))
        for choice in range(fields.n or 1)
    ]
    try:
        first = Request("", tuple(prompt), choices[0].params)
        check_request(first, vocab_size=served.model["vocab_size"], max_context=context)
    except ConfigError as error:
        raise problem_of_params(str(error).removeprefix("request '': ")) from None
    return choices


def join_wire_outputs(outputs: Sequence[Output]) -> Output:
    """All outputs of a choice as one."""
    logprobs = [entry for output in outputs for entry in output["logprobs"] or ()]
    return {
        **outputs[-1],
        "tokens": [token for output in outputs for token in output["tokens"]],
        "text": "".join(output["text"] for output in outputs),
        "logprobs": logprobs or None,
        "prompt_logprobs": next((output["prompt_logprobs"] for output in outputs if output["prompt_logprobs"]), None),
    }


def end_of(output: Output) -> dict[str, Any]:
    """Why a choice ended, as both endpoints say it."""
    finish = output["finish"]
    return {"finish_reason": FINISH_REASONS.get(finish or "", finish), "stop_reason": output["stop"]}
