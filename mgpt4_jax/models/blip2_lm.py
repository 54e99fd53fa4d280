"""BLIP-2 stage 2: a frozen ViT, a Q-Former, one linear projection, and a frozen OPT or T5.

Agrees with LAVIS ``blip2_opt.py``, ``blip2_t5.py`` and, for a Q-Former that reads the instruction,
``blip2_t5_instruct.py``. A model without ``vit`` is the language model alone.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models.layers import dense, embed_with_images, layer_norm
from mgpt4_jax.models.masks import bidirectional_mask
from mgpt4_jax.models.opt import Opt
from mgpt4_jax.models.qformer import Qformer
from mgpt4_jax.models.t5 import T5
from mgpt4_jax.models.vit import Vit
from mgpt4_jax.typing import Array, Bool, DType, Float, Int


class PictureReader(nn.Module):
    """The side of the pictures and the embeddings of the text: what both models share."""

    config: ModelConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        is_opt, dtype = config.opt is not None, self.dtype
        language: Any = Opt(config.opt, dtype, name="opt") if is_opt else T5(config.t5, dtype, name="t5")
        self.language = language
        if config.vit is None:
            return
        self.vit = Vit(config.vit, self.dtype, name="vit")
        self.ln_vision = layer_norm(config.vit.output_norm_eps, name="ln_vision", dtype=self.dtype)
        self.qformer = Qformer(config.qformer, self.dtype, name="qformer")
        width = config.language_model.hidden_size
        self.projection = dense(width, (None, "embed"), name="projection", dtype=self.dtype)

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
        mask = None if text_ids is None else bidirectional_mask(self.config.qformer.num_queries, text_valid)
        return self.projection(self.qformer(x, text_ids, mask=mask, deterministic=deterministic).queries)

    def embed(
        self, ids: Int[Array, "b t"], slots: Int[Array, "b t"], images: Float[Array, "b s d"] | None
    ) -> Float[Array, "b t d"]:
        """Token embeddings with the row's image tokens at its slots (-1: text); LAVIS has the picture first."""
        text = self.language.embed(ids)
        return text if images is None else embed_with_images(text, slots, images)

    def read(
        self,
        ids: Int[Array, "b t"],
        slots: Int[Array, "b t"],
        pixels: Float[Array, "b i H W 3"] | None,
        text_ids: Int[Array, "b i t"] | None = None,
        text_valid: Bool[Array, "b i t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b t d"]:
        """The language model's input: ``embed`` with the tokens of the ``i`` pictures of each row."""
        images = None
        if pixels is not None:
            flat = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in (pixels, text_ids, text_valid)]
            images = self.encode_image(*flat, deterministic=deterministic)
            images = images.reshape(pixels.shape[0], -1, images.shape[-1])
        return self.embed(ids, slots, images)


class Blip2Opt(PictureReader):
    """``[image tokens ; text]`` through OPT."""

    def __call__(
        self,
        ids: Int[Array, "b t"],
        slots: Int[Array, "b t"],
        pixels: Float[Array, "b i H W 3"] | None,
        valid: Bool[Array, "b t"] | None = None,
        *,
        read: Int[Array, "b r"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of whole sequences with ``i`` pictures a row, or of their places ``read`` alone.

        As ``MiniGPT4`` gives them. ``deterministic=False`` drops out in the Q-Former and takes a "dropout" key.
        """
        return self.language(self.read(ids, slots, pixels, deterministic=deterministic), valid, read=read)


class Blip2T5(PictureReader):
    """The encoder of T5 reads ``[image tokens ; prompt]``, the decoder writes the answer (prefix LM)."""

    def __call__(
        self,
        ids: Int[Array, "b s"],
        slots: Int[Array, "b s"],
        pixels: Float[Array, "b i H W 3"] | None,
        valid: Bool[Array, "b s"],
        decoder_ids: Int[Array, "b t"],
        decoder_valid: Bool[Array, "b t"] | None = None,
        text_ids: Int[Array, "b i t"] | None = None,
        text_valid: Bool[Array, "b i t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of the answer, with ``i`` pictures a row.

        ``decoder_ids`` are the answer's tokens as ``models.t5.shift_right`` gives them: the logits at a place are
        those of the answer's token at the same place. ``deterministic=False`` drops out in the Q-Former and takes a
        "dropout" key.
        """
        embeds = self.read(ids, slots, pixels, text_ids, text_valid, deterministic=deterministic)
        return self.language(embeds, valid, decoder_ids, decoder_valid)
