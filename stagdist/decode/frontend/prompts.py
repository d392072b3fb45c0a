"""Prompts from the command line, a file or a stream. An invalid prompt does not affect others."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stagdist.decode.request import Request, SamplingParams
from stagdist.errors import ConfigError

SUFFIXES = (".txt", ".jsonl")
SAMPLING_FIELDS = tuple(entry.name for entry in dataclasses.fields(SamplingParams))
FIELDS = ("prompt", "prompt_ids", "id", *SAMPLING_FIELDS)
"""Keys of an object in a .jsonl file of prompts."""


class Encoder(Protocol):
    """Encodes text, for example `stagdist.data.tokenizer.Tokenizer`."""

    def encode(self, text: str, /) -> list[int]:
        """Return the token ids of a text."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as it was read.

    Attributes:
        index: number from 0, including prompts with errors.
        place: source of the prompt, unique, for error messages.
        name: `id` of the answer; `index` if none is given.
        text: None if the prompt has `ids` or an error.
        ids: token ids, unchecked.
        sampling: parameters that override the defaults, by name.
        error: why the prompt cannot be read.
    """

    index: int
    place: str
    name: str | int
    text: str | None = None
    ids: Sequence[Any] | None = None
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
    for index, line in enumerate(lines):
        place = f"line {index + 1} of {source}"
        try:
            yield Prompt(index, place, index, text=_line_text(line, place))
        except ConfigError as error:
            yield Prompt(index, place, index, error=str(error))


def prompts_from_jsonl(lines: Iterable[bytes], source: str) -> Iterator[Prompt]:
    """One JSON object per line with `prompt` or `prompt_ids`, and any of `FIELDS`; blank lines are skipped.

    Args:
        source: name of the stream, for errors.
    """
    index = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"line {number} of {source}"
        try:
            yield _from_object(index, place, _line_text(line, place))
        except ConfigError as error:
            yield Prompt(index, place, index, error=str(error))
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
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"--prompts-file {path} cannot be read: {error.strerror or error}") from error


def make_request(prompt: Prompt, defaults: SamplingParams, tokenizer: Encoder) -> Request:
    """The request of a prompt; `place` is its id. Its seed is that of `defaults` plus `index`, unless it has one.

    Raises:
        ConfigError: the prompt could not be read, is no text, or has a sampling parameter that cannot work.
    """
    if prompt.error is not None:
        raise ConfigError(prompt.error)
    changes = {"seed": defaults.seed + prompt.index} | prompt.sampling
    try:
        params = dataclasses.replace(defaults, **changes)
    except ConfigError as error:
        raise ConfigError(f"{prompt.place}: {error}") from error
    if prompt.ids is not None:
        return Request(prompt.place, tuple(prompt.ids), params)
    text = prompt.text or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8; half a pair in JSON
        raise ConfigError(f"{prompt.place} is not UTF-8 text, see position {error.start}; encode it as UTF-8") from None
    return Request(prompt.place, tuple(tokenizer.encode(text)), params)


def _line_text(line: bytes, place: str) -> str:
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        wrong = line[error.start]
        raise ConfigError(
            f"{place} is not UTF-8: byte 0x{wrong:02x} at position {error.start}; convert it to UTF-8"
        ) from None


def _from_object(index: int, place: str, line: str) -> Prompt:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); a .jsonl file holds one object per line") from None
    if not isinstance(body, dict):
        raise ConfigError(f'{place} is no JSON object; write {{"prompt": "text"}}')
    for key in body:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, 1)
            known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(FIELDS)}"
            raise ConfigError(f"{place} has the unknown key {key!r}; {known}")
    if ("prompt" in body) == ("prompt_ids" in body):
        found = "both" if "prompt" in body else "neither"
        raise ConfigError(f"{place} has {found} of the keys prompt and prompt_ids; give one of them")
    text, ids, name = body.get("prompt"), body.get("prompt_ids"), body.get("id", index)
    if "prompt" in body and not isinstance(text, str):
        raise ConfigError(f"{place}: prompt is {text!r}; give text")
    if "prompt_ids" in body and not isinstance(ids, list):
        raise ConfigError(f"{place}: prompt_ids is {ids!r}; give a list of token ids")
    if not isinstance(name, str | int):
        raise ConfigError(f"{place}: id is {name!r}; give text or an integer")
    sampling = {key: body[key] for key in SAMPLING_FIELDS if key in body}
    return Prompt(index, place, name, text=text, ids=ids, sampling=sampling)
