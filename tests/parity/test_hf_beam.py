"""Beams of ``transformers`` 5: ids, scores and order, of prompts of unequal lengths.

LLaMA and OPT read them before their answers, given as ids or as embeddings; T5 reads them with its encoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from beams import BEAMS, NEW, assert_same, their_beams
from tiny_hf import LLAMA, OPT, T5
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mgpt4_jax.generate.beam_engine import BeamEngine, Hypothesis
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.generate.language import LanguageEngine
from mgpt4_jax.generate.requests import Request
from mgpt4_jax.generate.sampling import sampling_params

VOCAB = LLAMA["vocab_size"]
EOS = {"llama": (22, 60, 7), "opt": (58, 59, 26), "t5": (70, 14, 3)}
LENGTHS = (105, 21, 64)
CASES = {
    "plain": {"length_penalty": 1.0},
    "neutral": {"length_penalty": 0.0},
    "short": {"length_penalty": -1.0},
    "early": {"early_stopping": True},
    "never": {"early_stopping": "never", "length_penalty": 2.0},
    "never_short": {"early_stopping": "never", "length_penalty": -1.0},
    "min_length": {"min_new_tokens": 8, "length_penalty": -1.0},
    "penalised": {"repetition_penalty": 1.4, "length_penalty": 0.0},
    "n_best": {"num_return_sequences": 4, "length_penalty": -1.0},
}


@pytest.fixture(params=["llama", "opt", "t5"], scope="module")
def pair(request, convert_model):
    ends = {"eos_token_id": list(EOS[request.param])}
    if request.param == "llama":
        return convert_model(LlamaForCausalLM(LlamaConfig(**LLAMA | ends)))
    if request.param == "opt":
        return convert_model(OPTForCausalLM(OPTConfig(**OPT | ends)))
    # as many layers on both sides: the cache of transformers 5.23 has places for the encoder's
    model = T5ForConditionalGeneration(T5Config(**T5 | ends | {"num_decoder_layers": 2}))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, T5["d_model"]))  # transformers 5 ties it otherwise
    return convert_model(model)


@pytest.fixture(scope="module")
def beams(pair) -> BeamEngine:
    config, params, ends = pair.config, pair.params, {"slots": 32, "eos_ids": EOS[pair.config.architecture]}
    return BeamEngine(
        Engine(config, params, **ends) if config.llama is not None else LanguageEngine(config, params, **ends, bos_id=0)
    )


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    return [rng.integers(60, LLAMA["vocab_size"], length).astype(np.int32) for length in LENGTHS]


def generate(pair: Any, options: dict[str, Any], **inputs: Any) -> list[list[Hypothesis]]:
    before = 1 if pair.config.t5 is not None else inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return their_beams(pair.torch, options, EOS[pair.config.architecture], inputs, before)


def requests_of(prompts: list[np.ndarray], options: dict[str, Any]) -> list[Request]:
    params = sampling_params({"max_new_tokens": NEW, "num_beams": BEAMS, **options})
    return [Request(ids, np.full(len(ids), -1, np.int32), None, params) for ids in prompts]


@pytest.mark.parametrize("name", CASES)
def test_prompts_as_ids(pair, beams, prompts, name):
    is_t5 = pair.config.t5 is not None
    sides = [((0, n) if is_t5 else (n, 0)) for n in (max(LENGTHS) - len(ids) for ids in prompts)]
    padded = np.stack([np.pad(ids, side) for ids, side in zip(prompts, sides, strict=True)])
    inputs = {"input_ids": torch.from_numpy(padded).long(), "attention_mask": torch.from_numpy(padded > 0).long()}
    theirs = generate(pair, CASES[name], **inputs)
    before = [[0] if is_t5 else ids for ids in prompts]  # what the penalty weighs from the start
    seen = np.stack([np.isin(np.arange(VOCAB), ids) for ids in before])
    ours = beams.run(requests_of(prompts, CASES[name]), rules="transformers-5", seen=seen)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "n_best", "penalised"])
def test_prompts_as_embeddings(pair, beams, prompts, name):
    """No prompt is penalised. One by one: of a batch transformers 5.23 spares new tokens for each pad token."""
    embed, theirs = pair.torch.get_input_embeddings(), []
    for ids in prompts:
        given = {"inputs_embeds": embed(torch.from_numpy(ids).long())[None].detach()}
        theirs += generate(pair, CASES[name], **given, attention_mask=torch.ones(1, len(ids)).long())
    seen = np.broadcast_to(np.arange(VOCAB) == 0, (len(prompts), VOCAB)) if pair.config.t5 is not None else None
    assert_same(beams.run(requests_of(prompts, CASES[name]), rules="transformers-5", seen=seen), theirs)


def test_the_cases_end_in_every_way(pair, beams, prompts):
    """Else the tests above would show little: some answers must end early and some as late as they may."""
    found = [
        answer
        for options in CASES.values()
        for row in beams.run(requests_of(prompts, options), rules="transformers-5")
        for answer in row
    ]
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert len({len(answer.ids) for answer in found}) > 2
    assert len({answer.ids[-1] for answer in found} & set(EOS[pair.config.architecture])) > 1
    assert beams.num_compiled() == 1
