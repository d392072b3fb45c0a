"""Chat templates: conversations to text, with the functions and limits that `transformers` gives templates."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stagdist.serving.api.problems import ProblemError

PLAIN_STOP = "\nUser:"
"""Ends the answer of a base model that was given a conversation as plain text."""

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class _GenerationBlock(Extension):
    """`{% generation %}` marks answers for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes the characters of HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A Jinja template of the model or of the person who runs the server; requests bring none, as it is code.

    Args:
        special_tokens: variables of the template, such as `bos_token`.

    Raises:
        ProblemError: the template cannot be read.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ProblemError(501, f"the chat template of the model cannot be read: {reason}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The text of a conversation.

        Raises:
            ProblemError: the template refuses it.
        """
        known = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(
                **{"tools": None, "documents": None} | self._special_tokens | dict(variables) | known
            )
        except Exception as error:  # a template raises what it wants
            reason = " ".join(str(error).split()) or type(error).__name__
            message = f"the chat template of the model refuses the messages: {reason}"
            raise ProblemError(400, message, param="messages") from error


def plain_text(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
    """A conversation as text that names its speakers, for models without a template."""
    lines = [f"{_NAMES[message['role']]}: {message['content']}" for message in messages]
    return "\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are texts and whose roles are those that templates know.

    Raises:
        ProblemError: a content has a part that is no text.
    """
    found = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(_text_of(part, number) for part in content)
        elif not isinstance(content, str | None):
            place = f"messages.{number}.content"
            raise ProblemError(400, f"{place} must be a text or a list of parts", param=place)
        role = "system" if message["role"] == "developer" else message["role"]
        found.append({**message, "role": role, "content": content or ""})
    return found


def _text_of(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    place = f"messages.{number}.content"
    raise ProblemError(400, f"{place} has a part of type {str(kind)[:40]!r}; only text is supported", param=place)
