"""Q-Former: BERT with learned queries that look at the picture (LAVIS ``Qformer.py``; BLIP-2, section 3.1).

One pass serves every use, told apart by what is given:

* queries alone (``image_tokens``), text alone (``text_ids``), or both as ``[queries ; text]``;
* a mask of ``masks.py`` says who sees whom (uni-modal, multi-modal causal, bi-directional);
* a cache holds keys and values of earlier tokens: queries first, then text.

Queries and text share self-attention and have a feed-forward each; every
``cross_attention_frequency``-th layer lets the queries, never the text, attend to the picture.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import QformerConfig
from mgpt4_jax.models.layers import Cache, attend, dense, embedding, feed_forward, layer_norm, scan_layers
from mgpt4_jax.typing import Array, Bool, DType, Float, Int


class QformerCache(NamedTuple):
    """Keys and values: for each layer of a group ``[groups b s n h]``, and of the tail ``[b s n h]``."""

    layers: tuple[Cache, ...]
    tail: tuple[Cache, ...]


class QformerOutput(NamedTuple):
    """Last states; a side that was not given has no positions (``q`` or ``t`` is 0)."""

    queries: Float[Array, "b q d"]
    text: Float[Array, "b t d"]
    cache: QformerCache | None


def empty_qformer_cache(config: QformerConfig, rows: int, capacity: int, dtype: DType = jnp.float32) -> QformerCache:
    """A zero cache with room for ``capacity`` tokens, queries included."""
    groups, rest = divmod(config.num_layers, config.cross_attention_frequency)
    shape = (rows, capacity, config.num_heads, config.hidden_size // config.num_heads)

    def zeros(*leading: int) -> Cache:
        return jnp.zeros(leading + shape, dtype), jnp.zeros(leading + shape, dtype)

    in_group = config.cross_attention_frequency if groups else 0
    return QformerCache(tuple(zeros(groups) for _ in range(in_group)), tuple(zeros() for _ in range(rest)))


class QformerAttention(nn.Module):
    """Attention, residual and norm, as in BERT. Without a ``source`` it is self-attention."""

    config: QformerConfig
    deterministic: bool
    dtype: DType

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t s"] | None,
        source: Float[Array, "b s e"] | None = None,
        start: Int[Array, ""] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """With a cache, keys and values are written from position ``start`` on, and all of it is attended to."""
        config, d = self.config, self.config.hidden_size
        n, h = config.num_heads, d // config.num_heads
        source, source_axis = (x, "embed") if source is None else (source, None)

        def project(name: str, inputs: Array, axis: str | None) -> Array:
            return dense((n, h), (axis, "heads", "head_dim"), name=name, dtype=self.dtype)(inputs)

        query = project("query", x, "embed")
        key, value = project("key", source, source_axis), project("value", source, source_axis)
        if cache is not None:
            key, value = cache = (_write(cache[0], key, start), _write(cache[1], value, start))
        mixed = attend(query, key, value, mask)
        mixed = dense(d, ("heads", "head_dim", "embed"), name="out", dtype=self.dtype, inputs=2)(mixed)
        mixed = nn.Dropout(config.dropout, deterministic=self.deterministic)(mixed)
        return layer_norm(config.layer_norm_eps, name="norm", dtype=self.dtype)(x + mixed), cache


def _write(buffer: Float[Array, "b s n h"], new: Float[Array, "b t n h"], start: Array | None) -> Array:
    rows = (jnp.arange(new.shape[1]) + (0 if start is None else start))[None]
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], rows].set(new.astype(buffer.dtype), mode="drop")


class QformerMlp(nn.Module):
    """Feed-forward, residual and norm."""

    config: QformerConfig
    deterministic: bool
    dtype: DType

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        changed = feed_forward(x, self.config.mlp_size, self.dtype)
        changed = nn.Dropout(self.config.dropout, deterministic=self.deterministic)(changed)
        return layer_norm(self.config.layer_norm_eps, name="norm", dtype=self.dtype)(x + changed)


class QformerLayer(nn.Module):
    """The first ``num_queries`` positions are queries (0: a pass over text alone)."""

    config: QformerConfig
    num_queries: int
    has_cross_attention: bool
    deterministic: bool
    dtype: DType

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t s"] | None,
        image_tokens: Float[Array, "b p e"] | None,
        image_mask: Bool[Array, "b 1 p"] | None,
        start: Int[Array, ""] | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        settings = (self.config, self.deterministic, self.dtype)
        x, cache = QformerAttention(*settings, name="attn")(x, mask, start=start, cache=cache)
        queries, text = x[:, : self.num_queries], x[:, self.num_queries :]
        if self.num_queries:
            if self.has_cross_attention:
                cross = QformerAttention(*settings, name="cross_attn")
                queries, _ = cross(queries, image_mask, source=image_tokens)
            queries = QformerMlp(*settings, name="query_mlp")(queries)
        if text.shape[1]:
            text = QformerMlp(*settings, name="text_mlp")(text)
        # An empty side is left out: XLA's CPU compiler has crashed on concatenations with nothing.
        x = jnp.concatenate([part for part in (queries, text) if part.shape[1]], axis=1)
        self.sow("intermediates", "hidden", x)
        return x, cache


class QformerGroup(nn.Module):
    """Consecutive layers of which the first has cross-attention: the body that is scanned."""

    config: QformerConfig
    num_queries: int
    num_layers: int
    deterministic: bool
    dtype: DType

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t s"] | None,
        image_tokens: Float[Array, "b p e"] | None,
        image_mask: Bool[Array, "b 1 p"] | None,
        start: Int[Array, ""] | None,
        caches: tuple[Cache, ...] | None,
    ) -> tuple[Float[Array, "b t d"], tuple[Cache, ...] | None]:
        new_caches = []
        for index in range(self.num_layers):
            layer = QformerLayer(
                self.config, self.num_queries, index == 0, self.deterministic, self.dtype, name=f"layer_{index}"
            )
            cache = None if caches is None else caches[index]
            x, cache = layer(x, mask, image_tokens, image_mask, start, cache)
            new_caches.append(cache)
        return x, None if caches is None else tuple(new_caches)


class QformerEmbeddings(nn.Module):
    """Word and position embeddings of text; queries get neither. One norm over ``[queries ; text]``."""

    config: QformerConfig
    dtype: DType

    def setup(self) -> None:
        config, d = self.config, self.config.hidden_size
        if config.with_text:
            self.word = embedding(config.vocab_size, d, ("vocab", "embed"), name="word", dtype=self.dtype)
            self.position = embedding(config.max_positions, d, (None, "embed"), name="position", dtype=self.dtype)
        self.norm = layer_norm(config.layer_norm_eps, name="norm", dtype=self.dtype)

    def text(self, ids: Int[Array, "b t"], start: Int[Array, ""] | int) -> Float[Array, "b t d"]:
        return self.word(ids) + self.position(start + jnp.arange(ids.shape[1]))

    def __call__(self, joint: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.norm(joint)

    def word_logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        return self.word.attend(x)


class QformerLmHead(nn.Module):
    """BERT's prediction head up to the tied decoder, and the decoder's bias."""

    config: QformerConfig
    dtype: DType

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, " v"]]:
        x = dense(self.config.hidden_size, ("embed", None), name="dense", dtype=self.dtype)(x)
        x = layer_norm(self.config.layer_norm_eps, name="norm", dtype=self.dtype)(nn.gelu(x, approximate=False))
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        return x, self.param("bias", init, (self.config.vocab_size,))


class Qformer(nn.Module):
    config: QformerConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        self.query_tokens = self.param("query_tokens", init, (config.num_queries, config.hidden_size))
        self.embeddings = QformerEmbeddings(config, self.dtype, name="embeddings")
        self.embedding_dropout = nn.Dropout(config.dropout)
        if config.with_lm_head:
            self.lm_head = QformerLmHead(config, self.dtype, name="lm_head")

    @nn.compact
    def __call__(
        self,
        image_tokens: Float[Array, "b p e"] | None = None,
        text_ids: Int[Array, "b t"] | None = None,
        *,
        mask: Bool[Array, "b t s"] | None = None,
        image_mask: Bool[Array, "b 1 p"] | None = None,
        cache: QformerCache | None = None,
        start: Int[Array, ""] | int | None = None,
        deterministic: bool = True,
    ) -> QformerOutput:
        """Queries take part if ``image_tokens`` are given, text if ``text_ids`` are.

        ``mask`` is over ``[queries ; text]`` (with a cache: over its whole capacity); None lets
        everything see everything. ``start`` is where the cache is written; text that follows cached
        queries has its positions counted from the end of the queries.
        """
        config = self.config
        q = 0 if image_tokens is None else config.num_queries
        x = self._embed(image_tokens, text_ids, start, deterministic)
        self.sow("intermediates", "embedded", x)
        shared = (mask, image_tokens, image_mask, start)
        groups, rest = divmod(config.num_layers, config.cross_attention_frequency)
        layer_caches = tail_caches = None
        if groups:
            body = QformerGroup(config, q, config.cross_attention_frequency, deterministic, self.dtype, name="layers")
            layer_caches = None if cache is None else cache.layers
            x, layer_caches = scan_layers(body, x, *shared, length=groups, remat=config.remat, caches=layer_caches)
        if rest:
            body = QformerGroup(config, q, rest, deterministic, self.dtype, name="tail")
            x, tail_caches = body(x, *shared, None if cache is None else cache.tail)
        new_cache = None if cache is None else QformerCache(layer_caches or (), tail_caches or ())
        return QformerOutput(x[:, :q], x[:, q:], new_cache)

    def _embed(
        self, image_tokens: Array | None, text_ids: Array | None, start: Array | int | None, deterministic: bool
    ) -> Float[Array, "b t d"]:
        parts = []
        if image_tokens is not None:
            queries = self.query_tokens.astype(self.dtype)
            parts.append(jnp.broadcast_to(queries, (image_tokens.shape[0], *queries.shape)))
        if text_ids is not None:
            follows = start is not None and image_tokens is None
            parts.append(self.embeddings.text(text_ids, start - self.config.num_queries if follows else 0))
        return self.embedding_dropout(self.embeddings(jnp.concatenate(parts, axis=1)), deterministic=deterministic)

    def lm_logits(self, text: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits over the vocabulary; the decoder is the word embedding."""
        x, bias = self.lm_head(text)
        return self.embeddings.word_logits(x).astype(jnp.float32) + bias.astype(jnp.float32)
