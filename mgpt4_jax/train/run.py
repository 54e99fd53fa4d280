"""The directory of a run: who writes it, what it was started with, and whether it may go on as now asked.

RUN/config.yaml     the whole configuration of the last start
RUN/log.jsonl       every step's loss, validations, captions, events
RUN/checkpoints/    what the run can go on from
RUN/curves.png      drawn at the end
RUN/model/          the trained model: what was trained, on top of the model it started from
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from mgpt4_jax.checkpoint import read_manifest
from mgpt4_jax.errors import UserError

LOCK = "lock"
FIXED = (
    "objective",
    "text",
    "trainable",
    "lora",
    "batch_size",
    "dtype",
    "seed",
    "data.transform",
    "data.clean_captions",
)
"""Settings that decide what every step sees or trains: a run goes on only with the same. Others may change, and are
announced; what the data sets and the frozen parameters hold is told by their fingerprints, not by their paths."""
_PLACES = ("model", "run", "data.train")


def require_room(run: Path, model: Path) -> None:
    """Refuse, before anything is done, a directory where the trained model could not be written at the end."""
    out = run / "model"
    if model.resolve() in (run.resolve(), out.resolve()):
        raise UserError(f"{run}: is the model directory to start from, which is never changed; choose another --run")
    is_trained = (out / "model.json").is_file() and read_manifest(out).base is not None
    if out.exists() and not is_trained:
        raise UserError(f"{out}: is no model that a run wrote, and in the way of this one's; choose another --run")


@contextlib.contextmanager
def run_directory(run: Path, *, is_main: bool) -> Iterator[None]:
    """Make the directory and hold its lock: a second trainer in it is refused."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{run}: the run directory cannot be written ({error.strerror}); choose another --run"
        ) from error
    try:
        if is_main:
            _take(lock, run)
        yield
    finally:
        os.close(lock)


def _take(lock: int, run: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{run}: another trainer is writing this run; wait for it, or choose another --run") from error


def write_config(run: Path, config: Mapping[str, Any]) -> None:
    """``config.yaml``, whole or not at all; ``mgpt4 train --config RUN/config.yaml`` reads it again."""
    path, partial = run / "config.yaml", run / "config.yaml.partial"
    try:
        partial.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space there") from error


def check_unchanged(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines that announce what changed since the checkpoint; refuses what may not change.

    Both are the ``about`` of a checkpoint: ``config``, the ``mesh`` as it is, and fingerprints of ``data``,
    ``pictures`` and ``frozen``.
    """
    before, after = (flatten_config({**about["config"], "mesh": about["mesh"]}) for about in (saved, now))
    changes = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or key in _PLACES:
            continue
        if _is_fixed(key, before.get(key), after.get(key)):
            raise UserError(
                f"{key} was {before.get(key)!r} when this run began and is {after.get(key)!r} now; "
                "put it back, or start a new run directory (from RUN/model, to build on what was learnt)"
            )
        changes.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    if saved["data"] != now["data"]:
        raise UserError(
            "data.train is not the data set that this run began with (its files, order or weights changed); "
            "put it back, or start a new run directory (from RUN/model, to build on what was learnt)"
        )
    if saved["pictures"] != now["pictures"]:  # as when broken ones were mended
        changes.append("pictures behind data.train are not of the sizes that they were")
    if altered := [path for path, digits in saved["frozen"].items() if now["frozen"].get(path) != digits]:
        raise UserError(
            f"{now['config']['model']}: the frozen parameter {altered[0]} is not the one this run began with; give "
            "the same --model, or start a new run directory"
        )
    return changes


def _is_fixed(key: str, before: Any, after: Any) -> bool:
    if key == "optim.ema_decay":
        return 0 in (before, after)  # there is an average, or there is none
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def flatten_config(values: Any, prefix: str = "") -> dict[str, Any]:
    """``{"optim.peak_lr": 1e-4}``; lists stay whole."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
    return found


class Signals:
    """SIGTERM and SIGINT as a flag that the loop looks at between steps; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
