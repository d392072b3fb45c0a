"""Made-up results of examinations."""

import dataclasses
from typing import Any

from stagdist.cluster.doctor.facts import (
    Accelerator,
    Boundary,
    ClockOffset,
    HostFacts,
    Links,
    Reduction,
    Storage,
    Survey,
)


def facts(number: int = 1, hosts: int = 2, **changes: Any) -> HostFacts:
    """A healthy host, nodeN."""
    return dataclasses.replace(
        HostFacts(
            hostname=f"node{number}",
            python="3.11.7",
            packages={"torch": "2.13.0", "deepspeed": "0.19.8", "megatron-core": "0.16.1", "nccl": "2.27.3"},
            code="0123456789ab",
            driver="570.1",
            devices=(Accelerator("H100", 81559, 81000), Accelerator("H100", 81559, 81000)),
            cores=64,
            memory_mib=(1024 * 1024, 1000 * 1024),
            shm_mib=(65536, 65536),
            open_files=(65536, 65536),
            addresses={f"node{other}": f"10.0.0.{other}" for other in range(1, hosts + 1)},
            own_address=f"10.0.0.{number}",
            interfaces={"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{number}"]},
            route="eth0",
            free_port=23456,
            storage=Storage("/shared/runs", "", "nfs4", 10_000_000, 5_000_000, 900.0),
        ),
        **changes,
    )


def links(pairs: int = 4, **changes: Any) -> Links:
    """Two stages, each as many ranks as there are pairs, node1 and node2."""
    return dataclasses.replace(
        Links(
            grid=(2, pairs, 1),
            backend="nccl",
            hosts=("node1",) * pairs + ("node2",) * pairs,
            devices=("H100",) * 2 * pairs,
            boundaries=tuple(Boundary(0, (rank, rank + pairs), 3e-5, 11e9, 11e9) for rank in range(pairs)),
            reductions=(Reduction("all", tuple(range(2 * pairs)), 5e-5, 6e9, True),),
        ),
        **changes,
    )


def survey(num_hosts: int = 2, changed: dict[str, HostFacts] | None = None, **changes: Any) -> Survey:
    """Healthy hosts with healthy links, with some of them and some results replaced."""
    names = tuple(f"node{number}" for number in range(1, num_hosts + 1))
    known = {name: facts(number, num_hosts) for number, name in enumerate(names, start=1)} | (changed or {})
    return dataclasses.replace(
        Survey(
            hosts=names,
            slots=dict.fromkeys(names, 2),
            facts=known,
            clocks=dict.fromkeys(names, ClockOffset(0.001, 0.0005)),
            seen={reader: dict.fromkeys(names, True) for reader in names},
            links=links(),
        ),
        **changes,
    )
