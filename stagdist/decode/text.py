"""Incremental detokenization: complete characters only, and no part of a stop string."""

from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"
_MAX_CONTEXT = 8  # previous tokens that can change the text of new ones: a leading blank, bytes of a character
_MAX_MISSING = 3  # tokens; a character has at most 4 bytes
_MAX_WINDOW = 16

Decode = Callable[[Iterable[int]], str]
"""The text of token ids, for example `Tokenizer.decode`; invalid UTF-8 becomes U+FFFD."""


class TextStream:
    """Decodes the tokens of one request as they are generated.

    The joined pieces equal the decoded prompt and tokens without the decoded prompt, up to the first stop string. A
    character that the prompt leaves incomplete belongs to the prompt. Each token decodes a short window, not the text
    so far. `tokenizers.decoders.DecodeStream` does not suffice: it never returns invalid bytes and cannot be flushed.

    Args:
        prompt_ids: tokens before the generated ones.
        stop: stop strings; the text ends before the first complete one. Of several, the earliest start counts, and of
            those the shortest.
        include_stop: the text ends after the stop string.
        min_tokens: the text of so many first tokens is not searched.

    Attributes:
        stopped_by: the stop string that was found; all later calls return "".
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stopped_by: str | None = None
        self._decode = decode
        self._stop, self._include_stop, self._unsearched = tuple(stop), include_stop, min_tokens
        self._unsure = ""  # may begin a stop string
        self._window = self._context(list(prompt_ids[-_MAX_CONTEXT:]))
        self._shown = len(decode(self._window))  # characters of the window's text that were returned
        self._waiting = 0  # tokens since the text last ended in a complete character

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now final, possibly empty."""
        if self.stopped_by is not None:
            return ""
        self._unsearched -= 1
        self._window.append(token_id)
        text = self._decode(self._window)
        broken = len(text) - len(text.rstrip(_REPLACEMENT))
        self._waiting = self._waiting + 1 if broken else 0
        if self._waiting > _MAX_MISSING:
            broken = 1  # the earlier bytes are invalid and cannot become a character
        end = max(self._shown, len(text) - broken)
        new, self._shown = text[self._shown : end], end
        self._shorten(text, broken)
        return self._check_stop(new, last=False)

    def finish(self) -> str:
        """Return the text that was held back, without an incomplete last character."""
        if self.stopped_by is not None:
            return ""
        text = self._decode(self._window)
        new, self._shown = text[self._shown :].removesuffix(_REPLACEMENT), len(text)
        return self._check_stop(new, last=True)

    def _shorten(self, text: str, broken: int) -> None:
        """Drop tokens that cannot change the text of later ones."""
        if not broken:
            self._window = self._context(self._window)
            self._shown = len(self._decode(self._window))
        elif len(self._window) > _MAX_WINDOW:
            # UTF-8 is self-synchronizing: the end of the text does not change.
            self._window = self._window[-_MAX_CONTEXT:]
            self._shown = len(self._decode(self._window)) - (len(text) - self._shown)

    def _context(self, ids: list[int]) -> list[int]:
        """Return the fewest last tokens that have text and do not begin inside a character.

        SentencePiece drops the leading blank of a token without text before it.
        """
        for count in range(1, min(len(ids), _MAX_CONTEXT) + 1):
            text = self._decode(ids[-count:])
            if text and not text.startswith(_REPLACEMENT):
                return ids[-count:]
        return ids[-_MAX_CONTEXT:]

    def _check_stop(self, new: str, *, last: bool) -> str:
        """Return the text before a stop string, or before what may become one."""
        if self._unsearched >= 0:
            return new
        text, self._unsure = self._unsure + new, ""
        found = [(place, len(stop), stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, size, self.stopped_by = min(found)
            return text[: place + size * self._include_stop]
        if last or not text:
            return text
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if held:
            text, self._unsure = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
