"""Fine-tuning for retrieval: from annotations to a step, captions of one picture belong to it and to each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QFORMER, VIT, random_params
from train.instruct_world import BERT, BERT_VOCAB
from train.world import draw

from mgpt4_jax.checkpoint import new_directory, write_model
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.rows import PairBuilder, picture_number
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.errors import UserError
from mgpt4_jax.losses import contrastive_targets, draw_negatives
from mgpt4_jax.models import build, num_parameters
from mgpt4_jax.sharding import make_mesh, param_shardings, put_batch
from mgpt4_jax.train import loop
from mgpt4_jax.train.pretraining import pretrain
from mgpt4_jax.train.run_log import read_losses
from mgpt4_jax.train.setup import FIELDS, Programs, device_arrays, make_plan, open_data
from mgpt4_jax.train_config import CheckpointConfig, DataConfig, LogConfig, SourceConfig, TextConfig, TrainConfig

CONFIG = ModelConfig(
    "blip2",
    dataclasses.replace(VIT, num_layers=1),
    dataclasses.replace(QFORMER, num_layers=2, with_text=True, with_lm_head=True, vocab_size=BERT_VOCAB),
    projection_size=16,
)
PICTURES, CAPTIONS = 4, 2
TRAINED = ("qformer/*", "ln_vision/*", "vision_proj/*", "text_proj/*", "itm_head/*", "temp")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ``list.json`` of pictures with two captions each, and ``data.jsonl`` that names no pictures."""
    folder, rng, entries, lines = tmp_path_factory.mktemp("retrieval"), np.random.default_rng(0), [], []
    for number, colour in enumerate(("red", "green", "blue", "black")):
        draw(colour, "square", rng).save(folder / f"{number}.png")
        captions = [f"a {colour} square", f"the square is {colour}"]
        entries.append({"image": f"{number}.png", "caption": captions, "image_id": f"coco_{number}"})
        lines += [{"image": f"{number}.png", "caption": caption} for caption in captions]
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with new_directory(folder / "model") as partial:
        fields = {"config": CONFIG, "template": "none", "num_parameters": num_parameters(CONFIG)}
        write_model(partial, random_params(CONFIG, scale=0.3), fields)
        (partial / "qformer_tokenizer").mkdir()
        (partial / "qformer_tokenizer" / "vocab.txt").write_bytes((BERT / "vocab.txt").read_bytes())
    return folder


def configured(world: Path, source: SourceConfig, run: Path) -> TrainConfig:
    return TrainConfig(
        str(world / "model"),
        str(run),
        DataConfig((source,), num_threads=1),
        "qformer_pretrain",
        TextConfig(max_text_length=12, buckets=(12,), max_length=12),
        TRAINED,
        epochs=1,
        steps_per_epoch=2,
        batch_size=PICTURES * CAPTIONS,
        mesh="data=1",
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(sample_every=0, validate_every=0),
    )


def first_batch(config: TrainConfig, say: Any = lambda _: None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(the arrays of the first batch, the shapes that the step is compiled for)."""
    plan = make_plan(config, make_mesh("data=1"))
    data = open_data(plan, say)
    with data.loader.batches(0) as batches:
        batch = next(batches)
    return device_arrays(batch), Programs(plan, data.rows, {}, say).abstract_batch(12)


def test_captions_of_one_picture_share_their_target_and_are_never_negatives(world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = configured(world, SourceConfig("lavis", str(world / "list.json")), tmp_path)
    arrays, shapes = first_batch(config, said.append)
    assert any("pairs that share an image_id belong together" in line for line in said)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }
    pixels = arrays["pixels"].reshape(len(arrays["ids"]), -1)
    same = (pixels[:, None] == pixels[None]).all(-1)
    assert same.sum() == PICTURES * CAPTIONS**2
    targets = contrastive_targets(jnp.asarray(arrays["image_ids"]))
    np.testing.assert_allclose(targets, same / CAPTIONS)
    even = jnp.zeros(targets.shape)
    draws = jax.vmap(lambda key: jnp.stack(draw_negatives(key, even, even, targets)))(
        jax.random.split(jax.random.key(0), 200)
    )
    assert not same[np.arange(len(same)), np.asarray(draws)].any()


def test_data_that_names_no_pictures_makes_the_batch_that_it_always_made(world: Path, tmp_path: Path) -> None:
    config = configured(world, SourceConfig("jsonl", str(world / "data.jsonl")), tmp_path)
    arrays, shapes = first_batch(config)
    assert list(arrays) == list(shapes) == list(FIELDS[:5]) and "image_ids" not in FIELDS[:5]


def test_numbers_of_pictures(world: Path) -> None:
    """Those of ``contrastive_targets`` on the ids themselves; without an id each sample has its own."""
    ids = [7, 3, 7, 7, 3, 9]
    words = np.stack([picture_number(Sample(str(i), b"", "x", image_id=name)) for i, name in enumerate(ids)])
    np.testing.assert_array_equal(contrastive_targets(jnp.asarray(words)), contrastive_targets(jnp.asarray(ids)))
    own = [picture_number(Sample(str(i), b"", "x")) for i in range(3)]
    assert len({number.tobytes() for number in own}) == 3
    np.testing.assert_array_equal(
        picture_number(Sample("a", b"", "x", image_id="5")), picture_number(Sample("b", b"", "x", image_id=5))
    )
    with pytest.raises(UserError, match=r"image_id must be text or a whole number, got '\[1\]'"):
        PairBuilder(BERT, TextConfig(), names_pictures=True).row(Sample("a", b"", "x", image_id=[1]))


def test_sharded_equals_one_device(world: Path, tmp_path: Path) -> None:
    arrays, _ = first_batch(configured(world, SourceConfig("lavis", str(world / "list.json")), tmp_path))
    model, params = build(CONFIG), random_params(CONFIG, scale=0.3)

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        found = model.apply({"params": params}, batch, jax.random.key(3), dec_id=127, pad_id=0, method=pretrain)
        return found.contrast, found.matching, found.negatives

    mesh = make_mesh("data=4,fsdp=2")
    alone = jax.device_get(run(params, arrays))
    many = jax.device_get(run(jax.device_put(params, param_shardings(CONFIG, mesh)), put_batch(mesh, arrays)))
    np.testing.assert_array_equal(many[2], alone[2])
    np.testing.assert_allclose(many[:2], alone[:2], rtol=1e-5)
    same = (arrays["image_ids"][:, None] == arrays["image_ids"][None]).all(-1)
    assert not same[np.arange(len(same)), alone[2]].any()


def test_it_trains_from_a_list_of_lavis(world: Path, tmp_path: Path) -> None:
    config = configured(world, SourceConfig("lavis", str(world / "list.json")), tmp_path / "run")
    assert loop.train(config).step == 2
    assert len(read_losses(tmp_path / "run" / "log.jsonl")) == 2
