"""Runs that are disturbed: starting them, stopping them after a step, and holding them to an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from train.world import config_of, merge

from mgpt4_jax.checkpoint import read_leaf, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.train import loop
from mgpt4_jax.train.run_log import read_log, read_losses

STEPS = 20
STOPPED_AT = 12  # between two saves, which come every 5 steps


@dataclass(frozen=True)
class World:
    """A model directory, and the JSONL files of two data sets."""

    root: Path
    model: Path
    train: Path
    validation: Path

    def config(self, run: Path, **changes: Any) -> dict[str, Any]:
        """Without validation, which most tests do not need; ``changes`` as in a YAML file."""
        return merge(config_of(self.model, run, self.train, steps_per_epoch=STEPS), changes)

    def start(self, run: Path, *options: str, **changes: Any) -> int:
        """``mgpt4 train``: its exit code."""
        return start(self.config(run, **changes), *options)


def start(config: dict[str, Any], *options: str) -> int:
    """``mgpt4 train`` with a YAML file of ``config``: its exit code."""
    path = Path(config["run"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return main(["train", "--config", str(path), *options])


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


@contextlib.contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Runs in the block call ``act`` when ``step`` is done, before it is validated or saved."""
    original = loop._Trainer._after

    def after(self: Any, done: int) -> None:
        if done == step:
            act()
        original(self, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_after", after)
        yield


def signal_after(step: int, number: int) -> contextlib.AbstractContextManager[None]:
    """Runs in the block get a signal when ``step`` is done."""
    return after_step(step, lambda: signal.raise_signal(number))


def events(run: Path) -> list[str]:
    """What happened to a run, in its own words."""
    return [record["text"] for record in read_log(run / "log.jsonl") if record["kind"] == "event"]


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in run.glob("checkpoints/*") if path.name.isdecimal())


def state_digits(run: Path, step: int) -> dict[str, str]:
    """The fingerprint of every array of a checkpoint: parameters, moments, average, step and random key."""
    return json.loads((run / "checkpoints" / str(step) / "about" / "metadata").read_text())["fingerprint"]


def trained(run: Path) -> dict[str, np.ndarray]:
    """The parameters that ``RUN/model`` holds itself."""
    model = run / "model"
    return {path: read_leaf(model, path) for path in sorted(read_manifest(model).trained)}


def assert_same(run: Path, reference: Path, steps: int = STEPS) -> None:
    """Losses of every step, the last checkpoint and the trained parameters are those of ``reference``, bit for bit."""
    expected = read_losses(reference / "log.jsonl")
    assert list(expected) == list(range(1, steps + 1))
    assert read_losses(run / "log.jsonl") == expected
    assert state_digits(run, steps) == state_digits(reference, steps)
    ours, theirs = trained(run), trained(reference)
    assert ours.keys() == theirs.keys()
    for path, values in theirs.items():
        np.testing.assert_array_equal(ours[path], values, err_msg=path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock of a run, which is empty."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error_line(text: str) -> str:
    """The one line that a person is told; nothing of a traceback beside it."""
    assert "Traceback" not in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")
