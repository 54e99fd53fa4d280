"""T5: padding, decoding with a cache against the whole sequence, rows that beams reorder, buckets, remat, dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from mgpt4_jax.config import IGNORED, ModelConfig, T5Config
from mgpt4_jax.errors import UserError
from mgpt4_jax.models.t5 import T5, bucket_table, decode_step, prefill, relative_buckets, shift_right

GATED = T5Config(
    vocab_size=61,
    hidden_size=24,
    mlp_size=40,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    head_dim=8,
    num_buckets=16,
    max_distance=40,
    activation="gelu",
)
PLAIN = replace(GATED, gated=False, activation="relu", tie_embeddings=True, scale_logits=True, num_decoder_layers=2)
CONFIGS = {"gated": GATED, "plain_tied": PLAIN}
PROMPT, NEW = 50, 60  # beyond max_distance
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PADDINGS = {"none": (), "left": range(7), "right": range(43, PROMPT), "inside": range(32, 36)}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    """A configuration and its random parameters."""
    config = CONFIGS[request.param]
    return config, random_params(ModelConfig("t5", t5=config), scale=0.2)["t5"]


@pytest.fixture
def embeds(rng):
    return jnp.asarray(rng.standard_normal((2, PROMPT, 24)), jnp.float32)


@pytest.fixture
def answers(rng):
    return rng.integers(1, 61, (2, NEW))


@partial(jax.jit, static_argnums=0)
def _logits(config, params, embeds, valid, ids, ids_valid=None):
    return T5(config).apply({"params": params}, embeds, valid, ids, ids_valid)


_prefill = jax.jit(prefill, static_argnums=(1, 4))
_step = jax.jit(decode_step, static_argnums=1)


def _valid(padding):
    """The first row is padded, the second is whole."""
    return jnp.ones((2, PROMPT), bool).at[0, np.array(PADDINGS[padding], int)].set(False)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_the_prompt_changes_nothing(model, embeds, answers, padding):
    config, params = model
    valid = _valid(padding)
    ids = shift_right(answers, config)
    kept = np.flatnonzero(valid[0])
    alone = _logits(config, params, embeds[:1, kept], jnp.ones((1, len(kept)), bool), ids[:1])
    np.testing.assert_allclose(_logits(config, params, embeds, valid, ids)[:1], alone, **TOLERANCE)


def test_what_follows_an_answer_changes_nothing(model, embeds, answers):
    config, params = model
    ids = shift_right(answers, config)
    valid = jnp.arange(NEW)[None] < jnp.array([[21], [NEW]])
    whole = _logits(config, params, embeds, _valid("none"), ids)
    changed = _logits(config, params, embeds, _valid("none"), jnp.where(valid, ids, 0), valid)
    np.testing.assert_allclose(whole[valid], changed[valid], **TOLERANCE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_decoding_equals_the_whole_sequence(model, embeds, answers, padding):
    config, params = model
    valid = _valid(padding)
    expected = _logits(config, params, embeds, valid, shift_right(answers, config))
    logits, cache = _prefill(params, config, embeds, valid, NEW)
    np.testing.assert_allclose(logits, expected[:, 0], **TOLERANCE)
    for step in range(NEW - 1):
        logits, cache = _step(params, config, answers[:, step], step, cache)
        np.testing.assert_allclose(logits, expected[:, step + 1], **TOLERANCE, err_msg=f"step {step}")


def test_a_cache_whose_rows_are_reordered_goes_on_as_those_rows(model, embeds, rng):
    config, params = model
    _, cache = _prefill(params, config, embeds, _valid("left"), NEW)
    assert {leaf.shape[1] for leaf in jax.tree.leaves(cache)} == {2}
    beams = np.array([1, 0, 1, 1])
    tokens = rng.integers(0, 61, 4)
    grown, _ = _step(params, config, tokens, 0, jax.tree.map(lambda leaf: leaf[:, beams], cache))
    for beam, (row, token) in enumerate(zip(beams, tokens, strict=True)):
        alone, _ = _step(params, config, jnp.full(2, token), 0, cache)
        np.testing.assert_allclose(grown[beam], alone[row], **TOLERANCE)


def test_remat_changes_nothing(model, embeds, answers):
    config, params = model
    ids = shift_right(answers, config)

    def loss(params, config):
        return (_logits(config, params, embeds, _valid("left"), ids) ** 2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_gradient = value_and_grad(params, config)
    saved, saved_gradient = value_and_grad(params, replace(config, remat=True))
    np.testing.assert_allclose(plain, saved, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain_gradient, saved_gradient)


def test_bfloat16_stays_bfloat16_and_its_logits_are_float32(model, embeds):
    config, params = model
    logits, cache = _prefill(params, config, embeds.astype(jnp.bfloat16), _valid("none"), NEW)
    assert (logits.dtype, cache.keys.dtype, cache.cross_keys.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    logits, cache = _step(params, config, jnp.array([3, 4]), 0, cache)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)


def test_buckets_are_exact_when_near_and_logarithmic_when_far():
    config = replace(GATED, num_buckets=32, max_distance=128)
    table = bucket_table(config, is_bidirectional=False)
    np.testing.assert_array_equal(table[:17], np.arange(17))
    assert (table[128], table[32], table[64]) == (31, 21, 26)
    assert (np.diff(table) >= 0).all()
    looking = relative_buckets(config, jnp.array([300]), jnp.array([0, 299, 300, 301, 600]), is_bidirectional=True)
    assert looking.tolist() == [[15, 1, 0, 17, 31]]  # far back, back, here, ahead, far ahead
    looking = relative_buckets(config, jnp.array([300]), jnp.array([0, 299, 300, 301]), is_bidirectional=False)
    assert looking.tolist() == [[31, 1, 0, 0]]


def test_the_decoder_reads_the_answer_one_place_later():
    targets = jnp.array([[7, 8, 1], [9, 1, IGNORED], [1, IGNORED, IGNORED]])
    assert shift_right(targets, GATED).tolist() == [[0, 7, 8], [0, 9, 1], [0, 1, 0]]
    assert shift_right(targets[1:2], replace(GATED, start_id=5), pad_id=3).tolist() == [[5, 9, 1]]


def test_sizes_that_make_no_buckets_are_refused():
    for fields in ({"num_buckets": 6}, {"num_buckets": 32, "max_distance": 16}):
        with pytest.raises(UserError, match="t5.num_buckets"):
            replace(GATED, **fields)
    with pytest.raises(UserError, match="num_decoder_layers must be at most"):
        replace(GATED, num_decoder_layers=2000)
