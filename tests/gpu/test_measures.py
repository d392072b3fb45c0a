"""How the checks of decoding on a GPU read what they see, and the cases that they compare, on the CPU."""

import pytest

from tests.gpu.checks.host import calls_per_token, out_of_order
from tests.gpu.checks.products import PRODUCTS, ROWS, tiles_around
from tests.gpu.decode_cases import (
    MODES,
    WAYS,
    cpu_tokens,
    decode,
    errors,
    small_case,
    tokens,
    tokens_without_waiting,
)


def test_calls_are_counted_from_one_launch_to_the_next() -> None:
    step = ["cudaGraphLaunch", "cudaMemcpyAsync", "cudaEventRecord", "cudaEventSynchronize"]
    names = ["cudaMemcpy", *step, "cudaStreamSynchronize", *step, *step, *step, "cudaDeviceSynchronize"]
    assert calls_per_token(names, skipped=1) == dict.fromkeys(step, 1.0)
    assert calls_per_token(names, skipped=0)["cudaStreamSynchronize"] == pytest.approx(1 / 3)
    with pytest.raises(AssertionError, match="4 launches of a graph were seen, 3 of them not counted"):
        calls_per_token(names, skipped=3)


def test_a_wait_before_the_next_launch_is_found() -> None:
    ahead = [("launch", 0), ("launch", 1), ("wait", 0), ("launch", 2), ("wait", 1), ("wait", 2)]
    assert out_of_order(ahead) == []
    late = [("launch", 0), ("wait", 0), ("launch", 1), ("wait", 1)]
    assert out_of_order(late) == ["the host waited for token 0 before it launched step 1"]
    assert out_of_order(ahead[:-1]) == ["no wait for token 2 was seen"]


def test_tiles_around_the_chosen_one_fit_a_program() -> None:
    for product in PRODUCTS.values():
        for rows in ROWS:
            first, *others = tiles_around(product, rows)
            assert first == product.tile(rows) and len(others) >= 4 and first not in others
            for tile in others:
                loads = product.width // 8
                assert tile.block_n * tile.lanes >= 32 * tile.num_warps
                assert loads % tile.lanes == 0 and loads // tile.lanes % tile.unroll == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_cases_of_the_gpu_run_on_a_cpu(way: str) -> None:
    case = small_case("shared", way)
    assert tokens(case, "cpu") == decode(case, "cpu").tokens == cpu_tokens("shared")
    assert errors(case, "cpu").max_abs < 1e-4
    by_mode = tokens_without_waiting(case, "cpu", steps=2)
    assert by_mode.keys() == MODES.keys()
    assert by_mode["greedy"] == by_mode["other"] != by_mode["sampled"]
