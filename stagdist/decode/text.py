"""Tokens to text while they come: no broken characters, nothing of a stop string."""

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_MAX_CONTEXT = 8  # tokens before the new ones that may change how these are decoded: a blank, bytes of a character
_MAX_MISSING = 3  # tokens: a character has at most 4 bytes, so a fourth one that does not complete it never will
_MAX_WINDOW = 16


class Decoder(Protocol):
    """What gives the text of tokens, for example `stagdist.data.tokenizer.Tokenizer`."""

    def decode(self, ids: Iterable[int], /) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""


class TextStream:
    """Text of one request's tokens as they come.

    The pieces joined are what decoding the prompt with all tokens adds to the decoded prompt, up to the first stop
    string. A character that the prompt leaves unfinished counts as the prompt's. Each token costs the decoding of a
    few tokens, not of the whole text.

    Args:
        tokenizer: decodes the tokens.
        prompt_ids: what the new tokens continue.
        stop: the text ends before the first of these that is complete; of several, before the one that begins first.

    Attributes:
        stopped: a stop string was found; nothing more comes.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._unsure = ""  # may be the beginning of a stop string
        self._window = self._context(list(prompt_ids[-_MAX_CONTEXT:]))
        self._shown = len(tokenizer.decode(self._window))  # characters of the window's text that were given out
        self._waiting = 0  # tokens since the text was last without a broken end

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now safe to show, which may be none."""
        if self.stopped:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        broken = len(text) - len(text.rstrip(_REPLACEMENT))
        self._waiting = self._waiting + 1 if broken else 0
        if self._waiting > _MAX_MISSING:
            broken = 1  # those before the last are bytes of no character, and stay so
        end = max(self._shown, len(text) - broken)
        new, self._shown = text[self._shown : end], end
        self._shorten(text, broken)
        return self._check_stop(new, last=False)

    def finish(self) -> str:
        """What was held back, but for the last character where it is broken: its bytes will not come any more."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._window)
        new, self._shown = text[self._shown :].removesuffix(_REPLACEMENT), len(text)
        return self._check_stop(new, last=True)

    def _shorten(self, text: str, broken: int) -> None:
        """Forget tokens that no longer matter for the decoding of later ones."""
        if not broken:
            self._window = self._context(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        elif len(self._window) > _MAX_WINDOW:
            # UTF-8 finds its characters again from any byte on: the end of the text stays what it is.
            self._window = self._window[-_MAX_CONTEXT:]
            self._shown = len(self._tokenizer.decode(self._window)) - (len(text) - self._shown)

    def _context(self, ids: list[int]) -> list[int]:
        """The fewest last tokens that show text and do not begin inside a character.

        Without text before it, a token of SentencePiece would lose its blank.
        """
        for count in range(1, min(len(ids), _MAX_CONTEXT) + 1):
            text = self._tokenizer.decode(ids[-count:])
            if text and not text.startswith(_REPLACEMENT):
                return ids[-count:]
        return ids[-_MAX_CONTEXT:]

    def _check_stop(self, new: str, *, last: bool) -> str:
        """Text up to a stop string or to what may become one."""
        text, self._unsure = self._unsure + new, ""
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last or not text:
            return text
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if held:
            text, self._unsure = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
