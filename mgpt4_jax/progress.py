"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere, nothing for quick work."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0

Report = Callable[[int, int], None]


@contextlib.contextmanager
def progress(what: str) -> Iterator[Report]:
    """Yields ``report(done, total)``; it may be called as often as one likes, from one thread."""
    with _bar(what) if sys.stderr.isatty() else contextlib.nullcontext(_lines(what)) as report:
        yield report


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _lines(what: str) -> Report:
    start = time.monotonic()
    last = start + QUIET_SECONDS - LINE_SECONDS

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            print(f"{what}: {done / max(total, 1):.0%} after {now - start:.0f} s", file=sys.stderr, flush=True)

    return report
