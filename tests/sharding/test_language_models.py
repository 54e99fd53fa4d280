"""OPT and T5 under BLIP-2 on a mesh: the partitions that were meant, and the numbers of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import random_params

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import ModelConfig, OptConfig, T5Config, blip2_stage2, flan_t5_xl, opt_2_7b
from mgpt4_jax.models import build, opt, t5
from mgpt4_jax.sharding import batch_sharding, make_mesh, param_shardings

ROWS, LENGTH, ANSWER = 8, 21, 9
MODELS = {
    "opt": OptConfig(
        vocab_size=128, hidden_size=32, mlp_size=64, num_layers=2, num_heads=4, embed_size=32, max_positions=64
    ),
    "t5": T5Config(
        vocab_size=128, hidden_size=32, mlp_size=64, num_layers=2, num_decoder_layers=2, num_heads=4, head_dim=8
    ),
}
MESH = "data=2,fsdp=2,tensor=2"


def _specs(config):
    return {path: s.spec for path, s in flatten(param_shardings(config, make_mesh("fsdp=2,tensor=4"))).items()}


def test_partitions_are_those_that_were_meant():
    specs = _specs(blip2_stage2(opt_2_7b()))
    assert specs["opt/layers/attn/query/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["opt/layers/attn/query/bias"] == P(None, "tensor", None)
    assert specs["opt/layers/mlp/fc2/kernel"] == P(None, "tensor", "fsdp")
    assert specs["opt/embed_tokens/embedding"] == P("tensor", "fsdp")
    assert specs["opt/embed_positions/embedding"] == P(None, "fsdp")
    specs = _specs(blip2_stage2(flan_t5_xl()))
    assert specs["t5/encoder/layers/attn/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["t5/decoder/layers/cross_attn/key/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["t5/decoder/layers/mlp/gate/kernel"] == P(None, "fsdp", "tensor")
    assert specs["t5/decoder/relative_bias"] == P(None, "tensor")
    assert specs["t5/lm_head/kernel"] == P("fsdp", "tensor")


@pytest.mark.parametrize("name", MODELS)
def test_sharded_equals_unsharded(name):
    """The value and gradient of whole sequences, and two steps of decoding."""
    part, module = MODELS[name], {"opt": opt, "t5": t5}[name]
    config = ModelConfig(name, **{name: part})
    model, params = build(config), random_params(config)
    rng = np.random.default_rng(0)
    batch = {
        "ids": rng.integers(0, 128, (ROWS, LENGTH)),
        "valid": np.arange(LENGTH)[None] < rng.integers(5, LENGTH + 1, (ROWS, 1)),
        "answer": rng.integers(1, 128, (ROWS, ANSWER)),
    }

    def whole(params, batch):
        answer = (t5.shift_right(batch["answer"], part),) if name == "t5" else ()
        ids = batch["ids"]
        return (model.apply({"params": params}, ids, ids * 0 - 1, None, batch["valid"], *answer) ** 2).mean()

    def prefill(params, batch):
        embeds = model.apply({"params": params}, batch["ids"], batch["ids"] * 0 - 1, None, method="read")
        return module.prefill(params[name], part, embeds, batch["valid"], LENGTH + ANSWER)

    value_and_grad, prefill = jax.jit(jax.value_and_grad(whole)), jax.jit(prefill)
    step = jax.jit(lambda params, tokens, cache: module.decode_step(params[name], part, tokens, 0, cache))

    def run(params, batch):
        logits, cache = prefill(params, batch)
        return value_and_grad(params, batch), logits, step(params, batch["answer"][:, 0], cache)

    expected = run(params, batch)
    mesh = make_mesh(MESH)
    found = run(jax.device_put(params, param_shardings(config, mesh)), jax.device_put(batch, batch_sharding(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
