"""Trainers as processes of their own, that can be killed at any moment and are cheap to start again.

They are forked from a process that has imported everything and has no thread and no device yet.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml

from mgpt4_jax.cli import main

LIMIT = 300  # seconds that anything may take on the busiest machine
_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "mgpt4_jax.train.loop", "transformers", "matplotlib.pyplot"])


def in_child(function: Callable[..., None], *arguments: Any) -> float:
    """Call ``function`` of a module in a process of its own, which must end well: the seconds until its end."""
    process = _CONTEXT.Process(target=_quietly, args=(function, *arguments))
    begin = time.monotonic()
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    return time.monotonic() - begin


def _quietly(function: Callable[..., None], *arguments: Any) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    function(*arguments)


class Attempt:
    """``mgpt4 train``, running. What it says on stderr goes to ``screen``."""

    def __init__(self, config: dict[str, Any], screen: Path) -> None:
        self.run, self.screen = Path(config["run"]), screen
        path = self.run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        screen.write_text("")
        arguments = ["train", "--config", str(path)]
        self._process = _CONTEXT.Process(target=_train, args=(arguments, screen))
        self._process.start()

    def wait_for(self, moment: Callable[[], bool]) -> bool:
        """Whether ``moment`` came before the attempt ended; it is asked for about once a millisecond."""
        end = time.monotonic() + LIMIT
        while self._process.is_alive():
            if moment():
                return True
            assert time.monotonic() < end, f"waited too long; the trainer says: {self.said()}"
            time.sleep(0.0005)
        return False

    def kill(self) -> None:
        """SIGKILL: nothing of it runs after this line."""
        self._process.kill()
        self._process.join(LIMIT)

    def exit_code(self) -> int:
        """Waits for the end; negative: the signal that killed it."""
        self._process.join(LIMIT)
        assert self._process.exitcode is not None, self.said()
        return self._process.exitcode

    def said(self) -> str:
        return self.screen.read_text()


def _train(arguments: list[str], screen: Path) -> None:
    with screen.open("w") as file:
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_num_cpu_devices", 1)
    sys.exit(main(arguments))
