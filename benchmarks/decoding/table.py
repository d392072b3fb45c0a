"""The results of the decode benchmark as a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GB = 1e9
HEADLINES = (
    "best_split",
    "best_head",
    "ms_per_token",
    "ms_per_token_p90",
    "tokens_per_s",
    "speedup_vs_sequential_pipeline",
    "speedup_vs_sequential_tensor_parallel",
    "slowest_stage_compute_share",
    "plain_torch_step_over_engine_step",
    "prefill_speedup_vs_one_process",
    "processes_per_core",
)
CONTESTANT = "{:<27} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>9} {:>10}"
SWEEP_COLUMNS = (
    "name",
    "split",
    "stagger",
    "ms_per_token",
    "bound_ms",
    "efficiency",
    "cache_bytes",
    "tokens_equal",
    "margin_at_first_difference",
)


def table(results: Mapping[str, Any]) -> str:
    """One block per subject."""
    blocks = [_contestants(results["splits"], "splits and head layouts")]
    blocks.append(_contestants(results["contestants"], "the best split and its rivals"))
    blocks.append(_rivals([row for row in results["contestants"] if "timed_by" in row]))
    blocks += [_breakdown(name, rows) for name, rows in results["breakdown"].items()]
    blocks += [_sweep(axis, rows) for axis, rows in results.get("sweeps", {}).items()]
    blocks.append("\n".join(f"left out: {name}: {why}" for name, why in results["left_out"].items()))
    blocks.append(
        "\n".join(f"{name:<38} {_shown(results[name])}" for name in HEADLINES if results.get(name) is not None)
    )
    return "\n\n".join(block for block in blocks if block)


def _contestants(rows: Iterable[Mapping[str, Any]], title: str) -> str:
    head = CONTESTANT.format(
        title[:27], "ms/token", "p90", "tokens/s", "bound ms", "effic.", "MB/step", "bandwidth", "MB weights"
    )
    return "\n".join([head, *(_contestant(row) for row in rows)])


def _contestant(row: Mapping[str, Any]) -> str:
    values = [row["name"], f"{row['ms_per_token']:.2f}", f"{row['ms_per_token_p90']:.2f}", f"{row['tokens_per_s']:.1f}"]
    if "bound_ms" not in row:
        return CONTESTANT.format(*values, "", "", "", "", "").rstrip()
    read = [(rank["weights_bytes"] + rank["cache_bytes"]) / 1e6 for rank in row["read_per_step"]]
    held = max(rank["weights_bytes"] for rank in row["memory"]) / 1e6
    values += [f"{row['bound_ms']:.2f}", f"{row['efficiency']:.0%}", "/".join(f"{each:.0f}" for each in read)]
    return CONTESTANT.format(
        *values, "/".join(f"{share:.0%}" for share in row["memory_bandwidth_share"]), f"{held:.0f}"
    )


def _rivals(rows: Sequence[Mapping[str, Any]]) -> str:
    """What only rivals have; the speedup is the rival's time over ours in the same precision."""
    if not rows:
        return ""
    shape = "{:<27} {:>8} {:>13} {:>16}  {}"
    lines = [shape.format("rivals", "threads", "equal tokens", "staggered is", "times are from")]
    for row in rows:
        faster = f"{row['staggered_speedup']:.2f} x as fast"
        equal = f"{row['tokens_equal']} of {row['tokens_compared']}"
        lines.append(shape.format(row["name"], row["threads"], equal, faster, row["timed_by"]))
    return "\n".join(lines)


def _breakdown(name: str, stages: Sequence[Mapping[str, float]]) -> str:
    """One column per stage, milliseconds per step."""
    lines = [f"{name}, ms per step".ljust(38) + "".join(f"{'stage ' + str(i + 1):>10}" for i in range(len(stages)))]
    for key in stages[0]:
        values = [stage[key] for stage in stages]
        if key != "stage" and any(abs(value) >= 0.0005 for value in values):
            inside = key.removesuffix("_ms") in ("self_attention", "cross_attention", "mlp")
            label = ("  of which " if inside else "") + key.removesuffix("_ms").replace("_", " ")
            lines.append(f"  {label:<36}" + "".join(f"{value:>10.3f}" for value in values))
    return "\n".join(lines)


def _sweep(axis: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [axis, *(column for column in SWEEP_COLUMNS if column != axis and any(column in row for row in rows))]
    lines = ["".join(f"{column:>20}" for column in columns)]
    lines += ["".join(f"{_shown(row.get(column, '')):>20}" for column in columns) for row in rows]
    return "\n".join([f"sweep over {axis}", *lines])


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
