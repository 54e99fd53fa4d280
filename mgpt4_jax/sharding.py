"""Meshes, and the one table that maps the logical axes of the modules to mesh axes.

A mesh has the axes ``data`` (different samples), ``fsdp`` (samples too, with parameters cut up) and
``tensor`` (heads, feed-forward and vocabulary cut up). ``pjit`` is ``jax.jit`` with ``NamedSharding`` today.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import boxed_params

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}
"""Logical axis of a parameter -> mesh axis. An axis that is not here is an error, never a silent copy."""

BATCH = P(("data", "fsdp"))
"""Samples are cut over both axes that do not cut heads."""

_log = logging.getLogger(__name__)


def parse_mesh(text: str | None) -> dict[str, int]:
    """``"data=2,fsdp=4"`` -> sizes of all three axes (1 where not named); None or "" is one device."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, (text or "").split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in sizes or not size.strip().isdecimal() or int(size) < 1:
            raise UserError(f"mesh {text!r}: cannot read {part!r}; write for example 'data=2,fsdp=2,tensor=2'")
        sizes[name.strip()] = int(size)
    return sizes


def make_mesh(text: str | None = None) -> Mesh:
    """A mesh over the first devices that it needs."""
    sizes = parse_mesh(text)
    need, have = math.prod(sizes.values()), jax.device_count()
    if need > have:
        raise UserError(f"mesh {text!r} needs {need} devices and {have} are here; lower an axis")
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:need])


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """A ``NamedSharding`` for each parameter, in the tree of ``models.abstract_params``."""

    def one(path: tuple[Any, ...], box: Any) -> NamedSharding:
        names = box.names if isinstance(box, nn.LogicallyPartitioned) else (None,) * box.ndim
        shape = box.value.shape if isinstance(box, nn.LogicallyPartitioned) else box.shape
        return NamedSharding(mesh, spec_of(names, shape, mesh, jax.tree_util.keystr(path, simple=True, separator="/")))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, boxed_params(config), is_leaf=is_box)


def spec_of(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, what: str) -> P:
    """The partition of one array; an axis that does not divide its dimension is left whole, and said."""
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = None if name is None else RULES[name]
        if axis in spec:  # a mesh axis cuts one dimension only
            axis = None
        if axis is not None and size % mesh.shape[axis]:
            _log.info("%s: %s of %d is not divisible by %s=%d, kept whole", what, name, size, axis, mesh.shape[axis])
            axis = None
        spec.append(axis)
    return P(*spec)
