"""Rules that turn facts about hosts and links into findings. Pure: no clock, no network, no file."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator

from stagdist.cluster.doctor.facts import NOTE, PROBLEM, Finding, HostFacts, Link, LinkReport, Survey
from stagdist.cluster.doctor.host_probe import PACKAGES

CLOCK_S = 1.0
"""Seconds that clocks may differ before logs and file times mislead."""

SHM_MIB = 1024
"""NCCL and data loaders need at least that much of /dev/shm on a host with devices; containers often have 64 MiB."""

FREE_SHM_MIB = 64
FREE_DISK_MIB = 10 * 1024
SLOW_DISK_MB_S = 30.0
FAST_DISK_MB_S = 200.0
"""A disk of this speed is not reported as slow."""

SLOWER = 3.0
"""How many times slower than the others a disk or link may be."""

LATENCY_FLOOR_S = 2e-4
"""Differences below this are noise."""

LATENCY_S = 2e-3
BYTES_S = 100e6
"""What a link should reach in any case: gigabit Ethernet does."""

Fault = tuple[str, str, str, str]
"""Level, row of the table, what is wrong, and the remedy: a finding without its hosts."""


def findings(survey: Survey) -> list[Finding]:
    """Everything that is wrong, problems first."""
    rules = (_silent, _on_hosts, _clones, _versions, _names, _disk_speeds, _links)
    found = [finding for rule in rules for finding in rule(survey)]
    return sorted([*found, *survey.environment], key=lambda finding: finding.level != PROBLEM)


def _silent(survey: Survey) -> Iterator[Finding]:
    for host, reason in survey.silent.items():
        what, _, remedy = reason.partition("; ")
        yield Finding(PROBLEM, "answers", (host,), what, remedy)


# --- one host ---------------------------------------------------------------------------------------------------------


def _on_hosts(survey: Survey) -> Iterator[Finding]:
    """Faults of single hosts; the same fault of several hosts is one finding."""
    hosts: dict[Fault, list[str]] = defaultdict(list)
    for host, fact in survey.facts.items():
        for rule in (_resources, _devices, _clock, _interface, _storage):
            for fault in rule(survey, host, fact):
                hosts[fault].append(host)
    for (level, row, what, remedy), where in hosts.items():
        yield Finding(level, row, tuple(where), what, remedy)


def _resources(survey: Survey, host: str, fact: HostFacts) -> Iterator[Fault]:
    if not fact.folder:
        what = "the folder from which you start does not exist there, and ranks start in it"
        yield PROBLEM, "answers", what, "start from one that all hosts have"
    if fact.memory_mib[1] < 0.1 * fact.memory_mib[0]:
        yield NOTE, "memory", "less than a tenth of the memory is available", "end what holds it"
    if fact.devices and fact.shm_mib[0] < SHM_MIB:
        what = f"/dev/shm is smaller than {SHM_MIB} MiB"
        yield PROBLEM, "/dev/shm", what, "start containers with --shm-size=16g or --ipc=host"
    elif fact.shm_mib[1] < FREE_SHM_MIB:
        what = f"less than {FREE_SHM_MIB} MiB of /dev/shm are free"
        yield PROBLEM, "/dev/shm", what, "remove what ended jobs left in it"
    wanted = 512 + 8 * sum(survey.slots.values())  # every group keeps a connection to each of its ranks
    if fact.open_files[0] < wanted:
        what = f"a process may open fewer than {wanted} files, connections included"
        yield PROBLEM, "open files", what, "raise nofile in /etc/security/limits.conf"


def _devices(survey: Survey, host: str, fact: HostFacts) -> Iterator[Fault]:
    driver = fact.versions.get("driver") or ""
    if driver.startswith("failed"):
        yield PROBLEM, "driver", f"nvidia-smi: {driver}", "repair the driver, or reboot"
    if fact.devices and survey.slots[host] > len(fact.devices):
        what = f"{survey.slots[host]} slots, but {len(fact.devices)} devices"
        yield PROBLEM, "devices", what, "correct slots= in the hostfile"
    busy = [str(index) for index, device in enumerate(fact.devices) if device.free_mib < 0.9 * device.total_mib]
    if busy:
        what = f"something holds memory of device {', '.join(busy)}"
        yield NOTE, "device memory", what, "look for it with nvidia-smi"


def _clock(survey: Survey, host: str, fact: HostFacts) -> Iterator[Fault]:
    ahead_s = fact.clock_offset_s
    if abs(ahead_s) - fact.clock_error_s > CLOCK_S:
        what = f"its clock is {abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}"
        yield PROBLEM, "clock", what, "synchronize it with chrony or ntpd: log files and file times mislead"


def _interface(survey: Survey, host: str, fact: HostFacts) -> Iterator[Fault]:
    """What gloo would listen on, which goes by the host's own name unless GLOO_SOCKET_IFNAME is set."""
    named, own, route = survey.interface, fact.own_interface, fact.route
    lost = own in (None, "lo")
    if len(survey.hosts) < 2:
        return
    if named and named not in fact.interfaces:
        what = f"has no interface {named}, which GLOO_SOCKET_IFNAME names"
        yield PROBLEM, "interface", what, "name one that all hosts have"
    elif named and lost:
        what = f"its own name is no address that others reach, but GLOO_SOCKET_IFNAME is {named}"
        yield NOTE, "interface", what, "nothing more to do"
    elif named:
        return
    elif lost:
        what = (
            f"its own name ({fact.hostname}) resolves to {fact.own_address or 'nothing'}, where others cannot reach it"
        )
        remedy = f"set GLOO_SOCKET_IFNAME={route} and NCCL_SOCKET_IFNAME={route}: --write-env does"
        if route is None or any(other.route != route for other in survey.facts.values()):
            remedy = "correct /etc/hosts there: interfaces differ in name, so GLOO_SOCKET_IFNAME cannot serve all hosts"
        yield PROBLEM, "interface", what, remedy
    elif route and route != own:
        what = f"gloo will use {own}, but the way to the others is {route}"
        yield NOTE, "interface", what, "choose one with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"


def _storage(survey: Survey, host: str, fact: HostFacts) -> Iterator[Fault]:
    storage = fact.storage
    if storage.problem:
        what = f"cannot write to {storage.path}: {storage.problem}"
        yield PROBLEM, "disk", what, "mount it, free space, or choose another folder"
        return
    if storage.space_mib[1] < FREE_DISK_MIB:
        what = f"less than {FREE_DISK_MIB // 1024} GiB are free for checkpoints"
        yield NOTE, "disk", what, "free some, or keep fewer: checkpoint.keep"
    if not storage.shared:
        what = f"does not see what the doctor wrote to {storage.path}: the folder is not shared with this machine"
        yield PROBLEM, "shared", what, "mount one file system there on all hosts: no checkpoint would be complete"


# --- hosts compared ---------------------------------------------------------------------------------------------------


def _clones(survey: Survey) -> Iterator[Finding]:
    for name, count in Counter(fact.hostname for fact in survey.facts.values()).items():
        if count > 1:
            same = tuple(host for host, fact in survey.facts.items() if fact.hostname == name)
            what = f"all call themselves {name}: one machine listed twice, or clones"
            yield Finding(NOTE, "answers", same, what, "give each a unique name; mpirun identifies hosts by it")


def equal_rows(survey: Survey) -> dict[str, dict[str, str | None]]:
    """What should be the same on all hosts: row of the table -> host -> value."""
    names = next((fact.versions for fact in survey.facts.values()), {})
    rows = {name: {host: fact.versions.get(name) for host, fact in survey.facts.items()} for name in names}
    return {**rows, "devices": {host: _device_text(fact) for host, fact in survey.facts.items()}}


def _device_text(fact: HostFacts) -> str:
    counts = Counter(f"{device.name} {round(device.total_mib / 1024)} GiB" for device in fact.devices)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or f"none ({fact.cores} cores)"


def _versions(survey: Survey) -> Iterator[Finding]:
    remedies = {
        "code": "bring all hosts to the same commit of stagdist",
        "driver": "install the same driver",
        "devices": "the slowest device sets the pace; write them into separate hostfiles, or correct the hostfile",
    }
    for row, by_host in equal_rows(survey).items():
        missing = tuple(host for host, value in by_host.items() if value is None and row in PACKAGES)
        if missing:
            yield Finding(PROBLEM, row, missing, f"{row} is not installed", "pip install -c constraints.txt -e .")
        usual = statistics.mode(by_host.values()) if by_host else None
        odd = {host: value for host, value in by_host.items() if value != usual and host not in missing}
        if odd:
            what = f"{row} is {next(iter(odd.values())) or 'missing'}, and {usual or 'missing'} on the others"
            yield Finding(PROBLEM, row, tuple(odd), what, remedies.get(row, "install the same version"))


def _names(survey: Survey) -> Iterator[Finding]:
    for name in survey.hosts:
        resolved = {host: fact.addresses.get(name) for host, fact in survey.facts.items()}
        if unknown := tuple(host for host, address in resolved.items() if address is None):
            yield Finding(PROBLEM, "names", unknown, f"cannot resolve the name {name}", "enter it in DNS or /etc/hosts")
        others = {host: address for host, address in resolved.items() if host != name and address}
        if astray := tuple(host for host, address in others.items() if address.startswith("127.")):
            yield Finding(PROBLEM, "names", astray, f"takes {name} for itself", f"correct {name} in /etc/hosts")
        seen = {address for host, address in others.items() if host not in astray}
        if len(seen) > 1:
            what = f"{name} is {' and '.join(sorted(seen))}, depending on the host"
            yield Finding(PROBLEM, "names", (), what, "make DNS or /etc/hosts agree")


def _disk_speeds(survey: Survey) -> Iterator[Finding]:
    speeds = {host: fact.storage.write_mb_s for host, fact in survey.facts.items() if not fact.storage.problem}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    limit = max(min(usual / SLOWER, FAST_DISK_MB_S), SLOW_DISK_MB_S)
    slow = {host: speed for host, speed in speeds.items() if speed < limit}
    if slow:
        what = f"writes {min(slow.values()):.0f} MB/s (usual here: {usual:.0f})"
        yield Finding(NOTE, "write speed", tuple(slow), what, "every save will wait for it")


# --- links between ranks ----------------------------------------------------------------------------------------------


def slow_links(report: LinkReport) -> list[Link]:
    """Links that are much slower than the usual one of their axis."""
    slow = []
    for axis in dict.fromkeys(link.axis for link in report.links):
        links = [link for link in report.links if link.axis == axis]
        usual_s = statistics.median(link.latency_s for link in links)
        limit_s = max(SLOWER * usual_s, usual_s + LATENCY_FLOOR_S)
        limit_bytes_s = statistics.median(link.bytes_s for link in links) / SLOWER
        slow += [link for link in links if link.latency_s > limit_s or link.bytes_s < limit_bytes_s]
    return slow


def _name(report: LinkReport, link: Link) -> str:
    ranks = ", ".join(f"rank {rank} ({report.hosts[rank]})" for rank in link.ranks[:4])
    kind = "the boundary between" if link.axis == "pipe" else f"all-reduce ({link.axis}) of"
    return f"{kind} {ranks}{' ...' if len(link.ranks) > 4 else ''}"


def _links(survey: Survey) -> Iterator[Finding]:
    report = survey.links
    if survey.links_problem:
        what = f"links were not measured: {survey.links_problem}"
        yield Finding(PROBLEM, "links", (), what, "fix the other problems first, then run the doctor again")
    if report is None:
        return
    if "cpu" in report.devices and any(fact.devices for fact in survey.facts.values()):
        what = "nvidia-smi shows devices, but torch sees none"
        yield Finding(PROBLEM, "devices", (), what, "install the torch build that fits the driver")
    slow = slow_links(report)
    for link in slow:
        what = f"{_name(report, link)} is slower than the others: {link}"
        remedy = "compare cable, switch port and `ethtool` with the others, and look for other jobs on it"
        yield Finding(PROBLEM, "links", (), what, remedy)
    for link in report.links:
        if not link.correct:
            remedy = "do not train on these hosts: memory, device or network corrupts data"
            yield Finding(PROBLEM, "links", (), f"{_name(report, link)} gave a wrong sum", remedy)
    usual = [link for link in report.links if link.axis == "pipe" and link not in slow]
    poor = [link for link in usual if link.latency_s > LATENCY_S or link.bytes_s < BYTES_S]
    if poor:
        what = f"{len(poor)} stage boundaries are slower than gigabit Ethernet, for example {poor[0]}"
        remedy = "see that the fast network is used: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        yield Finding(NOTE, "links", (), what, remedy)
