"""TensorBoard and Weights & Biases, for runs that ask for them and have them installed."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import LogConfig

INSTALL = "pip install 'mgpt4-jax[logging]'"


class Caption(NamedTuple):
    """A picture's name, what its data set says of it, and what the model says."""

    name: str
    reference: str
    text: str


class Tracker(Protocol):
    """Gets what ``log.jsonl`` gets. ``group`` is ``train`` or ``validation``."""

    def numbers(self, step: int, group: str, values: Mapping[str, float]) -> None: ...

    def captions(self, step: int, captions: Sequence[Caption]) -> None: ...

    def close(self, failed: bool) -> None: ...


def open_trackers(
    run_dir: Path, config: LogConfig, *, start_step: int, settings: Mapping[str, Any] | None
) -> list[Tracker]:
    """Those that ``config`` asks for. Raises ``UserError`` for a package that is not installed."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(_package("tensorboardX", "log.tensorboard"), run_dir, start_step))
    if config.wandb:
        trackers.append(Wandb(_package("wandb", "log.wandb"), run_dir, settings))
    return trackers


def require_packages(config: LogConfig) -> None:
    """Refuse what ``open_trackers`` would, at the beginning of a run and not once all is loaded and compiled."""
    if config.tensorboard:
        _package("tensorboardX", "log.tensorboard")
    if config.wandb:
        _package("wandb", "log.wandb")


def _package(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{key} is true and {name} is not installed: {INSTALL}, or set {key} to false") from error


class TensorBoard:
    """Event files in ``RUN/tensorboard``; what an earlier attempt wrote beyond ``start_step`` is hidden."""

    def __init__(self, package: Any, run_dir: Path, start_step: int):
        self._writer = package.SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def numbers(self, step: int, group: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def captions(self, step: int, captions: Sequence[Caption]) -> None:
        rows = [f"| {' | '.join(_cell(value) for value in caption)} |" for caption in captions]
        self._writer.add_text("captions", "\n".join(["| picture | reference | model |", "|---|---|---|", *rows]), step)

    def close(self, failed: bool) -> None:
        self._writer.close()


def _cell(text: str) -> str:
    """Fit for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


class Wandb:
    """A run of the project ``mgpt4-jax``, named as the run directory; a resumed run goes on in it.

    W&B takes no step twice, so steps that are repeated after a crash keep their first values there.
    """

    def __init__(self, package: Any, run_dir: Path, settings: Mapping[str, Any] | None):
        self._wandb = package
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run = package.init(
                project="mgpt4-jax",
                name=run_dir.absolute().name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=str(run_dir),
                config=dict(settings or {}),
            )
        except package.Error as error:
            raise UserError(f"log.wandb: {_cell(str(error))}; mend it, or set log.wandb to false") from error

    def numbers(self, step: int, group: str, values: Mapping[str, float]) -> None:
        self._run.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def captions(self, step: int, captions: Sequence[Caption]) -> None:
        table = self._wandb.Table(columns=["picture", "reference", "model"], data=[list(row) for row in captions])
        self._run.log({"captions": table}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
