"""Beams of ``transformers`` 5: ids, scores and order, of prompts of unequal lengths, given as ids and as embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_hf import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM

from mgpt4_jax.generate.beam_engine import BeamEngine, Hypothesis
from mgpt4_jax.generate.engine import Engine, Request
from mgpt4_jax.generate.sampling import sampling_params

BEAMS, NEW = 5, 12
EOS = (22, 60, 7)
LENGTHS = (105, 21, 64)
GAP = 2e-5  # between what is kept and what is dropped; float32 sums differ by some 1e-6
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


@pytest.fixture(scope="module")
def pair(convert_model):
    return convert_model(LlamaForCausalLM(LlamaConfig(**LLAMA | {"eos_token_id": list(EOS)})))


@pytest.fixture(scope="module")
def beams(pair) -> BeamEngine:
    return BeamEngine(Engine(pair.config, pair.params, slots=32, eos_ids=EOS))


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    return [rng.integers(60, LLAMA["vocab_size"], length).astype(np.int32) for length in LENGTHS]


def generate(model: Any, options: dict[str, Any], **inputs: Any) -> list[list[Hypothesis]]:
    """The answers of transformers; fails where a choice between two continuations was a matter of rounding."""
    found = model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW,
        num_beams=BEAMS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert_no_ties(torch.stack(found.scores).numpy().reshape(len(found.scores), -1, BEAMS, LLAMA["vocab_size"]))
    new = found.sequences[:, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :]
    answers = []
    for ids, score in zip(new.tolist(), found.sequences_scores.tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(ids) if token in EOS), len(ids))
        answers.append(Hypothesis(ids[:end], score, "stop" if ids[end - 1] in EOS else "length"))
    count = options.get("num_return_sequences", 1)
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def assert_no_ties(steps: np.ndarray) -> None:
    """Replays a search from its log-probabilities [t b n v]: what is kept is better than what is dropped."""
    running = np.full(steps.shape[1:3], -1e9)
    running[:, 0] = 0
    for logs in steps.astype(np.float64):
        for row, totals in enumerate((running[:, :, None] + logs).reshape(len(running), -1)):
            order = np.argsort(-totals)
            going = order[~np.isin(order % steps.shape[-1], EOS)]
            for kept in (order, going):
                assert totals[kept[BEAMS - 1]] - totals[kept[BEAMS]] > GAP
            running[row] = totals[going[:BEAMS]]


def requests_of(prompts: list[np.ndarray], options: dict[str, Any]) -> list[Request]:
    params = sampling_params({"max_new_tokens": NEW, "num_beams": BEAMS, **options})
    return [Request(ids, np.full(len(ids), -1, np.int32), None, params) for ids in prompts]


def assert_same(ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]]) -> None:
    assert [[(h.ids, h.finish_reason) for h in row] for row in ours] == [
        [(h.ids, h.finish_reason) for h in row] for row in theirs
    ]
    for our_row, their_row in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([h.score for h in our_row], [h.score for h in their_row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_prompts_as_ids(pair, beams, prompts, name):
    padded = np.stack([np.pad(ids, (max(LENGTHS) - len(ids), 0)) for ids in prompts])
    seen = np.stack([np.isin(np.arange(LLAMA["vocab_size"]), ids) for ids in prompts])
    inputs = {"input_ids": torch.from_numpy(padded).long(), "attention_mask": torch.from_numpy(padded > 0).long()}
    theirs = generate(pair.torch, CASES[name], **inputs)
    ours = beams.run(requests_of(prompts, CASES[name]), rules="transformers-5", seen=seen)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "n_best"])
def test_prompts_as_embeddings(pair, beams, prompts, name):
    embeds = pair.torch.model.embed_tokens.weight.detach()
    padded = torch.zeros(len(prompts), max(LENGTHS), embeds.shape[1])
    for row, ids in enumerate(prompts):
        padded[row, -len(ids) :] = embeds[torch.from_numpy(ids).long()]
    valid = torch.tensor([[place >= max(LENGTHS) - size for place in range(max(LENGTHS))] for size in LENGTHS])
    theirs = generate(pair.torch, CASES[name], inputs_embeds=padded, attention_mask=valid.long())
    assert_same(beams.run(requests_of(prompts, CASES[name]), rules="transformers-5"), theirs)


def test_embeddings_are_not_penalised(pair, beams, prompts):
    """One by one: in a batch transformers 5.23 spares as many new tokens as the row has padding."""
    embeds = pair.torch.model.embed_tokens.weight.detach()
    theirs = []
    for ids in prompts:
        given = {"inputs_embeds": embeds[torch.from_numpy(ids).long()][None]}
        theirs += generate(pair.torch, CASES["penalised"], **given, attention_mask=torch.ones(1, len(ids)).long())
    assert_same(beams.run(requests_of(prompts, CASES["penalised"]), rules="transformers-5"), theirs)


def test_the_cases_end_in_every_way(pair, beams, prompts):
    """Else the tests above would show little: some answers must end early and some as late as they may."""
    found = [
        answer
        for options in CASES.values()
        for row in beams.run(requests_of(prompts, options), rules="transformers-5")
        for answer in row
    ]
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert len({len(answer.ids) for answer in found}) > 3
    assert len({answer.ids[-1] for answer in found} & set(EOS)) > 1
    assert beams.num_compiled() == 1
