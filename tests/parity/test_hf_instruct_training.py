"""InstructBLIP's training loss and its gradients beside ``transformers``, from samples through our rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from tiny_hf import LLAMA, QFORMER, T5, VISION
from train.instruct_world import BERT_VOCAB, VOCAB, rows_of
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.loading import extra_arrays
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.models import build
from mgpt4_jax.train.objectives import normalised
from mgpt4_jax.train.stages import STAGES

Q, IMAGE_TOKEN = 6, VOCAB - 1
LENGTHS = {"max_prompt_length": 100, "max_text_length": 60}
WORDS = "a red square and a blue circle on the left of "
SAMPLES = [  # the first loses the beginning of its question and the end of its answer
    Sample("long", b"", WORDS * 8, WORDS * 9 + "what is this?"),
    Sample("short", b"", "a green circle", "what?"),
    Sample("usual", b"", "a red square on the left.", "describe the picture with a long sentence"),
]


@pytest.fixture(params=["llama", "t5"], scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, convert_model):
    text = {"model_type": "llama", **LLAMA} if kind == "llama" else {"model_type": "t5", **T5, "dense_act_fn": "gelu"}
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": BERT_VOCAB, "max_position_embeddings": 100},
        text_config={**text, "vocab_size": VOCAB},
        num_query_tokens=Q,
        image_token_index=IMAGE_TOKEN,
    )
    model = InstructBlipForConditionalGeneration(config)
    if kind == "t5":  # transformers 5 ties unless the head is another tensor
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32))
    return convert_model(model)


def test_loss_and_gradients(kind, pair, rng, gradients, assert_gradients):
    rows = rows_of(kind, Q, **LENGTHS)
    found = [rows.row(sample) for sample in SAMPLES]
    longest = max(len(row) for row in found)
    assert longest > 100
    text = pad_sequences(found, longest, pad_id=rows.pad_id)
    batch = {name: getattr(text, name) for name in ("ids", "slots", "targets", "mask")}
    batch["pixels"] = rng.integers(0, 256, (len(SAMPLES), 1, 20, 20, 3), np.uint8)
    batch |= extra_arrays(found, rows.text)
    assert batch["qformer_mask"].sum(1).tolist() == [len(row.qformer_ids) for row in found]

    pixels = np.asarray(normalised(batch["pixels"]))[:, 0].transpose(0, 3, 1, 2)
    tensors = {
        "pixel_values": pixels,
        "input_ids": np.where(text.slots >= 0, IMAGE_TOKEN, text.ids).astype(np.int64),
        "attention_mask": text.mask.astype(np.int64),
        "qformer_input_ids": batch["qformer_ids"].astype(np.int64),
        "qformer_attention_mask": batch["qformer_mask"].astype(np.int64),
        "labels": text.targets.astype(np.int64),
    }
    theirs = pair.torch(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()})
    theirs.loss.backward()

    objective = STAGES["generative"].objective(build(pair.config), rows)
    (loss, metrics), gradient = jax.jit(
        jax.value_and_grad(lambda params: objective(params, batch, None), has_aux=True)
    )(pair.params)
    np.testing.assert_allclose(loss, theirs.loss.item(), rtol=1e-4)
    assert metrics["weight"] == (text.targets != IGNORED).sum()
    assert_gradients(gradient, gradients(pair.torch))
