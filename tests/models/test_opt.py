"""OPT: padding anywhere, decoding with a cache against the whole sequence, rows that beams reorder, remat, dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from mgpt4_jax.config import ModelConfig, OptConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.models.opt import Opt, decode_step, prefill, text_positions

FIRST = OptConfig(
    vocab_size=61, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, embed_size=32, max_positions=140
)
CONFIGS = {"norms_first": FIRST, "projected_norms_last": replace(FIRST, embed_size=20, norm_first=False)}
PROMPT, NEW, CAPACITY = 110, 24, 136
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PADDINGS = {"none": (), "left": range(13), "right": range(97, PROMPT), "inside": range(32, 45)}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    """A configuration and its random parameters."""
    config = CONFIGS[request.param]
    return config, random_params(ModelConfig("opt", opt=config), scale=0.15)["opt"]


@pytest.fixture
def embeds(model, rng):
    return jnp.asarray(rng.standard_normal((2, PROMPT, model[0].embed_size)), jnp.float32)


@partial(jax.jit, static_argnums=0)
def _logits(config, params, embeds, valid=None):
    return Opt(config).apply({"params": params}, embeds, valid)


_prefill = jax.jit(prefill, static_argnums=(1, 4))
_step = jax.jit(decode_step, static_argnums=1)


def _valid(padding):
    """The first row is padded, the second is whole."""
    return jnp.ones((2, PROMPT), bool).at[0, np.array(PADDINGS[padding], int)].set(False)


def test_padding_changes_nothing_wherever_it_stands(model, embeds):
    config, params = model
    for padding, place in PADDINGS.items():
        valid = _valid(padding)
        kept = np.setdiff1d(np.arange(PROMPT), np.array(place, int))
        alone = _logits(config, params, embeds[:1, kept])
        np.testing.assert_allclose(
            _logits(config, params, embeds, valid)[:1, kept], alone, **TOLERANCE, err_msg=padding
        )


@pytest.mark.parametrize("padding", PADDINGS)
def test_decoding_equals_the_whole_sequence(model, embeds, rng, padding):
    config, params = model
    valid = _valid(padding)
    tokens = rng.integers(0, config.vocab_size, (2, NEW))
    words = Opt(config).apply({"params": params}, tokens, method=Opt.embed)
    whole = jnp.concatenate([embeds, words], axis=1)
    expected = _logits(config, params, whole, jnp.concatenate([valid, jnp.ones((2, NEW), bool)], axis=1))

    logits, cache = _prefill(params, config, embeds, valid, CAPACITY)
    last = [np.flatnonzero(row)[-1] for row in np.asarray(valid)]
    np.testing.assert_allclose(logits, expected[np.arange(2), last], **TOLERANCE)
    for step in range(NEW):
        logits, cache = _step(params, config, tokens[:, step], step, cache)
        np.testing.assert_allclose(logits, expected[:, PROMPT + step], **TOLERANCE, err_msg=f"step {step}")


def test_a_cache_whose_rows_are_reordered_goes_on_as_those_rows(model, embeds, rng):
    config, params = model
    _, cache = _prefill(params, config, embeds, _valid("left"), CAPACITY)
    assert {leaf.shape[1] for leaf in jax.tree.leaves(cache)} == {2}
    beams = np.array([1, 0, 1, 1])
    tokens = rng.integers(0, config.vocab_size, 4)
    grown, _ = _step(params, config, tokens, 0, jax.tree.map(lambda leaf: leaf[:, beams], cache))
    for beam, (row, token) in enumerate(zip(beams, tokens, strict=True)):
        alone, _ = _step(params, config, jnp.full(2, token), 0, cache)
        np.testing.assert_allclose(grown[beam], alone[row], **TOLERANCE)


def test_decoding_runs_inside_a_loop(model, embeds):
    """As a beam search has it: the cache is the loop's state."""
    config, params = model

    @jax.jit
    def greedy(embeds, valid):
        def body(step, state):
            tokens, ids, cache = state
            logits, cache = decode_step(params, config, tokens, step, cache)
            tokens = logits.argmax(-1)
            return tokens, ids.at[:, step + 1].set(tokens), cache

        logits, cache = prefill(params, config, embeds, valid, CAPACITY)
        first = logits.argmax(-1)
        ids = jnp.zeros((2, 6), first.dtype).at[:, 0].set(first)
        return jax.lax.fori_loop(0, 5, body, (first, ids, cache))[1]

    valid = _valid("inside")
    logits, cache = _prefill(params, config, embeds, valid, CAPACITY)
    expected = [logits.argmax(-1)]
    for step in range(5):
        logits, cache = _step(params, config, expected[-1], step, cache)
        expected.append(logits.argmax(-1))
    np.testing.assert_array_equal(greedy(embeds, valid), np.stack(expected, axis=1))


def test_a_cache_beyond_the_models_positions_is_refused(model, embeds):
    config, params = model
    for capacity in (PROMPT - 1, config.max_positions + 1):
        with pytest.raises(ValueError, match="is not from 110"):
            prefill(params, config, embeds, _valid("none"), capacity)


def test_logits_of_some_places_are_those_of_the_whole(model, embeds):
    config, params = model
    read = jnp.array([[109, 3, 3], [0, 50, 108]])
    some = jax.jit(lambda embeds: Opt(config).apply({"params": params}, embeds, read=read))(embeds)
    whole = _logits(config, params, embeds)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(whole), np.asarray(read)[..., None], 1), **TOLERANCE)


def test_padding_gets_no_gradient(model, embeds):
    config, params = model
    valid = _valid("left")

    def loss(embeds):
        return (jnp.where(valid[..., None], _logits(config, params, embeds, valid), 0) ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(embeds)
    assert not gradient[0, :13].any()
    assert gradient[0, 13:].any(-1).all()


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
    logits, cache = _prefill(params, config, embeds.astype(jnp.bfloat16), _valid("none"), CAPACITY)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)
    logits, cache = _step(params, config, jnp.array([3, 4]), 0, cache)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)


def test_text_positions_count_valid_tokens():
    valid = jnp.array([[0, 0, 1, 1], [1, 0, 1, 0]], bool)
    assert text_positions(valid).tolist() == [[-1, -1, 0, 1], [0, -1, 1, -1]]


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="opt.num_heads=5 does not divide opt.hidden_size=32"):
        replace(FIRST, num_heads=5)
