"""The loss curve as a picture."""

import json
import math
from pathlib import Path

from stagdist.errors import DataError
from stagdist.files import replacing

SMOOTH_FROM_POINTS = 200
"""Training curves with more points than this get a running mean over them."""


def plot_loss(metrics_jsonl: str | Path, png: str | Path, title: str) -> None:
    """Draw training and validation loss over the steps into a PNG, written aside and renamed.

    Raises:
        DataError: the metrics hold no loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = read_losses(metrics_jsonl, "train")
    validation = read_losses(metrics_jsonl, "validation")
    if not train and not validation:
        raise DataError(f"{metrics_jsonl} holds no loss to plot; it needs lines of split train or validation")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        _draw_train(axes, train)
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(png)) as partial:
        figure.savefig(partial, format="png", dpi=120)


def read_losses(metrics_jsonl: str | Path, split: str) -> list[tuple[int, float]]:
    """Steps and losses of one split; steps whose loss was not finite are left out."""
    losses = []
    with open(metrics_jsonl, encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["split"] == split and entry.get("loss") is not None:
                losses.append((entry["step"], entry["loss"]))
    return losses


def running_mean(values: list[float], half_width: int) -> list[float]:
    """Mean of each value with up to `half_width` neighbors on either side."""
    totals = [0.0]
    for value in values:
        totals.append(totals[-1] + value)
    spans = [(max(0, i - half_width), min(len(values), i + half_width + 1)) for i in range(len(values))]
    return [(totals[end] - totals[begin]) / (end - begin) for begin, end in spans]


def _draw_train(axes, train: list[tuple[int, float]]) -> None:  # type: ignore[no-untyped-def]
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    if len(train) <= SMOOTH_FROM_POINTS:
        axes.plot(steps, losses, color="tab:blue", linewidth=1.2, label="train")
        return
    half_width = max(1, math.ceil(len(train) / 100))
    axes.plot(steps, losses, color="tab:blue", linewidth=0.5, alpha=0.3)
    label = f"train (mean of {2 * half_width + 1} points)"
    axes.plot(steps, running_mean(losses, half_width), color="tab:blue", linewidth=1.2, label=label)
