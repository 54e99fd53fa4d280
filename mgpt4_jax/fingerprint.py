"""Fingerprints of parameters: integer arithmetic on the device, the same however the arrays are cut up.

A run names the frozen weights that it stands on by them, so that a resumed run on other weights is refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.typing import Array

_WORD = (1 << 32) - 1
_SEEDS = (0x9E3779B9, 0x6A09E667)  # of two independent sums


def fingerprint(tree: Mapping[str, Any]) -> dict[str, str]:
    """Path of each leaf -> 16 hex digits of its dtype, shape and every bit of its values.

    Each element is mixed with its place, one to one, and the results are added up modulo 2^32, twice over. So one
    altered element always changes the digits, and anything else does but for a chance of 2^-64. The sums are exact
    in any order: neither the sharding nor the number of hosts shows. Nothing is gathered, and nothing is held beside
    the arrays; on several hosts all of them must call it.
    """
    leaves = flatten(tree)
    if not leaves:
        return {}
    sums = jax.device_get(_sums(list(leaves.values())))
    return {path: _digits(leaf, pair) for (path, leaf), pair in zip(leaves.items(), sums, strict=True)}


def _digits(leaf: Any, pair: Any) -> str:
    label = f"{jnp.dtype(leaf.dtype).name}{tuple(leaf.shape)}"
    words = [(int(word) + zlib.crc32(f"{place}{label}".encode())) & _WORD for place, word in enumerate(pair)]
    return "".join(f"{word:08x}" for word in words)


@jax.jit
def _sums(leaves: list[Array]) -> Array:
    """[leaves, 2]: both sums of each leaf."""
    return jnp.stack([_sum(_bits(leaf)) for leaf in leaves])


def _bits(leaf: Array) -> Array:
    """The values as unsigned integers of at most 32 bits; wider ones have one more axis, of two words."""
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    width = jnp.dtype(leaf.dtype).itemsize * 8
    return jax.lax.bitcast_convert_type(leaf, f"uint{min(width, 32)}").astype(jnp.uint32)


def _sum(bits: Array) -> Array:
    """[2]: sums over all elements of a hash of the value and its place in C order, modulo 2^32.

    One reduction of both: XLA's CPU cuts a reduction of one array in two, and would hold its operand between them.
    """
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        stride = math.prod(bits.shape[axis + 1 :]) & _WORD
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride) if size > 1 else 0
    mixed = tuple(_mix(bits ^ _mix(place + jnp.uint32(seed))) for seed in _SEEDS)
    add = lambda one, other: tuple(a + b for a, b in zip(one, other, strict=True))  # noqa: E731
    return jnp.stack(jax.lax.reduce(mixed, (jnp.uint32(0),) * len(mixed), add, tuple(range(bits.ndim))))


def _mix(x: Array) -> Array:
    """One to one on 32 bits, and every bit of the result depends on every bit (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
