"""Meshes, and the one table that maps the logical axes of the modules to mesh axes.

A mesh has the axes ``data`` (different samples), ``fsdp`` (samples too, with parameters cut up) and
``tensor`` (heads, feed-forward and vocabulary cut up). ``pjit`` is ``jax.jit`` with ``NamedSharding`` today.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
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
    "rank": None,
}
"""Logical axis of a parameter -> mesh axis. An axis that is not here is an error, never a silent copy."""

BATCH = P(("data", "fsdp"))
"""Samples are cut over both axes that do not cut heads."""

ACTIVATIONS = (("batch", BATCH[0]), ("replica", "data"), ("embed", "fsdp"))
"""Logical axis of an activation -> mesh axes, for ``nn.logical_axis_rules``."""

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


def make_mesh(text: str | None = None, all_devices: bool = False) -> Mesh:
    """A mesh over the first devices that it needs.

    Args:
      text: as ``parse_mesh`` reads it.
      all_devices: without a text take every device along ``data`` (as training does), and not one alone.

    Raises:
      UserError: there are too few devices; or, of several processes, some device would idle or the devices of a
        process would not hold whole rows of the batch.
    """
    sizes = parse_mesh(text)
    have = jax.device_count()
    if all_devices and not text:
        sizes["data"] = have
    need = math.prod(sizes.values())
    if need > have:
        raise UserError(f"mesh {text!r} needs {need} devices and {have} are here; lower an axis")
    if need < have and jax.process_count() > 1:
        raise UserError(f"mesh {text!r} uses {need} of the {have} devices of {jax.process_count()} processes; use all")
    if need < have and all_devices:
        _log.warning("mesh %s leaves %d of %d devices unused", text, have - need, have)
    devices = arrange(jax.devices()[:need], tuple(sizes.values()))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the shape of the mesh, such that each process's hold whole, neighbouring rows of the batch.

    That is jax's order, which follows the wires of a TPU pod, where it does so and makes no process load more than
    need be; else that of the processes, in which ``tensor`` and ``fsdp`` stay within a host as far as they fit.
    """
    by_process = np.array(sorted(devices, key=lambda device: (device.process_index, device.id))).reshape(shape)
    fewest = _rows_of_each(by_process)
    try:
        by_wires = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # axes that are no product of the pod's own
        by_wires = by_process
    found = _rows_of_each(by_wires)
    if found is not None and (fewest is None or found <= fewest):
        return by_wires
    if fewest is None:
        sizes = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        count = max(np.unique([device.process_index for device in devices], return_counts=True)[1])
        raise UserError(f"mesh {sizes}: a process has {count} devices; tensor must divide them or be a multiple")
    return by_process


def _rows_of_each(devices: np.ndarray) -> int | None:
    """How many rows every process holds, if as many as the others, side by side, all or none in common with another."""
    rows: dict[int, set[int]] = {}
    for (data, fsdp, _), device in np.ndenumerate(devices):
        rows.setdefault(device.process_index, set()).add(data * devices.shape[1] + fsdp)
    count = len(next(iter(rows.values())))
    is_whole = all(
        len(share) == count and max(share) - min(share) == count - 1 and min(share) % count == 0
        for share in rows.values()
    )
    return count if is_whole else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For an array whose first axis is the samples of the batch."""
    return NamedSharding(mesh, BATCH)


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch over all devices that this process must load; with ``tensor`` over hosts several load them.

    Raises:
      UserError: the rows cannot be shared out evenly.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}; "
            f"take {max(batch_size // shards, 1) * shards}"
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    parts = [index[0].indices(batch_size) for index in indices]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def put_batch(mesh: Mesh, arrays: Any) -> Any:
    """Arrays of this process's rows -> the arrays of the whole batch, cut over the mesh.

    Args:
      arrays: a tree of numpy arrays; the first axis of each is the rows that ``process_rows`` named.

    Raises:
      UserError: the rows cannot be shared out evenly.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    here = process_rows(mesh, shards)
    count, sharding = here.stop - here.start, batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        if len(array) % count:
            raise UserError(f"{len(array)} rows of a batch cannot be cut into the {count} parts of this process")
        shape = (len(array) // count * shards, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(put, arrays)


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
