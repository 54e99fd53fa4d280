"""OPT against ``OPTForCausalLM``: logits, every layer, gradients and greedy ids, over 130 tokens."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import OPT
from transformers import OPTConfig, OPTForCausalLM

from mgpt4_jax.models.opt import Opt, decode_step, prefill

LENGTH, NEW = 134, 12
VARIANTS = {
    "norms_first": {},
    "norms_last": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 20, "do_layer_norm_before": False},  # 350m
}
PADDINGS = {"none": (), "left": range(13), "right": range(121, LENGTH), "inside": range(32, 45)}


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, convert_model):
    return convert_model(OPTForCausalLM(OPTConfig(**OPT | VARIANTS[request.param])))


def _valid(padding):
    """The first row is padded, the second is whole."""
    valid = np.ones((2, LENGTH), bool)
    valid[0, np.array(PADDINGS[padding], int)] = False
    return valid


@partial(jax.jit, static_argnums=0)
def _run(config, params, embeds, valid, cotangent):
    """Logits, each layer's states, and the gradients of a probe with respect to parameters and embeddings."""

    def probe(params, embeds):
        logits, sown = Opt(config).apply({"params": params}, embeds, valid, mutable="intermediates")
        return (jnp.where(valid[..., None], logits, 0) * cotangent).sum(), (logits, sown["intermediates"]["layers"])

    (_, (logits, sown)), gradients = jax.value_and_grad(probe, (0, 1), has_aux=True)(params, embeds)
    return logits, sown["hidden"][0], *gradients


@pytest.mark.parametrize("padding", PADDINGS)
def test_forward_and_backward(pair, rng, gradients, assert_gradients, padding):
    valid = _valid(padding)
    embeds = rng.standard_normal((2, LENGTH, pair.config.opt.embed_size)).astype(np.float32)
    cotangent = rng.standard_normal((2, LENGTH, OPT["vocab_size"])).astype(np.float32) / LENGTH

    inputs = torch.from_numpy(embeds).requires_grad_()
    mask = torch.from_numpy(valid.astype(np.int64))
    theirs = pair.torch(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True)
    (theirs.logits * torch.from_numpy(cotangent) * mask[..., None]).sum().backward()
    params = pair.params["opt"]
    logits, hidden, params_gradient, gradient = _run(pair.config.opt, params, embeds, valid, cotangent)

    np.testing.assert_allclose(logits[valid], theirs.logits.detach().numpy()[valid], rtol=1e-4, atol=1e-4)
    for ours, layer in zip(hidden[:-1], theirs.hidden_states[1:], strict=False):  # the last one may be normed
        np.testing.assert_allclose(ours[valid], layer.detach().numpy()[valid], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient[valid], inputs.grad.numpy()[valid], rtol=1e-4, atol=1e-4)
    assert_gradients({"opt": params_gradient}, gradients(pair.torch))


@pytest.mark.parametrize("padding", ["left", "inside"])
def test_greedy_ids(pair, rng, padding):
    valid = _valid(padding)
    ids = np.where(valid, rng.integers(3, OPT["vocab_size"], (2, LENGTH)), 1)
    theirs = pair.torch.generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(valid.astype(np.int64)),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        eos_token_id=None,
        do_sample=False,
    ).numpy()[:, LENGTH:]
    config, params = pair.config.opt, pair.params["opt"]
    step = jax.jit(decode_step, static_argnums=1)
    embeds = Opt(config).apply({"params": params}, ids, method=Opt.embed)
    logits, cache = jax.jit(prefill, static_argnums=(1, 4))(params, config, embeds, valid, LENGTH + NEW)
    found = [logits.argmax(-1)]
    for index in range(NEW - 1):
        logits, cache = step(params, config, found[-1], index, cache)
        found.append(logits.argmax(-1))
    np.testing.assert_array_equal(np.stack(found, axis=1), theirs)
