"""The run as a person follows it: ``log.jsonl`` always, the screen, TensorBoard and W&B.

The trainer hands over numbers that are on the host already; nothing here waits for a device.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mgpt4_jax.errors import TrainingStopped
from mgpt4_jax.train.run_log import RunLog
from mgpt4_jax.train.screen import Screen, printable
from mgpt4_jax.train.trackers import Caption, Tracker, open_trackers
from mgpt4_jax.train_config import LogConfig

RECENT = 50  # steps that the screen's numbers are taken over
LAST = ("learning_rate", "bad_samples")  # metrics whose last value stands in a line; of others the mean
SPIKE_WINDOW = 100
SPIKE_LEAST = 20


@dataclass(frozen=True)
class Speed:
    """What a step takes: totals of ``batch_size`` pairs over ``num_devices`` devices.

    Args:
      flops_per_step: as ``flops.count_flops`` counts them, over all devices; None: unknown.
      peak_flops: of one device, a second; None: unknown, and no share of it is shown.
    """

    batch_size: int
    flops_per_step: float | None = None
    peak_flops: float | None = None
    num_devices: int = 1


@dataclass(frozen=True)
class _Step:
    metrics: Mapping[str, float]
    data_wait: float
    flops: float | None
    seconds: float | None  # since the step before; None for the first one, which compiled


class Monitor:
    """A context manager around the loop; on other processes than the main one it does nothing.

    Args:
      start_step: steps that are done already; what ``log.jsonl`` says of later ones is dropped.
      settings: the run's configuration as a plain dict, for W&B.

    Raises ``UserError`` when the log cannot be written or a tracker is not installed.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: LogConfig,
        *,
        num_steps: int,
        speed: Speed,
        start_step: int = 0,
        is_main_process: bool = True,
        settings: Mapping[str, Any] | None = None,
    ):
        self._run_dir, self._config, self._speed = Path(run_dir), config, speed
        self._num_steps, self._start_step, self._step = num_steps, start_step, start_step
        self._is_main, self._settings = is_main_process, settings
        self._line: list[_Step] = []  # steps since the last line
        self._recent: deque[_Step] = deque(maxlen=RECENT)
        self._first_time: float | None = None  # when the first step was done
        self._last_time: float | None = None  # when the last step was done, later by pauses since
        self._stack = contextlib.ExitStack()
        self._trackers: list[Tracker] = []

    def __enter__(self) -> Monitor:
        if self._is_main:
            with contextlib.ExitStack() as stack:
                self._log = stack.enter_context(RunLog(self._run_dir / "log.jsonl", self._start_step))
                trackers = open_trackers(
                    self._run_dir, self._config, start_step=self._start_step, settings=self._settings
                )
                self._screen = stack.enter_context(Screen(self._num_steps, self._start_step))
                self._trackers, self._stack = trackers, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            for tracker in self._trackers:
                self._stack.callback(tracker.close, failed=error is not None)
            self.flush()

    # -- what the trainer tells -----------------------------------------------------------------

    def step(self, step: int, metrics: Mapping[str, float], *, data_wait: float, flops: float | None = None) -> None:
        """Step number ``step`` (from 1, one after the other) is done.

        Args:
          metrics: ``loss``, and others by name, such as ``learning_rate``, ``grad_norm``, ``padding`` (the share
            of positions that are padding) and ``bad_samples`` (how many were skipped so far).
          data_wait: seconds that the loop waited for this step's batch.
          flops: of this step, where they differ from ``speed.flops_per_step``.
        """
        if not self._is_main:
            return
        if step != self._step + 1:
            raise ValueError(f"step {step} does not follow step {self._step}")
        now = time.perf_counter()
        seconds = None if self._last_time is None else now - self._last_time
        self._first_time = now if self._first_time is None else self._first_time
        done = _Step(metrics, data_wait, self._speed.flops_per_step if flops is None else flops, seconds)
        self._step, self._last_time = step, now
        self._line.append(done)
        self._recent.append(done)
        if step % self._config.every == 0 or step == self._num_steps:
            self._write_line()
        self._screen.show(step, self._describe)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, such as validating: it does not count in samples a second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._last_time is not None:
                self._last_time += time.perf_counter() - start

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._is_main:
            self._write("validation", step, metrics)
            self._screen.say(f"step {step}: validation {_pairs(metrics)}")
            for tracker in self._trackers:
                tracker.numbers(step, "validation", metrics)

    def captions(self, step: int, captions: Sequence[Caption | tuple[str, str, str]]) -> None:
        """Sample captions: the picture's name, the reference and the model's text."""
        if not self._is_main:
            return
        rows = [Caption(*caption) for caption in captions]
        self._write("captions", step, {"captions": [row._asdict() for row in rows]})
        self._screen.say(f"step {step}: captions")
        for row in rows:
            for line in (f"  {row.name}", f"    reference: {row.reference}", f"    model:     {row.text}"):
                self._screen.say(line)
        for tracker in self._trackers:
            tracker.captions(step, rows)

    def event(self, step: int, text: str) -> None:
        """Something that happened: resumed, saved, a bad sample."""
        if self._is_main:
            self._write("event", step, {"text": printable(text)})
            self._screen.say(f"step {step}: {text}")

    def flush(self) -> None:
        """Write the steps since the last line, and return when the log is on the disk.

        To be called before a checkpoint: a run that goes on from it finds the losses of all its steps logged.
        """
        if self._is_main:
            self._write_line()
            self._log.sync()

    # -- lines ----------------------------------------------------------------------------------

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._log.write({"kind": kind, "step": step, **values})

    def _write_line(self) -> None:
        if not self._line:
            return
        values: dict[str, Any] = {**_summary(self._line), **_rates(self._line, self._speed)}
        self._write("train", self._step, values | {"losses": [float(done.metrics["loss"]) for done in self._line]})
        self._line = []
        for tracker in self._trackers:
            tracker.numbers(self._step, "train", {key: value for key, value in values.items() if value is not None})

    def _describe(self) -> tuple[str, float | None]:
        """The numbers of the last steps for the screen, and the seconds that are left.

        The latter by the wall clock, with validations and saves, as they will come again.
        """
        recent = list(self._recent)
        values: dict[str, Any] = {**_summary(recent), **_rates(recent, self._speed)}

        def show(key: str, style: str = "", unit: str = "") -> str:
            value = values.get(key)
            return f"-{unit}" if value is None else f"{format(value, style) if style else compact(value)}{unit}"

        numbers = (
            f"loss {show('loss', '.4f')}",
            f"learning rate {show('learning_rate', '.2e')}",
            show("samples_per_second", unit=" samples/s"),
            show("tflops_per_device", unit=" TFLOP/s per device"),
            f"MFU {show('mfu', '.1%')}",
            f"data wait {show('data_wait_ms', unit=' ms')}",
        )
        done = self._step - self._start_step - 1
        left = (time.perf_counter() - self._first_time) / done * (self._num_steps - self._step) if done else None
        return " · ".join(numbers), left


def _summary(steps: Sequence[_Step]) -> dict[str, float]:
    """One number for each metric that any of ``steps`` has."""
    names = dict.fromkeys(name for done in steps for name in done.metrics)
    columns = {name: [done.metrics[name] for done in steps if name in done.metrics] for name in names}
    return {name: column[-1] if name in LAST else statistics.fmean(column) for name, column in columns.items()}


def _rates(steps: Sequence[_Step], speed: Speed) -> dict[str, float | None]:
    """Speeds over the steps whose time is known, and the mean wait for data; None: unknown."""
    timed = [done for done in steps if done.seconds is not None]
    seconds = sum(done.seconds for done in timed)
    flops = [done.flops for done in timed]
    samples = len(timed) * speed.batch_size / seconds if seconds else None
    rate = sum(flops) / seconds / speed.num_devices if seconds and None not in flops else None
    values = {
        "samples_per_second": samples,
        "tflops_per_device": None if rate is None else rate / 1e12,
        "mfu": None if rate is None or speed.peak_flops is None else rate / speed.peak_flops,
        "data_wait_ms": statistics.fmean(done.data_wait for done in steps) * 1e3,
    }
    return {name: None if value is None else float(f"{value:.5g}") for name, value in values.items()}


def compact(value: float) -> str:
    """Three digits, or all whole ones: 0.0123, 1.23, 142, 3120."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _pairs(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


class LossGuard:
    """Stops a run that went wrong.

    Args:
      spike_factor: a loss over this many times the median of the last 100 is a spike; 0: only NaN and Inf stop.
      history: losses of the steps before, of a resumed run.
    """

    def __init__(self, spike_factor: float, history: Iterable[float] = ()):
        self._factor = spike_factor
        self._losses = deque(history, maxlen=SPIKE_WINDOW)

    def check(self, step: int, loss: float) -> None:
        """Raises ``TrainingStopped``; a median is taken once 20 losses are known."""
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"step {step}: the loss is {loss}; look at this step's samples, or lower optim.peak_lr, and start "
                "again from the last checkpoint"
            )
        if self._factor and len(self._losses) >= SPIKE_LEAST:
            median = statistics.median(self._losses)
            if loss > self._factor * median:
                raise TrainingStopped(
                    f"step {step}: the loss {loss:.4g} is over {self._factor:g} times the median {median:.4g} of the "
                    f"last {len(self._losses)} steps (log.spike_factor); lower optim.peak_lr, or raise the factor"
                )
        self._losses.append(loss)
