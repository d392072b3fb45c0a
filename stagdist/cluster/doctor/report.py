"""The examination as text: one table of the hosts, one of the links, and what to do."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagdist.cluster.doctor.facts import PROBLEM, Finding, HostFacts, Links, Survey
from stagdist.cluster.doctor.findings import slow_boundaries, slow_reductions, values

COLUMNS = 4
"""With more hosts, the table names what most have and who differs."""

MARKER = "!"


@dataclass(frozen=True)
class TableRow:
    """One line of the table of hosts."""

    name: str  # findings refer to it
    cells: dict[str, str]  # text by host
    numbers: dict[str, float] | None = None  # by host, where they are measured and so never equal


def rows(survey: Survey) -> list[TableRow]:
    """All lines of the table of hosts."""
    facts = survey.facts
    found = [TableRow("answers", dict.fromkeys(facts, "yes") | dict.fromkeys(survey.silent, "NO"))]
    offsets = {host: clock.offset_s for host, clock in survey.clocks.items()}
    errors = {host: clock.error_s for host, clock in survey.clocks.items()}
    found.append(
        TableRow("clock", {host: f"{offsets[host]:+.3f} s (+-{errors[host]:.3f})" for host in offsets}, offsets)
    )
    found += [
        TableRow(name, {host: cell or "none" for host, cell in by_host.items()})
        for name, by_host in values(survey).items()
    ]

    def measured(name: str, number: Callable[[HostFacts], float], text: Callable[[HostFacts], str]) -> None:
        cells, numbers = ({host: function(fact) for host, fact in facts.items()} for function in (text, number))
        found.append(TableRow(name, cells, numbers))  # type: ignore[arg-type]

    if any(fact.devices for fact in facts.values()):
        free: Callable[[HostFacts], float] = lambda fact: min((one.free_mib for one in fact.devices), default=0)  # noqa: E731
        measured("device memory", free, lambda fact: f"{free(fact) / 1024:.1f} GiB free at least")
    measured("memory", lambda fact: fact.memory_mib[1], lambda fact: _part(fact.memory_mib))
    measured("/dev/shm", lambda fact: fact.shm_mib[1], lambda fact: _part(fact.shm_mib))
    measured("open files", lambda fact: fact.open_files[0], lambda fact: str(fact.open_files[0]))
    found += _network_rows(survey) + _storage_rows(survey)
    return [row for row in found if row.cells and set(row.cells.values()) != {"none"}]


def _part(sizes: tuple[int, int]) -> str:
    return f"{sizes[1] / 1024:.1f} of {sizes[0] / 1024:.1f} GiB free"


def _network_rows(survey: Survey) -> list[TableRow]:
    if len(survey.hosts) < 2:
        return []
    known = {
        host: f"{sum(address is not None for address in fact.addresses.values())} of {len(survey.hosts)} known"
        for host, fact in survey.facts.items()
    }
    own = {host: f"{fact.own_address or 'unknown'}" for host, fact in survey.facts.items()}
    used = {host: survey.interface or fact.own_interface or "unknown" for host, fact in survey.facts.items()}
    ways = {host: fact.route or "none" for host, fact in survey.facts.items()}
    return [
        TableRow("names", known),
        TableRow("own name is", own, dict.fromkeys(own, 0.0)),
        TableRow("way to others", ways),
        TableRow("interface", used),
    ]


def _storage_rows(survey: Survey) -> list[TableRow]:
    kept = {host: fact.storage for host, fact in survey.facts.items() if fact.storage}
    well = {host: storage for host, storage in kept.items() if not storage.problem}
    free = {host: _part((storage.total_mib, storage.free_mib)) for host, storage in well.items()}
    free |= {host: "cannot be written" for host, storage in kept.items() if storage.problem}
    speeds = {host: f"{storage.write_mb_s:.0f} MB/s" for host, storage in well.items()}
    shared = {host: "yes" if all(writers.values()) else "NO" for host, writers in survey.seen.items()}
    return [
        TableRow("file system", {host: storage.kind for host, storage in well.items()}),
        TableRow("disk", free, {host: kept[host].free_mib for host in free}),
        TableRow("write speed", speeds, {host: storage.write_mb_s for host, storage in well.items()}),
        TableRow("shared", shared if len(survey.hosts) > 1 else {}),
    ]


def host_table(survey: Survey, found: Sequence[Finding]) -> str:
    """Hosts as columns; with many, what most have and who differs."""
    marked = {(finding.row, host) for finding in found for host in finding.hosts}
    if len(survey.hosts) > COLUMNS:
        lines = [[row.name, _mark(any((row.name, host) in marked for host in row.cells)) + _summary(row)]
                 for row in rows(survey)]  # fmt: skip
        return _aligned([["", f"{len(survey.hosts)} hosts"], *lines])
    lines = [["", *survey.hosts]]
    for row in rows(survey):
        cells = [_mark((row.name, host) in marked) + row.cells.get(host, "-") for host in survey.hosts]
        lines.append([row.name, *cells])
    return _aligned(lines)


def _mark(wrong: bool) -> str:
    return f"{MARKER} " if wrong else "  "


def _summary(row: TableRow) -> str:
    distinct = list(dict.fromkeys(row.cells.values()))
    if len(distinct) == 1:
        return distinct[0]
    if row.numbers:
        low, high = (choose(row.cells, key=lambda host: row.numbers[host]) for choose in (min, max))  # type: ignore[index]
        return f"{row.cells[low]} ({low}) .. {row.cells[high]} ({high})"
    usual = statistics.mode(row.cells.values())
    odd = [f"{cell} ({host})" for host, cell in row.cells.items() if cell != usual]
    return f"{usual}, but {', '.join(odd[:4])}{f' and {len(odd) - 4} more' if len(odd) > 4 else ''}"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def link_table(links: Links) -> str:
    """Every stage boundary by its slowest pair of ranks, and every axis by its slowest group."""
    lines = [["  link", "ranks", "latency", "bandwidth", ""]]
    slow, slow_groups = slow_boundaries(links), slow_reductions(links)
    for stage in range(links.grid[0] - 1):
        pairs = [one for one in links.boundaries if one.stage == stage]
        worst = min(pairs, key=lambda one: min(one.forward_bytes_s, one.backward_bytes_s))
        lines.append([
            _mark(any(one in slow for one in pairs)) + f"stage {stage} -> {stage + 1}",
            " -> ".join(f"{rank} ({links.hosts[rank]})" for rank in worst.ranks),
            f"{max(one.latency_s for one in pairs) * 1e3:.2f} ms",
            f"{worst.forward_bytes_s / 1e6:.0f} MB/s forward, {worst.backward_bytes_s / 1e6:.0f} backward",
            _of(len(pairs), "pairs"),
        ])  # fmt: skip
    for axis in ("tensor", "data", "all"):
        groups = [one for one in links.reductions if one.axis == axis]
        if groups:
            slowest = min(groups, key=lambda one: one.bytes_s)
            lines.append([
                _mark(any(one in slow_groups or not one.correct for one in groups)) + f"all-reduce, {axis}",
                _ranks(slowest.ranks),
                f"{max(one.latency_s for one in groups) * 1e3:.2f} ms",
                f"{slowest.bytes_s / 1e6:.0f} MB/s",
                _of(len(groups), "groups"),
            ])  # fmt: skip
    return _aligned(lines)


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 6 else f"{ranks[0]}, {ranks[1]} .. {ranks[-1]} ({len(ranks)})"


def _of(count: int, what: str) -> str:
    return f"slowest of {count} {what}" if count > 1 else ""


def report(survey: Survey, found: Sequence[Finding]) -> str:
    """Everything, ending in the verdict."""
    parts = [host_table(survey, found)]
    if survey.links:
        pipe, data, tensor = survey.links.grid
        title = f"Links over {survey.links.backend}, pipe {pipe} x data {data} x tensor {tensor}:"
        parts.append(f"{title}\n{link_table(survey.links)}")
    if found:
        parts.append("".join(f"{finding}\n" for finding in found))
    problems = sum(finding.level == PROBLEM for finding in found)
    count = "1 problem" if problems == 1 else f"{problems} problems"
    parts.append(f"verdict: {f'{count} to fix before a long run' if problems else 'fine'}\n")
    return "\n".join(parts)
