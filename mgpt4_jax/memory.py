"""Bytes on devices: what is free, what arrays of given shardings weigh, and how sizes are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def free_memory(device: jax.Device, sharing: int = 1) -> int | None:
    """Bytes that can still be taken; simulated CPU devices share the machine's. None: the device does not say."""
    if device.platform == "cpu":
        info = Path("/proc/meminfo")
        if not info.exists():
            return None
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 // sharing
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def bytes_per_device(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> int:
    """What one device holds of an array."""
    return math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize


def readable(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
