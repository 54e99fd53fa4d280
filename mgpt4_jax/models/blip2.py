"""BLIP-2 stage 1: picture and text in one space (ITC), as a pair (ITM), text from a picture (ITG).

Agrees with LAVIS ``blip2_qformer.py``. The losses are functions of what these methods return.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models.layers import dense, layer_norm
from mgpt4_jax.models.masks import bidirectional_mask, decode_mask, padding_mask
from mgpt4_jax.models.qformer import Qformer, QformerCache, empty_qformer_cache
from mgpt4_jax.models.vit import Vit
from mgpt4_jax.typing import Array, Bool, DType, Float, Int


class ImageFeatures(NamedTuple):
    """``embeds`` has unit length; ``cache`` holds the queries' keys and values if room was asked for."""

    tokens: Float[Array, "b p e"]
    queries: Float[Array, "b q d"]
    embeds: Float[Array, "b q c"]
    cache: QformerCache | None


class Blip2(nn.Module):
    """ViT, ``ln_vision``, Q-Former with its text side, and the contrastive and matching heads."""

    config: ModelConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config, size = self.config, self.config.projection_size
        self.vit = Vit(config.vit, self.dtype, name="vit")
        self.ln_vision = layer_norm(config.vit.output_norm_eps, name="ln_vision", dtype=self.dtype)
        self.qformer = Qformer(config.qformer, self.dtype, name="qformer")
        self.vision_proj = dense(size, ("embed", None), name="vision_proj", dtype=self.dtype)
        self.text_proj = dense(size, ("embed", None), name="text_proj", dtype=self.dtype)
        self.itm_head = dense(2, ("embed", None), name="itm_head", dtype=self.dtype)
        self.temp = self.param("temp", nn.initializers.constant(0.07), ())

    def __call__(
        self, pixels: Float[Array, "b H W 3"], ids: Int[Array, "b t"], valid: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b i"], Float[Array, "b 2"]]:
        """Tempered image-to-text similarities of all pairs, and matching logits of the aligned pairs.

        Touches every parameter, which is what ``init`` needs.
        """
        image = self.image_features(pixels, room=ids.shape[1])
        similarity = self.similarity(image.embeds, self.text_features(ids, valid)[:, 0]) / self.temp
        if self.config.qformer.with_lm_head:
            self.caption_logits(image.cache, ids, valid)
        return similarity, self.match_logits(image.tokens, ids, valid)

    def encode_pixels(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b p e"]:
        return self.ln_vision(self.vit(pixels))

    def image_features(
        self, pixels: Float[Array, "b H W 3"], room: int | None = None, *, deterministic: bool = True
    ) -> ImageFeatures:
        """Query states and their unit projections; ``room`` keeps a cache with space for that much text."""
        tokens = self.encode_pixels(pixels)
        cache = mask = start = None
        if room is not None:
            q = self.config.qformer.num_queries
            cache = empty_qformer_cache(self.config.qformer, tokens.shape[0], q + room, self.dtype)
            mask, start = decode_mask(jnp.full((1, 1), q - 1), q + room), 0
        queries, _, cache = self.qformer(tokens, mask=mask, cache=cache, start=start, deterministic=deterministic)
        return ImageFeatures(tokens, queries, unit(self.vision_proj(queries)), cache)

    def text_features(
        self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"], *, deterministic: bool = True
    ) -> Float[Array, "b t c"]:
        """Unit projections of every text state; the first ([CLS]) stands for the text."""
        mask = padding_mask(valid.astype(bool))
        text = self.qformer(text_ids=ids, mask=mask, deterministic=deterministic).text
        return unit(self.text_proj(text))

    @staticmethod
    def similarity(images: Float[Array, "i q c"], texts: Float[Array, "b c"]) -> Float[Array, "i b"]:
        """Cosine of the best query, not divided by the temperature."""
        return jnp.einsum("iqc,bc->ibq", images, texts, preferred_element_type=jnp.float32).max(axis=-1)

    def match_logits(
        self,
        tokens: Float[Array, "b p e"],
        ids: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b 2"]:
        """(no, yes) logits, averaged over the queries of the joint bi-directional pass."""
        mask = bidirectional_mask(self.config.qformer.num_queries, valid)
        queries = self.qformer(tokens, ids, mask=mask, deterministic=deterministic).queries
        return self.itm_head(queries).astype(jnp.float32).mean(axis=1)

    def caption_logits(
        self, cache: QformerCache, ids: Int[Array, "b t"], valid: Bool[Array, "b t"], *, deterministic: bool = True
    ) -> Float[Array, "b t v"]:
        """Next-token logits of text that follows the cached queries; ``ids`` begin with [DEC]."""
        q, t = self.config.qformer.num_queries, ids.shape[1]
        keys_valid = jnp.concatenate([jnp.ones((ids.shape[0], q), bool), valid.astype(bool)], axis=1)
        mask = decode_mask(q + jnp.arange(t)[None], q + t) & padding_mask(keys_valid)
        text = self.qformer(text_ids=ids, mask=mask, cache=cache, start=q, deterministic=deterministic).text
        return self.qformer.lm_logits(text)


def unit(x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
    """Scaled to unit length in float32, as ``torch.nn.functional.normalize``."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
