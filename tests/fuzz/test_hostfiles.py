"""Damaged and unusual hostfiles through the reader and the commands that take one."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from launch import doctor
from stagdist.cluster.hosts.hostfile import read_hostfile
from stagdist.errors import ConfigError
from tests.fuzz.mutations import mutations, run_main

TEXT = """# two racks
node1 slots=8
node-2.rack.example slots=8   # old

10.0.0.3\tslots=4
#spare node4 slots=8
# spare 10.0.0.5 slots=4
"""


def test_every_mutated_hostfile_is_refused_by_name_or_lists_what_deepspeed_lists(tmp_path: Path) -> None:
    path, ascii_only = tmp_path / "hostfile", 128
    for mutation in mutations(TEXT.encode(), others=[b"node1 slots=" + b"9" * 5000, b"a" * 100_000 + b" slots=1"]):
        path.write_bytes(mutation.content)
        try:
            hostfile = read_hostfile(path)
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
            continue
        if max(mutation.content) < ascii_only:
            expected = dict(fetch_hostfile(str(path)))
            assert {host.name: host.slots for host in hostfile.hosts} == expected, mutation
    assert [one.name for one in tmp_path.iterdir()] == ["hostfile"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (TEXT.encode("utf-16"), "cannot be read"),
        (b"node1 slots=8\nnode2\0 slots=8\n", "line 2"),
        (b"\0" * 64, "line 1"),
        (b"", "lists no hosts"),
        (b"node1 slots=" + b"9" * 5000, "at most 9999"),
        ("node1 slots=٨".encode(), "no host"),
        (b"node1 slots=-1", "no host"),
        (b"node1 slots=1e3", "no host"),
        (b"alice@node1 slots=8", "`Host node1` with `User alice` into ~/.ssh/config"),
        (b"#spare alice@10.0.0.1 slots=8", "`Host 10.0.0.1` with `User alice` into ~/.ssh/config"),
        (b"node1 slots=8\nNode1 slots=8", "listed twice"),
        (b"node1 slots=8\n# Spare NODE1 slots=8", "listed twice"),
        (b"fe80::1 slots=8", "enter an IPv6 address in /etc/hosts"),
        (b"{'node1': 8}", "no host"),
    ],
)
def test_the_commands_refuse_a_wrong_hostfile_in_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(content)
    run_main(doctor.main, "--hostfile", path).assert_refused(str(path), complaint)
    with pytest.raises(ConfigError) as refused:
        read_hostfile(path)
    assert complaint in str(refused.value)


def test_a_byte_order_mark_and_other_ends_of_lines_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(TEXT)
    for number, text in enumerate(("\ufeff" + TEXT, TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT.replace("\n", "\r\n"))):
        path = tmp_path / str(number)
        path.write_bytes(text.encode())
        assert read_hostfile(path) == read_hostfile(tmp_path / "plain")
