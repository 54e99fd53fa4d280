"""InstructBLIP on a LLaMA, from pixels and two token sequences to logits and greedy ids."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_hf import LLAMA, QFORMER, VISION, greedy_ids
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from mgpt4_jax.models.minigpt4 import MiniGPT4

Q, ROWS, LENGTH, NEW = 6, 2, 120, 10
IMAGE_TOKEN = LLAMA["vocab_size"] - 1


@pytest.fixture(scope="module")
def pair(convert_model):
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={"model_type": "llama", **LLAMA, "num_key_value_heads": 2},
        num_query_tokens=Q,
        image_token_index=IMAGE_TOKEN,
    )
    return convert_model(InstructBlipForConditionalGeneration(config))


@pytest.fixture
def inputs(rng):
    """One picture a row; the first row's text is padded on the left, its instruction on the right."""
    ids = rng.integers(3, IMAGE_TOKEN, (ROWS, LENGTH))
    valid = np.arange(LENGTH)[None] >= np.array([[14], [0]])
    starts = (15, 40)
    slots = np.full((ROWS, LENGTH), -1)
    for row, start in enumerate(starts):
        ids[row, start : start + Q] = IMAGE_TOKEN
        slots[row, start : start + Q] = np.arange(Q)
    instruction_valid = np.arange(9)[None] < np.array([[5], [9]])
    return {
        "ids": np.where(valid, ids, 0),
        "slots": slots,
        "pixels": rng.standard_normal((ROWS, 20, 20, 3)).astype(np.float32),
        "valid": valid,
        "text_ids": np.where(instruction_valid, rng.integers(1, QFORMER["vocab_size"], (ROWS, 9)), 0),
        "text_valid": instruction_valid,
    }


def _for_torch(inputs):
    return {
        "pixel_values": torch.from_numpy(inputs["pixels"].transpose(0, 3, 1, 2).copy()),
        "input_ids": torch.from_numpy(inputs["ids"]),
        "attention_mask": torch.from_numpy(inputs["valid"].astype(np.int64)),
        "qformer_input_ids": torch.from_numpy(inputs["text_ids"]),
        "qformer_attention_mask": torch.from_numpy(inputs["text_valid"].astype(np.int64)),
    }


def _logits(pair, params, inputs, ids, slots, valid):
    pictures = [inputs[name][:, None] for name in ("pixels", "text_ids", "text_valid")]
    ids = jnp.where(slots >= 0, 0, ids)  # what stands at a slot is of no account
    return MiniGPT4(pair.config).apply({"params": params}, ids, slots, pictures[0], valid, *pictures[1:])


def test_the_converter_knows_it(pair):
    assert pair.config.architecture == "instructblip"
    assert pair.config.qformer.with_text
    assert pair.config.vit.output_norm_eps == pair.config.vit.layer_norm_eps == 1e-6


def test_image_tokens_depend_on_the_instruction(pair, inputs):
    run = jax.jit(partial(MiniGPT4(pair.config).apply, {"params": pair.params}, method=MiniGPT4.encode_image))
    ours = run(inputs["pixels"], inputs["text_ids"], inputs["text_valid"])
    named = {key: value for key, value in _for_torch(inputs).items() if not key.startswith(("input", "attention"))}
    theirs = pair.torch.get_image_features(**named).pooler_output.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - run(inputs["pixels"], inputs["text_ids"][::-1], inputs["text_valid"][::-1])).max() > 1e-2


def test_logits_and_gradient(pair, rng, inputs, gradients, assert_gradients):
    valid = inputs["valid"]
    cotangent = rng.standard_normal((ROWS, LENGTH, LLAMA["vocab_size"])).astype(np.float32) / LENGTH
    cotangent *= valid[..., None]
    theirs = pair.torch(**_for_torch(inputs)).logits
    (theirs * torch.from_numpy(cotangent)).sum().backward()

    def probe(params):
        logits = _logits(pair, params, inputs, inputs["ids"], inputs["slots"], valid)
        return (logits * cotangent).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(probe, has_aux=True))(pair.params)
    np.testing.assert_allclose(logits[valid], theirs.detach().numpy()[valid], rtol=1e-4, atol=1e-4)
    assert_gradients(gradient, gradients(pair.torch))


def test_greedy_ids(pair, inputs):
    theirs = pair.torch.generate(**_for_torch(inputs), max_new_tokens=NEW, do_sample=False).numpy()[:, -NEW:]
    encode = jax.jit(partial(MiniGPT4(pair.config).apply, {"params": pair.params}, method=MiniGPT4.encode_image))
    images = np.asarray(encode(inputs["pixels"], inputs["text_ids"], inputs["text_valid"]))
    rows = zip(inputs["ids"], inputs["slots"], inputs["valid"], images, strict=True)
    prompts = [(np.where(slots >= 0, 0, ids)[keep], slots[keep], image) for ids, slots, keep, image in rows]
    np.testing.assert_array_equal(greedy_ids(pair.config, pair.params, prompts, NEW), theirs)
