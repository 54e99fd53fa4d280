"""What ``verify`` found: one row a comparison, and the report of all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from mgpt4_jax.checkpoint import ModelManifest, nest, read_leaf


@dataclass(frozen=True)
class Row:
    """One comparison. ``max_rel`` is the largest error over (1 + the largest entry of its vector)."""

    component: str
    max_abs: float
    max_rel: float
    mean_abs: float
    cosine: float
    weights: bool | None  # parameters equal to the bit; None where there are none to compare
    passed: bool


@dataclass(frozen=True)
class VerifyReport:
    """``passed`` only if every row did; printing it with rich draws the table."""

    model: str
    tolerance: float
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.failures

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("component", "max abs", "max rel", "mean", "cosine", "weights", "verdict")
        for row in self.rows:
            numbers = [f"{value:.1e}" for value in (row.max_abs, row.max_rel, row.mean_abs)]
            weights = {True: "equal", False: "[red]differ[/]", None: ""}[row.weights]
            verdict = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
            table.add_row(row.component, *numbers, f"{row.cosine:.7f}", weights, verdict)
        for column in table.columns[1:5]:
            column.justify = "right"
        yield table
        yield from (f"not verified: {reason}" for reason in self.skipped)
        yield self.summary()

    def summary(self) -> str:
        """One line, marked up for rich."""
        if not self.rows:
            return "[red]nothing was compared[/]"
        if self.passed:
            return f"[green]pass[/]: {len(self.rows)} comparisons agree within {self.tolerance:g}"
        first = self.failures[0].component
        return f"[red]FAIL[/]: {len(self.failures)} of {len(self.rows)} comparisons, the first is {first}"


@dataclass
class Comparison:
    """Collects rows, and reads our parameters a layer at a time."""

    model_dir: Path
    manifest: ModelManifest
    tolerance: float
    progress: Callable[[int, int], None] | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    num_layers: int = 0  # that will be compared, for `progress`
    _layers_done: int = 0

    def add(self, component: str, ours: Any, theirs: Any, weights: bool | None = None) -> None:
        """Compare along the last axis: ``ours`` may be of jax, ``theirs`` of PyTorch; values must be finite."""
        a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if a.shape != b.shape:
            raise ValueError(f"{component}: ours has shape {a.shape}, theirs {b.shape}")
        error = np.abs(a - b)
        size = 1 + (np.abs(b).max(axis=-1, keepdims=True) if b.ndim else np.abs(b))
        max_rel = float((error / size).max())
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosine = float(np.vdot(a, b)) / norms if norms else float(not error.any())
        passed = bool(max_rel <= self.tolerance and weights is not False)  # NaN compares false
        self.rows.append(Row(component, float(error.max()), max_rel, float(error.mean()), cosine, weights, passed))

    def add_pair(self, component: str, pair: np.ndarray) -> None:
        """Compare the end of both sides' own walks: the first half is ours."""
        ours, theirs = np.split(pair, 2)
        self.add(component, ours, theirs)

    def layer_done(self) -> None:
        self._layers_done += 1
        if self.progress is not None:
            self.progress(self._layers_done, self.num_layers)

    def leaf(self, path: str) -> np.ndarray:
        return read_leaf(self.model_dir, path).astype(np.float32, copy=False)

    def params(self, prefix: str, layer: int | None = None, *, without: str = "\0") -> dict[str, Any]:
        """The parameters below ``prefix`` in float32, of one layer of a stack if ``layer`` is given."""
        paths = [path for path in self.manifest.dtypes if path.startswith(f"{prefix}/")]
        paths = [path for path in paths if not path.startswith(f"{prefix}/{without}")]
        values = {path: read_leaf(self.model_dir, path, layer).astype(np.float32, copy=False) for path in paths}
        return nest({path.removeprefix(f"{prefix}/"): value for path, value in values.items()})


def same_values(params: Any, module: Any) -> bool:
    """Whether our parameters hold the same float32 values as a PyTorch module, in whatever order."""
    theirs = (value.numpy() for value in module.state_dict().values())
    return fingerprint(jax.tree.leaves(params)) == fingerprint(theirs)


def fingerprint(arrays: Iterable[np.ndarray]) -> tuple[int, int]:
    """The sum (modulo 2**64) and the exclusive or of the bits of all float32 values.

    Neither the order of the values nor zeros (EVA's key bias, which we do not keep) change them; a change
    of any single value does.
    """
    total = mixed = 0
    for array in arrays:
        bits = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32)
        total, mixed = total + int(bits.sum(dtype=np.uint64)), mixed ^ int(np.bitwise_xor.reduce(bits))
    return total % 2**64, mixed


def compare_step(
    table: Comparison,
    component: str,
    pair: np.ndarray,
    ours: Callable[[np.ndarray], Any],
    theirs: Callable[[Any], Any],
    weights: bool | None = None,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """One layer of both sides; ``pair`` stacks our own states so far and PyTorch's, and so does the result.

    PyTorch gets its own, we get both: the row compares what came of PyTorch's. ``keep`` masks padding out.
    """
    import torch

    chained, local = np.split(np.asarray(ours(pair)), 2)
    out = theirs(torch.from_numpy(np.array(np.split(pair, 2)[1]))).numpy()
    table.add(component, *((local, out) if keep is None else (local[keep], out[keep])), weights=weights)
    return np.concatenate([chained, out])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape, np.float32)


def twice(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, x])


def linear(params: Any, x: Any) -> jax.Array:
    return jnp.asarray(x) @ params["kernel"] + params["bias"]
