"""What single tokens look like: their bytes, which may be half a character, and their place in a text."""

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from stagdist.data.tokenizer import Tokenizer, byte_alphabet

_BLANK = "\u2581"
"""How SentencePiece writes a blank."""


class TokenTexts:
    """Names and bytes of the tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = json.loads(tokenizer.to_json())
        self._tokenizer = tokenizer
        self._added = {added["id"]: added for added in content["added_tokens"]}
        parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        self._byte_level = '"ByteLevel"' in parts
        self._blanks = '"Metaspace"' in parts or bool(content["model"].get("byte_fallback"))
        self._alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the tokens that are not text."""
        return frozenset(token for token, added in self._added.items() if added["special"])

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes that a token stands for; those of its name if it is special, none for an unused id."""
        if token in self._added:
            return str(self._added[token]["content"]).encode()
        piece = self._tokenizer.piece(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(self._alphabet[char] for char in piece if char in self._alphabet)
        if self._blanks:
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(_BLANK, " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def name(self, token: int, *, as_id: bool = False) -> str:
        """A token in lists of log-probabilities: its text, `bytes:` where that is half a character, as OpenAI does.

        Args:
            as_id: `token_id:` and the id, as vLLM does on demand.
        """
        if as_id:
            return f"token_id:{token}"
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextOffsets:
    """The characters of a text before each of its tokens, as they come.

    Args:
        skip_special_tokens: special tokens are not in the text.
        text: the text that the first tokens were made from, None if tokens were first; SentencePiece puts a blank
            before the text.
        first: these tokens.
    """

    def __init__(
        self, texts: TokenTexts, *, skip_special_tokens: bool, text: str | None = None, first: Sequence[int] = ()
    ) -> None:
        self._texts = texts
        self._skipped: frozenset[int] = texts.special if skip_special_tokens else frozenset()
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")
        begin = next((texts.bytes_of(token) for token in first if token not in texts.special), b"")
        self._count = -1 if text is not None and begin.startswith(b" ") and not text.startswith(" ") else 0

    def next(self, token: int) -> int:
        """Offset of the next token; a token that continues a character has the offset of this character."""
        offset = max(self._count, 0)
        if token not in self._skipped:
            self._count += len(self._decoder.decode(self._texts.bytes_of(token)))
        return offset
