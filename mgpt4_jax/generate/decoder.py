"""LLaMA laid out for decoding: the same formulas as ``models.llama``, weights packed once at loading.

A token a row is a chain of matrix-vector products, bound by how fast the weights are read. Hence the
layers are unstacked, and query, key and value share one matrix. What XLA would copy at every step on a CPU
is stored as it wants it: every weight is a matrix with its input axis last, keys lie with their positions
last, values with their positions next to last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mgpt4_jax.config import LlamaConfig
from mgpt4_jax.models.layers import attend, rms_norm, rotary_angles, rotate
from mgpt4_jax.models.masks import causal_mask
from mgpt4_jax.sharding import spec_of
from mgpt4_jax.typing import Array, Bool, DType, Float, Int, Params

Cache = tuple[Array, Array]
"""Keys [b k h s] and values [b k s h] of one layer."""

BITS = jnp.uint16

Read = Callable[[str, int | None], Any]
"""``read("layers/mlp/up/kernel", 3)``: one layer's slice of a stacked LLaMA parameter; None: the whole array."""

LAYER_AXES: dict[str, tuple[str | None, ...]] = {
    "input_norm": ("norm",),
    "qkv": ("kv_heads", "embed"),
    "out": ("embed", "kv_heads"),
    "post_norm": ("norm",),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
}
"""Logical axes of a packed layer. ``qkv`` is [k*(g+2)*h d]: the g queries of a key head, its key, its value, so
that cutting it by key heads cuts all three alike; ``out`` is [d k*g*h]."""

_LAYER_SOURCES = (
    "input_norm/scale",
    "attn/query/kernel",
    "attn/key/kernel",
    "attn/value/kernel",
    "attn/out/kernel",
    "post_norm/scale",
    "mlp/gate/kernel",
    "mlp/up/kernel",
    "mlp/down/kernel",
)


def read_tree(llama: Params) -> Read:
    """A ``Read`` of the parameters of ``models.llama.Llama`` that are in memory."""

    def read(path: str, layer: int | None) -> Any:
        leaf: Any = llama
        for key in path.split("/"):
            leaf = leaf[key]
        return leaf if layer is None else leaf[layer]

    return read


def pack_decoder(config: LlamaConfig, read: Read, dtype: DType, mesh: Mesh) -> dict[str, Any]:
    """Parameters for ``prefill`` and ``decode_step``, read and packed a layer at a time, on the devices of ``mesh``.

    ``{"embedding": [v d], "head": [v d], "norm": [d], "layers": [{...}, ...]}``
    """

    def sharding(name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        # heads that are flattened with others are cut as whole heads
        sizes = [config.num_kv_heads if axis == "kv_heads" else size for axis, size in zip(axes, shape, strict=True)]
        return NamedSharding(mesh, spec_of(axes, tuple(sizes), mesh, f"llama {name}"))

    def place(function: Any, axes: Mapping[str, tuple[str | None, ...]], *arrays: Any) -> dict[str, Any]:
        shapes = jax.eval_shape(function, *arrays)
        shardings = {name: sharding(name, axes[name], shapes[name].shape) for name in shapes}
        return jax.jit(function, out_shardings=shardings)(*arrays)

    pack = partial(_pack_layer, config, dtype)
    layers = []
    for index in range(config.num_layers):
        layers.append(place(pack, LAYER_AXES, *(read(f"layers/{source}", index) for source in _LAYER_SOURCES)))
    outer = {"embedding": ("vocab", "embed"), "head": ("vocab", "embed"), "norm": ("norm",)}
    packed = place(lambda x: {"embedding": _store(x.astype(dtype))}, outer, read("embed_tokens/embedding", None))
    packed |= place(lambda x: {"norm": x.astype(dtype)}, outer, read("norm/scale", None))
    if config.tie_embeddings:
        packed["head"] = packed["embedding"]
    else:
        packed |= place(lambda x: {"head": _store(x.astype(dtype).T)}, outer, read("lm_head/kernel", None))
    return {**packed, "layers": layers}


def _pack_layer(
    config: LlamaConfig,
    dtype: DType,
    input_norm: Float[Array, " d"],
    query: Float[Array, "d n h"],
    key: Float[Array, "d k h"],
    value: Float[Array, "d k h"],
    out: Float[Array, "n h d"],
    post_norm: Float[Array, " d"],
    gate: Float[Array, "d f"],
    up: Float[Array, "d f"],
    down: Float[Array, "f d"],
) -> dict[str, Array]:
    d, n, h = query.shape
    k = config.num_kv_heads
    qkv = jnp.concatenate([query.reshape(d, k, n // k, h), key[:, :, None], value[:, :, None]], axis=2)
    layer = {
        "input_norm": input_norm,
        "qkv": qkv.reshape(d, -1).T,
        "out": out.reshape(n * h, d).T,
        "post_norm": post_norm,
        "gate": gate.T,
        "up": up.T,
        "down": down.T,
    }
    layer = {name: value.astype(dtype) for name, value in layer.items()}
    return {name: _store(value) if value.ndim == 2 else value for name, value in layer.items()}


def prefill(
    config: LlamaConfig, params: Params, embeds: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], list[Cache]]:
    """Normed states of right-padded rows, and each layer's keys and values."""
    b, t, _ = embeds.shape
    angles = _angles(config, jnp.arange(t)[None])
    mask = causal_mask(t)

    def attention(layer: Params, x: Array, cache: None) -> tuple[Array, Cache]:
        query, key, value = _project(config, layer, x, angles)
        mixed = attend(query.reshape(b, t, config.num_heads, config.head_dim), key, value, mask)
        return mixed.reshape(b, t, -1), (jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, 2))

    return _run(config, params, embeds, attention, [None] * config.num_layers)


def decode_step(
    config: LlamaConfig,
    params: Params,
    embeds: Float[Array, "b d"],
    positions: Int[Array, " b"],
    caches: list[Cache],
) -> tuple[Float[Array, "b d"], list[Cache]]:
    """Normed states of one more token a row, and the caches with its keys and values at ``positions``.

    A position beyond the end is not written. A row attends to everything up to its own position, so that
    what lies behind it, padding or another answer's leftovers, is never seen.
    """
    angles = _angles(config, positions[:, None])
    mask = jnp.arange(caches[0][0].shape[-1])[None] <= positions[:, None]
    rows = jnp.arange(embeds.shape[0])
    if len(rows) == 1:
        # XLA's CPU would make one write a slice update, fuse it twice and copy the cache. A second one, beyond
        # the end and hence dropped, keeps it a scatter in place.
        rows, positions = jnp.zeros(2, jnp.int32), jnp.append(positions, caches[0][0].shape[-1])

    def attention(layer: Params, x: Array, cache: Cache) -> tuple[Array, Cache]:
        query, key, value = _project(config, layer, x, angles)
        keys = cache[0].at[rows, :, :, positions].set(key[rows, 0], mode="drop")
        values = cache[1].at[rows, :, positions].set(value[rows, 0], mode="drop")
        return attend_cached(query[:, 0], keys, values, mask)[:, None], (keys, values)

    x, caches = _run(config, params, embeds[:, None], attention, caches)
    return x[:, 0], caches


def attend_cached(
    query: Float[Array, "b k g h"],
    keys: Float[Array, "b k h s"],
    values: Float[Array, "b k s h"],
    mask: Bool[Array, "b s"],
) -> Float[Array, "b d"]:
    """One query a row over its cache; the softmax is taken in float32, as in ``layers.attend``."""
    scores = jnp.einsum("bkgh,bkhs->bkgs", query * query.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, values).reshape(query.shape[0], -1)


def _run(
    config: LlamaConfig, params: Params, x: Float[Array, "b t d"], attention: Any, caches: list[Any]
) -> tuple[Float[Array, "b t d"], list[Cache]]:
    """All layers; ``attention(layer, normed, cache)`` gives the mixed heads [b t n*h] and the new cache."""
    new_caches = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        mixed, cache = attention(layer, _norm(config, layer["input_norm"], x), cache)
        x = x + _apply(layer["out"], mixed)
        normed = _norm(config, layer["post_norm"], x)
        x = x + _apply(layer["down"], jax.nn.silu(_apply(layer["gate"], normed)) * _apply(layer["up"], normed))
        new_caches.append(cache)
    return _norm(config, params["norm"], x), new_caches


def _project(
    config: LlamaConfig, layer: Params, x: Float[Array, "b t d"], angles: Float[Array, "b t h/2"]
) -> tuple[Float[Array, "b t k g h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Rotated queries and keys, and values."""
    b, t, _ = x.shape
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    mixed = _apply(layer["qkv"], x).reshape(b, t, k, n // k + 2, h)
    turned = rotate(mixed[:, :, :, :-1].reshape(b, t, -1, h), angles).reshape(b, t, k, n // k + 1, h)
    return turned[:, :, :, :-1], turned[:, :, :, -1], mixed[:, :, :, -1]


def _apply(weight: Array, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
    """``x`` times a matrix ``[f d]``; one that is kept as bits is turned into numbers block by block.

    XLA's CPU has no bfloat16 product: it makes a float32 copy of the weights, and makes it before the
    decoding loop, of all layers at once: twice the model. It cannot see through bits, and the barrier
    keeps it from merging the blocks, so only a sixteenth of one matrix is ever copied.
    """
    b, t, d = x.shape
    x = x.reshape(b * t, d)
    if weight.dtype != BITS:
        return jnp.einsum("bd,fd->bf", x, weight).reshape(b, t, -1)
    count = math.gcd(len(weight), 16)

    def block(bits: Array) -> Array:
        return jnp.einsum("bd,fd->fb", x, numbers(jax.lax.optimization_barrier(bits)))

    parts = jax.lax.map(block, weight.reshape(count, -1, d))
    return parts.reshape(-1, b * t).T.reshape(b, t, -1)


def _store(weight: Array) -> Array:
    """bfloat16 on a CPU is kept as its bits: see ``_apply``."""
    if weight.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jax.lax.bitcast_convert_type(weight, BITS)
    return weight


def numbers(weight: Array) -> Array:
    """What ``_store`` made of an array, turned back."""
    return jax.lax.bitcast_convert_type(weight, jnp.bfloat16) if weight.dtype == BITS else weight


def _angles(config: LlamaConfig, positions: Int[Array, "b t"]) -> Float[Array, "b t h/2"]:
    return rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)


def _norm(config: LlamaConfig, scale: Float[Array, " d"], x: Array) -> Array:
    return rms_norm(config.rms_norm_eps, name="norm", dtype=x.dtype).apply({"params": {"scale": scale}}, x)


def next_logits(params: Params, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    """Float32 logits of normed states."""
    return _apply(params["head"], x[:, None])[:, 0].astype(jnp.float32)
