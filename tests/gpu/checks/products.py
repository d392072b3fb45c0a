"""How fast Triton's products are with several tiles, against torch's, and attention with several numbers of splits."""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stagdist.decode.kernels.products import (
    LOAD_BYTES,
    WARP,
    Tile,
    add_linear,
    choose_tile,
    norm_linear,
    norm_swiglu,
)
from stagdist.decode.kernels.split_attention import Partials, attend, num_splits
from tests.gpu.checks.setting import Numbers, Setting
from tests.gpu.checks.timing import device_ms, wait

EPS = 1e-6
DTYPE = torch.bfloat16
HEADS, WIDTH = 12, 128
WARPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Product:
    """A product of a layer with its weight [columns, width], or two of them if `gated`; else it adds or normalizes."""

    columns: int
    width: int
    gated: bool = False
    adds: bool = False

    def tile(self, rows: int) -> Tile:
        """The tile of `choose_tile`."""
        return choose_tile(rows, self.columns, self.width, DTYPE.itemsize, gated=self.gated)

    def weights(self, device: str, num_bytes: int) -> list[Tensor]:
        """Random weights of so many bytes together, at least one."""
        rows = self.columns * (1 + self.gated)
        count = max(1, num_bytes // (rows * self.width * DTYPE.itemsize))
        return list(torch.randn(count, rows, self.width, dtype=DTYPE, device=device).unbind())

    def caller(self, rows: int, device: str, tile: Tile | None) -> Callable[[Tensor], object]:
        """A function of the weight that multiplies as a layer does; with torch if there is no tile."""
        x, residual, gain = (
            torch.ones(*size, dtype=DTYPE, device=device)
            for size in ((rows, self.width), (rows, self.columns), (self.width,))
        )
        if tile is None:
            return partial(F.linear, x)
        if self.gated:
            return lambda weight: norm_swiglu(x, gain, EPS, weight, tile=tile)
        if self.adds:
            return lambda weight: add_linear(residual, x, weight, residual, tile=tile)
        return lambda weight: norm_linear(x, gain, EPS, weight, tile=tile)


PRODUCTS = {
    "qkv": Product(4608, 1536),
    "o": Product(1536, 1536, adds=True),
    "gate_up": Product(12288, 1536, gated=True),
    "down": Product(1536, 12288, adds=True),
    "head": Product(256000, 1536),
}
"""Of the paper's models."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        moved_bytes: weights, or caches, that are read in turn: on a GPU many times what its cache holds.
        processes: compile kernels before they are measured.
        tiles: for each product, at most.
    """

    products: dict[str, Product]
    rows: tuple[int, ...]
    entries: tuple[int, ...]
    splits: tuple[int, ...]
    heads: int
    moved_bytes: int
    processes: int
    tiles: int
    repeats: int


ROWS = (1, 2, 4, 8)
FULL = Sizes(PRODUCTS, ROWS, (512, 4096, 32768), (1, 4, 8, 16, 22, 44, 64), HEADS, 1 << 30, 12, 10, 5)
TINY = Sizes({"gate_up": Product(16, 16, gated=True)}, (1,), (70,), (2,), 1, 1, 1, 2, 1)


@dataclass(frozen=True)
class Job:
    """A kernel to compile and to measure."""

    name: str
    rows: int
    tile: Tile


def products(setting: Setting) -> Numbers:
    """GB/s of each product by rows and tile, and microseconds of attention by entries and splits.

    The check fails only if a tile of `choose_tile` does not run.
    """
    sizes = FULL if setting.on_gpu else TINY
    jobs = [
        Job(name, rows, tile)
        for name, product in sizes.products.items()
        for rows in sizes.rows
        for tile in tiles_around(product, rows)[: sizes.tiles]
    ]
    context = multiprocessing.get_context("fork")  # CUDA has not started in this process
    with context.Pool(sizes.processes) as pool:
        failures = pool.map(partial(_compile, setting.device, sizes), jobs, chunksize=1)
    failed = {job: failure for job, failure in zip(jobs, failures, strict=True) if failure is not None}
    numbers: Numbers = {"failed": {str(job): failure for job, failure in failed.items()}}
    for name, product in sizes.products.items():
        weights = product.weights(setting.device, sizes.moved_bytes)
        numbers[name] = {}
        for rows in sizes.rows:
            tiles = [job.tile for job in jobs if (job.name, job.rows) == (name, rows) and job not in failed]
            numbers[name][str(rows)] = _by_tile(setting, sizes, product, rows, tiles, weights)
            setting.keep(numbers)
        del weights
    for entries in sizes.entries:
        numbers[f"attention over {entries} entries, us"] = _attention(setting, sizes, entries)
        setting.keep(numbers)
    chosen = {job: failure for job, failure in failed.items() if job.tile == sizes.products[job.name].tile(job.rows)}
    assert not chosen, f"kernels that do not run: {chosen}"
    return numbers


def tiles_around(product: Product, rows: int) -> list[Tile]:
    """The tile of `choose_tile`, first, and others: fewer and more rows of the weight, warps, and loads ahead."""
    base = product.tile(rows)
    loads = product.width * DTYPE.itemsize // LOAD_BYTES
    found = [base, replace(base, block_n=2 * base.block_n), replace(base, block_n=base.block_n // 2)]
    for warps in WARPS:
        lanes = min(WARP * warps, loads & -loads)
        block_n = base.block_n * base.lanes * warps // (base.num_warps * lanes)
        found.append(Tile(block_n, lanes, warps, _divisor(loads // lanes, 4)))
    trips = max(1, loads // base.lanes)
    found += [replace(base, unroll=_divisor(trips, most)) for most in (1, 2, 8)]
    fitting = [tile for tile in found if tile.block_n * tile.lanes >= WARP * tile.num_warps]
    return list(dict.fromkeys([base, *fitting]))


def _divisor(number: int, most: int) -> int:
    return next(factor for factor in range(most, 0, -1) if number % factor == 0)


def _compile(device: str, sizes: Sizes, job: Job) -> str | None:
    """Run a kernel once, which leaves it in Triton's cache on the disk; the error, if it does not run."""
    product = sizes.products[job.name]
    (weight,) = product.weights(device, 1)
    try:
        product.caller(job.rows, device, job.tile)(weight)
        wait(device)
    except Exception as error:  # of a compiler; the other tiles are measured
        return f"{type(error).__name__}: {error}"[:300]
    return None


def _by_tile(
    setting: Setting, sizes: Sizes, product: Product, rows: int, tiles: list[Tile], weights: list[Tensor]
) -> Numbers:
    """GB/s of each tile, of the best one, of that of `choose_tile`, and of torch."""

    def gb_s(tile: Tile | None) -> float:
        call = product.caller(rows, setting.device, tile)
        return weights[0].nbytes / _us(setting, sizes, [partial(call, weight) for weight in weights]) / 1e3

    measured = {tile: gb_s(tile) for tile in tiles}
    numbers: Numbers = {"torch_gb_s": gb_s(None)}
    if product.tile(rows) in measured:
        numbers["chosen_gb_s"] = measured[product.tile(rows)]
    if measured:
        best = max(measured, key=lambda tile: measured[tile])
        numbers["best"] = asdict(best) | {"gb_s": measured[best]}
    return numbers | {"tiles": [asdict(tile) | {"gb_s": speed} for tile, speed in measured.items()]}


def _attention(setting: Setting, sizes: Sizes, entries: int) -> Numbers:
    """Of one row whose cache is full; it stores its key and value, and turns its query."""
    device, heads = setting.device, sizes.heads
    cache_bytes = 2 * heads * (entries + 1) * WIDTH * DTYPE.itemsize
    count = max(1, sizes.moved_bytes // 4 // cache_bytes)
    caches = torch.randn(count, 2, 1, heads, entries + 1, WIDTH, dtype=DTYPE, device=device)
    states = torch.randn(1, 3 * heads * WIDTH, dtype=DTYPE, device=device)
    angles = (torch.ones(entries, WIDTH, dtype=DTYPE, device=device),) * 2
    positions = torch.full((1,), entries - 1, dtype=torch.int64, device=device)
    numbers: Numbers = {"chosen": num_splits(1, heads, entries)}
    for splits in dict.fromkeys((num_splits(1, heads, entries), *sizes.splits)):
        partials = Partials.allocate(heads * splits, heads, WIDTH, DTYPE, device)
        call = partial(attend, states, positions, angles, heads=heads, partials=partials, stores=True, splits=splits)
        numbers[f"{splits} splits"] = _us(setting, sizes, [partial(call, cache=cache) for cache in caches])
    query = states[:, : heads * WIDTH].view(1, heads, 1, WIDTH)
    attention: Any = F.scaled_dot_product_attention
    calls = [partial(attention, query, cache[0, :, :, :entries], cache[1, :, :, :entries]) for cache in caches]
    return numbers | {"torch": _us(setting, sizes, calls)}


def _us(setting: Setting, sizes: Sizes, calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call, all of them one right after the other; on a GPU as a graph."""

    def run() -> None:
        for call in calls:
            call()

    work: Callable[[], object] = run
    if setting.on_gpu:  # launches one by one take longer than small products
        run()
        wait(setting.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        work = graph.replay
    return 1e3 * device_ms(setting.device, work, repeats=sizes.repeats) / len(calls)
