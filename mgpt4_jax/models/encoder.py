"""The picture side on its own: the ViT, the Q-Former, or both, without a language model or heads.

What ``eva_vit_g.pth`` or ``blip2_pretrained_flant5xxl.pth`` give by themselves: for features, for
parity, and as the start of a training stage.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models.layers import layer_norm
from mgpt4_jax.models.masks import bidirectional_mask
from mgpt4_jax.models.qformer import Qformer
from mgpt4_jax.models.vit import Vit
from mgpt4_jax.typing import Array, Bool, DType, Float, Int


class Encoder(nn.Module):
    config: ModelConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        if config.vit is not None:
            self.vit = Vit(config.vit, self.dtype, name="vit")
            self.ln_vision = layer_norm(config.vit.output_norm_eps, name="ln_vision", dtype=self.dtype)
        if config.qformer is not None:
            self.qformer = Qformer(config.qformer, self.dtype, name="qformer")

    def encode_pixels(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b p e"]:
        return self.ln_vision(self.vit(pixels))

    def __call__(
        self,
        inputs: Float[Array, "b H W 3"] | Float[Array, "b p e"],
        text_ids: Int[Array, "b t"] | None = None,
        text_valid: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b q d"]:
        """Query states, or patch tokens without a Q-Former; ``inputs`` are tokens without a ViT."""
        tokens = inputs if self.config.vit is None else self.encode_pixels(inputs)
        if self.config.qformer is None:
            return tokens
        mask = None if text_ids is None else bidirectional_mask(self.config.qformer.num_queries, text_valid)
        states = self.qformer(tokens, text_ids, mask=mask)
        if self.is_initializing() and self.config.qformer.with_lm_head:
            self.qformer.lm_logits(states.text)
        return states.queries
