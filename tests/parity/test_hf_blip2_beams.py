"""Whole models of ``transformers`` 5 from pixels to answers, greedily and by five beams, whatever lengths are worth.

BLIP-2 on OPT and on T5 (plain and gated), InstructBLIP on a LLaMA (Vicuna) and on FlanT5; every row has a picture of
its own and another length. Pictures go through the encoder of the program, words through its engine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from beams import BEAMS, NEW, assert_same, their_beams
from tiny_hf import LLAMA, OPT, QFORMER, T5, VISION
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from mgpt4_jax.generate.beam_engine import BeamEngine
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.generate.language import LanguageEngine
from mgpt4_jax.generate.requests import Request
from mgpt4_jax.generate.sampling import sampling_params
from mgpt4_jax.generate.vision import ImageEncoder

Q, VOCAB = 6, OPT["vocab_size"]
IMAGE_TOKEN = VOCAB - 1
LENGTHS = (112, 41, 70)
# as many layers on both sides: the cache of transformers 5.23 has places for the encoder's
PLAIN = {"model_type": "t5", **T5, "num_decoder_layers": 2, "feed_forward_proj": "relu", "tie_word_embeddings": True}
FLAN = {"model_type": "t5", **T5, "num_decoder_layers": 2, "dense_act_fn": "gelu"}
VICUNA = {"model_type": "llama", **LLAMA, "num_key_value_heads": 2}
MODELS = {
    "blip2_opt": ({"model_type": "opt", **OPT}, False, (67, 65)),
    "blip2_t5": (PLAIN, False, (34, 61)),
    "blip2_flan_t5": (FLAN, False, (70, 69)),
    "instructblip_vicuna": (VICUNA, True, (47, 10)),
    "instructblip_flan_t5": (FLAN, True, (64, 44)),
}
CASES = {
    "long": {"length_penalty": 1.0},
    "neutral": {"length_penalty": 0.0},
    "short": {"length_penalty": -1.0},
    "n_best": {"length_penalty": -1.0, "num_return_sequences": 3, "repetition_penalty": 1.3},
}


@dataclasses.dataclass(frozen=True)
class Whole:
    """A pair of models, and the questions that both are asked."""

    pair: Any
    ends: tuple[int, ...]
    beams: BeamEngine
    requests: list[Request]
    given: list[dict[str, torch.Tensor]]  # the same for transformers

    @property
    def before(self) -> list[int]:
        """Ids of their answers before the first new one: T5's start token, or the whole prompt."""
        return [1 if self.pair.config.t5 is not None else len(request.ids) for request in self.requests]

    @property
    def seen(self) -> np.ndarray:
        """What their repetition penalty weighs from the start: a decoder's start token, or the ids of the prompt."""
        prompts = [[0] if self.pair.config.t5 is not None else one["input_ids"] for one in self.given]
        return np.stack([np.isin(np.arange(VOCAB), ids) for ids in prompts])

    def asked(self, **options: Any) -> list[Request]:
        sampling = sampling_params({"max_new_tokens": NEW, **options})
        return [dataclasses.replace(request, sampling=sampling) for request in self.requests]


@pytest.fixture(params=MODELS, scope="module")
def whole(request, convert_model) -> Whole:
    text, instructed, ends = MODELS[request.param]
    parts = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": text, "num_query_tokens": Q}
    parts["image_token_index"] = IMAGE_TOKEN
    kind = InstructBlipForConditionalGeneration if instructed else Blip2ForConditionalGeneration
    model = kind((InstructBlipConfig if instructed else Blip2Config)(**parts))
    if text["model_type"] == "t5" and not text["tie_word_embeddings"]:  # else transformers 5 ties them
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, T5["d_model"]))
    pair = convert_model(model)
    engine = Engine if text["model_type"] == "llama" else LanguageEngine
    beams = BeamEngine(engine(pair.config, pair.params, slots=32, eos_ids=ends, bos_id=0))
    return Whole(pair, ends, beams, *questions(pair, instructed))


def questions(pair: Any, instructed: bool) -> tuple[list[Request], list[dict[str, torch.Tensor]]]:
    """Pictures before the words, on a LLaMA within them; instructions of other lengths than the words."""
    rng = np.random.default_rng(5)
    pixels = rng.standard_normal((len(LENGTHS), 20, 20, 3)).astype(np.float32)
    words = [rng.integers(1, QFORMER["vocab_size"], 5 + 2 * row).tolist() for row in range(len(LENGTHS))]
    images = ImageEncoder(pair.config, pair.params, jnp.float32).encode(list(pixels), words if instructed else None)
    requests, given = [], []
    for row, length in enumerate(LENGTHS):
        start = 3 * row if pair.config.llama is not None else 0
        slots = np.full(length, -1, np.int32)
        slots[start : start + Q] = np.arange(Q)
        ids = np.where(slots >= 0, IMAGE_TOKEN, rng.integers(3, IMAGE_TOKEN, length)).astype(np.int32)
        requests.append(Request(np.where(slots >= 0, 0, ids), slots, images[row], sampling_params({})))
        arrays = {"pixel_values": pixels[row].transpose(2, 0, 1), "input_ids": ids, "attention_mask": np.ones(length)}
        if instructed:
            arrays |= {"qformer_input_ids": words[row], "qformer_attention_mask": np.ones(len(words[row]))}
        tensors = {name: torch.from_numpy(np.array(values)[None]) for name, values in arrays.items()}
        given.append({name: value if name == "pixel_values" else value.long() for name, value in tensors.items()})
    return requests, given


@pytest.mark.parametrize("name", CASES)
def test_beams(whole, name):
    """Ours all together, theirs one by one: of a batch transformers 5.23 spares new tokens for each pad token."""
    theirs = []
    for given, before in zip(whole.given, whole.before, strict=True):
        theirs += their_beams(whole.pair.torch, CASES[name], whole.ends, given, before)
    asked = whole.asked(num_beams=BEAMS, **CASES[name])
    assert_same(whole.beams.run(asked, rules="transformers-5", seen=whole.seen), theirs, 1e-4)


def test_greedy_ids(whole):
    asked = whole.asked(temperature=0.0, repetition_penalty=1.0)
    ours = [[] for _ in asked]
    for update in whole.beams.engine.run(asked):
        ours[update.index] += update.ids
    options = {"eos_token_id": list(whole.ends), "max_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    theirs = [whole.pair.torch.generate(**given, **options)[0].tolist() for given in whole.given]
    assert ours == [ids[before:] for ids, before in zip(theirs, whole.before, strict=True)]


def test_the_cases_show_something(whole):
    """Answers end early and as late as they may, at several lengths, and what lengths are worth decides which wins."""
    found = {
        name: whole.beams.run(whole.asked(num_beams=BEAMS, **options), rules="transformers-5", seen=whole.seen)
        for name, options in CASES.items()
    }
    every = [answer for rows in found.values() for row in rows for answer in row]
    assert {answer.finish_reason for answer in every} == {"stop", "length"}
    assert len({len(answer.ids) for answer in every}) > 3
    best = {name: [row[0].ids for row in rows] for name, rows in found.items()}
    assert best["short"] != best["long"]
    assert whole.beams.num_compiled() == 1
