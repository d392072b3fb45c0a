"""The report on faults: what it calls a problem, how it goes on, and what it tells."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab import fault_report
from tests.lab.drill import problems, resumed_step, times
from tests.lab.fault_report import SETTING, Report, markdown, measured
from tests.lab.faults import FAULTS, Fault
from tests.lab.soak import is_late, is_sound, spread

NAMED = {fault.name: fault for fault in FAULTS}
REQUIRED = {
    "fault", "start_with", "expected", "noticed_s", "next_step_s", "lost_steps", "orphans", "losses_equal",
    "newest_complete", "resumed_step", "ok", "commit", "wall_s",
}  # fmt: skip


def entry(**values: Any) -> dict[str, Any]:
    """Of a rank that was killed, when all was well."""
    good = {
        "fault": "kill_rank_1", "start_with": "ssh", "expected": "recover", "noticed_s": 0.8, "next_step_s": 8.0,
        "lost_steps": 3, "orphans": 0, "losses_equal": True, "largest_difference": 0.0, "planted_at_step": 33,
        "newest_complete": 30, "resumed_step": 30, "stopped_s": 20.0, "exit_code": 0, "last_line": "", "hung": False,
        "problems": [], "ok": True, "commit": "aaaaaaaaaa", "wall_s": 40.0,
    }  # fmt: skip
    return good | values


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("kill_rank_1", {}, []),
        ("kill_rank_1", {"resumed_step": 40}, []),
        ("kill_rank_1", {"resumed_step": 20}, ["resumed at step 20, before its newest checkpoint of step 30"]),
        ("kill_rank_1", {"resumed_step": None}, ["it was never resumed"]),
        ("kill_rank_1", {"noticed_s": 5.2}, ["a dead rank must be noticed within 5 s"]),
        ("kill_rank_1", {"orphans": 1}, ["hung False, orphans 1"]),
        ("kill_rank_1", {"planted_at_step": 290}, ["planted at step 290, when the run had all but ended"]),
        ("freeze_at_start", {"noticed_s": 14.0}, ["a frozen rank must be noticed within the time of a hang and 5 s"]),
        ("link_down_5s", {"resumed_step": None}, ["noticed after 0.8"]),
        ("sigterm_supervisor", {"noticed_s": None, "resumed_step": 0, "exit_code": 143},
         ["resumed at step 0, before its newest checkpoint of step 30"]),
        ("disk_full", {"exit_code": 1, "last_line": "Traceback"}, ["no clear last line: Traceback"]),
    ],
)  # fmt: skip
def test_what_is_not_as_it_must_be_is_told(name: str, values: dict[str, Any], expected: list[str]) -> None:
    assert problems(NAMED[name], entry(fault=name, **values)) == expected


def test_every_resume_after_the_fault_counts_also_that_of_a_later_start() -> None:
    events = [
        {"event": "resume", "time": 1.0, "step": 0, "lost_steps": 0},
        {"event": "fault", "time": 3.5, "noticed": 3.0, "says": "a rank is gone"},
        {"event": "resume", "time": 5.0, "step": 30, "lost_steps": 3},
        {"event": "step", "time": 6.0, "step": 31},
        {"event": "resume", "time": 9.0, "step": 20, "lost_steps": 0},
    ]
    assert (resumed_step(events, 2.0), resumed_step(events, 10.0)) == (20, None)
    assert times(events, 2.0, 8.0) == {
        "noticed_s": 1.0, "next_step_s": 3.0, "lost_steps": 3, "stopped_s": 6.0, "says": "a rank is gone",
    }  # fmt: skip


@pytest.mark.parametrize("error", [AssertionError("no step 33\nin time"), KeyError(1), OSError(28, "full")])
def test_an_entry_that_cannot_be_measured_does_not_end_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fault_report, "Lab", fail)
    found = measured(NAMED["kill_rank_1"], tmp_path, tmp_path, {})
    assert set(found) >= REQUIRED and not found["ok"] and found["losses_equal"] is None
    assert found["problems"] == [f"{type(error).__name__}: {error}"]
    report = Report(tmp_path / "faults.json")
    report.put(found)
    assert not report.has("kill_rank_1"), "it is measured again"
    assert f"- kill_rank_1: {type(error).__name__}" in (tmp_path / "faults.md").read_text()


def test_a_report_goes_on_where_it_was_or_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    report = Report(path)
    report.put(entry(fault="freeze_rank", commit="bbbbbbbbbb"))
    report.put(entry(ok=False))
    report.put(entry())
    again = Report(path)
    assert [one["fault"] for one in again.body["entries"]] == ["kill_rank_1", "freeze_rank"]
    assert again.has("kill_rank_1") and again.body["wall_s"] == 80.0
    again.forget(["kill_rank_1"])
    kept = Report(path)
    assert not kept.has("kill_rank_1") and kept.has("freeze_rank")
    path.write_text(json.dumps(kept.body | {"steps": SETTING["steps"] + 1}))  # type: ignore[operator]
    assert Report(path).body["entries"] == [], "numbers of another setting do not stand beside these"


def test_the_table_tells_how_long_it_took_and_which_commits_were_measured(tmp_path: Path) -> None:
    report = Report(tmp_path / "faults.json")
    report.put(entry(wall_s=600.0))
    assert "All of it took 10 minutes." in markdown(report.body) and "commit" not in markdown(report.body)
    report.put(entry(fault="kill_rank_0"))
    report.put(entry(fault="freeze_rank", commit="bbbbbbbbbb"))
    assert "Measured with commit `aaaaaaaa`, except `bbbbbbbb`: freeze_rank." in markdown(report.body)


def test_faults_have_names_of_their_own_and_only_a_supervisor_that_could_not_leaves_anything() -> None:
    def patient(fault: Fault) -> bool:
        return fault.ending_s > 2

    assert len(NAMED) == len(FAULTS)
    assert {fault.name for fault in FAULTS if patient(fault)} == {
        "link_down_no_spare", "sigkill_supervisor", "freeze_then_sigkill_supervisor",
        "srun_sigkill_supervisor",
    }  # fmt: skip


def test_a_soak_is_sound_only_if_nothing_was_late_or_taken_for_a_fault() -> None:
    good = {
        "losses_equal": True, "hung": 0, "orphans": 0, "checkpoints_lost": 0, "noticed_late": 0,
        "disturbed_by_a_blink": 0, "exit_code": 0,
    }  # fmt: skip
    assert is_sound(good)
    assert not any(is_sound(good | {name: 1}) for name in good if name != "losses_equal")
    assert not is_sound(good | {"losses_equal": False})
    assert not is_late("freeze_rank_0", 12.9) and is_late("freeze_rank_0", 13.1) and is_late("kill_rank_1", 5.1)
    assert not is_late("reboot", 20.0) and is_late("reboot", None)
    assert spread([None]) is None and spread([1.0, None, 3.0]) == {"median": 2.0, "max": 3.0}
