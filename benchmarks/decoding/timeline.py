"""A picture of decoding: every stage over a few steps, staggered above sequential, on one time axis."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagdist.files import replacing
from stagdist.telemetry.spans import Span

COLORS = {
    "compute": "#3b6fb6",
    "head": "#7a4fa3",
    "sampling": "#c2619f",
    "combine": "#4f9c94",
    "host work": "#8a8a8a",
    "send": "#e0a030",
    "wait for memory": "#e9c9c3",
    "wait for last section": "#e9c9c3",
    "wait for token": "#e6e6e6",
}
LABELS = {
    "compute": "section computes",
    "sampling": "choosing a token",
    "host work": "text and requests",
    "send": "sending",
    "wait for memory": "waits for the section before",
    "wait for token": "waits for the token",
}


@dataclass(frozen=True)
class Panel:
    """One way of decoding.

    Attributes:
        title: said above it.
        spans: of each stage, by stage; nanoseconds of one clock.
        layers: of each stage.
        lag: steps between sending a hand-off and needing it.
    """

    title: str
    spans: Sequence[Sequence[Span]]
    layers: Sequence[int]
    lag: int

    def step_begins(self) -> list[int]:
        """When stage 0 began each step: the token before was known then."""
        begins: dict[int, int] = {}
        for span in self.spans[0]:
            begins[span.step] = min(span.begin_ns, begins.get(span.step, span.begin_ns))
        return [begins[step] for step in sorted(begins)]


def draw_timeline(panels: Sequence[Panel], png: str | Path, *, steps: int = 3) -> None:
    """Draw the panels below each other over the time that `steps` steps of the slowest take.

    Raises:
        ValueError: a panel has fewer steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    begins = [panel.step_begins() for panel in panels]
    width_ms = max(_length_ms(each, typical_start(each, steps), steps) for each in begins)
    starts = [typical_start(each, steps, width_ms) for each in begins]
    lanes = max(len(panel.spans) for panel in panels)
    figure = Figure(figsize=(11, 1.6 + len(panels) * (0.9 + 0.65 * lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    shown: dict[str, str] = {}
    for place, (panel, start) in enumerate(zip(panels, starts, strict=True)):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        shown |= _draw(axes, panel, start, width_ms)
        if place == len(panels) - 1:
            axes.set_xlabel(
                "milliseconds\n"
                "dashed: stage 1 knows the token; arrows: a section's output, from sender to where it is needed"
            )
    _legend(figure, shown)
    path = Path(png)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def _draw(axes, panel: Panel, start: int, width_ms: float) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """Bars of all stages, a line where each token is known; the categories that appeared with their colors."""
    begins = panel.step_begins()
    origin = begins[start]
    shown: dict[str, str] = {}
    for stage, spans in enumerate(panel.spans):
        for span in spans:
            begin, end = (span.begin_ns - origin) / 1e6, (span.end_ns - origin) / 1e6
            if end <= 0 or begin >= width_ms:
                continue
            color = shown[span.category] = COLORS[span.category]
            begin, end = max(begin, 0.0), min(end, width_ms)
            quiet = span.category.startswith("wait")
            axes.broken_barh([(begin, end - begin)], (stage - 0.36, 0.72), color=color, alpha=0.9 if quiet else 1.0)
    _draw_hand_offs(axes, panel, origin, width_ms)
    tokens = [(begin - origin) / 1e6 for begin in begins if 0 <= (begin - origin) / 1e6 <= width_ms * 1.001]
    for count, moment in enumerate(tokens):
        axes.axvline(moment, color="black", linewidth=1.0, linestyle=(0, (4, 2)))
        if count:
            axes.annotate(f"token {count}", (moment, -0.5), fontsize=8, ha="right", va="bottom", xytext=(-2, 2),
                          textcoords="offset points")  # fmt: skip
    step_ms = (tokens[-1] - tokens[0]) / (len(tokens) - 1)
    axes.set_title(f"{panel.title}: {step_ms:.1f} ms per token", loc="left", fontsize=11, pad=14)
    axes.set(xlim=(0, width_ms), ylim=(len(panel.spans) - 0.5, -0.5))
    labels = [f"stage {stage + 1}\n{count} layers" for stage, count in enumerate(panel.layers)]
    axes.set_yticks(range(len(panel.spans)), labels)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return shown


def _draw_hand_offs(axes, panel: Panel, origin: int, width_ms: float) -> None:  # type: ignore[no-untyped-def]
    """An arrow from where a section's output is sent to where the next section needs it."""
    for stage, (above, below) in enumerate(itertools.pairwise(panel.spans)):
        needed = {span.step: span.end_ns for span in below if span.category == "wait for memory"}
        for span in above:
            if span.name != "send hand-off" or span.step + panel.lag not in needed:
                continue
            ends = (span.begin_ns - origin) / 1e6, (needed[span.step + panel.lag] - origin) / 1e6
            if ends[0] >= 0 and ends[1] <= width_ms:
                arrow = {"arrowstyle": "-|>", "color": "#222222", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", (ends[1], stage + 0.64), (ends[0], stage + 0.36), arrowprops=arrow)


def _legend(figure, shown: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.patches import Patch

    present = [category for category in COLORS if category in shown]
    handles = [Patch(color=COLORS[category], label=LABELS.get(category, category)) for category in present]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)


def typical_start(begins: Sequence[int], steps: int, width_ms: float = 0.0) -> int:
    """First of the consecutive steps that together took closest to the median time; not the first of a request.

    Args:
        begins: of all steps.
        width_ms: at least so much time follows, where there is that much.

    Raises:
        ValueError: too few steps.
    """
    if len(begins) < steps + 2:
        raise ValueError(f"{len(begins)} steps cannot show {steps}; record at least {steps + 2}")
    candidates = range(1, len(begins) - steps)
    lengths = sorted(begins[start + steps] - begins[start] for start in candidates)
    middle = lengths[len(lengths) // 2]
    long = [start for start in candidates if begins[-1] - begins[start] >= width_ms * 1e6]
    return min(long or candidates, key=lambda start: abs(begins[start + steps] - begins[start] - middle))


def _length_ms(begins: Sequence[int], start: int, steps: int) -> float:
    return (begins[start + steps] - begins[start]) / 1e6
