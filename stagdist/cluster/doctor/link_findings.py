"""What is wrong with the links between ranks: pure."""

import statistics
from collections.abc import Iterator, Sequence

from stagdist.cluster.doctor.facts import NOTE, PROBLEM, Boundary, Finding, Links, Reduction, Survey

SLOWER = 3.0
"""How many times slower than the usual one a link may be."""

LATENCY_FLOOR_S = 2e-4
"""Differences below this are noise."""

LATENCY_S = 2e-3
BYTES_S = 100e6
"""What a link should reach in any case: gigabit Ethernet does."""

LOOK = "compare cable, switch port and `ethtool` with the others, and look for other jobs on it"


def slow_boundaries(links: Links) -> list[Boundary]:
    """Boundaries that are much slower than the usual one."""
    if len(links.boundaries) < 2:
        return []
    latency_s = statistics.median(one.latency_s for one in links.boundaries)
    speeds = [speed for one in links.boundaries for speed in (one.forward_bytes_s, one.backward_bytes_s)]
    bytes_s = statistics.median(speeds)
    return [
        one
        for one in links.boundaries
        if one.latency_s > max(SLOWER * latency_s, latency_s + LATENCY_FLOOR_S)
        or min(one.forward_bytes_s, one.backward_bytes_s) < bytes_s / SLOWER
    ]


def slow_reductions(links: Links) -> list[Reduction]:
    """Groups that are much slower than the usual one of their axis."""
    found = []
    for axis in sorted({one.axis for one in links.reductions}):
        group = [one for one in links.reductions if one.axis == axis]
        latency_s, bytes_s = (
            statistics.median(figures) for figures in ([one.latency_s for one in group], [one.bytes_s for one in group])
        )
        found += [
            one
            for one in group
            if one.latency_s > max(SLOWER * latency_s, latency_s + LATENCY_FLOOR_S) or one.bytes_s < bytes_s / SLOWER
        ]
    return found


def place(links: Links, ranks: Sequence[int]) -> str:
    """Ranks with their hosts."""
    return ", ".join(f"rank {rank} ({links.hosts[rank]})" for rank in ranks[:4]) + (" ..." if len(ranks) > 4 else "")


def link_findings(survey: Survey) -> Iterator[Finding]:
    """Everything that is wrong with the links, or that they were not measured."""
    if survey.links is None:
        if survey.links_problem:
            what = f"links were not measured: {survey.links_problem}"
            yield Finding(PROBLEM, "links", (), what, "mend the other problems first, then run the doctor again")
        return
    links = survey.links
    yield from _devices(survey, links)
    for boundary in slow_boundaries(links):
        what = f"the boundary between {place(links, boundary.ranks)} is slower than the others: {figures(boundary)}"
        yield Finding(PROBLEM, "links", (), what, LOOK)
    for group in slow_reductions(links):
        what = f"all-reduce ({group.axis}) of {place(links, group.ranks)} is slower than the others"
        yield Finding(PROBLEM, "links", (), what, LOOK)
    for group in links.reductions:
        if not group.correct:
            what = f"all-reduce ({group.axis}) of {place(links, group.ranks)} gave a wrong sum"
            yield Finding(
                PROBLEM, "links", (), what, "do not train on these hosts: memory, device or network corrupts data"
            )
    yield from _all_slow(links)


def figures(one: Boundary) -> str:
    """Latency and bandwidths in words."""
    speeds = f"{one.forward_bytes_s / 1e6:.0f} MB/s forward, {one.backward_bytes_s / 1e6:.0f} backward"
    return f"{one.latency_s * 1e3:.2f} ms, {speeds}"


def _devices(survey: Survey, links: Links) -> Iterator[Finding]:
    have = any(fact.devices for fact in survey.facts.values())
    if have and "cpu" in links.devices:
        what = "nvidia-smi shows devices, but torch sees none"
        yield Finding(PROBLEM, "devices", (), what, "install the torch build that fits the driver")


def _all_slow(links: Links) -> Iterator[Finding]:
    known = slow_boundaries(links)
    slow = [
        one
        for one in links.boundaries
        if one not in known and (one.latency_s > LATENCY_S or min(one.forward_bytes_s, one.backward_bytes_s) < BYTES_S)
    ]
    if slow:
        what = f"{len(slow)} stage boundaries are slower than gigabit Ethernet, for example {figures(slow[0])}"
        remedy = "see that the fast network is used: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        yield Finding(NOTE, "links", (), what, remedy)
