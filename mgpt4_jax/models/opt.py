"""OPT decoder (Hugging Face ``modeling_opt.py``): learned positions, biases everywhere, ReLU, a tied head.

Whole sequences through stacked, scanned layers for training and scoring; ``prefill`` and ``decode_step`` are the
same layers with a cache, for decoding token by token with rows that beams may reorder. Nothing is dropped out: a
frozen language model is in evaluation mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgpt4_jax.config import OptConfig
from mgpt4_jax.models.layers import Cache, attend, dense, embedding, layer_norm, scan_layers, write_cache
from mgpt4_jax.models.masks import causal_mask, decode_mask, padding_mask
from mgpt4_jax.typing import Array, Bool, DType, Float, Int, Params

POSITION_OFFSET = 2
"""Rows of the position embedding before that of the first token; padding stands at row 1."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptCache:
    """Every leaf has the rows on its second axis, so that beams reorder it with one ``tree.map``.

    ``start`` is where the first decoded token is written: the padded length of the prompt.
    """

    keys: Float[Array, "l b s n h"]
    values: Float[Array, "l b s n h"]
    valid: Bool[Array, "1 b s"]  # what may be attended to
    start: int = field(metadata={"static": True})


class OptAttention(nn.Module):
    config: OptConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t s"],
        start: Int[Array, ""] | int | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        n, h = self.config.num_heads, self.config.hidden_size // self.config.num_heads

        def project(name: str) -> Array:
            return dense((n, h), ("embed", "heads", "head_dim"), name=name, dtype=self.dtype)(x)

        query, key, value = project("query"), project("key"), project("value")
        if cache is not None:
            key, value = cache = write_cache(cache, (key, value), start)
        mixed = attend(query, key, value, mask)
        out_axes = ("heads", "head_dim", "embed")
        return dense(x.shape[-1], out_axes, name="out", dtype=self.dtype, inputs=2)(mixed), cache


class OptMlp(nn.Module):
    config: OptConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = nn.relu(dense(self.config.mlp_size, ("embed", "mlp"), name="fc1", dtype=self.dtype)(x))
        return dense(x.shape[-1], ("mlp", "embed"), name="fc2", dtype=self.dtype)(hidden)


class OptLayer(nn.Module):
    """One decoder layer, norms before its blocks or (350m) after them."""

    config: OptConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t s"],
        start: Int[Array, ""] | int | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        eps, first = self.config.layer_norm_eps, self.config.norm_first
        attn_norm = layer_norm(eps, name="attn_norm", dtype=self.dtype)
        mlp_norm = layer_norm(eps, name="mlp_norm", dtype=self.dtype)
        attn = OptAttention(self.config, self.dtype, name="attn")
        mlp = OptMlp(self.config, self.dtype, name="mlp")
        mixed, cache = attn(attn_norm(x) if first else x, mask, start, cache)
        x = x + mixed if first else attn_norm(x + mixed)
        x = x + mlp(mlp_norm(x)) if first else mlp_norm(x + mlp(x))
        self.sow("intermediates", "hidden", x)
        return x, cache


class Opt(nn.Module):
    config: OptConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config, d = self.config, self.config.hidden_size
        self.embed_tokens = embedding(
            config.vocab_size, config.embed_size, ("vocab", "embed"), name="embed_tokens", dtype=self.dtype
        )
        rows = config.max_positions + POSITION_OFFSET
        self.embed_positions = embedding(rows, d, (None, "embed"), name="embed_positions", dtype=self.dtype)
        if config.embed_size != d:
            self.project_in = dense(d, (None, "embed"), name="project_in", dtype=self.dtype, use_bias=False)
            self.project_out = dense(
                config.embed_size, ("embed", None), name="project_out", dtype=self.dtype, use_bias=False
            )
        if config.norm_first:
            self.final_norm = layer_norm(config.layer_norm_eps, name="final_norm", dtype=self.dtype)

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Token embeddings, of width ``embed_size``; ``__call__`` adds the positions."""
        return self.embed_tokens(ids)

    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        valid: Bool[Array, "b t"] | None = None,
        *,
        read: Int[Array, "b r"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of a whole sequence; ``valid`` marks tokens that are not padding, wherever it stands.

        Positions count the valid tokens before each one. ``read`` names the places of each row whose logits are
        wanted; the result is [b r v] then.
        """
        valid = jnp.ones(embeds.shape[:2], bool) if valid is None else valid.astype(bool)
        mask = causal_mask(embeds.shape[1]) & padding_mask(valid)
        x, _ = self.states(embeds, text_positions(valid), mask)
        if read is not None:
            x = jnp.take_along_axis(x, read[..., None], axis=1)
        return self.logits(x)

    @nn.compact
    def states(
        self,
        embeds: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
        start: Int[Array, ""] | int | None = None,
        caches: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """States after the last layer; with ``caches`` [l b s n h] also these with what was written from ``start``."""
        config = self.config
        x = embeds.astype(self.dtype)
        if config.embed_size != config.hidden_size:
            x = self.project_in(x)
        x = x + self.embed_positions(positions + POSITION_OFFSET)
        layer = OptLayer(config, self.dtype, name="layers")
        return scan_layers(layer, x, mask, start, length=config.num_layers, remat=config.remat, caches=caches)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        if self.config.norm_first:
            x = self.final_norm(x)
        if self.config.embed_size != self.config.hidden_size:
            x = self.project_out(x)
        return self.embed_tokens.attend(x).astype(jnp.float32)


def text_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """0, 1, 2, ... over the valid tokens of a row, and -1 for padding."""
    counted = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    return jnp.where(valid, counted - 1, -1)


def prefill(
    params: Params, config: OptConfig, embeds: Float[Array, "b t d"], valid: Bool[Array, "b t"], capacity: int
) -> tuple[Float[Array, "b v"], OptCache]:
    """Read prompts: the logits of each row's next token, and a cache with room for ``capacity`` positions.

    ``params`` are those of ``Opt``; the dtype of ``embeds`` is computed in. Padding may stand anywhere.

    Raises:
      ValueError: the prompt does not fit, or the model has fewer positions than ``capacity``.
    """
    rows, length, _ = embeds.shape
    if not length <= capacity <= config.max_positions:
        raise ValueError(f"capacity {capacity} is not from {length} (the prompt) to {config.max_positions} (the model)")
    valid = valid.astype(bool)
    held = jnp.pad(valid, ((0, 0), (0, capacity - length)))
    mask = decode_mask(jnp.arange(length)[None], capacity) & padding_mask(held)
    n = config.num_heads
    empty = jnp.zeros((config.num_layers, rows, capacity, n, config.hidden_size // n), embeds.dtype)
    model = Opt(config, embeds.dtype).bind({"params": params})
    x, (keys, values) = model.states(embeds, text_positions(valid), mask, 0, (empty, empty))
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    logits = model.logits(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0]
    return logits, OptCache(keys, values, held[None], start=length)


def decode_step(
    params: Params, config: OptConfig, tokens: Int[Array, " b"], step: Int[Array, ""] | int, cache: OptCache
) -> tuple[Float[Array, "b v"], OptCache]:
    """Logits after one more token of each row; ``step`` tokens have been decoded before it."""
    slot = cache.start + step
    positions = cache.valid[0].sum(axis=1, dtype=jnp.int32)[:, None]
    valid = cache.valid | (jnp.arange(cache.valid.shape[-1]) == slot)
    model = Opt(config, cache.keys.dtype).bind({"params": params})
    embeds = model.embed(tokens[:, None])
    x, (keys, values) = model.states(embeds, positions, padding_mask(valid[0]), slot, (cache.keys, cache.values))
    return model.logits(x)[:, 0], replace(cache, keys=keys, values=values, valid=valid)
