"""BLIP-2 on OPT and on T5, and InstructBLIP on T5, from pixels and tokens to logits, gradients and greedy ids."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import OPT, QFORMER, T5, VISION
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from mgpt4_jax.models import opt, t5
from mgpt4_jax.models.blip2_lm import Blip2Opt, Blip2T5

Q, ROWS, LENGTH, ANSWER, NEW = 6, 2, 112, 104, 10
VOCAB = OPT["vocab_size"]
IMAGE_TOKEN = VOCAB - 1
TOWER = {"rtol": 1e-4, "atol": 1e-4}
MODELS = {
    "blip2_opt": ({"model_type": "opt", **OPT}, False),
    "blip2_t5": ({"model_type": "t5", **T5, "feed_forward_proj": "relu", "tie_word_embeddings": True}, False),
    "blip2_flan_t5": ({"model_type": "t5", **T5, "dense_act_fn": "gelu"}, False),
    "instructblip_flan_t5": ({"model_type": "t5", **T5, "dense_act_fn": "gelu"}, True),
}


@pytest.fixture(params=MODELS, scope="module")
def pair(request, convert_model):
    text, instructed = MODELS[request.param]
    parts = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": text, "num_query_tokens": Q}
    parts["image_token_index"] = IMAGE_TOKEN
    kind = InstructBlipForConditionalGeneration if instructed else Blip2ForConditionalGeneration
    model = kind((InstructBlipConfig if instructed else Blip2Config)(**parts))
    if text.get("tie_word_embeddings") is False:  # transformers 5 ties unless the head is another tensor
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32))
    return convert_model(model)


@pytest.fixture
def inputs(rng):
    """The picture stands first; the first row's text is padded at its end, its instruction too."""
    valid = np.arange(LENGTH)[None] < np.array([[LENGTH - 14], [LENGTH]])
    slots = np.where(np.arange(LENGTH) < Q, np.arange(LENGTH), -1)[None].repeat(ROWS, 0)
    ids = rng.integers(3, IMAGE_TOKEN, (ROWS, LENGTH))
    instruction_valid = np.arange(9)[None] < np.array([[5], [9]])
    return {
        "ids": np.where(slots >= 0, 0, np.where(valid, ids, 0)),
        "slots": slots,
        "valid": valid,
        "pixels": rng.standard_normal((ROWS, 20, 20, 3)).astype(np.float32),
        "text_ids": np.where(instruction_valid, rng.integers(1, QFORMER["vocab_size"], (ROWS, 9)), 0),
        "text_valid": instruction_valid,
        "targets": rng.integers(1, VOCAB, (ROWS, ANSWER)),
    }


def _for_torch(config, inputs):
    found = {
        "pixel_values": torch.from_numpy(inputs["pixels"].transpose(0, 3, 1, 2).copy()),
        "input_ids": torch.from_numpy(np.where(inputs["slots"] >= 0, IMAGE_TOKEN, inputs["ids"])),
        "attention_mask": torch.from_numpy(inputs["valid"].astype(np.int64)),
    }
    if config.qformer.with_text:
        found["qformer_input_ids"] = torch.from_numpy(inputs["text_ids"])
        found["qformer_attention_mask"] = torch.from_numpy(inputs["text_valid"].astype(np.int64))
    return found


def _ours(config, params, inputs):
    model = Blip2Opt(config) if config.opt is not None else Blip2T5(config)
    arrays = [inputs["ids"], inputs["slots"], inputs["pixels"][:, None], inputs["valid"]]
    if config.t5 is not None:
        arrays += [t5.shift_right(inputs["targets"], config.t5), None]
    if config.qformer.with_text:
        arrays += [inputs["text_ids"][:, None], inputs["text_valid"][:, None]]
    return model.apply({"params": params}, *arrays)


def test_the_converter_knows_it(pair, request):
    name = request.node.callspec.params["pair"]
    config = pair.config
    assert config.architecture == ("blip2_opt" if config.opt is not None else "blip2_t5")
    assert config.qformer.with_text == name.startswith("instructblip")
    assert config.t5 is None or config.t5.activation == ("gelu" if "flan" in name else "relu")
    assert config.tokens_per_image == Q


def test_logits_and_gradient(pair, rng, inputs, gradients, assert_gradients):
    config = pair.config
    given = _for_torch(config, inputs)
    if config.t5 is not None:
        given["decoder_input_ids"] = torch.from_numpy(np.array(t5.shift_right(inputs["targets"], config.t5)))
    theirs = pair.torch(**given).logits
    kept = inputs["valid"] if config.opt is not None else np.ones((ROWS, ANSWER), bool)
    cotangent = rng.standard_normal(theirs.shape).astype(np.float32) / LENGTH * kept[..., None]
    (theirs * torch.from_numpy(cotangent)).sum().backward()

    def probe(params):
        logits = _ours(config, params, inputs)
        return (logits * cotangent).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(probe, has_aux=True))(pair.params)
    np.testing.assert_allclose(logits[kept], theirs.detach().numpy()[kept], **TOWER)
    assert_gradients(gradient, gradients(pair.torch))


def test_greedy_ids(pair, inputs):
    """Words padded on the left of the text, behind the picture, as LAVIS answers questions."""
    config = pair.config
    valid = np.ones((ROWS, LENGTH), bool)
    valid[0, Q : Q + 14] = False
    inputs = inputs | {"valid": valid}
    theirs = pair.torch.generate(
        **_for_torch(config, inputs), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=False
    ).numpy()[:, -NEW:]
    model, module = (Blip2Opt(config), opt) if config.opt is not None else (Blip2T5(config), t5)
    name = "opt" if config.opt is not None else "t5"
    text = (inputs["text_ids"][:, None], inputs["text_valid"][:, None]) if config.qformer.with_text else ()
    read = jax.jit(partial(model.apply, {"params": pair.params}, method="read"))
    embeds = read(inputs["ids"], inputs["slots"], inputs["pixels"][:, None], *text)
    params, part = pair.params[name], getattr(config, name)
    step = jax.jit(module.decode_step, static_argnums=1)
    logits, cache = jax.jit(module.prefill, static_argnums=(1, 4))(params, part, embeds, valid, LENGTH + NEW)
    banned = jnp.zeros(VOCAB, bool).at[{"opt": 2, "t5": 1}[name]].set(True)  # theirs may not end early
    found = []
    for index in range(NEW):
        found.append(jnp.where(banned, -jnp.inf, logits).argmax(-1))
        logits, cache = step(params, part, found[-1], index, cache)
    np.testing.assert_array_equal(np.stack(found, axis=1), theirs)
