"""Progress: a bar on a terminal, plain lines from time to time elsewhere, silence on other ranks."""

import io
from contextlib import closing

import pytest

from stagdist.telemetry.progress import Progress, progress_parts, with_unit

VALUES = {
    "loss": 2.34567,
    "learning_rate": 3e-4,
    "grad_norm": 0.81234,
    "pipeline_bubble": 0.1,
    "memory_process_resident_bytes": 3 * 2**29,
    "tokens_per_s": 12345.0,
    "step_s": 0.5,
    "model_tflops_per_s": 4.56789,
    "model_tflops_per_s_per_device": 2.28,
    "mfu": 0.41234,
    "time_left_s": 3723.0,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_report_shows_everything_known() -> None:
    assert progress_parts(VALUES) == [
        "loss 2.3457",
        "lr 3.00e-04",
        "grad 0.812",
        "12.3 ktok/s",
        "4.57 TFLOP/s",
        "MFU 41.2%",
        "mem 1.50 GiB",
        "left 1:02:03",
    ]


def test_what_is_not_known_is_left_out() -> None:
    assert progress_parts({"loss": 2.0, "learning_rate": 1e-3, "grad_norm": None}) == ["loss 2.0000", "lr 1.00e-03"]


def test_off_a_terminal_lines_come_at_intervals_with_the_first_and_the_last() -> None:
    stream, now = io.StringIO(), [0.0]
    with closing(Progress(9, plain_interval_s=3.0, stream=stream, clock=lambda: now[0])) as progress:
        for step in range(1, 10):
            progress.show(step, VALUES)
            now[0] += 1.0
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/9", "4/9", "7/9", "9/9"]
    assert lines[0].startswith("step 1/9  loss 2.3457  lr 3.00e-04")


def test_the_last_report_of_a_run_that_ends_early_is_not_lost() -> None:
    stream = io.StringIO()
    with closing(Progress(9, stream=stream, clock=lambda: 0.0)) as progress:
        progress.show(1, VALUES)
        progress.show(2, VALUES)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/9", "2/9"]


def test_on_a_terminal_a_bar_starts_where_the_run_resumed() -> None:
    stream = Terminal()
    with closing(Progress(9, first_step=4, stream=stream)) as progress:
        progress.show(5, VALUES)
        progress.show(6, VALUES)
    drawn = stream.getvalue().split("\r")
    assert any("4/9" in frame for frame in drawn)
    assert "6/9" in drawn[-1] and "loss 2.3457" in drawn[-1] and "left 1:02:03" in drawn[-1]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_stay_silent(stream: io.StringIO) -> None:
    with closing(Progress(9, enabled=False, stream=stream)) as progress:
        progress.show(9, VALUES)
    assert stream.getvalue() == ""


def test_numbers_read_well() -> None:
    shown = [with_unit(number) for number in (7.0, 999.4, 999.9, 12345.0, 2.5e6, 3e9)]
    assert shown == ["7 ", "999 ", "1 k", "12.3 k", "2.5 M", "3 G"]
