"""Text while tokens come: whole characters, no stop string, the same text as decoding everything at once."""

import random
from collections.abc import Iterable, Sequence

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from stagdist.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from stagdist.decode.text import TextStream

SAMPLES = (
    "the cat sat on the mat. naïve café — Größe, 日本語のテキスト, Привет мир, 👍🏽 emoji 👩‍👩‍👧 and 𐍈𐍉𐍊 \n\t tabs"
)
ALPHABET = "ab  c.é—日本👍🏽𐍈\n\ufffd"


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A byte-level tokenizer without and with merges, some of which cut characters."""
    return byte_tokenizer() if request.param == "bytes" else train_bpe([SAMPLES] * 20, 320)


class Metaspace:
    """A SentencePiece-like decoder: blanks are part of tokens, and the one at the very start is dropped."""

    def __init__(self) -> None:
        words = ["▁", "▁hello", "▁world", "ly", "▁a", "b", "<s>", "."]
        pieces = words + [f"<0x{byte:02X}>" for byte in range(256)]
        self.ids = {piece: index for index, piece in enumerate(pieces)}
        self._backend = Backend(models.BPE(self.ids, [], byte_fallback=True))
        self._backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self._backend.add_special_tokens(["<s>"])

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def encode(self, *pieces: str) -> list[int]:
        """Ids of pieces; those that are not in the vocabulary become bytes."""
        ids: list[int] = []
        for piece in pieces:
            ids += [self.ids[piece]] if piece in self.ids else [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return ids


def pieces_of(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """What each token and the end give out."""
    return [stream.push(token) for token in ids] + [stream.finish()]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings in a text begins."""
    return min((text.find(each) for each in stop if each in text), default=None)


def without_broken_end(text: str) -> str:
    return text.removesuffix("\ufffd")


@pytest.mark.parametrize("seed", range(40))
def test_pieces_join_to_what_decoding_everything_adds(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(ALPHABET + SAMPLES, k=rng.randrange(1, 60)))
    ids = tokenizer.encode(text)
    cut = rng.randrange(0, len(ids))
    prompt, new = ids[:cut], ids[cut:]
    found = "".join(pieces_of(TextStream(tokenizer.decode, prompt), new))
    assert found == without_broken_end(tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :])


@pytest.mark.parametrize("seed", range(40))
def test_random_tokens_read_as_when_decoded_at_once(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(200)]
    if seed % 2:  # no character is ever complete
        ids = [rng.choice([255, 128, 226, 240, 159]) for _ in range(200)] if tokenizer.vocab_size == 257 else ids
    cut = rng.randrange(0, 20)
    found = "".join(pieces_of(TextStream(tokenizer.decode, ids[:cut]), ids[cut:]))
    assert found == without_broken_end(tokenizer.decode(ids)[len(tokenizer.decode(ids[:cut])) :])


@pytest.mark.parametrize("seed", range(60))
def test_the_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    letters = rng.choice(["ab", "abc", "a日", "👍🏽a", "aé "])
    stop = ["".join(rng.choices(letters, k=rng.randrange(2, 6))) for _ in range(rng.randrange(1, 4))]
    ids = tokenizer.encode("".join(rng.choices(letters, k=60)))
    stream = TextStream(tokenizer.decode, ids[:3], stop)
    found, taken = "", 3
    while stream.stopped_by is None and taken < len(ids):
        found += stream.push(ids[taken])
        taken += 1
        assert first_stop(found, stop) is None
    found += stream.finish()
    whole = without_broken_end(tokenizer.decode(ids[:taken])[len(tokenizer.decode(ids[:3])) :])
    place = first_stop(whole, stop)
    assert (stream.stopped_by is not None) == (place is not None)
    assert found == whole[:place]
    before = without_broken_end(tokenizer.decode(ids[: taken - 1])[len(tokenizer.decode(ids[:3])) :])
    assert first_stop(before, stop) is None  # it stopped as early as it could
    if stream.stopped_by is not None:
        assert whole[place:].startswith(stream.stopped_by)
        assert (stream.push(ids[0]), stream.finish()) == ("", "")


def test_a_character_comes_whole_with_its_last_byte() -> None:
    assert pieces_of(TextStream(byte_tokenizer().decode, []), list("aé👍".encode())) == [
        "a",
        "",
        "é",
        "",
        "",
        "",
        "👍",
        "",
    ]


def test_a_prompt_that_ends_inside_a_character_keeps_it() -> None:
    thumb = list("👍".encode())
    assert pieces_of(TextStream(byte_tokenizer().decode, thumb[:2]), [*thumb[2:], ord("x")]) == ["", "", "x", ""]
    assert pieces_of(TextStream(byte_tokenizer().decode, thumb[:2]), list(b"xy")) == ["x", "y", ""]


def test_bytes_of_no_character_stay_visible_and_hold_nothing_back_for_long() -> None:
    stream = TextStream(byte_tokenizer().decode, [65])
    text, longest = "", 0
    for count in range(1, 200):
        text += stream.push(255)
        longest = max(longest, count - len(text))
    assert set(text) == {"\ufffd"}
    assert longest <= 3
    assert stream.push(ord("b")) == "\ufffd" * (199 - len(text)) + "b"
    assert "".join(pieces_of(stream, [*b"c", 0xE2, 0x82, *b"d"])) == "c\ufffdd"


def test_a_last_character_that_is_cut_off_is_left_out() -> None:
    assert pieces_of(TextStream(byte_tokenizer().decode, []), [*b"a", 0xF0, 0x9F]) == ["a", "", "", ""]


def test_end_of_document_shows_nothing() -> None:
    assert pieces_of(TextStream(byte_tokenizer().decode, [256]), [*b"a", 256, *b"b"]) == ["a", "", "b", ""]


def test_a_stop_string_that_may_have_begun_is_held_back_until_it_is_certain() -> None:
    stream = TextStream(byte_tokenizer().decode, [], ["<end>", "<e!"])
    assert [stream.push(byte) for byte in b"x<e<end"] == ["x", "", "", "<e", "", "", ""]
    assert (stream.push(ord(">")), stream.stopped_by, stream.finish()) == ("", "<end>", "")
    stream = TextStream(byte_tokenizer().decode, [], ["<end>", "<e!"])
    assert ([stream.push(byte) for byte in b"x<en"], stream.finish(), stream.stopped_by) == (
        ["x", "", "", ""],
        "<en",
        None,
    )


def test_of_several_stop_strings_in_one_token_the_first_in_the_text_counts() -> None:
    class Words:
        """Tokens of several characters."""

        def decode(self, ids: Iterable[int]) -> str:
            return "".join(["one, two; three", "!"][token] for token in ids)

    for stop in ([";", ","], [",", ";"]):
        stream = TextStream(Words().decode, [1], stop)
        assert (stream.push(0), stream.stopped_by, stream.finish()) == ("one", ",", "")


@pytest.mark.parametrize("seed", range(30))
def test_an_included_stop_string_is_the_end_of_the_text(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    letters = rng.choice(["ab", "abc", "a日", "aé "])
    stop = ["".join(rng.choices(letters, k=rng.randrange(2, 6))) for _ in range(2)]
    ids = tokenizer.encode("".join(rng.choices(letters, k=60)))
    plain, included = TextStream(tokenizer.decode, [], stop), TextStream(tokenizer.decode, [], stop, include_stop=True)
    text, longer = "".join(pieces_of(plain, ids)), "".join(pieces_of(included, ids))
    assert included.stopped_by == plain.stopped_by
    assert longer == text + (plain.stopped_by or "")


@pytest.mark.parametrize(("min_tokens", "end"), [(0, 1), (1, 1), (2, 3), (3, 3), (4, 5), (9, 5)])
def test_the_text_of_the_first_tokens_is_not_searched(min_tokens: int, end: int) -> None:
    stream = TextStream(byte_tokenizer().decode, [], [";"], min_tokens=min_tokens)
    assert "".join(pieces_of(stream, list(b"a;b;c"))) == "a;b;c"[:end]


def test_of_stop_strings_that_begin_together_the_shortest_ends_the_text() -> None:
    stream = TextStream(lambda ids: "".join("ab;;c"[: 5 * len(list(ids))]), [], [";;", ";"], include_stop=True)
    assert (stream.push(0), stream.stopped_by) == ("ab;", ";")


def test_a_stop_string_does_not_begin_in_the_prompt() -> None:
    stream = TextStream(byte_tokenizer().decode, list(b"a\n"), ["\n\n"])
    assert "".join(pieces_of(stream, list(b"\nb"))) == "\nb"
    assert stream.stopped_by is None


def test_sentencepiece_keeps_the_blanks_between_tokens() -> None:
    tokenizer = Metaspace()
    prompt = tokenizer.encode("<s>", "▁hello")
    new = tokenizer.encode("▁world", "ly", "▁", "▁a", "<s>", "▁a", "<s>", "b", "é", "▁hello", "👍", "日", ".")
    found = pieces_of(TextStream(tokenizer.decode, prompt), new)
    assert "".join(found) == " worldly  a ab\u00e9 hello👍日." == tokenizer.decode(prompt + new)[len("hello") :]
    assert found[:6] == [" world", "ly", " ", " a", "", " a"]
    assert pieces_of(TextStream(tokenizer.decode, []), tokenizer.encode("▁hello", "▁a")) == ["hello", " a", ""]
    assert pieces_of(TextStream(tokenizer.decode, tokenizer.encode("<s>")), tokenizer.encode("▁a", "▁a")) == [
        "a",
        " a",
        "",
    ]


def test_sentencepiece_bytes_after_a_prompt_that_ends_inside_a_character() -> None:
    tokenizer = Metaspace()
    ids = tokenizer.encode("▁a", "日", "b", "▁a")
    assert "".join(pieces_of(TextStream(tokenizer.decode, ids[:3]), ids[3:])) == "b a"


def test_each_token_decodes_a_few_tokens_only() -> None:
    class Counting:
        """Counts the tokens that are decoded."""

        def __init__(self) -> None:
            self.inner, self.decoded = byte_tokenizer(), 0

        def decode(self, ids: Iterable[int]) -> str:
            ids = list(ids)
            self.decoded += len(ids)
            return self.inner.decode(ids)

    for text in (b"plain text ", "日本👍é".encode(), b"\xff", b"\x80\xe2", bytes([0]) + "\u200d".encode()):
        counting = Counting()
        stream = TextStream(counting.decode, list(text * 300))
        for token in (text * 300)[:1000]:
            stream.push(token)
        assert counting.decoded < 60 * 1000
    counting = Counting()
    stream = TextStream(counting.decode, [256] * 500)
    for _ in range(1000):
        stream.push(256)
    assert counting.decoded < 60 * 1000
