"""LLaMA over whole sequences: padding on either side, remat, dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from mgpt4_jax.config import LlamaConfig, ModelConfig, RopeScaling
from mgpt4_jax.models.llama import Llama, text_positions

MHA = LlamaConfig(
    vocab_size=61, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, max_positions=256
)
SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
CONFIGS = {
    "mha": MHA,
    "gqa_scaled_tied": replace(MHA, num_kv_heads=2, head_dim=16, tie_embeddings=True, rope_scaling=SCALING),
}
LENGTH = 130  # a rotary mistake passes on four tokens
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    """A configuration and its random parameters."""
    config = CONFIGS[request.param]
    return config, random_params(ModelConfig("llama", llama=config))["llama"]


@partial(jax.jit, static_argnums=0)
def _logits(config, params, embeds, valid=None):
    return Llama(config).apply({"params": params}, embeds, valid)


@pytest.fixture
def embeds(rng):
    return jnp.asarray(rng.standard_normal((2, LENGTH, 32)), jnp.float32)


def test_padding_on_either_side_changes_nothing(model, embeds):
    config, params = model
    length = 110
    right = jnp.broadcast_to(jnp.arange(LENGTH) < length, (2, LENGTH))
    left = right[:, ::-1]
    pad = embeds[:, length:]
    right_logits = _logits(config, params, embeds, right)[:, :length]
    left_logits = _logits(config, params, jnp.concatenate([pad, embeds[:, :length]], 1), left)[:, -length:]
    alone = _logits(config, params, embeds[:, :length])
    np.testing.assert_allclose(right_logits, alone, **TOLERANCE)
    np.testing.assert_allclose(left_logits, alone, **TOLERANCE)


def test_padding_gets_no_gradient(model, embeds):
    config, params = model
    valid = jnp.arange(LENGTH)[None] >= jnp.array([[20], [0]])

    def loss(embeds):
        return (jnp.where(valid[..., None], _logits(config, params, embeds, valid), 0) ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(embeds)
    assert np.isfinite(gradient).all()
    assert not gradient[0, :20].any()
    assert gradient[0, 20:].any(-1).all()


def test_logits_of_some_positions_are_those_of_all(model, embeds):
    config, params = model
    read = jnp.array([[129, 3, 3], [0, 64, 1]])
    some = jax.jit(lambda x: Llama(config).apply({"params": params}, x, read=read))(embeds)
    every = _logits(config, params, embeds)
    np.testing.assert_allclose(some, jnp.take_along_axis(every, read[..., None], axis=1), **TOLERANCE)


def test_remat_changes_nothing(model, embeds):
    config, params = model

    def loss(params, config):
        return (_logits(config, params, embeds) ** 2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_gradient = value_and_grad(params, config)
    saved, saved_gradient = value_and_grad(params, replace(config, remat=True))
    np.testing.assert_allclose(plain, saved, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain_gradient, saved_gradient)


def test_bfloat16_stays_bfloat16_and_its_logits_are_float32(model, embeds):
    config, params = model
    run = jax.jit(lambda x: Llama(config, jnp.bfloat16).apply({"params": params}, x, mutable="intermediates"))
    logits, sown = run(embeds[:, :4].astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert sown["intermediates"]["layers"]["hidden"][0].dtype == jnp.bfloat16


def test_text_positions_count_valid_tokens():
    valid = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0]])
    assert text_positions(valid).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
