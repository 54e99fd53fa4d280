"""The strict matcher: a table says which source tensor becomes which parameter, both ways.

Every tensor of a file is claimed by exactly one entry, every parameter is filled exactly once, shapes
are checked, and whatever is left out is named with a reason. All that does not fit is told at once, as
a diff, before a byte is written. ``apply`` then streams tensor by tensor; ``read_back`` runs the same
table backwards.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from mgpt4_jax.checkpoint import LeafWriter, ParamsWriter, flatten, is_stacked
from mgpt4_jax.errors import UserError

from .readers import FLOAT_DTYPES, Source, TensorInfo
from .transforms import Shape, Transform, contiguous

_LISTED = 12  # lines a section of the diff may have
IN_FLIGHT_BYTES = 1 << 28
_DISK_ERRORS = re.compile(r"No space left[^\]]*|Disk quota[^\]]*|Read-only[^\]]*|Permission denied|Input/output error")
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(frozen=True)
class Rule:
    """``source`` becomes ``targets`` through ``transform``.

    With ``layers``, ``{l}`` in ``source`` runs over them, and the i-th of them is row i of the targets.
    ``shape`` is that of one source tensor.
    """

    source: str
    targets: tuple[str, ...]
    transform: Transform
    shape: Shape
    layers: range | None = None

    def places(self) -> list[tuple[str, int | None]]:
        """(source key, row of the targets or None for the whole)."""
        if self.layers is None:
            return [(self.source, None)]
        return [(self.source.format(l=layer), row) for row, layer in enumerate(self.layers)]

    def target_shapes(self) -> list[Shape]:
        """Shapes of one row, found by running the transform on a view of nothing."""
        parts = self.transform.forward(np.broadcast_to(np.zeros((), bool), self.shape))
        return [part.shape for part in parts]


@dataclass(frozen=True)
class Alias:
    """``source`` may be present and then equals the tensor ``of`` (tied weights); written again on export."""

    source: str
    of: str


@dataclass(frozen=True)
class Ignore:
    """Keys that fully match ``pattern`` are left out, for ``reason``."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Fill:
    """A parameter that no file holds; ``make`` gives its value for a shape."""

    target: str
    make: Callable[[Shape], np.ndarray]
    reason: str


Entry: TypeAlias = Rule | Alias | Ignore | Fill
Table: TypeAlias = Sequence[Entry]


@dataclass(frozen=True)
class Part:
    """The tensors of one source and the table that reads them."""

    name: str  # of the file, for messages
    tensors: Mapping[str, TensorInfo]
    table: Table
    source: Source | None = None  # None: a manifest, planned but never applied


@dataclass(frozen=True)
class Move:
    part: Part
    key: str
    rule: Rule
    row: int | None


@dataclass
class Plan:
    """What to do, checked. ``ignored`` maps a reason to the keys left out for it."""

    leaves: dict[str, Shape]
    dtypes: dict[str, np.dtype] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    aliases: list[tuple[Part, Alias]] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.leaves.values())

    @property
    def num_bytes(self) -> int:
        return sum(
            int(np.prod(shape, dtype=np.int64)) * self.dtypes[path].itemsize for path, shape in self.leaves.items()
        )


@dataclass
class _Problems:
    lines: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, line: str) -> None:
        self.lines.setdefault(kind, []).append(line)

    def error(self, names: str) -> UserError:
        """First line: how many of each kind and the first; then the diff."""
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in self.lines.items())
        first = next(iter(self.lines.values()))[0]
        text = [f"{names}: does not fit the model: {counts}; first: {first.strip()}"]
        for kind, lines in self.lines.items():
            text += [f"{kind}:", *lines[:_LISTED]]
            if len(lines) > _LISTED:
                text.append(f"  ... and {len(lines) - _LISTED} more")
        return UserError("\n".join(text))


def plan(parts: Sequence[Part], abstract: Any) -> Plan:
    """Match the tables of all parts against their keys and the abstract parameters (``jax.eval_shape``).

    Raises ``UserError`` with a diff of everything that does not fit.
    """
    result = Plan({path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()})
    problems, filled = _Problems(), dict.fromkeys(result.leaves, 0)
    for part in parts:
        _plan_part(part, result, filled, problems)
    for path, count in filled.items():
        if count != (rows := _rows(result, path)):
            problems.add("parameters not filled once", f"  {path}: {count} of {rows} parts")
    if problems.lines:
        raise problems.error(", ".join(part.name for part in parts))
    return result


def _rows(result: Plan, path: str) -> int:
    """In how many parts a parameter is filled: its layers, if it has some."""
    return result.leaves[path][0] if is_stacked(path) else 1


def _plan_part(part: Part, result: Plan, filled: dict[str, int], problems: _Problems) -> None:
    rules = {key: (rule, row) for rule in part.table if isinstance(rule, Rule) for key, row in rule.places()}
    aliases = {entry.source: entry for entry in part.table if isinstance(entry, Alias)}
    ignores = [(re.compile(entry.pattern), entry.reason) for entry in part.table if isinstance(entry, Ignore)]
    for key, info in part.tensors.items():
        reasons = [reason for pattern, reason in ignores if pattern.fullmatch(key)]
        claims = (key in rules) + (key in aliases) + len(reasons)
        if claims > 1:
            raise ValueError(f"{key} is claimed by {claims} entries of the table of {part.name}")
        if key in rules:
            _plan_move(Move(part, key, *rules[key]), info, result, problems)
        elif key in aliases:
            result.aliases.append((part, aliases[key]))
        elif reasons:
            result.ignored.setdefault(reasons[0], []).append(key)
        else:
            problems.add("unknown tensors", f"  + {key} {list(info.shape)} ({part.name})")
    for key in (key for key in rules if key not in part.tensors):
        problems.add("missing tensors", f"  - {key} {list(rules[key][0].shape)} ({part.name})")
    for rule in (entry for entry in part.table if isinstance(entry, Rule)):
        _check_targets(rule, result, filled)
    for fill in (entry for entry in part.table if isinstance(entry, Fill)):
        filled[fill.target] += _rows(result, fill.target)
        result.fills.append(fill)
        result.dtypes[fill.target] = np.dtype(np.float32)


def _plan_move(move: Move, info: TensorInfo, result: Plan, problems: _Problems) -> None:
    if tuple(info.shape) != move.rule.shape:
        expected = list(move.rule.shape)
        problems.add(
            "tensors of another shape", f"  ! {move.key} {list(info.shape)}, expected {expected} ({move.part.name})"
        )
        return
    if info.dtype not in FLOAT_DTYPES:
        problems.add("tensors of another type", f"  ! {move.key} {info.dtype}, expected floats; is the file quantised?")
        return
    dtype = move.rule.transform.dtype or FLOAT_DTYPES[info.dtype]
    for target in move.rule.targets:
        result.dtypes[target] = _common_dtype(result.dtypes.get(target, dtype), dtype)
    result.moves.append(move)


def _check_targets(rule: Rule, result: Plan, filled: dict[str, int]) -> None:
    """The table itself fits the model: an error here is ours, not the user's."""
    for target, shape in zip(rule.targets, rule.target_shapes(), strict=True):
        whole = shape if rule.layers is None else (len(rule.layers), *shape)
        if result.leaves.get(target) != whole:
            raise ValueError(f"{rule.source} makes {target} {whole}, the model has {result.leaves.get(target)}")
        filled[target] += 1 if rule.layers is None else len(rule.layers)


def _common_dtype(one: np.dtype, other: np.dtype) -> np.dtype:
    """Layers of one parameter share a dtype; float16 and bfloat16 both fit float32 exactly."""
    return one if one == other else np.dtype(np.float32)


def apply(plan: Plan, writer: ParamsWriter, progress: Callable[[int, int], None] | None = None) -> None:
    """Read, transform and write one tensor after the other, in the order of the files.

    ``progress(done, total)`` counts bytes of the source. A NaN or infinity raises ``UserError``.
    """
    done, total = 0, sum(move.part.tensors[move.key].num_bytes for move in plan.moves)
    for part, alias in plan.aliases:
        _check_tied(part, alias)
    with contextlib.closing(_Sink(plan, writer)) as sink:
        for fill in plan.fills:
            sink.write(fill.target, None, fill.make(plan.leaves[fill.target]))
        for move in plan.moves:
            values = _read(move.part, move.key)
            try:
                made = move.rule.transform.forward(values)
            except ValueError as error:
                raise UserError(f"{move.part.name}: {move.key}: {error}") from error
            for target, array in zip(move.rule.targets, made, strict=True):
                sink.write(target, move.row, array)
            done += values.nbytes
            if progress is not None:
                progress(done, total)


def _read(part: Part, key: str) -> np.ndarray:
    if part.source is None:
        raise ValueError(f"{part.name} is a manifest: it has no values")
    values = part.source.read(key)
    if is_any_non_finite(values):
        raise UserError(f"{part.name}: {key} holds NaN or infinity; the file is damaged")
    return values


class _Sink:
    """Writes in the background, with a bounded amount in flight; closing waits for the rest."""

    def __init__(self, plan: Plan, writer: ParamsWriter):
        self._plan, self._writer = plan, writer
        self._leaves: dict[str, LeafWriter] = {}
        self._in_flight: deque[tuple[LeafWriter, int]] = deque()
        self._bytes = 0

    def write(self, path: str, row: int | None, values: np.ndarray) -> None:
        dtype = self._plan.dtypes[path]
        if path not in self._leaves:
            self._leaves[path] = self._writer.create(path, self._plan.leaves[path], dtype)
        leaf, values = self._leaves[path], contiguous(values).astype(dtype, copy=False)
        self._wait(IN_FLIGHT_BYTES - values.nbytes)
        with _told_plainly():
            leaf.write(row, values)
        self._in_flight.append((leaf, values.nbytes))
        self._bytes += values.nbytes

    def close(self) -> None:
        """Even after a failure nothing may be written any more: the directory is about to be removed."""
        failures = []
        while self._in_flight:
            try:
                self._wait(0)
            except UserError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _wait(self, most: int) -> None:
        """Until at most so many bytes are in flight."""
        while self._in_flight and self._bytes > most:
            leaf, size = self._in_flight.popleft()
            self._bytes -= size
            with _told_plainly():
                leaf.flush()


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """TensorStore reports a full disk as a ``ValueError``."""
    try:
        yield
    except (ValueError, OSError) as error:
        if (reason := _DISK_ERRORS.search(str(error))) is None:
            raise
        raise UserError(f"the model cannot be written: {reason[0]}") from error


def _check_tied(part: Part, alias: Alias) -> None:
    if alias.of not in part.tensors:
        raise UserError(f"{part.name}: {alias.source} is tied to {alias.of}, which is missing")
    one, other = _read(part, alias.source), _read(part, alias.of)
    if one.shape != other.shape or not np.array_equal(_bits(one), _bits(other)):
        raise UserError(f"{part.name}: {alias.source} differs from {alias.of}, to which it is tied in this model")


def is_any_non_finite(values: np.ndarray) -> bool:
    """Looks at the exponent bits: as quick for float16 and bfloat16 as for float32."""
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        return False
    bits = _bits(values)
    mask = bits.dtype.type(mask)
    step = 1 << 18  # stays in the cache
    return any(((bits[at : at + step] & mask) == mask).any() for at in range(0, bits.size, step))


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def read_back(
    table: Table, read: Callable[[str, int | None], np.ndarray]
) -> dict[str, tuple[Rule, Callable[[], np.ndarray]]]:
    """The table backwards: for each source key its rule, and its tensor when asked.

    ``read(path, row)`` gives a parameter or one row of it (``checkpoint.read_leaf``).
    """

    def tensor(rule: Rule, row: int | None) -> np.ndarray:
        values = rule.transform.inverse([read(target, row) for target in rule.targets], rule.shape)
        return contiguous(values)

    rules = ((rule, *place) for rule in table if isinstance(rule, Rule) for place in rule.places())
    return {key: (rule, functools.partial(tensor, rule, row)) for rule, key, row in rules}
