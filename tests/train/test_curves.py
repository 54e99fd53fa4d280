"""The picture of a run: what is on it, from logs long and short, clean and not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgpt4_jax.errors import UserError
from mgpt4_jax.train import curves
from mgpt4_jax.train.curves import draw_curves, moving_mean, plot
from mgpt4_jax.train.monitor import Monitor, Speed
from mgpt4_jax.train.run_log import read_log, read_losses
from mgpt4_jax.train_config import LogConfig


def train(run_dir: Path, steps: int, *, validate: bool = True, first: float = 2.0) -> Path:
    """A run whose loss falls from ``first`` above 2 to 2."""
    rng = np.random.default_rng(0)
    with Monitor(run_dir, LogConfig(every=5), num_steps=steps, speed=Speed(batch_size=8)) as monitor:
        for step in range(1, steps + 1):
            loss = 2 + first * math.exp(-10 * step / steps) + 0.05 * rng.normal()
            monitor.step(step, {"loss": loss, "learning_rate": 1e-4 / step}, data_wait=0.001)
            if validate and step % 10 == 0:
                monitor.validation(step, {"loss": 2.5 if step == 10 else 2.1})
    return run_dir / "log.jsonl"


def draw(log: Path) -> dict[str, Any]:
    """The axes by their titles."""
    figure = plot(read_log(log), read_losses(log), log.parent.name)
    return {axis.get_title().split(",")[0]: axis for axis in figure.axes}


def lines(axis: Any) -> dict[str, Any]:
    return {line.get_label().split(",")[0]: line for line in axis.get_lines()}


def test_the_picture_is_a_png_with_every_curve(tmp_path: Path) -> None:
    log = train(tmp_path / "my_run", 200)
    draw_curves(log, tmp_path / "curves.png")
    assert {path.name for path in tmp_path.iterdir()} == {"my_run", "curves.png"}
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size == (1210, 825)
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in (curves.SMOOTH, curves.VALIDATION, curves.OTHER):
        wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
        assert np.sum(np.all(pixels == wanted, axis=1)) > 50, colour


def test_what_the_curves_show(tmp_path: Path) -> None:
    log = train(tmp_path / "my_run", 200)
    axes = draw(log)
    assert axes.keys() == {"Loss", "Learning rate", "Samples per second"}
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in axes.values())
    axis = axes["Loss"]
    raw, smooth = axis.get_lines()[:2]
    losses = read_losses(log)
    assert raw.get_label() == "training, each step" and smooth.get_label() == "training, mean of 5 steps"
    assert dict(zip(raw.get_xdata(), raw.get_ydata(), strict=True)) == losses
    assert smooth.get_ydata()[100] == pytest.approx(np.mean([losses[step] for step in range(99, 104)]))
    validation = lines(axis)["validation"]
    assert validation.get_label() == "validation, best 2.1 at step 20"
    assert list(validation.get_xdata()) == list(range(10, 201, 10))
    rate = axes["Learning rate"].get_lines()[0]
    assert list(rate.get_ydata()) == [1e-4 / step for step in range(5, 201, 5)]
    assert axis.figure.get_suptitle() == "my_run: 200 steps"


def test_a_short_run_without_validation(tmp_path: Path) -> None:
    axis = draw(train(tmp_path / "short", 3, validate=False))["Loss"]
    assert list(lines(axis)) == ["training"]
    assert axis.get_lines()[0].get_marker() == "o"
    draw_curves(tmp_path / "short" / "log.jsonl", tmp_path / "short.png")


def test_a_steep_beginning_does_not_flatten_the_rest(tmp_path: Path) -> None:
    assert draw(train(tmp_path / "flat", 200))["Loss"].get_yscale() == "linear"
    axis = draw(train(tmp_path / "steep", 200, first=20.0))["Loss"]
    assert axis.get_yscale() == "log"
    low, high = axis.get_ylim()
    assert {2, 3, 4, 6, 8} <= {tick for tick in axis.get_yticks() if low < tick < high}


def test_one_spike_does_not_set_the_frame(tmp_path: Path) -> None:
    log = train(tmp_path / "run", 2000)
    text = log.read_text().splitlines()
    line = json.loads(text[300])
    line["losses"][0] = 1000.0
    log.write_text("\n".join([*text[:300], json.dumps(line), *text[301:]]) + "\n")
    assert read_losses(log)[line["step"] - 4] == 1000.0
    assert draw(log)["Loss"].get_ylim()[1] < 50


def test_losses_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Monitor(tmp_path, LogConfig(every=2), num_steps=4, speed=Speed(batch_size=1)) as monitor:
        for step, loss in enumerate((3.0, math.nan, 2.0, math.inf), 1):
            monitor.step(step, {"loss": loss}, data_wait=0.0)
        monitor.validation(4, {"loss": math.nan})
    draw_curves(log, tmp_path / "curves.png")
    [line] = draw(log)["Loss"].get_lines()
    np.testing.assert_equal(line.get_ydata(), [3.0, math.nan, 2.0, math.nan])


def test_a_name_may_look_like_a_formula(tmp_path: Path) -> None:
    log = train(tmp_path / "run_$x^^2$", 5)
    draw_curves(log, tmp_path / "curves.png")


@pytest.mark.parametrize("text", [None, "", '{"kind": "event", "step": 0, "text": "started"}\n'])
def test_a_log_without_steps_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"log\.jsonl: (has no step|cannot be read)"):
        draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = train(tmp_path / "run", 5)
    with pytest.raises(UserError, match=r"curves\.png: cannot be written \(No such file"):
        draw_curves(log, tmp_path / "absent" / "curves.png")


def test_a_moving_mean() -> None:
    values = np.array([1.0, 2.0, math.nan, 4.0, 9.0])
    np.testing.assert_allclose(moving_mean(values, 3), [1.5, 1.5, 3.0, 6.5, 6.5])
    np.testing.assert_array_equal(moving_mean(np.array([math.nan, 1.0]), 1), [math.nan, 1.0])
