"""LLaMA decoder (Hugging Face ``modeling_llama.py``): RMSNorm, rotary attention, gated feed-forward.

``Llama`` scans its stacked layers: training and whole-sequence scoring. Generation unstacks them once
(``unstack_layers``) and runs ``LlamaLayer`` in a Python loop with a cache a layer, which is twice as
fast a token as a scan that carries the cache.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgpt4_jax.config import LlamaConfig
from mgpt4_jax.models.layers import (
    Cache,
    attend,
    dense,
    embedding,
    rms_norm,
    rotary_angles,
    rotate,
    scan_layers,
)
from mgpt4_jax.models.masks import causal_mask, decode_mask, padding_mask
from mgpt4_jax.typing import Array, Bool, DType, Float, Int, Params


class LlamaAttention(nn.Module):
    config: LlamaConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t h/2"],
        mask: Bool[Array, "b t s"],
        positions: Int[Array, "b t"],
        cache: Cache | None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """With a cache, new keys are written at each row's ``positions`` (dropped beyond its end)."""
        n, k, h = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim

        def project(name: str, heads: int, axis: str) -> Array:
            return dense((heads, h), ("embed", axis, "head_dim"), name=name, dtype=self.dtype, use_bias=False)(x)

        query = rotate(project("query", n, "heads"), angles)
        key = rotate(project("key", k, "kv_heads"), angles)
        value = project("value", k, "kv_heads")
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            key = cache[0].at[rows, positions].set(key.astype(cache[0].dtype), mode="drop")
            value = cache[1].at[rows, positions].set(value.astype(cache[1].dtype), mode="drop")
        mixed = attend(query, key, value, mask)
        out_axes = ("heads", "head_dim", "embed")
        out = dense(x.shape[-1], out_axes, name="out", dtype=self.dtype, inputs=2, use_bias=False)(mixed)
        return out, (key, value)


class LlamaMlp(nn.Module):
    config: LlamaConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        def project(features: int, axes: tuple[str, str], name: str) -> nn.DenseGeneral:
            return dense(features, axes, name=name, dtype=self.dtype, use_bias=False)

        gate = project(self.config.mlp_size, ("embed", "mlp"), "gate")(x)
        up = project(self.config.mlp_size, ("embed", "mlp"), "up")(x)
        return project(x.shape[-1], ("mlp", "embed"), "down")(nn.silu(gate) * up)


class LlamaLayer(nn.Module):
    """One decoder layer; returns its keys and values (with a cache: the updated cache)."""

    config: LlamaConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t h/2"],
        mask: Bool[Array, "b t s"],
        positions: Int[Array, "b t"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        eps = self.config.rms_norm_eps
        normed = rms_norm(eps, name="input_norm", dtype=self.dtype)(x)
        mixed, cache = LlamaAttention(self.config, self.dtype, name="attn")(normed, angles, mask, positions, cache)
        x = x + mixed
        normed = rms_norm(eps, name="post_norm", dtype=self.dtype)(x)
        x = x + LlamaMlp(self.config, self.dtype, name="mlp")(normed)
        self.sow("intermediates", "hidden", x)
        return x, cache


class Llama(nn.Module):
    config: LlamaConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = embedding(
            config.vocab_size, config.hidden_size, ("vocab", "embed"), name="embed_tokens", dtype=self.dtype
        )
        self.layers = LlamaLayer(config, self.dtype, name="layers")
        self.norm = rms_norm(config.rms_norm_eps, name="norm", dtype=self.dtype)
        if not config.tie_embeddings:
            self.lm_head = dense(
                config.vocab_size, ("embed", "vocab"), name="lm_head", dtype=self.dtype, use_bias=False
            )

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return self.embed_tokens(ids)

    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of a whole sequence; ``valid`` marks tokens that are not padding (either side).

        ``positions`` default to the count of valid tokens before each one, so that padding on the
        left changes nothing.
        """
        b, t, _ = embeds.shape
        mask = causal_mask(t)
        if valid is not None:
            mask = mask & padding_mask(valid.astype(bool))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t), (b, t)) if valid is None else text_positions(valid)
        config = self.config
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x, _ = scan_layers(
            self.layers,
            embeds.astype(self.dtype),
            angles,
            mask,
            positions,
            length=config.num_layers,
            remat=config.remat,
        )
        return self.logits(self.norm(x))

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        out = self.embed_tokens.attend(x) if self.config.tie_embeddings else self.lm_head(x)
        return out.astype(jnp.float32)


def text_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """0, 1, 2, ... over the valid tokens of a row; padding gets 0 on the left, the last one on the right."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)


def unstack_layers(params: Params) -> dict[str, Any]:
    """Parameters of ``Llama`` with ``layers`` as a list of one dict a layer, for ``run_layers``.

    Each stacked array is freed as soon as it is cut, so that the peak is one stacked array over the whole.
    """
    stacked, treedef = jax.tree.flatten(params["layers"])
    columns = []
    while stacked:
        columns.append(list(stacked.pop(0)))
    layers = [jax.tree.unflatten(treedef, layer) for layer in zip(*columns, strict=True)]
    return {**params, "layers": layers}


def empty_cache(config: LlamaConfig, rows: int, capacity: int, dtype: DType) -> list[Cache]:
    """A zero cache a layer, ``[rows capacity k h]``."""
    shape = (rows, capacity, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


def run_layers(
    config: LlamaConfig,
    params: Params,
    embeds: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    caches: list[Cache] | None = None,
) -> tuple[Float[Array, "b t d"], list[Cache]]:
    """Unstacked layers over right-padded rows; returns the normed states and each layer's keys and values.

    Without caches a row attends causally to itself; with caches it attends to everything up to its
    own position. Padding on the right is never attended to, since it comes later.
    """
    dtype = embeds.dtype
    angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    if caches is None:
        mask = causal_mask(embeds.shape[1])
    else:
        mask = decode_mask(positions, caches[0][0].shape[1])
    layer, x, new_caches = LlamaLayer(config, dtype), embeds, []
    for index, layer_params in enumerate(params["layers"]):
        cache = None if caches is None else caches[index]
        x, cache = layer.apply({"params": layer_params}, x, angles, mask, positions, cache)
        new_caches.append(cache)
    normed = rms_norm(config.rms_norm_eps, name="norm", dtype=dtype).apply({"params": params["norm"]}, x)
    return normed, new_caches


def lookup(params: Params, ids: Int[Array, "b t"], dtype: DType) -> Float[Array, "b t d"]:
    return params["embed_tokens"]["embedding"][ids].astype(dtype)


def head(config: LlamaConfig, params: Params, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    """Float32 logits of normed states."""
    if config.tie_embeddings:
        kernel = params["embed_tokens"]["embedding"].T
    else:
        kernel = params["lm_head"]["kernel"]
    return jnp.einsum("bd,dv->bv", x, kernel.astype(x.dtype)).astype(jnp.float32)
