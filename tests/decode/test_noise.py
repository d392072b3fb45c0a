"""Noise: a pure function of seed, position and token that passes for Gumbel noise."""

import math

import numpy as np
import pytest
import torch

from stagdist.decode.sampling.noise import gumbel, uniform

VOCAB = 4096


def block(seeds: int = 16, positions: int = 16, vocab: int = VOCAB) -> torch.Tensor:
    """Uniform numbers [seeds, positions, vocab] of neighbouring seeds, positions and ids."""
    seed, position = torch.meshgrid(torch.arange(seeds), torch.arange(positions), indexing="ij")
    return uniform(seed.reshape(-1), position.reshape(-1), torch.arange(vocab)).reshape(seeds, positions, vocab)


def splitmix(seed: int, position: int, token: int) -> float:
    """The same number from Python's unlimited integers."""
    mask, step = 2**64 - 1, 0x9E3779B97F4A7C15

    def finalize(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    row = finalize((finalize((seed * step) & mask) + position * step) & mask)
    return ((finalize((row + token * step) & mask) >> 12) + 0.5) / 2**52


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_it_is_splitmix64_of_seed_position_and_token(seed: int) -> None:
    ids = [0, 1, 17, 262_143]
    found = uniform(torch.tensor([seed, seed]), torch.tensor([0, 8191]), torch.tensor(ids))
    assert found.tolist() == [[splitmix(seed, position, token) for token in ids] for position in (0, 8191)]


def test_uniform_numbers_fill_their_interval_evenly() -> None:
    numbers = block()
    assert numbers.min() > 0 and numbers.max() < 1
    bins = 256
    counts = torch.histc(numbers, bins, 0, 1)
    expected = numbers.numel() / bins
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "tokens"])
@pytest.mark.parametrize("distance", [1, 2, 8])
def test_neighbours_are_independent(axis: int, distance: int) -> None:
    numbers = block()
    length = numbers.shape[axis] - distance
    pairs = np.stack(
        [numbers.narrow(axis, 0, length).flatten().numpy(), numbers.narrow(axis, distance, length).flatten().numpy()]
    )
    assert abs(np.corrcoef(pairs)[0, 1]) < 5 / math.sqrt(pairs.shape[1])
    bins = 16
    counts, _, _ = np.histogram2d(pairs[0], pairs[1], bins, [[0, 1], [0, 1]])
    expected = pairs.shape[1] / bins**2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (bins**2 - 1)) < 5 * math.sqrt(2 * (bins**2 - 1))


def test_one_bit_of_any_input_changes_half_of_the_bits() -> None:
    def bits(seed: int, position: int, token: int) -> int:
        number = uniform(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token]))
        return int(number.item() * 2**53)

    for argument in range(3):
        for bit in range(17):
            changed = 0
            for start in range(40):
                inputs = [start, 3 * start, 5 * start]
                flipped = list(inputs)
                flipped[argument] ^= 1 << bit
                changed += (bits(*inputs) ^ bits(*flipped)).bit_count()
            assert abs(changed / 40 - 26) < 5 * math.sqrt(52 / 4 / 40)


def test_gumbel_noise_has_the_moments_of_its_distribution() -> None:
    noise = gumbel(torch.arange(256), torch.zeros(256, dtype=torch.int64), torch.arange(VOCAB))
    assert noise.isfinite().all()
    assert noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0.577216, abs=5 * math.sqrt(math.pi**2 / 6 / noise.numel()))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)


def test_noise_does_not_depend_on_batch_order_or_subset() -> None:
    seeds, positions, ids = torch.tensor([3, 2**62, 3, 9]), torch.tensor([0, 5, 6, 1000]), torch.arange(777)
    whole = gumbel(seeds, positions, ids)
    for row in range(4):
        assert torch.equal(gumbel(seeds[row : row + 1], positions[row : row + 1], ids)[0], whole[row])
    shuffled = torch.randperm(777, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(gumbel(seeds, positions, shuffled), whole[:, shuffled])
    per_row = torch.stack([shuffled.roll(row) for row in range(4)])
    assert torch.equal(gumbel(seeds, positions, per_row), whole.gather(1, per_row))
    assert torch.equal(gumbel(seeds.flip(0), positions.flip(0), ids).flip(0), whole)


def test_inputs_are_left_as_they_were() -> None:
    seeds, positions, ids = torch.tensor([3]), torch.tensor([4]), torch.arange(5)
    gumbel(seeds, positions, ids)
    assert (seeds.tolist(), positions.tolist(), ids.tolist()) == ([3], [4], [0, 1, 2, 3, 4])


@pytest.mark.gpu
def test_devices_agree() -> None:
    seeds, positions, ids = torch.arange(8) * 2**59, torch.arange(8), torch.arange(VOCAB)
    there = [each.cuda() for each in (seeds, positions, ids)]
    assert torch.equal(uniform(*there).cpu(), uniform(seeds, positions, ids))
    torch.testing.assert_close(gumbel(*there).cpu(), gumbel(seeds, positions, ids), rtol=1e-13, atol=1e-13)
