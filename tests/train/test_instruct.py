"""InstructBLIP's training: on any mesh the numbers of one device, and from the command line to answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from tiny import random_params
from train.instruct_world import BERT_VOCAB, MODELS, rows_of, write_instruct_model
from train.world import COLOURS, config_of, draw

import mgpt4_jax
from mgpt4_jax.checkpoint import flatten, read_leaf, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.loading import extra_arrays
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.models import build
from mgpt4_jax.sharding import make_mesh, param_shardings, put_batch
from mgpt4_jax.train.run_log import read_losses
from mgpt4_jax.train.stages import STAGES

TRAINED = ["qformer/*", "projection/*", "ln_vision/*"]


def make_batch(kind: str, count: int = 8) -> dict[str, np.ndarray]:
    rows, rng = rows_of(kind), np.random.default_rng(0)
    questions = ["What colour is the square?", "a", "Describe the picture in all of its detail, please."]
    samples = [Sample(str(i), b"", f"a {COLOURS[i % 6]} circle", questions[i % 3]) for i in range(count)]
    found = [rows.row(sample) for sample in samples]
    text = pad_sequences(found, 64, pad_id=rows.pad_id)
    arrays = {name: getattr(text, name) for name in ("ids", "slots", "targets", "mask")}
    pixels = rng.integers(0, 256, (count, 1, 28, 28, 3), np.uint8)
    return {**arrays, "pixels": pixels, **extra_arrays(found, rows.text)}


@pytest.mark.parametrize("kind", MODELS)
def test_sharded_equals_one_device(kind: str) -> None:
    """Loss and gradients of the Q-Former, with dropout; the instruction that it reads matters."""
    config = MODELS[kind]
    objective = STAGES["generative"].objective(build(config), rows_of(kind))
    batch, params, mesh = make_batch(kind), random_params(config), make_mesh("data=2,fsdp=2,tensor=2")

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda params: objective(params, batch, jax.random.key(1))[0])(params)

    loss, gradients = run(params, batch)
    placed = jax.device_put(params, param_shardings(config, mesh))
    loss_of_many, gradients_of_many = run(placed, put_batch(mesh, batch))
    np.testing.assert_allclose(loss_of_many, loss, rtol=1e-5)
    found, expected = flatten(gradients_of_many), flatten(gradients)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
    assert np.abs(expected["qformer/embeddings/word/embedding"]).max() > 0
    other = {**batch, "qformer_ids": np.where(batch["qformer_mask"], BERT_VOCAB - 1 - batch["qformer_ids"], 0)}
    assert abs(float(run(params, other)[0]) - float(loss)) > 1e-5


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, lines = tmp_path_factory.mktemp("questions"), np.random.default_rng(0), []
    for number in range(24):
        colour, shape = str(rng.choice(COLOURS)), str(rng.choice(["square", "circle"]))
        draw(colour, shape, rng).save(folder / f"{number}.png")
        question, answer = [("What colour is it?", colour), ("What shape is it?", shape)][number % 2]
        lines.append({"image": f"{number}.png", "instruction": question, "answer": answer})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_it_learns_from_the_command_line_and_answers(kind: str, questions: Path, tmp_path: Path) -> None:
    model, run = write_instruct_model(tmp_path / "model", kind), tmp_path / "run"
    text = {
        "max_text_length": 16,
        "max_prompt_length": 24,
        "end_symbol": "</s>",
        "instructions": ["Question: {} Short answer:"],
        "buckets": [48],
        "max_length": 48,
    }
    log = {"validate_every": 0}
    config = config_of(
        model,
        run,
        questions,
        questions,
        objective="generative",
        trainable=TRAINED,
        steps_per_epoch=16,
        text=text,
        log=log,
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    losses = list(read_losses(run / "log.jsonl").values())
    assert len(losses) == 16 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    manifest = read_manifest(run / "model")
    assert {path.split("/")[0] for path in manifest.trained} == {"projection", "qformer", "ln_vision"}
    read = "qformer/embeddings/word/embedding"
    assert np.any(read_leaf(run / "model", read) != read_leaf(model, read))
    answers = mgpt4_jax.load(run / "model").generate(
        images=[questions.parent / "0.png"], prompts=["Question: What colour is it? Short answer:"], max_new_tokens=4
    )
    assert [answer.finish_reason in ("stop", "length") for answer in answers] == [True]
