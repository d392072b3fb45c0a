"""Requests as clients send them. Unknown fields are ignored; known ones that cannot be served are refused by name."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from stagdist.decode.request import MAX_INT64, MAX_LOGPROBS, SamplingParams
from stagdist.errors import ConfigError
from stagdist.serving.api.problems import SAMPLING_FIELDS, ProblemError, problem_of_fields, problem_of_params

Model = TypeVar("Model", bound=BaseModel)

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_LENGTH = 64, 4096
MAX_LIST = 4096
"""Limit of lists of token ids in the sampling fields."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1, 0),
    "logprob_token_ids": ([],),
    "lora_path": (),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "stop_regex": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Fields of OpenAI's API and of other servers that are not served, with the values that ask for nothing."""

_ADVICE = {
    "best_of": "use `n`",
    "chat_template": "a template is code: start the server with --chat-template",
    "no_stop_trim": "use `include_stop_str_in_output`",
    "prompt_logprobs": "use `echo` with `logprobs`",
}

Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "minItems": 1,
                },
            ]
        }
    ),
]
"""A text, several texts, token ids, or several lists of them; checked when encoded, since they may be long."""

Content = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]
"""The content of a message: a text, or parts of one."""

Stops = Annotated[
    list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}
    ),
]
"""One stop string or several."""

TokenKey = Annotated[str, Field(max_length=20)]
TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_LIST)]


class WireModel(BaseModel):
    """A request's body: values are of the type that they have in JSON."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(WireModel):
    """Which chunks of a stream have the usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(WireModel):
    """What completions and chat completions share; `null` means the default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[TokenKey, float], Field(max_length=MAX_LIST)] | None = None
    seed: Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)] | None = None
    stop: Stops | None = None
    stop_token_ids: TokenList | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: TokenList | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    deadline_s: Annotated[float, Field(gt=0, le=86_400)] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_served(cls, body: Any) -> Any:
        """Refuse known fields by name."""
        if isinstance(body, dict):
            for name in REFUSED.keys() & body.keys():
                value = body[name]
                if value is not None and value not in REFUSED[name]:
                    advice = f"; {_ADVICE[name]}" if name in _ADVICE else ""
                    raise ProblemError(400, f"`{name}` is not supported by this server{advice}", param=name)
        return body

    def sampling(self, *, max_new_tokens: int, seed: int, **more: Any) -> SamplingParams:
        """Sampling parameters; `seed` may be any integer.

        Raises:
            ProblemError: a value that cannot work.
        """
        same = SAMPLING_FIELDS & SamplingFields.model_fields.keys()
        given = {name: getattr(self, name) for name in same} | {
            "max_new_tokens": max_new_tokens,
            "seed": seed % (MAX_INT64 + 1),
            "top_k": self.top_k if self.top_k is not None and self.top_k > 0 else None,
            "logit_bias": None if self.logit_bias is None else tuple(self.logit_bias.items()),
            "stop": None if self.stop is None else tuple(filter(None, self.stop)),  # some clients send an empty one
            "ignore_end_of_document": self.ignore_eos,
            **more,
        }
        try:
            return SamplingParams(**{name: value for name, value in given.items() if value is not None})
        except ConfigError as error:
            raise problem_of_params(str(error)) from None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True
    parse_special: bool = False


class ChatMessage(BaseModel):
    """One message; fields that are not listed here reach the template too."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str = Field(pattern="^(system|developer|user|assistant|tool)$")
    content: Content = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_LIST)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(WireModel):
    """POST /tokenize: a text (`content` is llama.cpp's name), or a conversation."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_LIST)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    parse_special: bool = True  # as elsewhere: clients look up the ids of special tokens
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    """POST /detokenize."""

    model: str | None = None
    # The errors of a million tokens would take gigabytes.
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


def parse_model(kind: type[Model], body: Any) -> Model:
    """Check a decoded body.

    Raises:
        ProblemError: it is no object, or a field is of the wrong kind.
    """
    if not isinstance(body, dict):
        raise ProblemError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise problem_of_fields(error) from None
