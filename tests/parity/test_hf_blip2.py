"""ViT, Q-Former and heads against ``Blip2ForImageTextRetrieval`` and ``Blip2ForConditionalGeneration``."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import LLAMA, QFORMER, VISION
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mgpt4_jax.models.blip2 import Blip2
from mgpt4_jax.models.masks import bidirectional_mask, padding_mask
from mgpt4_jax.models.minigpt4 import MiniGPT4
from mgpt4_jax.models.qformer import Qformer
from mgpt4_jax.models.vit import Vit

Q, T, ROWS = 6, 11, 3
LAYER = {"rtol": 1e-5, "atol": 1e-5}
TOWER = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def retrieval(convert_model):
    """With a text side and all heads."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        num_query_tokens=Q,
        image_text_hidden_size=12,
    )
    return convert_model(Blip2ForImageTextRetrieval(config))


@pytest.fixture(scope="module")
def generation(convert_model):
    """Without a text side, on a LLaMA."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={"model_type": "llama", **LLAMA},
        num_query_tokens=Q,
    )
    return convert_model(Blip2ForConditionalGeneration(config))


@pytest.fixture
def pixels(rng):
    return rng.standard_normal((ROWS, 20, 20, 3)).astype(np.float32)


@pytest.fixture
def image(rng):
    return rng.standard_normal((ROWS, 17, VISION["hidden_size"])).astype(np.float32)


@pytest.fixture
def text(rng):
    """Token ids and which of them are not padding."""
    ids = rng.integers(1, QFORMER["vocab_size"], (ROWS, T))
    valid = np.arange(T)[None] < np.array([[T], [T - 3], [4]])
    return np.where(valid, ids, 0), valid


def _torch(*arrays):
    """Arrays as tensors, boolean ones as integers."""
    return [torch.from_numpy(x.astype(np.int64) if x.dtype == bool else np.array(x)) for x in arrays]


def _channels_first(pixels):
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def _hidden(config, sown):
    """States after each layer, in the order of the layers."""
    sown = sown["intermediates"]
    frequency = config.cross_attention_frequency
    groups = [sown["layers"][f"layer_{place}"]["hidden"][0] for place in range(frequency)]
    found = [states[group] for group in range(config.num_layers // frequency) for states in groups]
    rest = config.num_layers % frequency
    return found + [sown["tail"][f"layer_{place}"]["hidden"][0] for place in range(rest)]


def _compare_layers(ours, theirs):
    assert len(theirs) == len(ours) + 1  # theirs begin with the embeddings
    for index, (mine, other) in enumerate(zip(ours, theirs[1:], strict=True)):
        np.testing.assert_allclose(mine, other.detach().numpy(), **LAYER, err_msg=f"layer {index}")


def test_vision_tower(retrieval, rng, pixels, gradients, assert_gradients):
    config, params = retrieval.config.vit, retrieval.params["vit"]
    cotangent = rng.standard_normal((ROWS, 17, 24)).astype(np.float32) / 17
    images = _channels_first(pixels).requires_grad_()
    recorded = {}
    layers = retrieval.torch.vision_model.encoder.layers
    hooks = [
        layer.register_forward_hook(lambda _, __, out, i=i: recorded.update({i: out})) for i, layer in enumerate(layers)
    ]
    theirs = retrieval.torch.vision_model(images)
    for hook in hooks:
        hook.remove()
    (recorded[len(layers) - 1] * torch.from_numpy(cotangent)).sum().backward()

    @jax.jit
    def run(params, pixels):
        def probe(params, pixels):
            out, sown = Vit(config).apply({"params": params}, pixels, mutable="intermediates")
            return (out * cotangent).sum(), (out, sown["intermediates"]["blocks"]["hidden"][0])

        return jax.value_and_grad(probe, (0, 1), has_aux=True)(params, pixels)

    (_, (_, hidden)), (params_gradient, gradient) = run(params, pixels)
    for index, states in recorded.items():
        np.testing.assert_allclose(hidden[index], states.detach().numpy(), **LAYER, err_msg=f"block {index}")
    np.testing.assert_allclose(gradient.transpose(0, 3, 1, 2), images.grad.numpy(), **TOWER)
    assert_gradients({"vit": params_gradient}, gradients(retrieval.torch))
    tokens = jax.jit(partial(Blip2(retrieval.config).apply, method=Blip2.encode_pixels))(
        {"params": retrieval.params}, pixels
    )
    np.testing.assert_allclose(tokens, theirs.last_hidden_state.detach().numpy(), **TOWER)


@pytest.mark.parametrize("use", ["queries", "joint", "text"])
def test_qformer_layers(retrieval, image, text, use):
    ids, valid = text
    words, given, patches = _torch(ids, valid, image)
    queries = retrieval.torch.query_tokens.expand(ROWS, -1, -1)
    ours: dict[str, object] = {}
    if use == "queries":
        theirs = {"query_embeds": queries, "encoder_hidden_states": patches}
        inputs = (image,)
    elif use == "joint":
        mask = torch.cat([torch.ones(ROWS, Q, dtype=torch.long), given], dim=1)
        theirs = {
            "query_embeds": retrieval.torch.embeddings(input_ids=words, query_embeds=queries),
            "query_length": Q,
            "attention_mask": mask,
            "encoder_hidden_states": patches,
        }
        inputs, ours = (image, ids), {"mask": bidirectional_mask(Q, jnp.asarray(valid))}
    else:
        embedded = retrieval.torch.embeddings(input_ids=words)
        theirs = {"query_embeds": embedded, "query_length": 0, "attention_mask": given}
        inputs, ours = (None, ids), {"mask": padding_mask(jnp.asarray(valid))}
    config = retrieval.config.qformer
    run = jax.jit(partial(Qformer(config).apply, {"params": retrieval.params["qformer"]}, mutable="intermediates"))
    _, sown = run(*inputs, **ours)
    expected = retrieval.torch.qformer(**theirs, output_hidden_states=True)
    _compare_layers(_hidden(config, sown), expected.hidden_states)


def test_qformer_without_text(generation, rng, image, gradients, assert_gradients):
    config, params = generation.config.qformer, generation.params["qformer"]
    assert not config.with_text
    cotangent = rng.standard_normal((ROWS, Q, 32)).astype(np.float32) / Q
    patches = torch.from_numpy(image).requires_grad_()
    queries = generation.torch.query_tokens.expand(ROWS, -1, -1)
    theirs = generation.torch.qformer(query_embeds=queries, encoder_hidden_states=patches, output_hidden_states=True)
    (theirs.last_hidden_state * torch.from_numpy(cotangent)).sum().backward()

    @jax.jit
    def run(params, image):
        def probe(params, image):
            out, sown = Qformer(config).apply({"params": params}, image, mutable="intermediates")
            return (out.queries * cotangent).sum(), sown

        return jax.value_and_grad(probe, (0, 1), has_aux=True)(params, image)

    (_, sown), (params_gradient, gradient) = run(params, image)
    _compare_layers(_hidden(config, sown), theirs.hidden_states)
    np.testing.assert_allclose(gradient, patches.grad.numpy(), **TOWER)
    assert_gradients({"qformer": params_gradient}, gradients(generation.torch))


def test_image_tokens_for_the_language_model(generation, pixels):
    run = jax.jit(partial(MiniGPT4(generation.config).apply, method=MiniGPT4.encode_image))
    theirs = generation.torch.get_image_features(_channels_first(pixels)).pooler_output
    np.testing.assert_allclose(run({"params": generation.params}, pixels), theirs.detach().numpy(), **TOWER)


def test_retrieval_heads(retrieval, rng, pixels, text, gradients, assert_gradients):
    """ITC similarities and ITM logits, and the gradient of both with respect to every parameter."""
    ids, valid = text
    words, given = _torch(ids, valid)
    contrast, match = (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, ROWS), (ROWS, 2)))
    call = partial(retrieval.torch, _channels_first(pixels), words, given)
    itc = call(use_image_text_matching_head=False).logits_per_image
    itm = call(use_image_text_matching_head=True).logits_per_image
    ((itc * torch.from_numpy(contrast)).sum() + (itm * torch.from_numpy(match)).sum()).backward()

    def probe(params):
        model = Blip2(retrieval.config).bind({"params": params})
        image = model.image_features(pixels)
        similarity = model.similarity(image.embeds, model.text_features(ids, valid)[:, 0])
        logits = model.match_logits(image.tokens, ids, valid)
        return (similarity * contrast).sum() + (logits * match).sum(), (similarity, logits)

    (_, (similarity, logits)), gradient = jax.jit(jax.value_and_grad(probe, has_aux=True))(retrieval.params)
    np.testing.assert_allclose(similarity, itc.detach().numpy(), **TOWER)
    np.testing.assert_allclose(logits, itm.detach().numpy(), **TOWER)
    assert_gradients(gradient, gradients(retrieval.torch), without=("temp",))  # which Hugging Face drops
