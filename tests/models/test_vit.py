"""The ViT alone; against PyTorch it is compared in ``tests/parity``."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QFORMER, random_params

from mgpt4_jax.config import ModelConfig, VitConfig
from mgpt4_jax.models.vit import Vit, VitBlock, patchify

CONFIG = VitConfig(image_size=12, patch_size=4, hidden_size=24, mlp_size=40, num_layers=2, num_heads=3)


@pytest.fixture
def pixels(rng):
    return jnp.asarray(rng.standard_normal((2, 12, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return random_params(ModelConfig("blip2", CONFIG, replace(QFORMER, encoder_size=24, with_text=True)))["vit"]


def test_patchify_is_raster_order_of_row_column_channel(rng):
    pixels = rng.standard_normal((2, 6, 6, 3))
    patches = patchify(jnp.asarray(pixels), 3)
    for row, column in np.ndindex(2, 2):
        expected = pixels[:, row * 3 : row * 3 + 3, column * 3 : column * 3 + 3].reshape(2, -1)
        np.testing.assert_allclose(patches[:, row * 2 + column], expected, rtol=1e-6)


def test_patch_embedding_is_a_strided_convolution(pixels, params):
    _, sown = Vit(CONFIG).apply({"params": params}, pixels, mutable="intermediates")
    kernel = params["patch_embed"]["kernel"].reshape(4, 4, 3, 24)
    conv = jax.lax.conv_general_dilated(pixels, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    expected = conv.reshape(2, 9, 24) + params["patch_embed"]["bias"]
    np.testing.assert_allclose(sown["intermediates"]["patches"][0], expected, rtol=1e-5, atol=1e-5)


def test_scanned_equals_one_block_after_another(pixels, params):
    out, sown = Vit(CONFIG).apply({"params": params}, pixels, mutable="intermediates")
    sown = sown["intermediates"]
    cls = jnp.broadcast_to(params["cls_token"], (2, 1, 24))
    x = jnp.concatenate([cls, sown["patches"][0]], axis=1) + params["pos_embed"]
    for index in range(CONFIG.num_layers):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"])
        x, _ = VitBlock(CONFIG).apply({"params": block}, x)
        np.testing.assert_allclose(sown["blocks"]["hidden"][0][index], x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-5)


def test_keys_have_no_bias_and_no_norm_ends_the_tower(params):
    assert set(params["blocks"]["attn"]) == {"qkv", "q_bias", "v_bias", "out"}
    assert set(params["blocks"]["attn"]["qkv"]) == {"kernel"}
    assert set(params) == {"patch_embed", "cls_token", "pos_embed", "blocks"}


def test_remat_changes_nothing(pixels, params):
    def loss(params, config):
        return (Vit(config).apply({"params": params}, pixels) ** 2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_gradient = value_and_grad(params, CONFIG)
    saved, saved_gradient = value_and_grad(params, replace(CONFIG, remat=True))
    np.testing.assert_allclose(plain, saved, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain_gradient, saved_gradient)


@pytest.mark.parametrize("shape", [(1, 16, 12, 3), (1, 12, 12, 1), (1, 3, 12, 12)])
def test_pixels_of_another_shape_are_refused_with_both_shapes(params, shape):
    with pytest.raises(ValueError, match=r"pixels must be \[b 12 12 3\], got \(1, "):
        Vit(CONFIG).apply({"params": params}, jnp.zeros(shape))
