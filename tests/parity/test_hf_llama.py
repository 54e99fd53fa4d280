"""LLaMA against ``LlamaForCausalLM``: logits, every layer, gradients and greedy ids, over 130 tokens."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import LLAMA, greedy_ids
from transformers import LlamaConfig, LlamaForCausalLM

from mgpt4_jax.models.layers import rotary_frequencies
from mgpt4_jax.models.llama import Llama

LENGTH, NEW = 134, 8
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "wide_heads": {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "llama3": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e5,
        },
    },
    "tied": {"tie_word_embeddings": True},
}
PADDINGS = {"none": (0, 0), "left": (13, 0), "right": (0, 13)}


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, convert_model):
    return convert_model(LlamaForCausalLM(LlamaConfig(**LLAMA | VARIANTS[request.param])))


@partial(jax.jit, static_argnums=0)
def _run(config, params, embeds, valid, cotangent):
    """Logits, each layer's states, and the gradients of a probe with respect to parameters and embeddings."""

    def probe(params, embeds):
        logits, sown = Llama(config).apply({"params": params}, embeds, valid, mutable="intermediates")
        return (jnp.where(valid[..., None], logits, 0) * cotangent).sum(), (logits, sown["intermediates"]["layers"])

    (_, (logits, sown)), gradients = jax.value_and_grad(probe, (0, 1), has_aux=True)(params, embeds)
    return logits, sown["hidden"][0], *gradients


@pytest.mark.parametrize("padding", PADDINGS)
def test_forward_and_backward(pair, rng, gradients, assert_gradients, padding):
    left, right = PADDINGS[padding]
    embeds = rng.standard_normal((2, LENGTH, 32)).astype(np.float32)
    cotangent = rng.standard_normal((2, LENGTH, LLAMA["vocab_size"])).astype(np.float32) / LENGTH
    place = np.arange(LENGTH)
    valid = np.stack([(place >= left) & (place < LENGTH - right), np.ones(LENGTH, bool)])
    positions = np.maximum(valid.cumsum(1) - 1, 0)

    inputs = torch.from_numpy(embeds).requires_grad_()
    theirs = pair.torch(
        inputs_embeds=inputs,
        attention_mask=torch.from_numpy(valid.astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        output_hidden_states=True,
    )
    (theirs.logits * torch.from_numpy(cotangent) * torch.from_numpy(valid)[..., None]).sum().backward()
    params = pair.params["llama"]
    logits, hidden, params_gradient, gradient = _run(pair.config.llama, params, embeds, valid, cotangent)

    np.testing.assert_allclose(logits[valid], theirs.logits.detach().numpy()[valid], rtol=1e-4, atol=1e-4)
    for ours, layer in zip(hidden[:-1], theirs.hidden_states[1:], strict=False):  # the last one is normed
        np.testing.assert_allclose(ours[valid], layer.detach().numpy()[valid], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient[valid], inputs.grad.numpy()[valid], rtol=1e-4, atol=1e-4)
    tied = () if pair.config.llama.tie_embeddings else ("llama/embed_tokens/embedding",)  # not reached by embeds
    assert_gradients({"llama": params_gradient}, gradients(pair.torch), without=tied)


def test_rotary_frequencies_are_equal_to_the_bit(pair):
    config = pair.config.llama
    ours = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_array_equal(ours, pair.torch.model.rotary_emb.inv_freq.numpy())


def test_greedy_ids(pair, rng):
    ids = rng.integers(3, LLAMA["vocab_size"], (2, LENGTH))
    valid = np.stack([np.arange(LENGTH) >= 9, np.ones(LENGTH, bool)])
    ids[~valid] = 0
    theirs = pair.torch.generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(valid.astype(np.int64)),
        max_new_tokens=NEW,
        do_sample=False,
    )
    prompts = [(row[keep], np.full(keep.sum(), -1), None) for row, keep in zip(ids, valid, strict=True)]
    np.testing.assert_array_equal(greedy_ids(pair.config, pair.params, prompts, NEW), theirs.numpy()[:, LENGTH:])
