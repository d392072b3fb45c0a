"""The examination as text: one table of the hosts, one of the links, and what to do."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagdist.cluster.doctor.facts import PROBLEM, Finding, HostFacts, Link, LinkReport, Survey
from stagdist.cluster.doctor.findings import equal_rows, slow_links
from stagdist.parallel.grid import Grid

COLUMNS = 4
"""With more hosts, the table names what most have and who differs."""

MARKER = "! "
NO_MARKER = "  "


@dataclass(frozen=True)
class TableRow:
    """One line of the table of hosts."""

    name: str  # findings refer to it
    cells: dict[str, str]  # text by host
    numbers: dict[str, float] | None = None  # by host, for what is measured and so never equal


def _rows(survey: Survey) -> list[TableRow]:
    """All lines of the table of hosts."""
    facts = survey.facts

    def row(name: str, text: Callable[[HostFacts], str], number: Callable[[HostFacts], float] | None = None) -> None:
        numbers = number and {host: number(fact) for host, fact in facts.items()}
        rows.append(TableRow(name, {host: text(fact) for host, fact in facts.items()}, numbers))

    rows = [TableRow("answers", dict.fromkeys(facts, "yes") | dict.fromkeys(survey.silent, "NO"))]
    row(
        "clock",
        lambda fact: f"{fact.clock_offset_s:+.2f} s (+-{fact.clock_error_s:.2f})",
        lambda fact: fact.clock_offset_s,
    )
    for name, by_host in equal_rows(survey).items():
        rows.append(TableRow(name, {host: value or "none" for host, value in by_host.items()}))
    if any(fact.devices for fact in facts.values()):
        row("device memory", lambda fact: f"{_free_mib(fact) / 1024:.1f} GiB free at least", _free_mib)
    row("memory", lambda fact: _part(fact.memory_mib), lambda fact: fact.memory_mib[1])
    row("/dev/shm", lambda fact: _part(fact.shm_mib), lambda fact: fact.shm_mib[1])
    row("open files", lambda fact: str(fact.open_files[0]), lambda fact: fact.open_files[0])
    if len(survey.hosts) > 1:
        row("names", lambda fact: f"{sum(map(bool, fact.addresses.values()))} of {len(fact.addresses)} known")
        row("own name is", lambda fact: fact.own_address or "unknown", lambda fact: 0.0)
        row("way to others", lambda fact: fact.route or "none")
        row("interface", lambda fact: survey.interface or fact.own_interface or "unknown")
        row("shared", lambda fact: "yes" if fact.storage.shared else "NO")
    row("file system", lambda fact: fact.storage.kind or "unknown")
    row(
        "disk",
        lambda fact: "cannot be written" if fact.storage.problem else _part(fact.storage.space_mib),
        lambda fact: fact.storage.space_mib[1],
    )
    row("write speed", lambda fact: f"{fact.storage.write_mb_s:.0f} MB/s", lambda fact: fact.storage.write_mb_s)
    return [one for one in rows if set(one.cells.values()) - {"none"}]


def _free_mib(fact: HostFacts) -> int:
    return min((device.free_mib for device in fact.devices), default=0)


def _part(sizes: tuple[int, int]) -> str:
    return f"{sizes[1] / 1024:.1f} of {sizes[0] / 1024:.1f} GiB free"


def host_table(survey: Survey, found: Sequence[Finding]) -> str:
    """Hosts as columns; with many, what most have and who differs."""
    marked = {(finding.row, host) for finding in found for host in finding.hosts}

    def mark(row: TableRow, *hosts: str) -> str:
        return MARKER if any((row.name, host) in marked for host in hosts) else NO_MARKER

    rows = _rows(survey)
    if len(survey.hosts) > COLUMNS:
        lines = [[row.name, mark(row, *row.cells) + _summary(row)] for row in rows]
        return _aligned([["", f"{len(survey.hosts)} hosts"], *lines])
    cells = [[row.name, *(mark(row, host) + row.cells.get(host, "-") for host in survey.hosts)] for row in rows]
    return _aligned([["", *survey.hosts], *cells])


def _summary(row: TableRow) -> str:
    usual = statistics.mode(row.cells.values())
    odd = [f"{cell} ({host})" for host, cell in row.cells.items() if cell != usual]
    if not odd:
        return usual
    if row.numbers:
        low, high = (choose(row.numbers, key=row.numbers.__getitem__) for choose in (min, max))
        return f"{row.cells[low]} ({low}) .. {row.cells[high]} ({high})"
    return f"{usual}, but {', '.join(odd[:4])}{f' and {len(odd) - 4} more' if len(odd) > 4 else ''}"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (map(str.ljust, line, widths) for line in lines)
    return "".join(f"{'  '.join(line).rstrip()}\n" for line in cells)


def link_table(report: LinkReport) -> str:
    """Every stage boundary by its slowest pair of ranks, and every axis by its slowest group."""
    slow, rows = slow_links(report), defaultdict(list)
    for link in report.links:
        stage = link.ranks[0] // (report.grid[1] * report.grid[2])
        rows[f"stage {stage} -> {stage + 1}" if link.axis == "pipe" else f"all-reduce, {link.axis}"].append(link)
    lines = [["  link", "ranks", "latency", "bandwidth", ""]]
    for name, links in rows.items():
        worst = min(links, key=lambda link: link.bytes_s)
        mark = MARKER if any(link in slow or not link.correct for link in links) else NO_MARKER
        latency = f"{max(link.latency_s for link in links) * 1e3:.2f} ms"
        count = f"slowest of {len(links)}" if len(links) > 1 else ""
        lines.append([mark + name, _ranks(report, worst), latency, f"{worst.bytes_s / 1e6:.0f} MB/s", count])
    return _aligned(lines)


def _ranks(report: LinkReport, link: Link) -> str:
    ranks = link.ranks
    if link.axis == "pipe":
        return " -> ".join(f"{rank} ({report.hosts[rank]})" for rank in ranks)
    return ", ".join(map(str, ranks)) if len(ranks) <= 6 else f"{ranks[0]}, {ranks[1]} .. {ranks[-1]} ({len(ranks)})"


def report(survey: Survey, found: Sequence[Finding]) -> str:
    """Everything, ending in the verdict."""
    parts = [host_table(survey, found)]
    if survey.links:
        parts.append(f"Links over {survey.links.backend}, {Grid(*survey.links.grid)}:\n{link_table(survey.links)}")
    if found:
        parts.append("".join(f"{finding}\n" for finding in found))
    problems = sum(finding.level == PROBLEM for finding in found)
    count = "1 problem" if problems == 1 else f"{problems} problems"
    parts.append(f"verdict: {f'{count} to fix before a long run' if problems else 'fine'}\n")
    return "\n".join(parts)
