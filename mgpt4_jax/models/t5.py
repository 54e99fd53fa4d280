"""T5 encoder and decoder (Hugging Face ``modeling_t5.py``): relative positions, RMSNorm, unscaled attention.

Whole sequences through stacked, scanned layers for training and scoring; ``prefill`` and ``decode_step`` are the
same layers with a cache, in which the keys and values of the encoder's states are computed once. Nothing is
dropped out: a frozen language model is in evaluation mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.config import IGNORED, T5Config
from mgpt4_jax.models.layers import Cache, attend, dense, embedding, rms_norm, scan_layers, write_cache
from mgpt4_jax.models.masks import causal_mask, padding_mask
from mgpt4_jax.typing import Array, Bool, DType, Float, Int, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class T5Cache:
    """Every leaf has the rows on its second axis, so that beams reorder it with one ``tree.map``.

    ``start`` is where the first decoded token is written: behind the start token.
    """

    keys: Float[Array, "l b t n h"]
    values: Float[Array, "l b t n h"]
    cross_keys: Float[Array, "l b s n h"]
    cross_values: Float[Array, "l b s n h"]
    cross_valid: Bool[Array, "1 b s"]  # which states of the encoder are not padding
    start: int = field(metadata={"static": True})


class LayerCache(NamedTuple):
    """Of one decoder layer, or with a leading ``l`` of all; ``cross`` is None until it has been computed."""

    own: Cache
    cross: Cache | None


def bucket_table(config: T5Config, *, is_bidirectional: bool) -> np.ndarray:
    """int32 bucket of each distance from 0 to ``max_distance``, all farther ones sharing the last.

    In NumPy's float32 and the original's order of operations: a distance that stands on the border of two buckets
    would fall into another one if the logarithm were rounded otherwise.
    """
    buckets = config.num_buckets // 2 if is_bidirectional else config.num_buckets
    exact = buckets // 2
    distance = np.arange(config.max_distance + 1)
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(math.log(config.max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + steps.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


def relative_buckets(
    config: T5Config, queries: Int[Array, " t"], keys: Int[Array, " s"], *, is_bidirectional: bool
) -> Int[Array, "t s"]:
    """Which row of the position table is added for a query that looks at a key.

    Looking back or, in the decoder, ahead (which the mask forbids) takes the first half or all of the rows; looking
    ahead in the encoder the second half.
    """
    offset = keys[None, :] - queries[:, None]
    distance = jnp.abs(offset) if is_bidirectional else jnp.maximum(-offset, 0)
    table = jnp.asarray(bucket_table(config, is_bidirectional=is_bidirectional))
    buckets = table[jnp.minimum(distance, config.max_distance)]
    return buckets + jnp.where(offset > 0, config.num_buckets // 2, 0) if is_bidirectional else buckets


class T5Attention(nn.Module):
    config: T5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        source: Float[Array, "b s d"] | None,
        mask: Bool[Array, "b t s"],
        bias: Float[Array, "n t s"] | None = None,
        start: Int[Array, ""] | int | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Attend to ``source``, or without one to ``cache`` alone; gives the keys and values that it attended to.

        With a source and a cache they are written there from ``start`` on, and all of it is attended to.
        """
        n, h = self.config.num_heads, self.config.head_dim

        def project(name: str, inputs: Array) -> Array:
            axes = ("embed", "heads", "head_dim")
            return dense((n, h), axes, name=name, dtype=self.dtype, use_bias=False)(inputs)

        query, pair = project("query", x), cache
        if source is not None:
            pair = project("key", source), project("value", source)
            pair = pair if cache is None else write_cache(cache, pair, start)
        mixed = attend(query, *pair, mask, scale=1.0, bias=bias)
        out_axes = ("heads", "head_dim", "embed")
        return dense(x.shape[-1], out_axes, name="out", dtype=self.dtype, inputs=2, use_bias=False)(mixed), pair


class T5Mlp(nn.Module):
    config: T5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        activation = {
            "relu": nn.relu,
            "gelu": lambda x: nn.gelu(x, approximate=False),
            "gelu_new": lambda x: nn.gelu(x, approximate=True),
        }[self.config.activation]

        def widen(name: str) -> Array:
            return dense(self.config.mlp_size, ("embed", "mlp"), name=name, dtype=self.dtype, use_bias=False)(x)

        hidden = activation(widen("gate")) * widen("up") if self.config.gated else activation(widen("up"))
        return dense(x.shape[-1], ("mlp", "embed"), name="down", dtype=self.dtype, use_bias=False)(hidden)


class T5EncoderLayer(nn.Module):
    """It keeps no cache, which ``scan_layers`` is told by the second None."""

    config: T5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b t t"], bias: Float[Array, "n t t"], cache: None = None
    ) -> tuple[Float[Array, "b t d"], None]:
        eps = self.config.layer_norm_eps
        normed = rms_norm(eps, name="attn_norm", dtype=self.dtype)(x)
        x = x + T5Attention(self.config, self.dtype, name="attn")(normed, normed, mask, bias)[0]
        x = x + T5Mlp(self.config, self.dtype, name="mlp")(rms_norm(eps, name="mlp_norm", dtype=self.dtype)(x))
        self.sow("intermediates", "hidden", x)
        return x, None


class T5DecoderLayer(nn.Module):
    """Without ``encoded`` the cache holds what cross-attention reads."""

    config: T5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        encoded: Float[Array, "b s d"] | None,
        mask: Bool[Array, "b t u"],
        cross_mask: Bool[Array, "b 1 s"],
        bias: Float[Array, "n t u"],
        start: Int[Array, ""] | int | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache]:
        eps = self.config.layer_norm_eps
        own, cross = (None, None) if cache is None else cache
        normed = rms_norm(eps, name="attn_norm", dtype=self.dtype)(x)
        changed, own = T5Attention(self.config, self.dtype, name="attn")(normed, normed, mask, bias, start, own)
        x = x + changed
        normed = rms_norm(eps, name="cross_norm", dtype=self.dtype)(x)
        attention = T5Attention(self.config, self.dtype, name="cross_attn")
        changed, cross = attention(normed, encoded, cross_mask, cache=cross)
        x = x + changed
        x = x + T5Mlp(self.config, self.dtype, name="mlp")(rms_norm(eps, name="mlp_norm", dtype=self.dtype)(x))
        self.sow("intermediates", "hidden", x)
        return x, LayerCache(own, cross)


class T5Encoder(nn.Module):
    config: T5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, embeds: Float[Array, "b s d"], valid: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        config, place = self.config, jnp.arange(embeds.shape[1])
        buckets = relative_buckets(config, place, place, is_bidirectional=True)
        bias = _position_table(self, config)[buckets].transpose(2, 0, 1)
        layer = T5EncoderLayer(config, self.dtype, name="layers")
        x, _ = scan_layers(
            layer, embeds, padding_mask(valid), bias, length=config.num_layers, remat=config.remat, caches=None
        )
        return rms_norm(config.layer_norm_eps, name="norm", dtype=self.dtype)(x)


class T5Decoder(nn.Module):
    config: T5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        mask: Bool[Array, "b t u"],
        encoded: Float[Array, "b s d"] | None,
        encoded_valid: Bool[Array, "b s"],
        start: Int[Array, ""] | int | None = None,
        caches: LayerCache | None = None,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """States behind the last norm. With ``caches`` the tokens stand from ``start`` on."""
        config = self.config
        queries = jnp.arange(embeds.shape[1]) + (0 if start is None else start)
        buckets = relative_buckets(config, queries, jnp.arange(mask.shape[-1]), is_bidirectional=False)
        bias = _position_table(self, config)[buckets].transpose(2, 0, 1)
        shared = (encoded, mask, padding_mask(encoded_valid), bias, start)
        layer = T5DecoderLayer(config, self.dtype, name="layers")
        x, caches = scan_layers(
            layer, embeds, *shared, length=config.num_decoder_layers, remat=config.remat, caches=caches
        )
        return rms_norm(config.layer_norm_eps, name="norm", dtype=self.dtype)(x), caches


def _position_table(module: nn.Module, config: T5Config) -> Float[Array, "u n"]:
    """What is added to the logits of each head in each bucket; all layers of a tower share it."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "heads"))
    return module.param("relative_bias", init, (config.num_buckets, config.num_heads)).astype(jnp.float32)


class T5(nn.Module):
    config: T5Config
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        size, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.shared = embedding(*size, axes, name="shared", dtype=self.dtype)
        self.encoder = T5Encoder(config, self.dtype, name="encoder")
        self.decoder = T5Decoder(config, self.dtype, name="decoder")
        if not config.tie_embeddings:
            self.lm_head = dense(size[0], axes[::-1], name="lm_head", dtype=self.dtype, use_bias=False)

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return self.shared(ids)

    def encode(self, embeds: Float[Array, "b s d"], valid: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        """States of the encoder; places are those of the array, padding included, as in the original."""
        return self.encoder(embeds.astype(self.dtype), valid.astype(bool))

    def __call__(
        self,
        embeds: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        decoder_ids: Int[Array, "b t"],
        decoder_valid: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Float32 logits: those at a place predict the token that ``decoder_ids`` has at the next (``shift_right``)."""
        return self.decode(decoder_ids, self.encode(embeds, valid), valid, decoder_valid)

    def decode(
        self,
        decoder_ids: Int[Array, "b t"],
        encoded: Float[Array, "b s d"],
        encoded_valid: Bool[Array, "b s"],
        decoder_valid: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        mask = causal_mask(decoder_ids.shape[1])
        if decoder_valid is not None:
            mask = mask & padding_mask(decoder_valid.astype(bool))
        x, _ = self.decoder(self.embed(decoder_ids), mask, encoded, encoded_valid.astype(bool))
        return self.logits(x)

    def decode_cached(
        self,
        tokens: Int[Array, " b"],
        encoded: Float[Array, "b s d"] | None,
        encoded_valid: Bool[Array, "b s"],
        place: Int[Array, ""] | int,
        caches: LayerCache,
    ) -> tuple[Float[Array, "b v"], LayerCache]:
        """One token of each row at ``place``; ``encoded`` is needed the first time only."""
        mask = (jnp.arange(caches.own[0].shape[2]) <= place)[None, None]
        x, caches = self.decoder(self.embed(tokens[:, None]), mask, encoded, encoded_valid, place, caches)
        return self.logits(x)[:, 0], caches

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        if self.config.scale_logits:
            x = x * self.config.hidden_size**-0.5
        out = self.shared.attend(x) if self.config.tie_embeddings else self.lm_head(x)
        return out.astype(jnp.float32)


def shift_right(targets: Int[Array, "b t"], config: T5Config, pad_id: int = 0) -> Int[Array, "b t"]:
    """What the decoder reads to predict ``targets``: the start token before them, the last one gone.

    A target that takes no part in the loss is read as padding.
    """
    shifted = jnp.roll(targets, 1, axis=1).at[:, 0].set(config.start_id)
    return jnp.where(shifted == IGNORED, pad_id, shifted)


def prefill(
    params: Params, config: T5Config, embeds: Float[Array, "b s d"], valid: Bool[Array, "b s"], capacity: int
) -> tuple[Float[Array, "b v"], T5Cache]:
    """Encode prompts and decode the start token: the logits of each row's first token, and a cache.

    ``params`` are those of ``T5``; the dtype of ``embeds`` is computed in. ``capacity`` counts decoded positions,
    the start token among them.
    """
    rows, valid = embeds.shape[0], valid.astype(bool)
    empty = jnp.zeros((config.num_decoder_layers, rows, capacity, config.num_heads, config.head_dim), embeds.dtype)
    model = T5(config, embeds.dtype).bind({"params": params})
    tokens = jnp.full(rows, config.start_id)
    caches = LayerCache((empty, empty), None)
    logits, (own, cross) = model.decode_cached(tokens, model.encode(embeds, valid), valid, 0, caches)
    return logits, T5Cache(own[0], own[1], cross[0], cross[1], valid[None], start=1)


def decode_step(
    params: Params, config: T5Config, tokens: Int[Array, " b"], step: Int[Array, ""] | int, cache: T5Cache
) -> tuple[Float[Array, "b v"], T5Cache]:
    """Logits after one more token of each row; ``step`` tokens have been decoded before it."""
    model = T5(config, cache.keys.dtype).bind({"params": params})
    caches = LayerCache((cache.keys, cache.values), (cache.cross_keys, cache.cross_values))
    place = cache.start + step
    logits, (own, _) = model.decode_cached(tokens, None, cache.cross_valid[0], place, caches)
    return logits, replace(cache, keys=own[0], values=own[1])
