"""Hostfiles: what DeepSpeed reads is read alike, spares besides, and nothing that a shell could run."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from stagdist.cluster.hosts.hostfile import Host, Hostfile, read_hostfile
from stagdist.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_and_spares_are_read_and_deepspeed_sees_the_hosts_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "# two racks\nnode1 slots=8\n\n10.0.0.2   slots=4 # old\n#spare node-3.rack slots=8\n")
    assert read_hostfile(path) == Hostfile((Host("node1", 8), Host("10.0.0.2", 4)), (Host("node-3.rack", 8),))
    assert sum(host.slots for host in read_hostfile(path).hosts) == 12
    assert dict(fetch_hostfile(str(path))) == {"node1": 8, "10.0.0.2": 4}


def test_both_programs_keep_the_order_of_the_hosts(tmp_path: Path) -> None:
    hosts = (Host("b", 2), Host("a", 1))
    path = written(tmp_path, "b slots=2\na slots=1\n")
    assert read_hostfile(path).hosts == hosts
    assert list(fetch_hostfile(str(path)).items()) == [("b", 2), ("a", 1)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "lists no hosts"),
        ("#spare node1 slots=1", "lists no hosts"),
        ("node1", "line 1: 'node1' is no host"),
        ("a slots=1\nnode1 slots=two", "line 2"),
        ("node1 slots=0", "slots=0"),
        ("a slots=1\na slots=2", "listed twice"),
        ("a slots=1\n#spare a slots=2", "listed twice"),
        ("$(touch${IFS}x) slots=1", "refused"),
        ("a;reboot slots=1", "refused"),
        ("`id` slots=1", "refused"),
        ("-oProxyCommand=x slots=1", "refused"),
        ("a slots=1\n#spare -x slots=1", "line 2"),
        ("root@node1 slots=1", "write the host alone here, and `Host node1` with `User root` into ~/.ssh/config"),
        ("node1 slots=10000", "at most 9999"),
        ("a slots=1 max_slots=2", "no host"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")) as caught:
        read_hostfile(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_hostfile(tmp_path / "nowhere")
