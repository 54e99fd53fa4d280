"""``log.jsonl``: what a run says of itself, one JSON object a line, and each step in one line only.

Every object has ``kind``, ``step`` (optimiser steps done, from 1) and ``time`` (seconds since 1970). A line of
kind ``train`` also holds ``losses``, the loss of each step since the line before, to the last bit: ``step`` is
the last one's. What is not a finite number is written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from mgpt4_jax.errors import UserError

Record = dict[str, Any]


class RunLog:
    """Appends to a log. The lines that an earlier attempt wrote beyond ``start_step`` are dropped first.

    A line reaches the system before ``write`` returns, so killing the process loses none. Raises ``UserError``
    when the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_log(path, start_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._problem(error) from error

    def write(self, record: Record) -> None:
        text = json.dumps(_finite({**record, "time": round(time.time(), 3)}), ensure_ascii=False, allow_nan=False)
        line = text.encode("utf-8", "replace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._problem(error) from error

    def sync(self) -> None:
        """Return when all lines are on the disk, so that not even a power cut loses them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror}); free space there, or choose another run")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def cut_log(path: Path, step: int) -> None:
    """Take back what the log says of steps after ``step``, and lines that were cut off in writing.

    The new file takes the old one's name when it is whole. A line of training that reaches beyond ``step`` keeps
    the losses up to it.
    """
    if not path.exists():
        return
    old = path.read_bytes()
    kept = [cut for record in _records(old) if (cut := _cut(record, step)) is not None]
    new = b"".join(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for record in kept)
    if new == old:
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _cut(record: Record, step: int) -> Record | None:
    if record["step"] <= step:
        return record
    losses = record.get("losses", [])
    left = losses[: max(step - (record["step"] - len(losses)), 0)]
    if not left:
        return None
    known = [loss for loss in left if loss is not None]
    return {**record, "step": step, "losses": left, "loss": fmean(known) if known else None}


def read_log(path: Path | str) -> list[Record]:
    """The lines of a log, in order; the last one is left out while it is being written."""
    try:
        return _records(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the log.jsonl of a run") from error


def read_losses(path: Path | str) -> dict[int, float]:
    """The training loss of every step, exactly as it was; NaN where it was not finite."""
    losses: dict[int, float] = {}
    for record in read_log(path):
        values = record.get("losses", [])
        for step, loss in enumerate(values, record["step"] - len(values) + 1):
            losses[step] = math.nan if loss is None else loss
    return losses


def _records(data: bytes) -> list[Record]:
    """The objects of whole lines; a line that a crash or a full disk cut off is none."""
    records = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON has not, become None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
