"""What the towers share: attention, rotary positions, and Linen layers with named axes.

Logical axis names ("embed", "heads", "mlp", ...) stand on every parameter; ``sharding.py`` maps
them to a mesh. Norms and softmax are computed in float32 whatever the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.config import RopeScaling
from mgpt4_jax.typing import Array, Bool, DType, Float, Int

Cache = tuple[Array, Array]
"""Keys and values of one layer, each ``[b s k h]``; a stack of layers has a leading ``l``."""


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"] | None,
    *,
    scale: float | None = None,
    bias: Float[Array, "n t s"] | None = None,
) -> Float[Array, "b t n h"]:
    """Scaled dot-product attention; ``n`` query heads share ``k`` key heads in groups of ``n / k``.

    ``bias`` is added to the logits before the softmax, which is taken in float32. A row without any allowed key
    gets the mean of the values.
    """
    b, t, n, h = query.shape
    k = key.shape[2]
    query = query.reshape(b, t, k, n // k, h) * (h**-0.5 if scale is None else scale)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.reshape(k, n // k, *bias.shape[1:])
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(b, t, n, h)


def write_cache(cache: Cache, new: Cache, start: Int[Array, ""] | int) -> Cache:
    """Keys and values of ``t`` positions, written into every row of a cache from position ``start`` on."""
    old_key, old_value = cache
    key, value = (part.astype(old_key.dtype) for part in new)
    return (
        jax.lax.dynamic_update_slice_in_dim(old_key, key, start, axis=1),
        jax.lax.dynamic_update_slice_in_dim(old_value, value, start, axis=1),
    )


def rotary_angles(
    positions: Int[Array, "b t"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[Array, "b t h/2"]:
    """Angles in radians of each position and frequency (RoFormer; Hugging Face ``modeling_rope_utils``)."""
    return positions[..., None].astype(jnp.float32) * rotary_frequencies(head_dim, theta, scaling)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position, float32 ``[h/2]``; in NumPy and in the original's order of operations.

    That makes them PyTorch's on every backend, to the bit wherever its own power is rounded right: one unit in the
    last place would be an error of 1e-4 in the cosine at position 4000.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power is rounded once, from float64: NumPy's own in float32 is 2 units off on some processors.
    frequencies = np.float32(1) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return frequencies
    slowed = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slowed
    # LLaMA-3: wave lengths beyond original/low are slowed, below original/high kept, between blended.
    wave_lengths = np.float32(2 * math.pi) * (1 / frequencies)  # PyTorch divides by multiplying
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (np.float32(scaling.original_max_positions) * (1 / wave_lengths) - np.float32(low)) / np.float32(high - low)
    blended = (1 - blend) * frequencies / np.float32(scaling.factor) + blend * frequencies
    return np.where(blend <= 0, slowed, np.where(blend >= 1, frequencies, blended))


def rotate(x: Float[Array, "b t n h"], angles: Float[Array, "b t h/2"]) -> Float[Array, "b t n h"]:
    """Rotary embedding in the layout of Hugging Face: the two halves of a head are the coordinates."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def embed_with_images(
    text: Float[Array, "b t d"], slots: Int[Array, "b t"], images: Float[Array, "b s d"]
) -> Float[Array, "b t d"]:
    """Put image tokens into a text: where ``slots`` is not -1 it indexes the row's image tokens."""
    gathered = jnp.take_along_axis(images, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots >= 0)[..., None], gathered.astype(text.dtype), text)


def dense(
    features: int | Sequence[int],
    axes: tuple[str | None, ...],
    *,
    name: str,
    dtype: DType,
    inputs: int = 1,
    use_bias: bool = True,
) -> nn.DenseGeneral:
    """A linear map of the last ``inputs`` axes onto ``features``; ``axes`` names the kernel's axes."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(nn.initializers.truncated_normal(0.02), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:]),
        name=name,
    )


def layer_norm(epsilon: float, *, name: str, dtype: DType) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in float32 by the two-pass formula (as PyTorch)."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


def rms_norm(epsilon: float, *, name: str, dtype: DType) -> nn.RMSNorm:
    return nn.RMSNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        name=name,
    )


def embedding(num: int, features: int, axes: tuple[str | None, str | None], *, name: str, dtype: DType) -> nn.Embed:
    return nn.Embed(
        num,
        features,
        dtype=dtype,
        embedding_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), axes),
        name=name,
    )


def feed_forward(x: Float[Array, "b t d"], mlp_size: int, dtype: DType) -> Float[Array, "b t d"]:
    """fc1, exact (erf) GELU, fc2: called inside a compact module, which then owns ``fc1`` and ``fc2``."""
    hidden = dense(mlp_size, ("embed", "mlp"), name="fc1", dtype=dtype)(x)
    return dense(x.shape[-1], ("mlp", "embed"), name="fc2", dtype=dtype)(nn.gelu(hidden, approximate=False))


def cut(x: Float[Array, "b t d"], axes: tuple[str | None, ...]) -> Float[Array, "b t d"]:
    """Say how activations lie on a mesh, by logical axes; outside ``nn.logical_axis_rules`` it says nothing.

    Left alone the compiler may cut activations as the parameters are cut, along their width, and then adds up those
    of the whole batch in every layer.
    """
    mesh = jax.typeof(x).sharding.mesh
    return x if mesh.empty else nn.with_logical_constraint(x, axes, mesh=mesh)


def cut_by_rows(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Each sample's activations whole on its device."""
    return cut(x, ("batch", None, None))


def scan_layers(
    layer: nn.Module,
    x: Float[Array, "b t d"],
    *shared: Any,
    length: int,
    remat: bool,
    caches: Any = None,
) -> tuple[Float[Array, "b t d"], Any]:
    """Apply ``layer`` ``length`` times: one compiled body, parameters stacked along a leading ``l``.

    The layer takes ``(x, *shared, cache)`` and returns ``(x, cache)``; ``caches`` has a leading ``l`` too,
    and without caches none are kept. What a layer sows into ``intermediates`` is stacked, which is what
    layer-by-layer parity reads.

    For the backward pass a layer keeps what its matrices gave, as far as it is needed, and computes again what lies
    between: norms, attention, activations, together some hundredths of the work. With ``remat`` it keeps its input
    alone and computes all of it again.
    """
    kept = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def body(layer: nn.Module, x: Array, cache: Cache | None, *shared: Any) -> tuple[Array, Cache | None]:
        x, new_cache = layer(cut_by_rows(x), *shared, cache)
        return cut_by_rows(x), None if cache is None else new_cache

    scanned = nn.scan(
        nn.remat(body, prevent_cse=False, policy=kept),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        in_axes=(0,) + (nn.broadcast,) * len(shared),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(layer, x, caches, *shared)
