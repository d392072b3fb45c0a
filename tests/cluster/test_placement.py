"""Where the next attempt runs when hosts have died."""

from stagdist.cluster.hosts.hostfile import Host
from stagdist.cluster.supervision.placement import HostPlacement, with_fewer, with_spares

HOSTS = (Host("a", 2), Host("b", 2), Host("c", 2))


def names(placement: HostPlacement | None) -> list[str] | None:
    return None if placement is None else [f"{host.name}:{host.slots}" for host in placement.hosts]


def test_a_spare_takes_the_ranks_of_the_dead_host() -> None:
    new = with_spares(HostPlacement(HOSTS, (Host("d", 4), Host("e", 2))), {"b"}, lambda name: True)
    assert names(new) == ["a:2", "d:2", "c:2"]
    assert new is not None and new.lost == (Host("b", 2),)
    assert new.spares == (Host("e", 2), Host("b", 2)), "it may be back one day"


def test_a_host_that_is_back_takes_the_place_of_its_replacement() -> None:
    one = with_spares(HostPlacement(HOSTS, (Host("d", 2),)), {"b"}, lambda name: True)
    assert one is not None
    assert names(with_spares(one, {"d"}, lambda name: name == "b")) == ["a:2", "b:2", "c:2"]
    assert with_spares(one, {"d"}, lambda name: False) is None


def test_a_spare_that_is_dead_or_too_small_is_passed_over() -> None:
    spares = (Host("dead", 2), Host("small", 1), Host("good", 2))
    assert names(with_spares(HostPlacement(HOSTS, spares), {"a"}, lambda name: name != "dead")) == [
        "good:2",
        "b:2",
        "c:2",
    ]
    assert with_spares(HostPlacement(HOSTS, spares[:2]), {"a"}, lambda name: name != "dead") is None


def test_two_dead_hosts_need_two_spares() -> None:
    assert with_spares(HostPlacement(HOSTS, (Host("d", 2),)), {"a", "b"}, lambda name: True) is None


def test_the_largest_world_that_fits_goes_on() -> None:
    new = with_fewer(HostPlacement(HOSTS), {"b"}, lambda size: size % 3 == 0)
    assert names(new) == ["a:2", "c:1"] and new is not None and new.world_size == 3
    assert names(with_fewer(HostPlacement(HOSTS), {"b", "c"}, lambda size: size % 2 == 0)) == ["a:2"]
    assert with_fewer(HostPlacement(HOSTS), {"b", "c"}, lambda size: size >= 4) is None
