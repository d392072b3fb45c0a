"""Which hosts the next attempt runs on after some have died. Pure."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.supervision.messages import NOT_SHARED
from stagdist.errors import ConfigError

UNKNOWN_HOST = "Could not resolve hostname"
"""What OpenSSH prints for a name without an address."""


@dataclass(frozen=True)
class HostPlacement:
    """Hosts at work and in reserve."""

    hosts: tuple[Host, ...]  # in the order of their ranks
    spares: tuple[Host, ...] = ()  # not at work; hosts that were lost come last, since they may be back
    lost: tuple[Host, ...] = ()  # at work once, and given up

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return sum(host.slots for host in self.hosts)


def useless_spares(placement: HostPlacement) -> list[Host]:
    """Spares with fewer slots than any host has."""
    fewest = min(host.slots for host in placement.hosts)
    return [spare for spare in placement.spares if spare.slots < fewest]


def with_spares(
    placement: HostPlacement, dead: Collection[str], answers: Callable[[str], bool]
) -> HostPlacement | None:
    """Put a spare in the place of every dead host; it must answer and have as many slots.

    Returns: None when there are not enough spares.
    """
    hosts, spares, lost = list(placement.hosts), list(placement.spares), list(placement.lost)
    for index, host in enumerate(hosts):
        if host.name not in dead:
            continue
        spare = next((spare for spare in spares if spare.slots >= host.slots and answers(spare.name)), None)
        if spare is None:
            return None
        spares.remove(spare)
        hosts[index] = Host(spare.name, host.slots)
        lost.append(host)
    back = [host for host in lost[len(placement.lost) :] if host not in spares]
    return HostPlacement(tuple(hosts), (*spares, *back), tuple(lost))


def with_fewer(placement: HostPlacement, dead: Collection[str], fits: Callable[[int], bool]) -> HostPlacement | None:
    """Continue on the remaining hosts with the largest number of ranks that fits, taken from the front.

    Args:
        fits: whether the run's grid exists on so many ranks.

    Returns: None when no number fits.
    """
    living = [host for host in placement.hosts if host.name not in dead]
    world = next((size for size in range(sum(host.slots for host in living), 0, -1) if fits(size)), None)
    if world is None:
        return None
    lost = tuple(host for host in placement.hosts if host.name in dead)
    return HostPlacement(_first(living, world), placement.spares, placement.lost + lost)


def _first(hosts: Sequence[Host], slots: int) -> tuple[Host, ...]:
    taken = []
    for host in hosts:
        if slots:
            taken.append(Host(host.name, min(slots, host.slots)))
            slots -= taken[-1].slots
    return tuple(taken)


def listed_hosts(dead: Mapping[str, str]) -> str:
    """Hosts with the reasons why they cannot be used."""
    return "; ".join(f"{host}: {reason}" for host, reason in sorted(dead.items()))


def refuse_unusable(dead: Mapping[str, str]) -> None:
    """Refuse hosts that waiting does not make usable: an unknown name, or a host that does not share the run's folder.

    Raises:
        ConfigError: a host has no address, as ssh reports, or does not see the run's folder.
    """
    apart = [host for host, reason in dead.items() if NOT_SHARED in reason]
    if apart:
        raise ConfigError(
            f"{', '.join(apart)}: {dead[apart[0]]}; choose a runs_directory or --folder that all hosts see"
        )
    unknown = [host for host, reason in dead.items() if UNKNOWN_HOST in reason]
    if unknown:
        raise ConfigError(
            f"no address is known for {', '.join(unknown)} ({dead[unknown[0]]}); correct the hostfile, or fix the "
            "name service"
        )
