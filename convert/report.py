"""What a conversion did, for people (a table) and for programs (fields)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from mgpt4_jax.checkpoint import ModelManifest
from mgpt4_jax.config import ModelConfig

from .inferred import Inferred
from .rules import Plan


@dataclass(frozen=True)
class Component:
    """One part of a model: vit, ln_vision, qformer, projection, llama, ..."""

    name: str
    num_parameters: int
    num_tensors: int  # of the source files that went into it
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The outcome of ``convert``; printing it with rich draws the table."""

    out: Path
    config: ModelConfig
    template: str
    num_parameters: int
    components: tuple[Component, ...]
    ignored: dict[str, list[str]]  # reason -> keys
    filled: dict[str, list[str]]  # reason -> parameters that no file holds
    resized: str | None
    warnings: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("component", "parameters", "tensors", "dtype")
        for component in self.components:
            numbers = (f"{component.num_parameters:,}", str(component.num_tensors))
            table.add_row(component.name, *numbers, ", ".join(component.dtypes))
        table.add_row("all", f"{self.num_parameters:,}", str(sum(c.num_tensors for c in self.components)), "")
        for column in table.columns[1:3]:
            column.justify = "right"
        yield table
        yield from map(escape, self.notes())

    def notes(self) -> list[str]:
        """One line each: what was resized, copied, left out or filled in, warnings, and where the model is."""
        lines = [*([self.resized] if self.resized else []), *self.remarks]
        for reason, keys in self.ignored.items():
            lines.append(f"left out {len(keys)}: {reason} ({_examples(keys)})")
        for reason, paths in self.filled.items():
            lines.append(f"filled in {', '.join(paths)}: {reason}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return [*lines, f"{self.out}: {self.config.architecture}, template {self.template}"]


def _examples(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]}, ..."


def summarize(out: Path, plan: Plan, inferred: Inferred, manifest: ModelManifest) -> Report:
    filled: dict[str, list[str]] = {}
    for fill in plan.fills:
        filled.setdefault(fill.reason, []).append(fill.target)
    return Report(
        out=out,
        config=manifest.config,
        template=manifest.template,
        num_parameters=manifest.num_parameters,
        components=components(plan),
        ignored=plan.ignored,
        filled=filled,
        resized=inferred.resized,
        warnings=tuple(inferred.warnings),
        remarks=tuple(inferred.remarks),
    )


def components(plan: Plan) -> tuple[Component, ...]:
    tensors: dict[str, int] = {}
    for move in plan.moves:
        name = move.rule.targets[0].split("/")[0]
        tensors[name] = tensors.get(name, 0) + 1
    parts = []
    for name in dict.fromkeys(path.split("/")[0] for path in plan.leaves):
        paths = [path for path in plan.leaves if path.split("/")[0] == name]
        count = sum(int(np.prod(plan.leaves[path], dtype=np.int64)) for path in paths)
        dtypes = tuple(sorted({plan.dtypes[path].name for path in paths}))
        parts.append(Component(name, count, tensors.get(name, 0), dtypes))
    return tuple(parts)
