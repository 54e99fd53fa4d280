"""T5 against ``T5ForConditionalGeneration``: logits, every layer, gradients and greedy ids, over 110 tokens."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import T5 as SIZES
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from mgpt4_jax.config import T5Config as OurConfig
from mgpt4_jax.models.t5 import T5, decode_step, prefill, relative_buckets, shift_right

LENGTH, ANSWER, NEW = 115, 104, 12
VARIANTS = {
    "flan": {},
    "flan_as_lavis": {"dense_act_fn": "gelu"},
    "plain_tied": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "plain_untied": {"feed_forward_proj": "relu"},
}
PADDINGS = {"none": (), "left": range(13), "right": range(102, LENGTH), "inside": range(32, 45)}


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, convert_model):
    """``transformers`` 5 ties unless the head is another tensor."""
    fields = SIZES | VARIANTS[request.param]
    model = T5ForConditionalGeneration(T5Config(**fields))
    if not fields["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return convert_model(model)


def test_the_converter_knows_it(pair, request):
    variant, config = request.node.callspec.params["pair"], pair.config.t5
    assert (config.gated, config.tie_embeddings) == ("flan" in variant, variant == "plain_tied")
    assert config.scale_logits == config.tie_embeddings
    assert config.activation == {"flan": "gelu_new", "flan_as_lavis": "gelu"}.get(variant, "relu")


@partial(jax.jit, static_argnums=0)
def _run(config, params, embeds, valid, decoder_ids, decoder_valid, cotangent):
    """Logits, each layer's states, and the gradients of a probe with respect to parameters and embeddings."""

    def probe(params, embeds):
        inputs = (embeds, valid, decoder_ids, decoder_valid)
        logits, sown = T5(config).apply({"params": params}, *inputs, mutable="intermediates")
        return (jnp.where(decoder_valid[..., None], logits, 0) * cotangent).sum(), (logits, sown["intermediates"])

    (_, (logits, sown)), gradients = jax.value_and_grad(probe, (0, 1), has_aux=True)(params, embeds)
    hidden = [sown[tower]["layers"]["hidden"][0] for tower in ("encoder", "decoder")]
    return logits, hidden, *gradients


def _valid(padding):
    """The first row is padded, the second is whole."""
    valid = np.ones((2, LENGTH), bool)
    valid[0, np.array(PADDINGS[padding], int)] = False
    return valid


@pytest.mark.parametrize("padding", PADDINGS)
def test_forward_and_backward(pair, rng, gradients, assert_gradients, padding):
    valid = _valid(padding)
    config, params = pair.config.t5, pair.params["t5"]
    embeds = rng.standard_normal((2, LENGTH, 32)).astype(np.float32)
    cotangent = rng.standard_normal((2, ANSWER, SIZES["vocab_size"])).astype(np.float32) / ANSWER
    decoder_valid = np.arange(ANSWER)[None] < np.array([[ANSWER - 30], [ANSWER]])
    targets = np.where(decoder_valid, rng.integers(1, SIZES["vocab_size"], (2, ANSWER)), -100)
    decoder_ids = np.asarray(shift_right(targets, config))

    inputs, mask = torch.from_numpy(embeds).requires_grad_(), torch.from_numpy(decoder_valid.astype(np.int64))
    theirs = pair.torch(
        inputs_embeds=inputs,
        attention_mask=torch.from_numpy(valid.astype(np.int64)),
        decoder_attention_mask=mask,
        labels=torch.from_numpy(targets),  # which it shifts itself
        output_hidden_states=True,
    )
    (theirs.logits * torch.from_numpy(cotangent) * mask[..., None]).sum().backward()
    arrays = (embeds, valid, decoder_ids, decoder_valid, cotangent)
    logits, hidden, params_gradient, gradient = _run(config, params, *arrays)

    ours, expected = np.asarray(logits)[decoder_valid], theirs.logits.detach().numpy()[decoder_valid]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    layers = (
        (hidden[0], theirs.encoder_hidden_states, valid),
        (hidden[1], theirs.decoder_hidden_states, decoder_valid),
    )
    for mine, others, kept in layers:
        for ours, layer in zip(mine[:-1], others[1:], strict=False):  # the last one is normed
            np.testing.assert_allclose(ours[kept], layer.detach().numpy()[kept], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(gradient[valid], inputs.grad.numpy()[valid], rtol=1e-4, atol=1e-4)
    assert_gradients({"t5": params_gradient}, gradients(pair.torch))


def test_greedy_ids(pair, rng):
    valid = _valid("left")
    embeds = rng.standard_normal((2, LENGTH, 32)).astype(np.float32)
    theirs = pair.torch.generate(
        inputs_embeds=torch.from_numpy(embeds),
        attention_mask=torch.from_numpy(valid.astype(np.int64)),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        eos_token_id=None,
        do_sample=False,
        use_cache=False,  # theirs counts the encoder's layers
    ).numpy()[:, 1:]
    config, params = pair.config.t5, pair.params["t5"]
    step = jax.jit(decode_step, static_argnums=1)
    logits, cache = jax.jit(prefill, static_argnums=(1, 4))(params, config, embeds, valid, NEW)
    found = [logits.argmax(-1)]
    for index in range(NEW - 1):
        logits, cache = step(params, config, found[-1], index, cache)
        found.append(logits.argmax(-1))
    np.testing.assert_array_equal(np.stack(found, axis=1), theirs)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (16, 40), (64, 256), (32, 100), (8, 20)])
@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_buckets_are_equal(buckets, farthest, is_bidirectional):
    config = OurConfig(num_buckets=buckets, max_distance=farthest)
    offsets = np.arange(-3 * farthest, 3 * farthest + 1)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(offsets), is_bidirectional, buckets, farthest)
    ours = relative_buckets(config, jnp.array([0]), jnp.asarray(offsets), is_bidirectional=is_bidirectional)
    np.testing.assert_array_equal(ours[0], theirs.numpy())
