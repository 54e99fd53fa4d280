"""OPT and T5 behind the engine's interface: alone as in a batch, sharded as not, within OPT's positions, as text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mgpt4_jax.api import Model, load
from mgpt4_jax.config import ModelConfig, OptConfig, T5Config
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam_engine import BeamEngine
from mgpt4_jax.generate.language import LanguageEngine
from mgpt4_jax.generate.requests import Request
from mgpt4_jax.generate.sampling import sampling_params
from mgpt4_jax.sharding import make_mesh, param_shardings
from tests.generate.conftest import GOLDEN
from tests.tiny import QFORMER, VIT, random_params

OPT = OptConfig(vocab_size=90, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, embed_size=32, max_positions=60)
T5 = T5Config(vocab_size=90, hidden_size=32, mlp_size=48, num_layers=2, num_decoder_layers=2, num_heads=4, head_dim=8)
CONFIGS = {
    "opt": ModelConfig("blip2_opt", VIT, QFORMER, opt=OPT),
    "t5": ModelConfig("blip2_t5", VIT, QFORMER, t5=T5),
}
QUERIES = QFORMER.num_queries


@pytest.fixture(params=CONFIGS, scope="module")
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config: ModelConfig) -> Any:
    return random_params(config, scale=0.2)


@pytest.fixture(scope="module")
def engine(config: ModelConfig, params: Any) -> LanguageEngine:
    return LanguageEngine(config, params, slots=8, eos_ids=(3,), bos_id=0)


def prompt(rng: np.random.Generator, length: int, pictures: int = 1, **sampling: Any) -> Request:
    """The pictures, and ``length`` random ids."""
    count = pictures * QUERIES
    ids = np.concatenate([np.zeros(count, np.int32), rng.integers(4, 90, length)]).astype(np.int32)
    slots = np.concatenate([np.arange(count), np.full(length, -1)]).astype(np.int32)
    images = rng.standard_normal((count, 32)).astype(np.float32) if pictures else None
    values = {"max_new_tokens": 9, "num_beams": 4, "num_return_sequences": 4, **sampling}
    return Request(ids, slots, images, sampling_params(values))


def ids_of(found: Any) -> list[list[list[int]]]:
    return [[answer.ids for answer in row] for row in found]


def test_a_prompt_finds_what_it_finds_alone(engine: LanguageEngine, rng: np.random.Generator) -> None:
    requests = [prompt(rng, 5), prompt(rng, 20, length_penalty=-1.0), prompt(rng, 11, 0, max_new_tokens=4)]
    beams = BeamEngine(engine)
    together = beams.run(requests)
    assert ids_of(together) == ids_of(beams.run([request])[0] for request in requests)
    assert [len(set(map(tuple, row))) for row in ids_of(together)] == [4] * 3


def test_sharded_equals_unsharded(config: ModelConfig, engine: LanguageEngine, params: Any, rng: Any) -> None:
    requests = [prompt(rng, 5), prompt(rng, 12, length_penalty=2.0, early_stopping="never")]
    placed = jax.device_put(params, param_shardings(config, make_mesh("data=2,tensor=2")))
    sharded = LanguageEngine(config, placed, slots=8, eos_ids=(3,), bos_id=0)
    found, expected = BeamEngine(sharded).run(requests), BeamEngine(engine).run(requests)
    assert ids_of(found) == ids_of(expected)
    np.testing.assert_allclose(
        [h.score for row in found for h in row], [h.score for row in expected for h in row], 1e-5
    )


def test_greedy_answers_come_in_order_and_are_watched(engine: LanguageEngine, rng: np.random.Generator) -> None:
    options = {"num_beams": 1, "num_return_sequences": 1}
    requests = [prompt(rng, length, **options) for length in (3, 8, 5, 9, 2, 4, 7, 6, 10, 1)]
    requests[4] = dataclasses.replace(requests[4], watch=lambda ids: True)
    updates = list(engine.run(requests))
    assert [update.index for update in updates] == list(range(10))
    assert updates[4].finish_reason == "stop"
    searched = BeamEngine(engine).run(requests)
    assert [update.ids for update in updates] == [best.ids for [best] in searched]


def test_padding_takes_no_positions_that_opt_has_not(rng: np.random.Generator) -> None:
    """A prompt of 40 is padded to 60 and an answer of 20 to 32: more than there are places."""
    engine = LanguageEngine(CONFIGS["opt"], random_params(CONFIGS["opt"], scale=0.2), eos_ids=(3,), bos_id=0)
    assert engine.max_length == 60
    requests = [prompt(rng, 34, max_new_tokens=20), prompt(rng, 3, max_new_tokens=20)]
    beams = BeamEngine(engine)
    found = beams.run(requests)
    assert ids_of(found)[1] == ids_of(beams.run(requests[1:]))[0]
    with pytest.raises(UserError, match="exceed the context of 60"):
        beams.run([prompt(rng, 35, max_new_tokens=20)])


def test_nothing_is_drawn(engine: LanguageEngine, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="set temperature to 0"):
        next(engine.run([prompt(rng, 3, num_beams=1, num_return_sequences=1, temperature=0.5)]))


def test_llama_has_another_engine(params: Any) -> None:
    with pytest.raises(UserError, match="neither OPT nor T5"):
        LanguageEngine(ModelConfig("encoder", VIT, QFORMER), params, eos_ids=(3,), bos_id=0)


# --- through `load` ------------------------------------------------------------------------------------------


@pytest.fixture(params=["opt", "t5"], scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name, out = request.param, tmp_path_factory.mktemp("blip2") / "model"
    case = GOLDEN / f"blip2_{name}"
    vit = {"num_heads": 4, "num_layers": 3, "image_size": 56}
    convert(
        qformer=case / f"blip2_{name}.pth",
        llm=case / f"{name}_model",
        tokenizer=case / f"{name}_tokenizer",
        overrides={"vit": vit, "qformer": {"num_heads": 4}},
        out=out,
    )
    model = load(out, slots=8)
    assert isinstance(model, Model)
    return model


def test_answers_are_text(loaded: Model, pictures: list[Path]) -> None:
    prompts = ["", "a photo of", "Question: what is it? Answer:"]
    found = loaded.generate(prompts=prompts, images=pictures, num_beams=5, num_return_sequences=2, max_new_tokens=12)
    for prompt, picture, answer in zip(prompts, pictures, found, strict=True):
        assert answer.text == loaded.tokenizer.decode(answer.ids).strip()
        assert answer.prompt_tokens == len(loaded.tokenizer.encode_whole(prompt)) + loaded.config.tokens_per_image
        [alone] = loaded.generate(prompts=[prompt], images=[picture], num_beams=5, max_new_tokens=12)
        assert (alone.ids, alone.text) == (answer.ids, answer.text)
    greedy = loaded.generate(prompts=prompts, images=pictures, max_new_tokens=12)
    assert [answer.score for answer in greedy] == [None] * 3
    assert loaded.answerer.engine.max_length == loaded.plan.max_length


def test_a_picture_stands_before_the_words(loaded: Model, pictures: list[Path]) -> None:
    with pytest.raises(UserError, match="reads its pictures before the text"):
        loaded.generate(prompts=["see <ImageHere>"], images=pictures[:1])
    with pytest.raises(UserError, match="set temperature to 0"):
        loaded.generate(prompts=["a"], temperature=1.0)
