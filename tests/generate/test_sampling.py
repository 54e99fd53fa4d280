"""Sampling against Hugging Face's logits processors, and its own promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mgpt4_jax.errors import UserError
from mgpt4_jax.generate import sampling as s

VOCAB = 97


@pytest.fixture
def logits() -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((4, VOCAB)) * 3).astype(np.float32)


def test_repetition_penalty_equals_transformers(logits: np.ndarray) -> None:
    ids = np.array([[1, 5, 5], [1, 0, 96], [1, 2, 3], [1, 1, 1]])
    seen = np.zeros((4, VOCAB), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    penalties = np.array([1.0, 1.05, 1.3, 0.5], np.float32)
    ours = s.penalize_repetition(jnp.asarray(logits), jnp.asarray(seen), jnp.asarray(penalties))
    for row, penalty in enumerate(penalties):
        processor = RepetitionPenaltyLogitsProcessor(float(penalty))
        theirs = processor(torch.tensor(ids[row : row + 1]), torch.tensor(logits[row : row + 1]))
        np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (5, 0.5), (1, 0.9), (0, 1e-6), (500, 0.99), (0, 1.0)])
def test_top_filters_equal_transformers(logits: np.ndarray, top_k: int, top_p: float) -> None:
    ours = s.filter_top(jnp.asarray(logits), jnp.full(4, top_k), jnp.full(4, top_p, jnp.float32))
    theirs = torch.tensor(logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_whole_order_equals_transformers(logits: np.ndarray) -> None:
    ids, prompt_length, eos = np.array([[1, 5, 7]]), 1, 2
    chain = [
        RepetitionPenaltyLogitsProcessor(1.3),
        MinNewTokensLengthLogitsProcessor(prompt_length, 4, eos),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
    ]
    theirs = torch.tensor(logits[:1])
    for processor in chain:
        theirs = processor(torch.tensor(ids), theirs)
    seen = np.zeros((1, VOCAB), bool)
    seen[0, ids[0]] = True
    scores = s.penalize_repetition(jnp.asarray(logits[:1]), jnp.asarray(seen), jnp.array([1.3]))
    scores = s.forbid_stops(scores, jnp.array([[[2]]]), jnp.array([True])) / 0.7
    ours = s.filter_top(scores, jnp.array([20]), jnp.array([0.8]))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def rows(**fields: object) -> s.Sampling:
    return s.stack_sampling([s.sampling_params(fields)])


def test_draws_follow_the_distribution_and_the_seed_alone() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2, 1e-9]]))
    draws = 2000
    counts = np.bincount(
        s.draw_tokens(jnp.repeat(logits, draws, 0), jnp.arange(draws, dtype=jnp.uint32), jnp.zeros(draws, jnp.int32)),
        minlength=4,
    )
    np.testing.assert_allclose(counts / draws, [0.5, 0.3, 0.2, 0.0], atol=0.04)


def test_a_row_draws_the_same_wherever_it_stands(logits: np.ndarray) -> None:
    mixed = s.stack_sampling([s.sampling_params({"temperature": t, "seed": 7, "top_p": 0.9}) for t in (0.0, 1.0, 0.5)])
    none = jnp.full((3, 1, 1), -1)
    together = s.next_tokens(jnp.asarray(logits[:3]), jnp.zeros((3, VOCAB), bool), jnp.array([4, 4, 9]), none, mixed)
    for row in range(3):
        alone = s.next_tokens(
            jnp.asarray(logits[row : row + 1]),
            jnp.zeros((1, VOCAB), bool),
            jnp.array([(4, 4, 9)[row]]),
            none[:1],
            jax.tree.map(lambda x, row=row: x[row : row + 1], mixed),
        )
        assert together[row] == alone[0]
    assert together[0] == logits[0].argmax()


def test_min_new_tokens_forbids_single_stops_only() -> None:
    stops = jnp.array([[[-1, 3], [4, 5], [-1, -1]]])
    out = s.forbid_stops(jnp.zeros((1, 8)), stops, jnp.array([True]))
    assert np.isinf(np.asarray(out)).nonzero()[1].tolist() == [3]
    assert not np.isinf(s.forbid_stops(jnp.zeros((1, 8)), stops, jnp.array([False]))).any()


def test_stop_sequences_match_the_end() -> None:
    stops = jnp.asarray(s.pack_stops([((9,), (4, 5)), ()], 3, 2))
    recent = jnp.array([[4, 5], [9, 9]])
    assert s.ends_with_stop(recent, stops).tolist() == [True, False]
    assert s.ends_with_stop(jnp.array([[5, 4], [4, 5]]), stops).tolist() == [False, False]
    assert s.ends_with_stop(jnp.array([[0, 9], [9, 9]]), stops).tolist() == [True, False]


BAD_VALUES = [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": "hot"},
    {"temperature": True},
    {"top_p": 0},
    {"top_p": 2},
    {"top_p": None},
    {"top_k": -1},
    {"top_k": 1.5},
    {"max_new_tokens": 0},
    {"max_new_tokens": 10**9},
    {"max_new_tokens": "10"},
    {"min_new_tokens": -1},
    {"min_new_tokens": 10, "max_new_tokens": 5},
    {"repetition_penalty": 0},
    {"seed": -1},
    {"seed": 2**40},
    {"stop": ""},
    {"stop": 5},
    {"stop": ["a"] * 1000},
    {"stop_ids": "a"},
    {"stop_ids": [[]]},
    {"stop_ids": [[-1]]},
    {"num_beams": 0},
    {"num_beams": 1000},
    {"num_beams": 4, "temperature": 0.5},
    {"num_return_sequences": 2},
    {"num_return_sequences": 5, "num_beams": 4},
    {"length_penalty": float("nan")},
    {"length_penalty": "1"},
    {"early_stopping": "always"},
    {"early_stopping": 1},
    {"max_tokens": 4},
]


@pytest.mark.parametrize("values", BAD_VALUES, ids=lambda values: str(values)[:40])
def test_bad_parameters_are_refused_in_one_line(values: dict) -> None:
    with pytest.raises(UserError) as error:
        s.sampling_params(values)
    assert next(iter(values)) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
