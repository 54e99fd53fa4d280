"""Attention, rotary positions and the scan that every tower shares."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgpt4_jax.config import RopeScaling
from mgpt4_jax.models import layers

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _attend_slowly(query, key, value, allowed):
    """Attention in float64, one head and one query at a time."""
    b, t, n, h = query.shape
    group = n // key.shape[2]
    out = np.zeros(query.shape)
    for row, head, pos in np.ndindex(b, n, t):
        logits = key[row, :, head // group].astype(np.float64) @ query[row, pos, head] / math.sqrt(h)
        weights = np.exp(logits - logits.max()) * allowed[row, pos]
        out[row, pos, head] = (weights / weights.sum()) @ value[row, :, head // group]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attend_agrees_with_the_definition(rng, kv_heads):
    query = rng.standard_normal((2, 5, 6, 8)).astype(np.float32)
    key, value = (rng.standard_normal((2, 7, kv_heads, 8)).astype(np.float32) for _ in range(2))
    allowed = rng.random((2, 5, 7)) < 0.6
    allowed[..., 0] = True
    ours = layers.attend(*map(jnp.asarray, (query, key, value, allowed)))
    np.testing.assert_allclose(ours, _attend_slowly(query, key, value, allowed), **TOLERANCE)


def test_attend_without_mask_sees_everything(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((1, 4, 2, 8)), jnp.float32) for _ in range(3))
    everything = jnp.ones((1, 4, 4), bool)
    unmasked, masked = layers.attend(query, key, value, None), layers.attend(query, key, value, everything)
    np.testing.assert_array_equal(unmasked, masked)


def test_a_row_that_may_see_nothing_is_the_mean_of_the_values(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((1, 3, 2, 8)), jnp.float32) for _ in range(3))
    mask = jnp.zeros((1, 3, 3), bool)
    out = layers.attend(query, key, value, mask)
    np.testing.assert_allclose(out, jnp.broadcast_to(value.mean(1, keepdims=True), out.shape), **TOLERANCE)
    gradient = jax.grad(lambda q: layers.attend(q, key, value, mask).sum())(query)
    assert np.isfinite(gradient).all()


def test_masked_keys_get_no_gradient(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((1, 3, 2, 8)), jnp.float32) for _ in range(3))
    mask = jnp.array([[[True, True, False]]])
    for argument in (1, 2):
        gradient = jax.grad(lambda *qkv: (layers.attend(*qkv, mask) ** 2).sum(), argument)(query, key, value)
        assert not gradient[:, 2].any()
        assert gradient[:, :2].any()


def test_softmax_is_float32_in_bfloat16():
    query = jnp.full((1, 1, 1, 4), 8.0, jnp.bfloat16)
    key = jnp.ones((1, 512, 1, 4), jnp.bfloat16)
    value = jnp.ones((1, 512, 1, 4), jnp.bfloat16)
    out = layers.attend(query, key, value, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=1e-2)


def test_rotate_turns_pairs_of_the_two_halves():
    """A unit vector on coordinate ``c`` of the first half turns towards coordinate ``c`` of the second."""
    x = jnp.array([1.0, 0.0, 0.0, 0.0])[None, None, None]
    angles = jnp.full((1, 1, 2), math.pi / 2)
    np.testing.assert_allclose(layers.rotate(x, angles)[0, 0, 0], [0, 0, 1, 0], atol=1e-6)


def test_rotary_scores_depend_on_distance_only(rng):
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(at, to):
        def turn(x, position):
            return layers.rotate(x, layers.rotary_angles(jnp.full((1, 1), position), 16, 1e4, None))

        return jnp.vdot(turn(query, at), turn(key, to))

    np.testing.assert_allclose(score(7, 3), score(154, 150), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rotary_angles_of_the_paper():
    angles = layers.rotary_angles(jnp.array([[0, 1, 150]]), 8, 1e4, None)
    expected = np.array([0, 1, 150])[:, None] * 1e4 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(angles[0], expected, rtol=1e-6)


def test_linear_scaling_divides_positions():
    positions = jnp.arange(160)[None]
    scaled = layers.rotary_angles(positions, 64, 1e4, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled, layers.rotary_angles(positions, 64, 1e4, None) / 4, rtol=1e-6)


def test_llama3_scaling_keeps_short_wave_lengths_and_slows_long_ones():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    position = jnp.ones((1, 1), jnp.int32)
    plain = np.asarray(layers.rotary_angles(position, 128, 5e5, None)[0, 0])
    scaled = np.asarray(layers.rotary_angles(position, 128, 5e5, scaling)[0, 0])
    wave_length = 2 * math.pi / plain
    short, long = wave_length < 8192 / 4, wave_length > 8192 / 1
    assert short.any()
    assert long.any()
    assert (~short & ~long).any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_embed_with_images_fills_the_slots_only(rng):
    text = jnp.asarray(rng.standard_normal((2, 4, 3)), jnp.float32)
    images = jnp.asarray(rng.standard_normal((2, 5, 3)), jnp.float32)
    slots = jnp.array([[-1, 4, 0, -1], [2, -1, -1, 2]])
    out = layers.embed_with_images(text, slots, images)
    for row, position in np.ndindex(2, 4):
        slot = int(slots[row, position])
        expected = text[row, position] if slot < 0 else images[row, slot]
        np.testing.assert_array_equal(out[row, position], expected)


class _Step(nn.Module):
    """``x += fc(x)``, with a cache that remembers the input."""

    @nn.compact
    def __call__(self, x, shift, cache=None):
        new = x + layers.dense(x.shape[-1], ("embed", "mlp"), name="fc", dtype=jnp.float32)(x) + shift
        self.sow("intermediates", "hidden", new)
        return new, None if cache is None else (cache[0] + 1, x[:, :1])


class _Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, shift, caches=None):
        return layers.scan_layers(_Step(name="steps"), x, shift, length=3, remat=self.remat, caches=caches)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_layers_is_a_python_loop(rng, remat):
    x = jnp.asarray(rng.standard_normal((2, 4, 6)), jnp.float32)
    shift = jnp.float32(0.5)
    params = nn.unbox(_Stack().init(jax.random.key(0), x, shift))["params"]
    caches = (jnp.zeros((3, 2)), jnp.zeros((3, 2, 1, 6)))
    (out, new_caches), sown = _Stack(remat).apply({"params": params}, x, shift, caches, mutable="intermediates")

    expected, hidden, inputs = x, [], []
    for index in range(3):
        inputs.append(expected[:, :1])
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["steps"])
        expected, _ = _Step().apply({"params": layer}, expected, shift)
        hidden.append(expected)
    np.testing.assert_allclose(out, expected, **TOLERANCE)
    np.testing.assert_allclose(sown["intermediates"]["steps"]["hidden"][0], jnp.stack(hidden), **TOLERANCE)
    np.testing.assert_allclose(new_caches[1], jnp.stack(inputs), **TOLERANCE)
    assert (new_caches[0] == 1).all()
