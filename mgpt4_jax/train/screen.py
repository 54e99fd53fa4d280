"""What a person at the terminal sees of a run: a bar and a line of numbers, or plain lines now and then.

Everything goes to stderr. See ``progress.py`` for shorter work.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable
from types import TracebackType

from mgpt4_jax.progress import LINE_SECONDS

REFRESH_SECONDS = 0.2


class Screen:
    """A context manager; ``show`` may be called at every step, ``say`` prints a line that stays."""

    def __init__(self, num_steps: int, start_step: int):
        self._stack = contextlib.ExitStack()
        self._num_steps, self._start_step = num_steps, start_step
        self._terminal: Terminal | None = None
        self._last_time = -LINE_SECONDS

    def __enter__(self) -> Screen:
        if sys.stderr.isatty():
            self._terminal = self._stack.enter_context(Terminal(self._num_steps, self._start_step))
        return self

    def show(self, step: int, describe: Callable[[], tuple[str, float | None]]) -> None:
        """``describe`` gives the numbers and the seconds left; it is asked now and then only."""
        now = time.monotonic()
        pause = LINE_SECONDS if self._terminal is None else REFRESH_SECONDS
        if now - self._last_time < pause and step < self._num_steps:
            return
        self._last_time = now
        numbers, seconds = describe()
        left = "" if seconds is None else f"{duration(seconds)} left"
        if self._terminal is not None:
            self._terminal.show(step, numbers, left)
        else:
            self.say(" · ".join(filter(None, (f"step {step}/{self._num_steps}", numbers, left))))

    def say(self, text: str) -> None:
        if self._terminal is not None:
            self._terminal.say(printable(text))
        else:
            print(printable(text), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Terminal:
    """The lines that stay at the bottom: the bar, and the numbers of the last steps."""

    def __init__(self, num_steps: int, start_step: int):
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
        from rich.text import Text

        columns = TextColumn("training"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn()
        self._progress = Progress(*columns, TextColumn("{task.fields[left]}"))
        self._task = self._progress.add_task("", total=num_steps, completed=start_step, left="")
        self._numbers = Text("compiling the first step")
        self._console = Console(stderr=True)
        self._live = Live(Group(self._progress, self._numbers), console=self._console, transient=True)

    def show(self, step: int, numbers: str, left: str) -> None:
        self._progress.update(self._task, completed=step, left=left)
        self._numbers.plain = numbers

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Terminal:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)


def printable(text: str) -> str:
    """One line without control codes: names and captions are the words of others."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def duration(seconds: float) -> str:
    """``3725`` as ``1:02:05``."""
    return str(datetime.timedelta(seconds=round(seconds)))
