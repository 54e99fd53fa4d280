"""EVA-CLIP vision transformer (LAVIS ``eva_vit.py``): all tokens of the last block, no final norm."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import VitConfig
from mgpt4_jax.models.layers import attend, dense, feed_forward, layer_norm, scan_layers
from mgpt4_jax.typing import Array, DType, Float


class VitAttention(nn.Module):
    """Self-attention whose queries and values have a bias and whose keys have none."""

    config: VitConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        n = self.config.num_heads
        h = self.config.hidden_size // n
        qkv = dense((3, n, h), ("embed", None, "heads", "head_dim"), name="qkv", dtype=self.dtype, use_bias=False)(x)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "head_dim"))
        query = qkv[:, :, 0] + self.param("q_bias", bias_init, (n, h)).astype(self.dtype)
        value = qkv[:, :, 2] + self.param("v_bias", bias_init, (n, h)).astype(self.dtype)
        mixed = attend(query, qkv[:, :, 1], value, None)
        out_axes = ("heads", "head_dim", "embed")
        return dense(self.config.hidden_size, out_axes, name="out", dtype=self.dtype, inputs=2)(mixed)


class VitMlp(nn.Module):
    config: VitConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        return feed_forward(x, self.config.mlp_size, self.dtype)


class VitBlock(nn.Module):
    """Pre-norm block: ``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    config: VitConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"], cache: None = None) -> tuple[Float[Array, "b p d"], None]:
        eps = self.config.layer_norm_eps
        mixed = VitAttention(self.config, self.dtype, name="attn")(layer_norm(eps, name="norm1", dtype=self.dtype)(x))
        self.sow("intermediates", "attn_out", mixed)
        x = x + mixed
        changed = VitMlp(self.config, self.dtype, name="mlp")(layer_norm(eps, name="norm2", dtype=self.dtype)(x))
        self.sow("intermediates", "mlp_out", changed)
        x = x + changed
        self.sow("intermediates", "hidden", x)
        return x, None


class Vit(nn.Module):
    """Pixels to patch tokens. Sows ``patches``, ``embedded``; each block ``attn_out``, ``mlp_out``, ``hidden``."""

    config: VitConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b p d"]:
        """Normalised pixels of the exact configured size; the class token comes first."""
        config, d = self.config, self.config.hidden_size
        if pixels.shape[1:] != (config.image_size, config.image_size, 3):
            raise ValueError(f"pixels must be [b {config.image_size} {config.image_size} 3], got {pixels.shape}")
        patches = patchify(pixels.astype(self.dtype), config.patch_size)
        patches = dense(d, (None, "embed"), name="patch_embed", dtype=self.dtype)(patches)
        self.sow("intermediates", "patches", patches)

        init = nn.initializers.truncated_normal(0.02)
        cls = self.param("cls_token", nn.with_logical_partitioning(init, ("embed",)), (d,))
        positions = self.param(
            "pos_embed", nn.with_logical_partitioning(init, (None, "embed")), (config.num_positions, d)
        )
        cls = jnp.broadcast_to(cls.astype(self.dtype), (pixels.shape[0], 1, d))
        x = jnp.concatenate([cls, patches], axis=1) + positions.astype(self.dtype)
        self.sow("intermediates", "embedded", x)
        block = VitBlock(config, self.dtype, name="blocks")
        x, _ = scan_layers(block, x, length=config.num_layers, remat=config.remat)
        return x


def patchify(pixels: Float[Array, "b H W 3"], size: int) -> Float[Array, "b p d"]:
    """Cut into ``size`` x ``size`` patches in raster order, each flattened as (row, column, channel).

    A convolution with stride = kernel is this and one matrix product, which every backend runs fast.
    """
    b, height, width, channels = pixels.shape
    grid = pixels.reshape(b, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * channels)
