"""The loss curve is a readable picture with what the metrics hold."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from stagdist.errors import DataError
from stagdist.telemetry.metrics import MetricsWriter
from stagdist.telemetry.plot import plot_loss, read_losses, running_mean


@pytest.fixture()
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def _metrics(folder: Path, steps: int, validate_every: int | None = None) -> Path:
    with closing(MetricsWriter(folder)) as writer:
        for step in range(1, steps + 1):
            writer.write("train", step, {"loss": 5.0 / step})
            if validate_every and step % validate_every == 0:
                writer.write("validation", step, {"loss": 6.0 / step, "perplexity": 1.0})
    return folder / "metrics.jsonl"


def test_both_curves_with_labelled_axes(tmp_path: Path, drawn: list[Figure]) -> None:
    (tmp_path / "out").mkdir()
    plot_loss(_metrics(tmp_path, 20, validate_every=10), tmp_path / "out" / "loss.png", "a run")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss.png"]
    (axes,) = drawn[0].axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a run", "step", "loss (nats per token)")
    curves = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert curves["validation"] == [[10, 0.6], [20, 0.3]]
    assert curves["train"] == [[step, 5.0 / step] for step in range(1, 21)]


def test_long_curves_are_smoothed_over_the_raw_ones(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_loss(_metrics(tmp_path, 500), tmp_path / "loss.png", "long")
    raw, smooth = drawn[0].axes[0].get_lines()
    assert raw.get_alpha() == pytest.approx(0.3)
    assert smooth.get_label() == "train (mean of 11 points)"
    assert len(smooth.get_xdata()) == 500  # type: ignore[arg-type]


def test_steps_without_a_finite_loss_are_left_out(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path)) as writer:
        writer.write("train", 1, {"loss": 2.0})
        writer.write("train", 2, {"loss": float("nan")})
        writer.write("train", 3, {"learning_rate": 1.0})
    assert read_losses(tmp_path / "metrics.jsonl", "train") == [(1, 2.0)]


def test_metrics_without_a_loss_are_refused(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).close()
    with pytest.raises(DataError, match="no loss"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "empty")
    assert not (tmp_path / "loss.png").exists()


def test_the_running_mean_narrows_at_the_ends() -> None:
    assert running_mean(np.array([1.0, 2.0, 6.0, 8.0]), 1) == pytest.approx([1.5, 3.0, 16 / 3, 7.0])
