"""Output without a reader blocks nothing."""

import os
import time

from stagdist.cluster.supervision.background_output import CAPACITY, BackgroundWriter


def test_lines_arrive_in_order() -> None:
    reader, writer = os.pipe()
    screen = BackgroundWriter(writer)
    for number in range(100):
        screen.write(f"line {number}\n")
    screen.close()
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read().splitlines() == [f"line {number}" for number in range(100)]


def test_a_reader_that_sleeps_holds_nobody_up() -> None:
    reader, writer = os.pipe()
    screen = BackgroundWriter(writer)
    started = time.monotonic()
    for _ in range(2 * CAPACITY):
        screen.write("x" * 100 + "\n")
    screen.close(timeout_s=0.1)
    assert time.monotonic() - started < 5
    os.close(reader)


def test_a_full_disk_is_no_error() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    screen = BackgroundWriter(descriptor)
    screen.write("lost\n")
    screen.close()
    os.close(descriptor)
