"""Sampling follows the model's distribution, one seed gives one text, and no character is broken."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stagdist.errors import ConfigError
from stagdist.evaluation.sample import decode_whole_characters, generate_by_recomputation, sample_token

VOCABULARY = 6


def _successor(ids: Tensor) -> Tensor:
    """Strongly prefers the token after the last one, wherever it stands in the context."""
    return 50.0 * torch.nn.functional.one_hot((ids + 1) % VOCABULARY, VOCABULARY).float()


def test_greedy_takes_the_likeliest_and_returns_only_new_tokens() -> None:
    new = generate_by_recomputation(_successor, [4], max_new_tokens=5, max_context=8, temperature=0)
    assert new == [5, 0, 1, 2, 3]


def test_the_end_of_document_ends_the_text_and_is_not_returned() -> None:
    new = generate_by_recomputation(_successor, [4], max_new_tokens=5, max_context=8, temperature=0, end_of_document=1)
    assert new == [5, 0]


def test_every_token_sees_the_whole_context_up_to_its_limit() -> None:
    seen: list[list[int]] = []

    def logits(ids: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(ids[0].tolist())
        return _successor(ids)

    generate_by_recomputation(logits, [0, 1], max_new_tokens=3, max_context=3, temperature=0)
    assert seen == [[0, 1], [0, 1, 2], [1, 2, 3]]


def test_one_seed_gives_one_text() -> None:
    def text(seed: int) -> list[int]:
        flat = lambda ids: torch.zeros(*ids.shape, VOCABULARY)  # noqa: E731
        return generate_by_recomputation(flat, [0], max_new_tokens=30, max_context=8, seed=seed)

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 2), (2.0, 3)])
def test_samples_follow_the_tempered_distribution(temperature: float, top_k: int | None) -> None:
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    draws = [sample_token(scores, temperature=temperature, top_k=top_k, generator=generator) for _ in range(4000)]
    allowed = scores[: top_k or VOCABULARY].double()
    expected = torch.softmax(allowed / temperature, 0).numpy()
    shares = np.bincount(draws, minlength=VOCABULARY) / len(draws)
    assert shares[len(allowed) :].sum() == 0 and shares[5] == 0
    np.testing.assert_allclose(shares[: len(allowed)], expected, atol=0.03)


def _decode_bytes(ids: object) -> str:
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_character_cut_short_is_left_out(missing: int) -> None:
    ids = list("naïve 𝄞".encode())
    assert decode_whole_characters(_decode_bytes, ids) == "naïve 𝄞"
    assert decode_whole_characters(_decode_bytes, ids[:-missing]) == "naïve "


def test_broken_bytes_in_the_middle_stay_visible() -> None:
    assert decode_whole_characters(_decode_bytes, [0x61, 0xFF, 0x62]) == "a\ufffdb"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "no tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"max_context": 0}, "max_context 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    settings: dict = {"prompt_ids": [1], "max_new_tokens": 1, "max_context": 4}
    with pytest.raises(ConfigError, match=message):
        generate_by_recomputation(_successor, **(settings | changes))
