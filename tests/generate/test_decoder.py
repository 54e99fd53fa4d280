"""The packed decoder against the model itself: grouped heads, scaled rotary positions, tied embeddings, bfloat16."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgpt4_jax.config import LlamaConfig, ModelConfig, RopeScaling
from mgpt4_jax.generate import decoder
from mgpt4_jax.models import build
from mgpt4_jax.sharding import make_mesh
from tests.tiny import LLAMA, random_params

CONFIGS = {
    "plain": LLAMA,
    "grouped": dataclasses.replace(LLAMA, num_kv_heads=2, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "tied": dataclasses.replace(LLAMA, num_kv_heads=1, tie_embeddings=True),
}
LENGTHS = (9, 5, 1)
STEPS = 4


def logits_of(config: LlamaConfig, params: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [b steps v] of prompts of ``LENGTHS`` and the tokens after them: one by one, and by the model itself."""
    packed = decoder.pack_decoder(config, decoder.read_tree(params["llama"]), dtype, make_mesh())
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (len(LENGTHS), max(LENGTHS) + STEPS))
    embeds = decoder.numbers(packed["embedding"])[ids]
    x, caches = decoder.prefill(config, packed, embeds[:, : max(LENGTHS)])
    room = ((0, 0), (0, 0))
    caches = [(jnp.pad(k, (*room, (0, 0), (0, 9))), jnp.pad(v, (*room, (0, 9), (0, 0)))) for k, v in caches]
    rows, positions = jnp.arange(len(LENGTHS)), jnp.array(LENGTHS)
    found = [decoder.next_logits(packed, x[rows, positions - 1])]
    step = jax.jit(lambda *arguments: decoder.decode_step(config, packed, *arguments))
    for _ in range(STEPS):
        x, caches = step(embeds[rows, positions], positions, caches)
        found.append(decoder.next_logits(packed, x))
        positions += 1
    model = build(ModelConfig("llama", llama=config), dtype)
    whole = model.apply({"params": params}, ids, np.full_like(ids, -1), None)
    expected = [whole[rows, np.array(LENGTHS) - 1 + step] for step in range(STEPS + 1)]
    return np.stack(found, 1), np.stack(expected, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_by_one_equals_the_model(name: str) -> None:
    params = random_params(ModelConfig("llama", llama=CONFIGS[name]), scale=0.2)
    found, expected = logits_of(CONFIGS[name], params, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_kept_as_bits_is_bfloat16() -> None:
    params = random_params(ModelConfig("llama", llama=LLAMA), scale=0.05)
    found, expected = logits_of(LLAMA, params, jnp.bfloat16)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.02)  # eight bits of mantissa through two layers
    weight = jnp.asarray(params["llama"]["lm_head"]["kernel"], jnp.bfloat16)
    assert decoder.numbers(decoder._store(weight)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(decoder.numbers(decoder._store(weight)), weight)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_decoding_step_copies_neither_weights_nor_cache(rows: int) -> None:
    """XLA's CPU compiler copies operands that do not lie as it wants them, at every step, without a word."""
    config = dataclasses.replace(LLAMA, num_layers=1, hidden_size=256, mlp_size=512, head_dim=64)
    params = random_params(ModelConfig("llama", llama=config))
    packed = decoder.pack_decoder(config, decoder.read_tree(params["llama"]), jnp.float32, make_mesh())
    room = 256

    def steps(packed: Any, caches: Any, positions: Any) -> Any:
        def body(carry: Any) -> Any:
            positions, caches, x = carry
            x, caches = decoder.decode_step(config, packed, x, positions, caches)
            return positions + 1, caches, x

        x = jnp.ones((rows, config.hidden_size))
        return jax.lax.while_loop(lambda carry: carry[0][0] < room, body, (positions, caches, x))

    shape = (rows, config.num_kv_heads, config.head_dim, room)
    caches = [(jnp.zeros(shape), jnp.zeros((*shape[:2], room, config.head_dim)))]
    program = jax.jit(steps, donate_argnums=1).lower(packed, caches, jnp.zeros(rows, jnp.int32)).compile()
    smallest = config.hidden_size * config.num_kv_heads * config.head_dim * 4  # one weight, or one row's keys
    assert program.memory_analysis().temp_size_in_bytes < smallest
