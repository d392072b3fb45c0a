"""Prompts from the command line, a file or a stream. An invalid prompt does not affect others."""

import dataclasses
import difflib
import json
import reprlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagdist.data.tokenizer import Messages, Tokenizer
from stagdist.decode.request import Request, SamplingParams
from stagdist.errors import ConfigError, DataError
from stagdist.files import not_downloaded

SUFFIXES = (".txt", ".jsonl")
SAMPLING_FIELDS = tuple(entry.name for entry in dataclasses.fields(SamplingParams))
KINDS = ("prompt", "prompt_ids", "messages")
FIELDS = (*KINDS, "id", *SAMPLING_FIELDS)
"""Keys of an object in a .jsonl file of prompts."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as it was read.

    Attributes:
        index: number from 0, including prompts with errors.
        place: source of the prompt, unique, for error messages.
        name: `id` of the answer, text or an integer, or whatever an error came with; `index` if none is given.
        text: None if the prompt has `ids`, `messages` or an error.
        ids: token ids, unchecked.
        messages: a conversation for the chat template.
        sampling: parameters that override the defaults, by name.
        error: why the prompt cannot be read.
    """

    index: int
    place: str
    name: Any
    text: str | None = None
    ids: Sequence[Any] | None = None
    messages: Messages | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def prompts_from_arguments(texts: Iterable[str]) -> Iterator[Prompt]:
    """Prompts of the command line, in order."""
    for index, text in enumerate(texts):
        yield Prompt(index, f"--prompt number {index + 1}", index, text=text)


def prompts_from_lines(lines: Iterable[bytes], source: str) -> Iterator[Prompt]:
    """One prompt per line, as soon as the line is there; the line's end is not part of it.

    Args:
        source: name of the stream, for errors.
    """
    for index, line in enumerate(_without_mark(lines)):
        place = f"line {index + 1} of {source}"
        try:
            yield Prompt(index, place, index, text=_line_text(line, place))
        except ConfigError as error:
            yield Prompt(index, place, index, error=str(error))


def prompts_from_jsonl(lines: Iterable[bytes], source: str) -> Iterator[Prompt]:
    """One JSON object per line with one of `KINDS`, and any of `FIELDS`; blank lines are skipped.

    Args:
        source: name of the stream, for errors.
    """
    index = 0
    for number, line in enumerate(_without_mark(lines), 1):
        if not line.strip():
            continue
        place = f"line {number} of {source}"
        name: Any = index
        try:
            body = _object(line, place)
            name = body.get("id", index)
            yield _from_object(index, place, name, body)
        except ConfigError as error:
            yield Prompt(index, place, name, error=str(error))
        index += 1


def prompts_from_file(path: Path) -> Iterator[Prompt]:
    """Prompts of a file: `.txt` holds one per line, `.jsonl` an object per line."""
    read = prompts_from_jsonl if path.suffix == ".jsonl" else prompts_from_lines
    with path.open("rb") as lines:
        yield from read(lines, path.name)


def check_prompts_file(path: Path) -> None:
    """Whether `prompts_from_file` can read it at all.

    Raises:
        ConfigError: it is not there, not readable or of another kind.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--prompts-file {path} ends in {path.suffix!r}; give a {' or a '.join(SUFFIXES)} file")
    try:
        problem = not_downloaded(path, text=True)
    except OSError as error:
        raise ConfigError(f"--prompts-file {path} cannot be read: {error.strerror or error}") from error
    if problem is not None:
        raise ConfigError(f"--prompts-file {problem}")


@dataclass(frozen=True)
class PromptEncoding:
    """How prompts become token ids: as with the tokenizer of the model in `transformers`.

    Attributes:
        add_special_tokens: put the special tokens around a text that the tokenizer puts there, such as a
            begin-of-text token.
        parse_special: special tokens that are written in a text become themselves.
        chat: a text is the message of a user in the chat template.
    """

    add_special_tokens: bool = True
    parse_special: bool = False
    chat: bool = False

    def ids(self, prompt: Prompt, tokenizer: Tokenizer) -> Sequence[Any]:
        """Token ids of a prompt without an error.

        Raises:
            ConfigError: its text is not UTF-8 or has no tokens, or the chat template refuses it.
        """
        if prompt.ids is not None:
            return prompt.ids
        text = prompt.text or ""
        try:
            (text if prompt.messages is None else json.dumps(prompt.messages, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8; half a pair in JSON
            problem = f"{prompt.place} is not UTF-8 text, see position {error.start}; encode it as UTF-8"
            raise ConfigError(problem) from None
        messages = [{"role": "user", "content": text}] if self.chat and prompt.messages is None else prompt.messages
        try:
            if messages is not None:
                return tokenizer.encode_chat(messages)
            return tokenizer.encode_prompt(
                text, add_special_tokens=self.add_special_tokens, parse_special=self.parse_special
            )
        except (ConfigError, DataError) as error:
            raise ConfigError(f"{prompt.place}: {error}") from error


def make_request(
    prompt: Prompt, defaults: SamplingParams, tokenizer: Tokenizer, encoding: PromptEncoding | None = None
) -> Request:
    """The request of a prompt; `place` is its id. Its seed is that of `defaults` plus `index`, unless it has one.

    Raises:
        ConfigError: the prompt could not be read or encoded, or has a sampling parameter that cannot work.
    """
    if prompt.error is not None:
        raise ConfigError(prompt.error)
    changes = {"seed": defaults.seed + prompt.index} | prompt.sampling
    try:
        params = dataclasses.replace(defaults, **changes)
    except ConfigError as error:
        raise ConfigError(f"{prompt.place}: {error}") from error
    return Request(prompt.place, tuple((encoding or PromptEncoding()).ids(prompt, tokenizer)), params)


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without the byte order mark that some editors write before the first."""
    for index, line in enumerate(lines):
        yield line if index else line.removeprefix(BOM_UTF8)


def _line_text(line: bytes, place: str) -> str:
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        wrong = line[error.start]
        raise ConfigError(
            f"{place} is not UTF-8: byte 0x{wrong:02x} at position {error.start}; convert it to UTF-8"
        ) from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        body = json.loads(_line_text(line, place))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); a .jsonl file holds one object per line") from None
    if not isinstance(body, dict):
        raise ConfigError(f'{place} is no JSON object; write {{"prompt": "text"}}')
    return body


def _from_object(index: int, place: str, name: Any, body: dict[str, Any]) -> Prompt:
    for key in body:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, 1)
            known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(FIELDS)}"
            raise ConfigError(f"{place} has the unknown key {key!r}; {known}")
    if "id" in body and not _is_name(body["id"]):
        raise ConfigError(f"{place}: id is {reprlib.repr(body['id'])}; give text or an integer")
    given = [key for key in KINDS if key in body]
    if len(given) != 1:
        found = " and ".join(given) or "no prompt"
        raise ConfigError(f"{place} has {found}; give one of the keys {', '.join(KINDS)}")
    text, ids, messages = (body.get(key) for key in KINDS)
    if "prompt" in body and not isinstance(text, str):
        raise ConfigError(f"{place}: prompt is {reprlib.repr(text)}; give text")
    if "prompt_ids" in body and not isinstance(ids, list):
        raise ConfigError(f"{place}: prompt_ids is {reprlib.repr(ids)}; give a list of token ids")
    if "messages" in body and not _is_conversation(messages):
        raise ConfigError(f'{place}: messages must be a list of objects like {{"role": "user", "content": "text"}}')
    sampling = {key: body[key] for key in SAMPLING_FIELDS if key in body}
    return Prompt(index, place, name, text=text, ids=ids, messages=messages, sampling=sampling)


def _is_name(value: Any) -> bool:
    if isinstance(value, str):
        return value == value.encode(errors="ignore").decode()  # half of a surrogate pair cannot be written
    return isinstance(value, int) and not isinstance(value, bool)


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    )
