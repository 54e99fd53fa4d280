"""The curves of a run as one picture: losses, learning rate, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.errors import UserError
from mgpt4_jax.train.run_log import Record, read_log, read_losses
from mgpt4_jax.typing import Float

RAW, SMOOTH, VALIDATION, OTHER = "#9bbbe0", "#1f5fa8", "#d1495b", "#4a4e57"
FEW = 40  # points that are marked one by one
STEEP = 3.0


def draw_curves(log_path: Path | str, png_path: Path | str) -> None:
    """Draw ``log.jsonl`` into a PNG, which appears whole or not at all.

    Raises ``UserError`` when the log has no training step, or the picture cannot be written.
    """
    records, losses = read_log(log_path), read_losses(log_path)
    if not losses:
        raise UserError(f"{log_path}: has no step of training, so there is nothing to draw; train first")
    _save(plot(records, losses, Path(log_path).absolute().parent.name), Path(png_path))


def plot(records: Sequence[Record], losses: dict[int, float], name: str) -> Any:
    """The curves as a ``matplotlib`` figure, of no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and needed at the end only
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{name}: {max(losses)} steps", fontsize=14, parse_math=False)
    axes = figure.subplot_mosaic([["loss", "loss"], ["rate", "speed"]], height_ratios=[2.2, 1])
    validations = [record for record in records if record.get("kind") == "validation"]
    lines = [record for record in records if record.get("kind") == "train"]
    _draw_losses(axes["loss"], losses, validations)
    _draw_column(axes["rate"], lines, "learning_rate")
    axes["rate"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speeds = _draw_column(axes["speed"], lines, "samples_per_second")
    if speeds:
        axes["speed"].set_title(f"Samples per second, median {np.median(speeds):.3g}")
        axes["speed"].set_ylim(0, 1.1 * max(speeds))
    for axis in axes.values():
        axis.set_xlabel("step")
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    return figure


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space there, or choose another") from error


def _draw_losses(axis: Any, losses: dict[int, float], validations: Sequence[Record]) -> None:
    """Each step's loss, its moving mean, and the validation loss; single spikes may stick out of the frame."""
    steps = np.array(sorted(losses))
    raw = np.array([losses[step] for step in steps])
    window = max(len(raw) // 40, 1)
    smooth = moving_mean(raw, window)
    if window > 1:
        axis.plot(steps, raw, color=RAW, linewidth=0.8, alpha=0.7, label="training, each step")
    label = f"training, mean of {window} steps" if window > 1 else "training"
    axis.plot(steps, smooth, color=SMOOTH, linewidth=2, label=label, **_marks(raw))
    found = {record["step"]: record.get("loss") for record in validations}  # the last one of a step
    points = {step: loss for step, loss in found.items() if loss is not None}
    if points:
        best = min(points, key=points.__getitem__)
        label = f"validation, best {points[best]:.4g} at step {best}"
        axis.plot(points.keys(), points.values(), color=VALIDATION, linewidth=2, marker="o", markersize=4, label=label)
    _frame(axis, [*smooth, *points.values(), *_percentiles(raw)])
    axis.set_title("Loss")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False)


def _frame(axis: Any, values: Sequence[float]) -> None:
    """Show the range of ``values``, in logarithms where a steep beginning would flatten the rest."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) == max(finite):
        return
    low, high = min(finite), max(finite)
    if low <= 0 or high < STEEP * low:
        margin = 0.05 * (high - low)
        axis.set_ylim(low - margin, high + margin)
        return
    axis.set_yscale("log")
    axis.set_ylim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_column(axis: Any, lines: Sequence[Record], key: str) -> list[float]:
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    values = [value for _, value in pairs]
    axis.plot([step for step, _ in pairs], values, color=OTHER, linewidth=1.5, **_marks(values))
    name = key.replace("_", " ")
    axis.set_title(name.capitalize())
    axis.set_ylabel(name)
    return values


def _marks(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(values) <= FEW else {}


def _percentiles(values: Float[np.ndarray, " t"]) -> list[float]:
    finite = values[np.isfinite(values)]
    return np.percentile(finite, (0.2, 99.8)).tolist() if len(finite) else []


def moving_mean(values: Float[np.ndarray, " t"], window: int) -> Float[np.ndarray, " t"]:
    """The mean of the ``window`` values around each one, of fewer at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    sums = np.convolve(np.where(finite, values, 0), kernel, mode="same")
    counts = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
