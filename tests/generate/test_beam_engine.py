"""Beams of a model: as greedy decoding when there is one, alone as in a batch, sharded as not, in few programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam_engine import BeamEngine, Hypothesis
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.generate.requests import Request
from mgpt4_jax.generate.sampling import sampling_params
from tests.generate.conftest import make_engine
from tests.tiny import LLAMA, MINIGPT4

QUERIES = MINIGPT4.tokens_per_image


def prompt(rng: np.random.Generator, length: int, pictures: int = 0, **sampling: Any) -> Request:
    """Random ids with ``pictures`` runs of image slots after the first token."""
    count = pictures * QUERIES
    ids = rng.integers(3, LLAMA.vocab_size, length + count).astype(np.int32)
    slots = np.full(length + count, -1, np.int32)
    slots[1 : 1 + count] = np.arange(count)
    images = rng.standard_normal((count, LLAMA.hidden_size)).astype(np.float32) if pictures else None
    values = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 4, **sampling}
    return Request(ids, slots, images, sampling_params(values))


def mixed_prompts(rng: np.random.Generator) -> list[Request]:
    return [
        prompt(rng, 5),
        prompt(rng, 21, 1, length_penalty=-1.0, max_new_tokens=7),
        prompt(rng, 14, 2, repetition_penalty=1.3, early_stopping=True),
        prompt(rng, 1, min_new_tokens=5, stop_ids=[[9], [4, 5]]),
        prompt(rng, 12, 0, length_penalty=2.0, early_stopping="never"),
    ]


def words_of(found: list[list[Hypothesis]]) -> list[list[tuple[list[int], str]]]:
    return [[(answer.ids, answer.finish_reason) for answer in row] for row in found]


def assert_scores(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose([h.score for h in row], [h.score for h in other], rtol=1e-5)


@pytest.fixture(scope="module")
def beams(engine: Engine) -> BeamEngine:
    return BeamEngine(engine)


def test_a_prompt_finds_what_it_finds_alone(beams: BeamEngine, rng: np.random.Generator) -> None:
    requests = mixed_prompts(rng)
    assert beams.rows(4) == 2
    together = beams.run(requests)
    alone = [beams.run([request])[0] for request in requests]
    assert words_of(together) == words_of(alone)
    assert_scores(together, alone)
    assert words_of(beams.run(requests[::-1])[::-1]) == words_of(together)
    assert [len(row) for row in together] == [4] * 5
    assert all(row == sorted(row, key=lambda answer: -answer.score) for row in together)


def test_sharded_equals_unsharded(beams: BeamEngine, params: Any, rng: np.random.Generator) -> None:
    sharded = BeamEngine(make_engine(MINIGPT4, params, "data=2,tensor=2", slots=8, max_length=128))
    requests = mixed_prompts(rng)
    found, expected = sharded.run(requests), beams.run(requests)
    assert words_of(found) == words_of(expected)
    assert_scores(found, expected)


def test_one_beam_is_the_greedy_answer(engine: Engine, beams: BeamEngine, rng: np.random.Generator) -> None:
    options = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.2, "min_new_tokens": 2}
    requests = [prompt(rng, length, pictures, **options) for length, pictures in ((5, 0), (14, 2), (12, 1))]
    greedy: dict[int, list[int]] = {}
    for update in engine.run(requests):
        greedy[update.index] = greedy.get(update.index, []) + update.ids
    assert [row[0].ids for row in beams.run(requests)] == [greedy[index] for index in range(3)]


def test_more_beams_find_better_answers(beams: BeamEngine, rng: np.random.Generator) -> None:
    requests = [prompt(rng, length, length_penalty=0.0, early_stopping="never") for length in (5, 9, 17, 25)]
    one = [
        dataclasses.replace(
            request, sampling=dataclasses.replace(request.sampling, num_beams=1, num_return_sequences=1)
        )
        for request in requests
    ]
    found, greedy = beams.run(requests), beams.run(one)
    gains = [row[0].score - other[0].score for row, other in zip(found, greedy, strict=True)]
    assert sum(gains) > 1  # not each: the greedy answer may fall out of the beams on its way


def test_new_requests_compile_nothing(params: Any, rng: np.random.Generator) -> None:
    """One program for a count of rows, a length of prompts and of answers, and a number of pictures and of beams."""
    beams = BeamEngine(make_engine(MINIGPT4, params, slots=4, max_length=64))
    for _ in range(12):
        length, new = int(rng.integers(1, 30)), int(rng.integers(1, 30))
        options = {"length_penalty": float(rng.normal()), "early_stopping": True, "stop_ids": [[int(length)]]}
        beams.run([prompt(rng, length, max_new_tokens=new, num_beams=2, num_return_sequences=1, **options)])
    assert beams.num_compiled() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "empty"),
        ({"length": 120}, "exceed the context of 128"),
        ({"length": 5, "pictures": 17}, "17 pictures"),
    ],
)
def test_impossible_requests_are_refused(
    beams: BeamEngine, rng: np.random.Generator, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        beams.run([prompt(rng, **change)])


def test_there_are_more_words_than_beams(params: Any, rng: np.random.Generator) -> None:
    engine = Engine.__new__(Engine)  # only its sizes are asked for
    engine.config, engine.max_length, engine.vocab_size = MINIGPT4, 64, 32
    searcher = BeamEngine.__new__(BeamEngine)
    searcher.engine = engine
    request = dataclasses.replace(prompt(rng, 5), sampling=sampling_params({"num_beams": 32, "max_new_tokens": 5}))
    with pytest.raises(UserError, match="num_beams 32 must be less than the 32 tokens"):
        searcher.check(request)
