"""The Q-Former's passes and masks, its cache, and layer counts that leave a tail."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VIT, random_params

from mgpt4_jax.config import ModelConfig, QformerConfig
from mgpt4_jax.models.masks import bidirectional_mask, decode_mask, multimodal_causal_mask, padding_mask, unimodal_mask
from mgpt4_jax.models.qformer import Qformer, QformerLayer, empty_qformer_cache

BASE = QformerConfig(
    hidden_size=24,
    mlp_size=40,
    num_layers=4,
    num_heads=3,
    num_queries=5,
    encoder_size=32,
    with_text=True,
    with_lm_head=True,
    vocab_size=37,
    max_positions=20,
)
CONFIGS = {
    "groups": BASE,
    "tail": replace(BASE, num_layers=3, cross_attention_frequency=2),
    "tail_alone": replace(BASE, num_layers=2, cross_attention_frequency=3),
}
Q, T = BASE.num_queries, 7
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    """A configuration, its compiled pass, and its random parameters."""
    config = CONFIGS[request.param]
    params = random_params(ModelConfig("blip2", VIT, config))["qformer"]

    @partial(jax.jit, static_argnames=("mutable", "deterministic"))
    def run(*inputs, **named):
        return Qformer(config).apply({"params": params}, *inputs, **named)

    return config, run, params


@pytest.fixture
def image(rng):
    return jnp.asarray(rng.standard_normal((2, 9, 32)), jnp.float32)


@pytest.fixture
def ids(rng):
    return jnp.asarray(rng.integers(0, BASE.vocab_size, (2, T)), jnp.int32)


VALID = jnp.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def test_cross_attention_stands_in_every_nth_layer(model):
    config, _, params = model
    groups, rest = divmod(config.num_layers, config.cross_attention_frequency)
    found = []
    for _ in range(groups):
        assert all(leaf.shape[0] == groups for leaf in jax.tree.leaves(params["layers"]))
        names = [f"layer_{index}" for index in range(config.cross_attention_frequency)]
        found += ["cross_attn" in params["layers"][name] for name in names]
    if rest:
        found += ["cross_attn" in params["tail"][f"layer_{index}"] for index in range(rest)]
    assert found == [index % config.cross_attention_frequency == 0 for index in range(config.num_layers)]


def test_scanned_equals_one_layer_after_another(model, image, ids):
    config, apply, params = model
    mask = bidirectional_mask(Q, VALID)
    out, sown = apply(image, ids, mask=mask, mutable="intermediates")
    x = sown["intermediates"]["embedded"][0]
    frequency = config.cross_attention_frequency
    for index in range(config.num_layers):
        group, position = divmod(index, frequency)
        if group < config.num_layers // frequency:
            layer = jax.tree.map(lambda leaf, group=group: leaf[group], params["layers"][f"layer_{position}"])
        else:
            layer = params["tail"][f"layer_{position}"]
        module = QformerLayer(config, Q, position == 0, True, jnp.float32)
        x, _ = jax.jit(module.apply)({"params": layer}, x, mask, image, None, None, None)
    np.testing.assert_allclose(jnp.concatenate([out.queries, out.text], 1), x, **TOLERANCE)


def test_unimodal_mask_equals_two_separate_passes(model, image, ids):
    _, apply, _ = model
    joint = apply(image, ids, mask=unimodal_mask(Q, VALID))
    np.testing.assert_allclose(joint.queries, apply(image).queries, **TOLERANCE)
    text = apply(text_ids=ids, mask=padding_mask(VALID.astype(bool))).text
    np.testing.assert_allclose(joint.text, text, **TOLERANCE)


def test_a_missing_side_has_no_positions(model, image, ids):
    _, apply, _ = model
    assert apply(image).text.shape == (2, 0, 24)
    assert apply(text_ids=ids).queries.shape == (2, 0, 24)


def test_padded_text_changes_no_valid_position(model, image, ids):
    _, apply, _ = model
    joint = apply(image, ids, mask=bidirectional_mask(Q, VALID))
    alone = apply(image[1:], ids[1:, :4], mask=bidirectional_mask(Q, VALID[1:, :4]))
    np.testing.assert_allclose(joint.queries[1:], alone.queries, **TOLERANCE)
    np.testing.assert_allclose(joint.text[1:, :4], alone.text, **TOLERANCE)


def test_image_mask_hides_patches(model, image):
    _, apply, _ = model
    patches = jnp.arange(9)[None, None, :] < 6
    np.testing.assert_allclose(apply(image, image_mask=patches).queries, apply(image[:, :6]).queries, **TOLERANCE)


def _query_cache(config, apply, image):
    cache = empty_qformer_cache(config, 2, Q + T)
    return apply(image, mask=decode_mask(jnp.full((1, 1), Q - 1), Q + T), cache=cache, start=0)


def test_text_on_cached_queries_equals_the_unilm_pass(model, image, ids):
    """ITG as the original trains it (cached) and as the paper draws it (one pass)."""
    config, apply, params = model
    unilm = apply(image, ids, mask=multimodal_causal_mask(Q, VALID))
    first = _query_cache(config, apply, image)
    np.testing.assert_allclose(first.queries, unilm.queries, **TOLERANCE)
    keys_valid = jnp.concatenate([jnp.ones((2, Q), bool), VALID.astype(bool)], axis=1)
    mask = decode_mask(Q + jnp.arange(T)[None], Q + T) & padding_mask(keys_valid)
    text = apply(text_ids=ids, mask=mask, cache=first.cache, start=Q).text
    valid = VALID.astype(bool)
    np.testing.assert_allclose(text[valid], unilm.text[valid], **TOLERANCE)
    logits = jax.jit(lambda x: Qformer(config).apply({"params": params}, x, method=Qformer.lm_logits))(text)
    assert logits.shape == (2, T, config.vocab_size)
    assert logits.dtype == jnp.float32


def test_one_token_at_a_time_equals_the_full_pass(model, image, ids):
    config, apply, _ = model
    full = apply(image, ids, mask=multimodal_causal_mask(Q, jnp.ones_like(ids))).text
    cache, states = _query_cache(config, apply, image).cache, []
    for step in range(T):
        mask = decode_mask(jnp.full((1, 1), Q + step), Q + T)
        out = apply(text_ids=ids[:, step : step + 1], mask=mask, cache=cache, start=Q + step)
        cache, states = out.cache, [*states, out.text]
    np.testing.assert_allclose(jnp.concatenate(states, 1), full, **TOLERANCE)


def test_gradient_flows_through_the_cache(model, image, ids):
    config, apply, _ = model

    def loss(image):
        mask = decode_mask(Q + jnp.arange(T)[None], Q + T)
        return (apply(text_ids=ids, mask=mask, cache=_query_cache(config, apply, image).cache, start=Q).text ** 2).sum()

    def loss_unilm(image):
        return (apply(image, ids, mask=multimodal_causal_mask(Q, jnp.ones_like(ids))).text ** 2).sum()

    ours, expected = jax.jit(jax.grad(loss))(image), jax.jit(jax.grad(loss_unilm))(image)
    if config.num_layers > 1:
        assert expected.any()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_remat_changes_nothing(model, image, ids):
    config, _, params = model

    def loss(params, config):
        out = Qformer(config).apply({"params": params}, image, ids, mask=bidirectional_mask(Q, VALID))
        return (out.queries**2).mean() + (out.text**3).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_gradient = value_and_grad(params, config)
    saved, saved_gradient = value_and_grad(params, replace(config, remat=True))
    np.testing.assert_allclose(plain, saved, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain_gradient, saved_gradient)


def test_dropout_acts_only_when_asked(model, image):
    _, apply, _ = model
    key = {"dropout": jax.random.key(1)}
    still = apply(image).queries
    np.testing.assert_array_equal(apply(image, rngs=key).queries, still)
    dropped = apply(image, deterministic=False, rngs=key).queries
    again = apply(image, deterministic=False, rngs=key).queries
    other = apply(image, deterministic=False, rngs={"dropout": jax.random.key(2)}).queries
    np.testing.assert_array_equal(dropped, again)
    assert np.abs(dropped - still).max() > 1e-3
    assert np.abs(dropped - other).max() > 1e-3


def test_queries_get_no_position_and_text_positions_start_at_zero(model, ids):
    config, apply, params = model
    _, sown = apply(text_ids=ids, mutable="intermediates")
    table = params["embeddings"]
    joint = table["word"]["embedding"][ids] + table["position"]["embedding"][:T]
    norm = table["norm"]
    centred = joint - joint.mean(-1, keepdims=True)
    expected = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_eps)
    expected = expected * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(sown["intermediates"]["embedded"][0], expected, **TOLERANCE)
