"""How the parts are put together: pictures among text, joined patches, the language model alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, MINIGPT4, random_params

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models.llama import Llama
from mgpt4_jax.models.minigpt4 import MiniGPT4, join_patches

Q = MINIGPT4.tokens_per_image
CONFIGS = {"qformer": MINIGPT4, "joined": replace(MINIGPT4, qformer=None, patches_per_token=2)}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    config = CONFIGS[request.param]
    return config, random_params(config)


@pytest.fixture
def pixels(rng):
    return jnp.asarray(rng.standard_normal((2, 2, 28, 28, 3)), jnp.float32)


def test_join_patches_concatenates_neighbours_of_the_raster(rng):
    x = jnp.asarray(rng.standard_normal((2, 9, 3)))
    joined = join_patches(x, 4)
    assert joined.shape == (2, 2, 12)
    np.testing.assert_array_equal(joined[:, 1], x[:, 5:9].reshape(2, 12))


def test_logits_are_those_of_the_embeddings_put_together(model, rng, pixels):
    """Two pictures in a row, in any order, next to each other or apart."""
    config, params = model
    q = config.tokens_per_image
    ids = jnp.asarray(rng.integers(0, LLAMA.vocab_size, (2, 3 * q + 5)))
    slots = np.full(ids.shape, -1)
    slots[0, 1 : 1 + 2 * q] = np.arange(2 * q)
    slots[1, 2 : 2 + q], slots[1, 4 + q : 4 + 2 * q] = np.arange(q) + q, np.arange(q)
    apply = partial(MiniGPT4(config).apply, {"params": params})
    logits = jax.jit(apply)(ids, slots, pixels)

    encode = jax.jit(partial(apply, method=MiniGPT4.encode_image))
    images = np.stack([encode(pixels[:, index]) for index in range(2)], axis=1).reshape(2, 2 * q, -1)
    embeds = np.array(params["llama"]["embed_tokens"]["embedding"])[ids]
    embeds[0, 1 : 1 + 2 * q] = images[0]
    embeds[1, 2 : 2 + q], embeds[1, 4 + q : 4 + 2 * q] = images[1, q:], images[1, :q]
    expected = jax.jit(partial(Llama(LLAMA).apply, {"params": params["llama"]}))(embeds)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_pictures_of_a_row_do_not_touch_each_other(model, pixels):
    config, params = model
    encode = jax.jit(partial(MiniGPT4(config).apply, {"params": params}, method=MiniGPT4.encode_image))
    both, alone = encode(pixels[0]), encode(pixels[0, 1:])
    assert both.shape == (2, config.tokens_per_image, LLAMA.hidden_size)
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-5, atol=1e-5)


def test_the_language_model_alone_is_llama(rng):
    config = ModelConfig("llama", llama=LLAMA)
    params = random_params(config)
    ids = jnp.asarray(rng.integers(0, LLAMA.vocab_size, (2, 7)))
    logits = MiniGPT4(config).apply({"params": params}, ids, jnp.full_like(ids, -1), None)
    embeds = params["llama"]["embed_tokens"]["embedding"][ids]
    expected = Llama(LLAMA).apply({"params": params["llama"]}, jnp.asarray(embeds))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
