"""Sample captions: the ids that answering gives, from the parameters as training holds them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from picture_sources import MemorySource
from tiny import LLAMA, MINIGPT4, random_params

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import IGNORED, ModelConfig
from mgpt4_jax.data.loading import Loader, TrainBatch
from mgpt4_jax.data.prompts import VICUNA_V0
from mgpt4_jax.data.rows import RowBuilder, buckets_of
from mgpt4_jax.data.text import load_llama_tokenizer
from mgpt4_jax.generate.engine import Engine, Request
from mgpt4_jax.generate.sampling import sampling_params
from mgpt4_jax.models import abstract_params, build
from mgpt4_jax.sharding import make_mesh, param_shardings, put_batch
from mgpt4_jax.train.captions import (
    SampleCaptions,
    caption_program,
    greedy_captions,
    prompt_lengths,
    prompts,
    stop_sequences,
)
from mgpt4_jax.train.objectives import normalised
from mgpt4_jax.train.setup import Data
from mgpt4_jax.train.state import split
from mgpt4_jax.train_config import DataConfig, LogConfig, SourceConfig, TextConfig, TrainConfig

NEW, EOS = 12, 2
QUERIES = MINIGPT4.tokens_per_image
VOCAB = 480  # of the recorded tokeniser
CONFIG = dataclasses.replace(MINIGPT4, llama=dataclasses.replace(LLAMA, vocab_size=VOCAB))


# -- the loop -------------------------------------------------------------------------------------


def table(rows: list[list[int]], start: int) -> Any:
    """A model that says ``rows`` from position ``start`` on, whatever it reads, and nothing but them."""
    said = jnp.array(rows)

    def apply_logits(ids: Any, mask: Any) -> Any:
        places = jnp.clip(jnp.arange(ids.shape[1]) - start + 1, 0, said.shape[1] - 1)
        return jax.nn.one_hot(said[:, places], 50) * mask[..., None]

    return apply_logits


def run_table(rows: list[list[int]], stops: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    b, start = len(rows), 3
    ids = jnp.full((b, start + 5), 7)
    mask = jnp.broadcast_to(jnp.arange(start + 5) < start, ids.shape)
    found = greedy_captions(table(rows, start), ids, mask, jnp.full(b, start), max_new=5, stops=stops)
    return np.asarray(found).tolist()


def test_rows_that_stopped_stay_stopped() -> None:
    rows = [[4, 2, 9, 9, 9], [5, 5, 5, 5, 5], [2, 4, 4, 4, 4]]
    assert run_table(rows, ((2,),)) == [[4, 2, -1, -1, -1], [5, 5, 5, 5, 5], [2, -1, -1, -1, -1]]


def test_a_stop_of_several_tokens() -> None:
    """And one whose beginning stands at the end of the prompt is none."""
    rows = [[8, 9, 8, 3, 9], [9, 7, 9, 9, 9], [8, 8, 9, 1, 1]]
    stops = ((8, 3), (7, 9))
    assert run_table(rows, stops) == [[8, 9, 8, 3, -1], [9, 7, 9, -1, -1], [8, 8, 9, 1, 1]]


def test_no_more_than_asked_for() -> None:
    assert run_table([[1, 1, 1, 1, 1]], ()) == [[1, 1, 1, 1, 1]]


# -- the same as answering ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG, scale=0.2)


def make_rows(rng: np.random.Generator, rows: int = 8) -> dict[str, np.ndarray]:
    """Prompts of unequal lengths, [BOS][picture][words], with room for what is said."""
    lengths = rng.integers(QUERIES + 2, QUERIES + 9, rows).astype(np.int32)
    room, size = int(lengths.max()) + NEW, CONFIG.vit.image_size
    mask = np.arange(room) < lengths[:, None]
    slots = np.full((rows, room), -1, np.int32)
    slots[:, 1 : 1 + QUERIES] = np.arange(QUERIES)
    return {
        "ids": np.where(mask, rng.integers(3, VOCAB, (rows, room)), 0).astype(np.int32),
        "slots": slots,
        "mask": mask,
        "lengths": lengths,
        "pixels": rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8),
    }


@pytest.fixture(scope="module")
def engine(params: Any) -> Engine:
    return Engine(CONFIG, params, slots=8, max_length=64, eos_ids=(EOS,))


def answers(
    engine: Engine, params: Any, rows: Mapping[str, np.ndarray], stops: tuple[tuple[int, ...], ...]
) -> list[list[int]]:
    """What the engine says, -1 behind its end."""
    images = build(CONFIG).apply({"params": params}, normalised(rows["pixels"][:, 0]), method="encode_image")
    sampling = sampling_params({"max_new_tokens": NEW, "temperature": 0.0, "stop_ids": stops})
    requests = [
        Request(ids[:length], slots[:length], np.asarray(picture), sampling)
        for ids, slots, length, picture in zip(rows["ids"], rows["slots"], rows["lengths"], images, strict=True)
    ]
    said: list[list[int]] = [[] for _ in requests]
    for update in engine.run(requests):
        said[update.index] += update.ids
    return [ids + [-1] * (NEW - len(ids)) for ids in said]


def captions(params: Any, rows: dict[str, np.ndarray], stops: Any, mesh: str | None = None) -> list[list[int]]:
    """What training says of parameters that are split and cut up."""
    devices = make_mesh(mesh)
    placed = jax.device_put(params, param_shardings(CONFIG, devices))
    trained = {path for path in flatten(params) if path.startswith("projection/")}
    trainable, frozen = split(placed, trained)
    program = jax.jit(caption_program(build(CONFIG), max_new=NEW, stops=stops))
    return np.asarray(program(trainable, frozen, put_batch(devices, rows))).tolist()


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2,data=2"])
def test_the_ids_are_those_of_answering(engine: Engine, params: Any, mesh: str | None) -> None:
    rows = make_rows(np.random.default_rng(0))
    free = answers(engine, params, rows, ())
    assert captions(params, rows, ((EOS,),), mesh) == free
    stops = (tuple(free[0][3:5]), (free[1][2],))  # ends some rows early, others not
    expected = answers(engine, params, rows, stops)
    lengths = [sum(token >= 0 for token in ids) for ids in expected]
    assert lengths[0] <= 5 and lengths[1] <= 3 and max(lengths) == NEW
    assert captions(params, rows, ((EOS,), *stops), mesh) == expected


def test_no_second_copy_of_the_weights() -> None:
    """The program works in a small part of what its parameters take."""
    llama = dataclasses.replace(LLAMA, hidden_size=256, mlp_size=1024, num_layers=8, head_dim=64)
    config = dataclasses.replace(CONFIG, llama=llama)
    shapes = abstract_params(config)
    trainable, frozen = split(shapes, {path for path in flatten(shapes) if path.startswith("projection/")})
    rows = make_rows(np.random.default_rng(0), rows=2)
    program = jax.jit(caption_program(build(config), max_new=NEW, stops=()))
    memory = program.lower(trainable, frozen, rows).compile().memory_analysis()
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    assert memory.argument_size_in_bytes > weights > 30e6
    assert memory.temp_size_in_bytes < 0.2 * weights


# -- from samples to captions ---------------------------------------------------------------------


@pytest.fixture
def tokenizer_dir(golden_dir: Path) -> Path:
    return golden_dir / "minigpt4_vicuna" / "llm"


def sample_captions(
    tokenizer_dir: Path,
    *,
    train: MemorySource,
    validation: tuple[MemorySource, ...] = (),
    mesh: str = "data=8",
    text: TextConfig | None = None,
    samples: int = 3,
    config: ModelConfig = CONFIG,
) -> SampleCaptions:
    text = text or TextConfig(max_text_length=NEW)
    objective = "finetune" if text.instructions else "align"
    data_config = DataConfig((SourceConfig("jsonl", "x"),))
    run = TrainConfig(
        "model", "run", data_config, objective=objective, text=text, batch_size=16, log=LogConfig(samples=samples)
    )
    rows = RowBuilder(tokenizer_dir, text, VICUNA_V0, QUERIES, objective)
    loader = Loader([train], rows, data_config, batch_size=16, image_size=config.vit.image_size, seed=0)
    plan: Any = types.SimpleNamespace(config=run, mesh=make_mesh(mesh))
    return SampleCaptions(plan, Data(loader, rows, validation, buckets_of(text)), build(config))


def test_the_first_validation_samples_are_captioned(tokenizer_dir: Path, params: Any) -> None:
    """The same ones every time, in words, by what the parameters are then."""
    train, validation = MemorySource("train", 40), MemorySource("validation", 5, bad=frozenset({1}))
    sampler = sample_captions(tokenizer_dir, train=train, validation=(validation,))
    trainable, frozen = split(params, {"projection/kernel", "projection/bias"})
    found = sampler.write(trainable, frozen)
    assert [caption.name for caption in found] == ["validation/0", "validation/2", "validation/3"]  # 1 is bad
    assert [caption.reference for caption in found] == ["a", "a red cat", "a red cat sits"]
    assert sampler.write(trainable, frozen) == found
    changed = jax.tree.map(lambda leaf: -leaf, trainable)
    assert [caption.text for caption in sampler.write(changed, frozen)] != [caption.text for caption in found]


def test_without_validation_the_first_batch_is(tokenizer_dir: Path, params: Any) -> None:
    sampler = sample_captions(tokenizer_dir, train=MemorySource("train", 40), samples=4)
    found = sampler.write(*split(params, {"projection/kernel"}))
    assert len({caption.name for caption in found}) == 4
    assert all(caption.name.startswith("train/") and caption.reference for caption in found)


def test_a_caption_is_what_the_engine_says_about_the_question(tokenizer_dir: Path, engine: Engine, params: Any) -> None:
    """From the sample to the words, in the template, on another mesh."""
    text = TextConfig(max_text_length=NEW, end_symbol="###", instructions=("<Img><ImageHere></Img> What is it?",))
    train = MemorySource("train", 40)
    sampler = sample_captions(
        tokenizer_dir, train=train, validation=(train,), text=text, samples=2, mesh="data=2,tensor=4"
    )
    found = sampler.write(*split(params, {"projection/kernel"}))
    rows = RowBuilder(tokenizer_dir, text, VICUNA_V0, QUERIES, "finetune")
    with sampler._data.loader.validation_batches((train,), limit=1) as batches:
        batch = next(iter(batches))
    starts = prompt_lengths(batch.targets, batch.mask)[:8]
    asked = rows.tokenizer.decode(batch.ids[0, : starts[0]].tolist())
    assert asked.endswith("What is it? ###Assistant: ")
    arrays = prompts(batch, starts, int(starts.max()) + NEW, pad_id=rows.tokenizer.pad_id)
    stops = stop_sequences(rows.tokenizer, "###")
    said = answers(engine, params, arrays, stops[1:])
    words = [rows.tokenizer.decode([token for token in ids if token >= 0]).split("###")[0].strip() for ids in said]
    assert [caption.text for caption in found] == words[:2]
    assert [caption.reference for caption in found] == ["a", "a red"]


def test_prompts_end_where_the_answer_begins() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    targets = np.array([[IGNORED, IGNORED, IGNORED, 3, 4, IGNORED], [IGNORED] * 6], np.int32)
    mask = np.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], bool)
    batch = TrainBatch(0, ids, np.full((2, 6), -1), targets, mask, np.zeros((2, 1, 2, 2, 3)), ["a", ""], [])
    lengths = prompt_lengths(targets, mask)
    assert lengths.tolist() == [3, 1]
    arrays: Mapping[str, np.ndarray] = prompts(batch, lengths, 5, pad_id=9)
    assert arrays["ids"].tolist() == [[0, 1, 2, 9, 9], [6, 9, 9, 9, 9]]
    assert arrays["mask"].tolist() == [[True, True, True, False, False], [True, False, False, False, False]]


def test_stops_are_the_end_symbol_as_it_is_spelt_behind_a_word(tokenizer_dir: Path) -> None:
    tokenizer = load_llama_tokenizer(tokenizer_dir)
    assert stop_sequences(tokenizer, "\n") == ((2,), (13,))
    assert stop_sequences(tokenizer, "") == ((2,),)
    (_, end) = stop_sequences(tokenizer, "###")
    assert tokenizer.decode(tokenizer.encode("a") + list(end)) == "a###"
