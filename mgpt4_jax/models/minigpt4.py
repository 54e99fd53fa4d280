"""MiniGPT-4: a frozen picture side, one linear projection, a frozen language model.

Agrees with MiniGPT-4 ``minigpt4.py`` / ``minigpt_v2.py`` and, for a Q-Former that reads the
instruction, with LAVIS ``blip2_vicuna_instruct.py``. A model without ``vit`` is the language model alone.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models.layers import dense, embed_with_images, layer_norm
from mgpt4_jax.models.llama import Llama
from mgpt4_jax.models.masks import bidirectional_mask
from mgpt4_jax.models.qformer import Qformer
from mgpt4_jax.models.vit import Vit
from mgpt4_jax.typing import Array, Bool, DType, Float, Int


class MiniGPT4(nn.Module):
    config: ModelConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.llama = Llama(config.llama, self.dtype, name="llama")
        if config.vit is None:
            return
        self.vit = Vit(config.vit, self.dtype, name="vit")
        self.ln_vision = layer_norm(config.vit.output_norm_eps, name="ln_vision", dtype=self.dtype)
        if config.qformer is not None:
            self.qformer = Qformer(config.qformer, self.dtype, name="qformer")
        self.projection = dense(config.llama.hidden_size, (None, "embed"), name="projection", dtype=self.dtype)

    def encode_image(
        self,
        pixels: Float[Array, "i H W 3"],
        text_ids: Int[Array, "i t"] | None = None,
        text_valid: Bool[Array, "i t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "i q d"]:
        """Tokens of each picture in the language model's space; text only for InstructBLIP's Q-Former."""
        x = self.ln_vision(self.vit(pixels))
        if self.config.qformer is None:
            x = join_patches(x, self.config.patches_per_token)
        else:
            mask = None if text_ids is None else bidirectional_mask(self.config.qformer.num_queries, text_valid)
            x = self.qformer(x, text_ids, mask=mask, deterministic=deterministic).queries
        self.sow("intermediates", "before_projection", x)
        return self.projection(x)

    def embed(
        self, ids: Int[Array, "b t"], slots: Int[Array, "b t"], images: Float[Array, "b s d"] | None
    ) -> Float[Array, "b t d"]:
        """Token embeddings with the row's image tokens at its slots (-1: text)."""
        text = self.llama.embed(ids)
        return text if images is None else embed_with_images(text, slots, images)

    def __call__(
        self,
        ids: Int[Array, "b t"],
        slots: Int[Array, "b t"],
        pixels: Float[Array, "b i H W 3"] | None,
        valid: Bool[Array, "b t"] | None = None,
        text_ids: Int[Array, "b i t"] | None = None,
        text_valid: Bool[Array, "b i t"] | None = None,
        *,
        read: Int[Array, "b r"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of whole sequences with ``i`` pictures a row, or of their positions ``read`` alone.

        ``deterministic=False`` drops out in the Q-Former and in adapters and takes a "dropout" key.
        """
        images = None
        if pixels is not None:
            rows, count = pixels.shape[:2]
            flat = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in (pixels, text_ids, text_valid)]
            images = self.encode_image(*flat, deterministic=deterministic)
            images = images.reshape(rows, count * images.shape[1], -1)
        return self.llama(self.embed(ids, slots, images), valid, read=read, deterministic=deterministic)


def join_patches(x: Float[Array, "b p d"], count: int) -> Float[Array, "b q e"]:
    """Drop the class token and concatenate ``count`` consecutive patches of the raster order."""
    b, p, d = x.shape
    return jnp.reshape(x[:, 1:], (b, (p - 1) // count, count * d))
