"""Programs side by side: one process a side, the same tasks, interleaved rounds.

Each side runs in its own process and waits while another one works. A round does every task once on each side, in
alternating order, so that what else the machine does in the meantime hits all.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIDES = ("torch", "jax")

Answer = dict[str, float]
"""What a side says of a task that it did: its ``seconds``, and whatever else was measured."""

Answers = dict[str, dict[str, list[Answer]]]
"""Of each task, of each side, of each round."""


def measure(
    program: str,
    arguments: Sequence[str],
    tasks: Mapping[str, Mapping[str, Any]],
    rounds: int,
    *,
    sides: Sequence[str] = SIDES,
    at_once: bool = True,
) -> Answers:
    """Do every task on each side, in ``rounds`` rounds after one that warms up and is dropped.

    Args:
      program: is started once a side, with ``arguments`` and ``--side NAME``; it has to ``serve``.
      tasks: keyword arguments of the function that is served, to which the number of the round is added as ``seed``.
      at_once: the sides live at the same time and take turns; else one follows the other, for want of memory.
    """
    answers: Answers = {task: {side: [] for side in sides} for task in tasks}
    for group in (sides,) if at_once else ((side,) for side in sides):
        processes = {side: _start([sys.executable, program, *arguments, "--side", side]) for side in group}
        for number in range(rounds + 1):
            for task, fields in tasks.items():
                for side in group if number % 2 else reversed(group):
                    answer = _ask(processes[side], {**fields, "seed": number})
                    if number:
                        answers[task][side].append(answer)
            print(f"round {number} of {rounds}" + (" (warm-up)" if number == 0 else ""), file=sys.stderr, flush=True)
        for process in processes.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    return answers


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen[str], task: dict[str, Any]) -> Answer:
    process.stdin.write(json.dumps(task) + "\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    answer = process.stdout.readline()  # type: ignore[union-attr]
    if not answer:
        raise SystemExit(f"a side stopped while doing {task}")
    return json.loads(answer)


def serve(run: Callable[..., Answer]) -> None:
    """Do the tasks that come from stdin, one JSON line each."""
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def print_table(answers: Answers, what: str) -> None:
    """Medians of the times, and the median of the rounds' ratios: PyTorch's time / ours, above 1 we are faster."""
    rounds = len(next(iter(answers.values()))["jax"])
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{what}, {len(os.sched_getaffinity(0))} cores ({platform.machine()}), load {load}, ", end="")
    print(f"{rounds} interleaved rounds, {time.strftime('%Y-%m-%d')}\n")
    print("| task | PyTorch, ms | ours, ms | ratio (median of rounds) | least .. most |")
    print("|---|---|---|---|---|")
    for task in answers:
        for key in ("seconds", "cpu_seconds"):
            if key in answers[task]["jax"][0]:
                print(f"| {task}{', processor time' if key == 'cpu_seconds' else ''} | {_row(answers[task], key)} |")


def _row(sides: dict[str, list[Answer]], key: str) -> str:
    theirs, ours = ([answer[key] for answer in sides[side]] for side in SIDES)
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    medians = f"{statistics.median(theirs) * 1e3:.1f} | {statistics.median(ours) * 1e3:.1f}"
    return f"{medians} | {statistics.median(ratios):.2f} | {min(ratios):.2f} .. {max(ratios):.2f}"


def timed(action: Callable[[], Any]) -> float:
    """Seconds that ``action`` took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def times(action: Callable[[], Any]) -> Answer:
    """Seconds that ``action`` took, and seconds of processor time of all threads.

    The second says more on a machine that others use too, but threads that wait by spinning, as PyTorch's do, count
    as work: compare it on one core (``taskset -c 0``).
    """
    start = time.process_time()
    seconds = timed(action)
    return {"seconds": seconds, "cpu_seconds": time.process_time() - start}
