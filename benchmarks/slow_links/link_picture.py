"""A picture of step times over the latency of a link."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagdist.files import replacing

COLORS = ("#3b6fb6", "#7a4fa3", "#e0a030", "#4f9c94")


def draw_links(results: Mapping[str, Any], png: str | Path, packets: Mapping[str, Any] | None = None) -> None:
    """Draw measured curves with their predictions.

    Args:
        results: of a run with injected latencies, as written to JSON.
        packets: of a run over a link that delays packets.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [curve["name"] for curve in results["curves"]]
    colors = dict(zip(names, COLORS, strict=False))
    runs = [(results, "-", ""), *([(packets, ":", ", delayed packets")] if packets else [])]
    for run, style, note in runs:
        for curve in (each for each in run["curves"] if each["name"] in colors):
            color, delays = colors[curve["name"]], run["delays_ms"]
            axes.plot(delays, curve["ms_per_token"], style, color=color, marker="o", markersize=4, linewidth=2,
                      label=curve["name"] + note)  # fmt: skip
            if not note:
                axes.plot(delays, curve["predicted_ms"], "-", color=color, linewidth=0.8, alpha=0.7)
    axes.plot([], [], "-", color="#555555", linewidth=0.8, label="predicted from the run without latency")
    lowest = min(min(curve["ms_per_token"]) for curve in results["curves"])
    axes.set_yscale("log")
    ticks = [tick for tick in (5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000) if tick > 0.6 * lowest]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="one-way latency of the link, milliseconds", ylabel="milliseconds per token")
    highest = max(max(curve["ms_per_token"]) for run, _, _ in runs for curve in run["curves"])
    axes.set(xlim=(0, None), ylim=(0.8 * lowest, 1.2 * highest))
    axes.grid(color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside upper center")
    path = Path(png)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
