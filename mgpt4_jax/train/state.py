"""What a run holds on its devices: frozen parameters, and the state that steps change and checkpoints keep.

Parameters are split once, by path, into a trainable tree and a frozen one. Only the first is differentiated,
has moments and is saved; the second lies there in the compute dtype.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgpt4_jax.checkpoint import flatten, nest
from mgpt4_jax.errors import UserError
from mgpt4_jax.typing import Array, Int, Params, PRNGKey

ADAPTERS = "*_lora/*"
"""Paths of LoRA adapters: always trained."""


KEY_IMPL = "threefry2x32"  # drawn alike on every backend, however the arrays are cut


class TrainState(NamedTuple):
    """``average`` is the moving average of ``trainable``, or None."""

    step: Int[Array, ""]
    trainable: Params
    optimizer: Any
    average: Params | None
    key: PRNGKey


def trainable_paths(paths: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The parameters that are trained; a pattern that names none is refused."""
    paths = set(paths)
    chosen = set(fnmatch.filter(paths, ADAPTERS))
    for pattern in patterns:
        found = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
        if not found:
            parts = ", ".join(sorted({f"{path.split('/')[0]}/*" for path in paths}))
            raise UserError(f"trainable: {pattern!r} names no parameter; the parts are {parts}")
        chosen |= found
    return chosen


def split(params: Params, trained: set[str]) -> tuple[Params, Params]:
    """(trainable, frozen) trees of ``params``."""
    leaves = flatten(params)
    return (
        nest({path: leaf for path, leaf in leaves.items() if path in trained}),
        nest({path: leaf for path, leaf in leaves.items() if path not in trained}),
    )


def join(trainable: Params, frozen: Params) -> Params:
    """The whole tree again."""
    return nest({**flatten(frozen), **flatten(trainable)})


def make_state(
    trainable: Params, optimizer: optax.GradientTransformation, *, seed: int, with_average: bool
) -> TrainState:
    """The state before the first step. Under ``jit``: nothing here looks at values."""
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    average = jax.tree.map(jnp.copy, trainable) if with_average else None
    return TrainState(
        jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average, jax.random.key(seed, impl=KEY_IMPL)
    )


def state_shardings(
    trainable_shardings: Params, optimizer: optax.GradientTransformation, abstract: TrainState, mesh: Mesh
) -> TrainState:
    """Moments lie as their parameters do; what is counted lies whole on every device."""
    whole = NamedSharding(mesh, P())
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.optimizer,
        trainable_shardings,
        transform_non_params=lambda _: whole,
    )
    average = None if abstract.average is None else trainable_shardings
    return TrainState(whole, trainable_shardings, moments, average, whole)
