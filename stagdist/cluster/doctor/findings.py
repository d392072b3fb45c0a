"""Rules that turn facts about hosts and links into findings. Pure: no clock, no network, no file."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from stagdist.cluster.doctor.facts import NOTE, PROBLEM, Boundary, Finding, HostFacts, Links, Reduction, Survey
from stagdist.cluster.doctor.host_probe import PACKAGES

CLOCK_S = 1.0
"""Seconds that clocks may differ before logs and file times mislead."""

SHM_MIB = 1024
"""NCCL and data loaders need at least that much of /dev/shm on a host with devices; containers often have 64 MiB."""

FREE_DISK_MIB = 10 * 1024
SLOW_DISK_MB_S = 30.0
FAST_DISK_MB_S = 200.0
"""A disk of this speed is not reported as slow."""

SLOWER = 3.0
"""How many times slower than the others a disk may be."""


LATENCY_FLOOR_S = 2e-4
"""Differences below this are noise."""

LATENCY_S = 2e-3
BYTES_S = 100e6
"""What a link should reach in any case: gigabit Ethernet does."""

LOOK = "compare cable, switch port and `ethtool` with the others, and look for other jobs on it"


def findings(survey: Survey) -> list[Finding]:
    """Everything that is wrong, problems first."""
    rules = (_answers, _clocks, _versions, _devices, _resources, _names, _interfaces, _storage, _shared)
    found = [finding for rule in rules for finding in rule(survey)]
    found += [*survey.other, *link_findings(survey)]
    return sorted(found, key=lambda finding: finding.level != PROBLEM)


def _where(survey: Survey, wrong: Callable[[HostFacts], bool]) -> tuple[str, ...]:
    return tuple(host for host, fact in survey.facts.items() if wrong(fact))


def _answers(survey: Survey) -> Iterator[Finding]:
    for host, reason in survey.silent.items():
        what, _, remedy = reason.partition("; ")
        yield Finding(PROBLEM, "answers", (host,), what, remedy or f"try `ssh {host} true`")
    for name, count in Counter(fact.hostname for fact in survey.facts.values()).items():
        if count > 1:
            same = _where(survey, lambda fact, name=name: fact.hostname == name)  # type: ignore[misc]
            what = f"all call themselves {name}: one machine listed twice, or clones"
            yield Finding(NOTE, "answers", same, what, "give each a unique name; mpirun identifies hosts by it")
    gone = _where(survey, lambda fact: not fact.folder)
    if gone:
        what = "the folder from which you start does not exist there, and launchers change to it"
        yield Finding(PROBLEM, "answers", gone, what, "start from one that all hosts have")


def _clocks(survey: Survey) -> Iterator[Finding]:
    for host, clock in survey.clocks.items():
        if abs(clock.offset_s) - clock.error_s > CLOCK_S:
            what = f"its clock is {abs(clock.offset_s):.1f} s {'ahead' if clock.offset_s > 0 else 'behind'}"
            yield Finding(
                PROBLEM, "clock", (host,), what, "synchronize it with chrony or ntpd: log files and file times mislead"
            )
    unresolved = tuple(host for host in survey.facts if host not in survey.clocks)
    if unresolved:
        yield Finding(NOTE, "clock", unresolved, "the clock could not be read", "run the doctor again")


def values(survey: Survey) -> dict[str, dict[str, str | None]]:
    """What should be the same on all hosts: row of the table -> host -> value."""
    facts = survey.facts
    rows: dict[str, dict[str, str | None]] = {"python": {host: fact.python for host, fact in facts.items()}}
    for name in (*PACKAGES, "nccl"):
        rows[name] = {host: fact.packages.get(name) for host, fact in facts.items()}
    rows["code"] = {host: fact.code for host, fact in facts.items()}
    rows["driver"] = {host: fact.driver for host, fact in facts.items()}
    rows["devices"] = {host: device_text(fact) for host, fact in facts.items()}
    return rows


def device_text(fact: HostFacts) -> str:
    """Devices of a host in a few words."""
    counts = Counter(f"{device.name} {round(device.total_mib / 1024)} GiB" for device in fact.devices)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or f"none ({fact.cores} cores)"


def _versions(survey: Survey) -> Iterator[Finding]:
    remedies = {
        "code": "bring all hosts to the same commit of stagdist",
        "driver": "install the same driver",
        "devices": "the slowest device sets the pace; write them into separate hostfiles, or correct the hostfile",
    }
    for row, by_host in values(survey).items():
        if row in PACKAGES:
            missing = tuple(host for host, value in by_host.items() if value is None)
            if missing:
                yield Finding(PROBLEM, row, missing, f"{row} is not installed", "pip install -c constraints.txt -e .")
        usual = Counter(by_host.values()).most_common(1)[0][0] if by_host else None
        odd = {host: value for host, value in by_host.items() if value != usual and (value or row not in PACKAGES)}
        if odd:
            first = next(iter(odd.values()))
            what = f"{row} is {first or 'missing'}, and {usual or 'missing'} on the others"
            yield Finding(PROBLEM, row, tuple(odd), what, remedies.get(row, "install the same version"))


def _devices(survey: Survey) -> Iterator[Finding]:
    for host, fact in survey.facts.items():
        if fact.driver and fact.driver.startswith("failed"):
            yield Finding(PROBLEM, "driver", (host,), f"nvidia-smi: {fact.driver}", "repair the driver, or reboot")
        if fact.devices and survey.slots[host] > len(fact.devices):
            what = f"{survey.slots[host]} slots, but {len(fact.devices)} devices"
            yield Finding(PROBLEM, "devices", (host,), what, "correct slots= in the hostfile")
        busy = [index for index, device in enumerate(fact.devices) if device.free_mib < 0.9 * device.total_mib]
        if busy:
            what = f"something holds memory of device {', '.join(map(str, busy))}"
            yield Finding(NOTE, "device memory", (host,), what, "look for it with nvidia-smi")


def _resources(survey: Survey) -> Iterator[Finding]:
    full = _where(survey, lambda fact: fact.memory_mib[1] < 0.1 * fact.memory_mib[0])
    if full:
        yield Finding(NOTE, "memory", full, "less than a tenth of the memory is available", "end what holds it")
    small = _where(survey, lambda fact: bool(fact.devices) and fact.shm_mib[0] < SHM_MIB)
    if small:
        what = f"/dev/shm is smaller than {SHM_MIB} MiB"
        yield Finding(PROBLEM, "/dev/shm", small, what, "start containers with --shm-size=16g or --ipc=host")
    filled = tuple(host for host in _where(survey, lambda fact: fact.shm_mib[1] < 64) if host not in small)
    if filled:
        what = "less than 64 MiB of /dev/shm are free"
        yield Finding(PROBLEM, "/dev/shm", filled, what, "remove what ended jobs left in it")
    wanted = 512 + 8 * sum(survey.slots.values())  # every group keeps a connection to each of its ranks
    few = _where(survey, lambda fact: fact.open_files[0] < wanted)
    if few:
        what = f"a process may open fewer than {wanted} files, connections included"
        yield Finding(PROBLEM, "open files", few, what, "raise nofile in /etc/security/limits.conf")


def _names(survey: Survey) -> Iterator[Finding]:
    for name in survey.hosts:
        resolved = {host: fact.addresses.get(name) for host, fact in survey.facts.items()}
        unknown = tuple(host for host, address in resolved.items() if address is None)
        if unknown:
            yield Finding(PROBLEM, "names", unknown, f"cannot resolve the name {name}", "enter it in DNS or /etc/hosts")
        astray = tuple(
            host for host, address in resolved.items() if host != name and (address or "").startswith("127.")
        )
        if astray:
            yield Finding(PROBLEM, "names", astray, f"takes {name} for itself", f"correct {name} in /etc/hosts")
        seen = {address for host, address in resolved.items() if host != name and address and host not in astray}
        if len(seen) > 1:
            what = f"{name} is {' and '.join(sorted(seen))}, depending on the host"
            yield Finding(PROBLEM, "names", (), what, "make DNS or /etc/hosts agree")


def _interfaces(survey: Survey) -> Iterator[Finding]:
    if len(survey.hosts) < 2:
        return
    lost = _where(survey, lambda fact: fact.own_interface in (None, "lo"))
    if survey.interface:
        missing = _where(survey, lambda fact: survey.interface not in fact.interfaces)
        if missing:
            what = f"has no interface {survey.interface}, which GLOO_SOCKET_IFNAME names"
            yield Finding(PROBLEM, "interface", missing, what, "name one that all hosts have")
        elif lost and survey.fixed:
            what = f"its own name is no address that others reach; GLOO_SOCKET_IFNAME={survey.interface} is written"
            yield Finding(NOTE, "interface", lost, what, "nothing more to do")
        return
    for host in lost:
        own = survey.facts[host].own_address
        what = (
            f"its own name ({survey.facts[host].hostname}) resolves to {own or 'nothing'}, where others cannot reach it"
        )
        route = survey.facts[host].route
        same = {survey.facts[other].route for other in survey.facts} == {route} and route
        remedy = (
            f"set GLOO_SOCKET_IFNAME={route} and NCCL_SOCKET_IFNAME={route}: --write-env does"
            if same
            else "correct /etc/hosts there: interfaces differ in name, so GLOO_SOCKET_IFNAME cannot serve all hosts"
        )
        yield Finding(PROBLEM, "interface", (host,), what, remedy)
    for host, fact in survey.facts.items():
        if host not in lost and fact.route and fact.route != fact.own_interface:
            what = f"gloo will use {fact.own_interface}, but the way to the others is {fact.route}"
            yield Finding(NOTE, "interface", (host,), what, "choose one with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")


def _storage(survey: Survey) -> Iterator[Finding]:
    kept = {host: fact.storage for host, fact in survey.facts.items() if fact.storage}
    for host, storage in kept.items():
        if storage.problem:
            what = f"cannot write to {storage.path}: {storage.problem}"
            yield Finding(PROBLEM, "disk", (host,), what, "mount it, free space, or choose another folder")
    well = {host: storage for host, storage in kept.items() if not storage.problem}
    small = tuple(host for host, storage in well.items() if storage.free_mib < FREE_DISK_MIB)
    if small:
        what = f"less than {FREE_DISK_MIB // 1024} GiB are free for checkpoints"
        yield Finding(NOTE, "disk", small, what, "free some, or keep fewer: checkpoint.keep")
    if not well:
        return
    usual = statistics.median(storage.write_mb_s for storage in well.values())
    slow = tuple(
        host
        for host, storage in well.items()
        if storage.write_mb_s < max(min(usual / SLOWER, FAST_DISK_MB_S), SLOW_DISK_MB_S)
    )
    if slow:
        what = f"writes {min(well[host].write_mb_s for host in slow):.0f} MB/s (usual here: {usual:.0f})"
        yield Finding(NOTE, "write speed", slow, what, "every save will wait for it")


def _shared(survey: Survey) -> Iterator[Finding]:
    blind = {
        reader: [writer for writer, read in writers.items() if not read] for reader, writers in survey.seen.items()
    }
    readers = tuple(reader for reader, missed in blind.items() if missed)
    if readers:
        missed = blind[readers[0]]
        what = f"does not see what {', '.join(missed[:4])} wrote to the checkpoints: the folder is not shared"
        remedy = "mount one file system at the same place on all hosts: no checkpoint would be complete"
        yield Finding(PROBLEM, "shared", readers, what, remedy)


# --- links between ranks ----------------------------------------------------------------------------------------------


def slow_boundaries(links: Links) -> list[Boundary]:
    """Boundaries that are much slower than the usual one."""
    if len(links.boundaries) < 2:
        return []
    latency_s = statistics.median(one.latency_s for one in links.boundaries)
    speeds = [speed for one in links.boundaries for speed in (one.forward_bytes_s, one.backward_bytes_s)]
    bytes_s = statistics.median(speeds)
    return [one for one in links.boundaries if _is_slow(one.latency_s, latency_s, _lower_speed(one), bytes_s)]


def slow_reductions(links: Links) -> list[Reduction]:
    """Groups that are much slower than the usual one of their axis."""
    found = []
    for axis in sorted({one.axis for one in links.reductions}):
        group = [one for one in links.reductions if one.axis == axis]
        latency_s = statistics.median(one.latency_s for one in group)
        bytes_s = statistics.median(one.bytes_s for one in group)
        found += [one for one in group if _is_slow(one.latency_s, latency_s, one.bytes_s, bytes_s)]
    return found


def _is_slow(latency_s: float, usual_s: float, bytes_s: float, usual_bytes_s: float) -> bool:
    return latency_s > max(SLOWER * usual_s, usual_s + LATENCY_FLOOR_S) or bytes_s < usual_bytes_s / SLOWER


def _lower_speed(one: Boundary) -> float:
    return min(one.forward_bytes_s, one.backward_bytes_s)


def place(links: Links, ranks: Sequence[int]) -> str:
    """Ranks with their hosts."""
    return ", ".join(f"rank {rank} ({links.hosts[rank]})" for rank in ranks[:4]) + (" ..." if len(ranks) > 4 else "")


def link_findings(survey: Survey) -> Iterator[Finding]:
    """Everything that is wrong with the links, or that they were not measured."""
    if survey.links is None:
        if survey.links_problem:
            what = f"links were not measured: {survey.links_problem}"
            yield Finding(PROBLEM, "links", (), what, "fix the other problems first, then run the doctor again")
        return
    links = survey.links
    yield from _unused_devices(survey, links)
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


def _unused_devices(survey: Survey, links: Links) -> Iterator[Finding]:
    have = any(fact.devices for fact in survey.facts.values())
    if have and "cpu" in links.devices:
        what = "nvidia-smi shows devices, but torch sees none"
        yield Finding(PROBLEM, "devices", (), what, "install the torch build that fits the driver")


def _all_slow(links: Links) -> Iterator[Finding]:
    known = slow_boundaries(links)
    slow = [
        one
        for one in links.boundaries
        if one not in known and (one.latency_s > LATENCY_S or _lower_speed(one) < BYTES_S)
    ]
    if slow:
        what = f"{len(slow)} stage boundaries are slower than gigabit Ethernet, for example {figures(slow[0])}"
        remedy = "see that the fast network is used: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        yield Finding(NOTE, "links", (), what, remedy)
