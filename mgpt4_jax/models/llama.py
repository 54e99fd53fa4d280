"""LLaMA decoder (Hugging Face ``modeling_llama.py``): RMSNorm, rotary attention, gated feed-forward.

Whole sequences through stacked, scanned layers: training and scoring. Token by token the same formulas
run in ``generate/decoder.py``, on weights that are packed for reading speed.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import LlamaConfig
from mgpt4_jax.models.layers import (
    attend,
    cut,
    cut_by_rows,
    dense,
    embedding,
    rms_norm,
    rotary_angles,
    rotate,
    scan_layers,
)
from mgpt4_jax.models.lora import adapted
from mgpt4_jax.models.masks import causal_mask, padding_mask
from mgpt4_jax.typing import Array, Bool, DType, Float, Int


class LlamaAttention(nn.Module):
    config: LlamaConfig
    dtype: DType = jnp.float32
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t h/2"],
        mask: Bool[Array, "b t t"],
    ) -> Float[Array, "b t d"]:
        n, k, h = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim

        adapt = partial(adapted, lora=self.config.lora, dtype=self.dtype, deterministic=self.deterministic)

        def project(name: str, heads: int, axis: str) -> Array:
            return adapt(x, (heads, h), ("embed", axis, "head_dim"), name=name)

        query = rotate(project("query", n, "heads"), angles)
        key = rotate(project("key", k, "kv_heads"), angles)
        value = project("value", k, "kv_heads")
        mixed = attend(query, key, value, mask)
        return adapt(mixed, (x.shape[-1],), ("heads", "head_dim", "embed"), name="out", inputs=2)


class LlamaMlp(nn.Module):
    config: LlamaConfig
    dtype: DType = jnp.float32
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        adapt = partial(adapted, lora=self.config.lora, dtype=self.dtype, deterministic=self.deterministic)
        gate = adapt(x, (self.config.mlp_size,), ("embed", "mlp"), name="gate")
        up = adapt(x, (self.config.mlp_size,), ("embed", "mlp"), name="up")
        return adapt(nn.silu(gate) * up, (x.shape[-1],), ("mlp", "embed"), name="down")


class LlamaLayer(nn.Module):
    """One decoder layer. It keeps no cache, which ``scan_layers`` is told by the second None."""

    config: LlamaConfig
    dtype: DType = jnp.float32
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t h/2"],
        mask: Bool[Array, "b t t"],
        cache: None = None,
    ) -> tuple[Float[Array, "b t d"], None]:
        eps, settings = self.config.rms_norm_eps, (self.config, self.dtype, self.deterministic)
        normed = rms_norm(eps, name="input_norm", dtype=self.dtype)(x)
        x = x + LlamaAttention(*settings, name="attn")(normed, angles, mask)
        normed = rms_norm(eps, name="post_norm", dtype=self.dtype)(x)
        x = x + LlamaMlp(*settings, name="mlp")(normed)
        self.sow("intermediates", "hidden", x)
        return x, None


class Llama(nn.Module):
    config: LlamaConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = embedding(
            config.vocab_size, config.hidden_size, ("vocab", "embed"), name="embed_tokens", dtype=self.dtype
        )
        self.norm = rms_norm(config.rms_norm_eps, name="norm", dtype=self.dtype)
        if not config.tie_embeddings:
            self.lm_head = dense(
                config.vocab_size, ("embed", "vocab"), name="lm_head", dtype=self.dtype, use_bias=False
            )

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        # Where the table is cut along its width, the pieces of each row come together in one exchange.
        return cut_by_rows(cut(self.embed_tokens(ids), ("replica", None, "embed")))

    @nn.compact
    def __call__(
        self,
        embeds: Float[Array, "b t d"],
        valid: Bool[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        read: Int[Array, "b r"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b t v"]:
        """Float32 logits of a whole sequence; ``valid`` marks tokens that are not padding (either side).

        ``read`` names the positions of each row whose logits are wanted; the result is [b r v] then. Nothing else
        is as large as logits, and of a small model the head is a good part of the work.

        ``positions`` default to the count of valid tokens before each one, so that padding on the
        left changes nothing. With ``deterministic=False`` the inputs of adapters are dropped out, which
        takes a "dropout" key.
        """
        b, t, _ = embeds.shape
        mask = causal_mask(t)
        if valid is not None:
            mask = mask & padding_mask(valid.astype(bool))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t), (b, t)) if valid is None else text_positions(valid)
        config = self.config
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = embeds.astype(self.dtype)
        layers = LlamaLayer(config, self.dtype, deterministic, name="layers")
        x, _ = scan_layers(layers, x, angles, mask, length=config.num_layers, remat=config.remat)
        if read is not None:
            x = jnp.take_along_axis(x, read[..., None], axis=1)
        return self.logits(self.norm(x))

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        out = self.embed_tokens.attend(x) if self.config.tie_embeddings else self.lm_head(x)
        return out.astype(jnp.float32)


def text_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """0, 1, 2, ... over the valid tokens of a row; padding gets 0 on the left, the last one on the right."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)
