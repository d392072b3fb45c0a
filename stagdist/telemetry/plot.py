"""The loss curve as a picture."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from stagdist.errors import DataError
from stagdist.files import replacing
from stagdist.telemetry.metrics import read_metrics

SMOOTH_FROM_POINTS = 200
"""Training curves with more points than this get a running mean over them."""


def plot_loss(metrics_jsonl: str | Path, png: Path, title: str) -> None:
    """Draw training and validation loss over the steps into a PNG, written aside and renamed.

    Raises:
        DataError: the metrics hold no loss.
    """
    from matplotlib.figure import Figure

    train = read_losses(metrics_jsonl, "train")
    validation = read_losses(metrics_jsonl, "validation")
    if not train and not validation:
        raise DataError(f"{metrics_jsonl} holds no loss to plot; it needs lines of split train or validation")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        _draw_train(axes, *map(np.array, zip(*train, strict=True)))
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(png) as partial:
        figure.savefig(partial, format="png", dpi=120)


def read_losses(metrics_jsonl: str | Path, split: str) -> list[tuple[int, float]]:
    """Steps and losses of one split; steps whose loss was not finite are left out."""
    lines = read_metrics(metrics_jsonl, split)
    return [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]


def running_mean(values: np.ndarray, half_width: int) -> np.ndarray:
    """Mean of each value with up to `half_width` neighbors on either side."""
    totals, places = np.cumsum([0.0, *values]), np.arange(len(values))
    first, last = np.maximum(places - half_width, 0), np.minimum(places + half_width + 1, len(values))
    return (totals[last] - totals[first]) / (last - first)


def _draw_train(axes: Any, steps: np.ndarray, losses: np.ndarray) -> None:
    label = "train"
    if len(losses) > SMOOTH_FROM_POINTS:
        axes.plot(steps, losses, color="tab:blue", linewidth=0.5, alpha=0.3)
        half_width = math.ceil(len(losses) / 100)
        losses, label = running_mean(losses, half_width), f"train (mean of {2 * half_width + 1} points)"
    axes.plot(steps, losses, color="tab:blue", linewidth=1.2, label=label)
