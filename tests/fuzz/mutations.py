"""Mutated copies of a file, and what a command has to do with them."""

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

COUNT = int(os.environ.get("MUTATIONS", "20"))
"""Mutated inputs of each reader; `make fuzz` sets 2,000."""


@dataclass(frozen=True)
class Mutation:
    """A changed copy of a file.

    Attributes:
        name: what was changed, for the message of a failed test.
        content: the bytes.
        kept: length of the prefix that is as it was.
    """

    name: str
    content: bytes
    kept: int


def mutations(content: bytes, count: int = COUNT, *, seed: int = 0, others: Sequence[bytes] = ()) -> Iterator[Mutation]:
    """The empty file, files of other kinds, then as many truncations as single flipped bits.

    Args:
        content: the valid file.
        count: number of copies.
        seed: of the positions; the same seed gives the same copies.
        others: files of other kinds that take its place.
    """
    draw = random.Random(seed)
    foreign = [b"", b"\0" * 64, b"\xff\xfe" + "text".encode("utf-16-le"), b"[" * 100_000, *others][:count]
    for index, other in enumerate(foreign):
        yield Mutation(f"foreign content {index}", other, 0)
    for index in range(count - len(foreign)):
        place = draw.randrange(len(content))
        if index % 2:
            yield Mutation(f"cut to {place} bytes", content[:place], place)
        else:
            bit = draw.randrange(8)
            flipped = bytes([content[place] ^ 1 << bit])
            yield Mutation(f"bit {bit} of byte {place}", content[:place] + flipped + content[place + 1 :], place)


@dataclass(frozen=True)
class Outcome:
    """What a command did in this process."""

    code: int
    output: str
    errors: str

    def assert_refused(self, *names: str) -> None:
        """One line of error that names the file, and code 2."""
        assert self.code == 2, self
        lines = [line for line in self.errors.splitlines() if line.strip()]
        assert len(lines) == 1, self
        assert "error: " in lines[0], self
        assert "Traceback" not in self.errors, self
        assert all(name in lines[0] for name in names), self


def run_main(main: Callable[[], int], *arguments: object) -> Outcome:
    """Call the `main` of a script in this process with a command line. An unexpected exception is code 1."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in "12")
    with (
        mock.patch.object(sys, "argv", ["command", *map(str, arguments)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
    printed, complaint = (stream.buffer.getvalue().decode() for stream in (output, errors))  # type: ignore[attr-defined]
    return Outcome(code, printed, complaint)
