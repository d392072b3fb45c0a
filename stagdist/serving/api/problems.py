"""Errors as clients of OpenAI's API read them: an object with a message, and a status that says whether to retry."""

import dataclasses
import json
import math
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from stagdist.decode.request import SamplingParams

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

_LONGEST = 400
"""Characters of a message."""

WIRE_NAMES = {"max_new_tokens": "max_tokens", "ignore_end_of_document": "ignore_eos"}
"""Fields of requests that `SamplingParams` calls otherwise."""

SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


class ProblemError(Exception):
    """A request that is not served.

    Args:
        param: the field of the request that is wrong.
        code: a word that programs can compare; the status if there is none.
        retry_after_s: seconds after which the same request may be served.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        if status in (500, 501, 504):
            self.headers["x-should-retry"] = "false"  # the openai package would repeat what fails again

    def body(self) -> bytes:
        """The error object as JSON."""
        kind = TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        code = self.code or self.status
        return json.dumps(
            {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}
        ).encode()

    def response(self) -> Response:
        """The error as a response of its own."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def problem_of_params(message: str) -> ProblemError:
    """The problem that `SamplingParams` or `check_request` found, with the names that requests use."""
    name = next((name for name in message.split(maxsplit=1)[:1] if name in SAMPLING_FIELDS), None)
    for ours, theirs in WIRE_NAMES.items():
        message = message.replace(ours, theirs)
    if message.startswith("the prompt "):
        name = "prompt"
    if len(message) > _LONGEST:  # it shows the value
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    return ProblemError(400, message, param=WIRE_NAMES.get(name or "", name))


def problem_of_fields(error: ValidationError) -> ProblemError:
    """The first field of a request that is of the wrong kind."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] == "missing" else f"; it is {str(first['input'])[:80]!r}"
    message = f"{place}: {first['msg']}{given}" if place else str(first["msg"])
    return ProblemError(400, message, param=place or None)
