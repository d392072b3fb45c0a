"""Made-up results of examinations."""

from typing import Any

from stagdist.cluster.doctor.facts import Accelerator, HostFacts, Link, LinkReport, Storage, Survey

VERSIONS = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "megatron-core": "0.16.1",
    "nccl": "2.27.3",
    "code": "0123456789ab",
    "driver": "570.1",
}
STORAGE = Storage("/shared/runs", True, "", "nfs4", (10_000_000, 5_000_000), 900.0)


def facts(number: int = 1, hosts: int = 2, **changes: Any) -> HostFacts:
    """A healthy host, nodeN."""
    healthy = HostFacts(
        hostname=f"node{number}",
        versions=VERSIONS,
        devices=(Accelerator("H100", 81559, 81000), Accelerator("H100", 81559, 81000)),
        cores=64,
        memory_mib=(1024 * 1024, 1000 * 1024),
        shm_mib=(65536, 65536),
        open_files=(65536, 65536),
        addresses={f"node{other}": f"10.0.0.{other}" for other in range(1, hosts + 1)},
        own_address=f"10.0.0.{number}",
        interfaces={"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{number}"]},
        route="eth0",
        port=23456,
        folder=True,
        storage=STORAGE,
    )
    return healthy.model_copy(update=changes)


def boundary(left: int, right: int, latency_s: float = 3e-5, bytes_s: float = 11e9) -> Link:
    """Two ranks of neighboring stages, healthy unless figures are given."""
    return Link("pipe", (left, right), latency_s, bytes_s, True)


def links(
    pairs: int = 4, boundaries: tuple[Link, ...] = (), groups: tuple[Link, ...] = (), **changes: Any
) -> LinkReport:
    """Two stages, each as many ranks as there are pairs, node1 and node2."""
    boundaries = boundaries or tuple(boundary(rank, rank + pairs) for rank in range(pairs))
    groups = groups or (Link("all", tuple(range(2 * pairs)), 5e-5, 6e9, True),)
    healthy = LinkReport(
        grid=(2, pairs, 1),
        backend="nccl",
        hosts=("node1",) * pairs + ("node2",) * pairs,
        devices=("H100",) * 2 * pairs,
        links=(*boundaries, *groups),
    )
    return healthy.model_copy(update=changes)


def survey(num_hosts: int = 2, changed: dict[str, HostFacts] | None = None, **changes: Any) -> Survey:
    """Healthy hosts with healthy links, with some of them and some results replaced."""
    names = tuple(f"node{number}" for number in range(1, num_hosts + 1))
    known = {name: facts(number, num_hosts) for number, name in enumerate(names, start=1)} | (changed or {})
    healthy = Survey(
        hosts=names,
        slots=dict.fromkeys(names, 2),
        facts=known,
        links=links(),
    )
    return healthy.model_copy(update=changes)
