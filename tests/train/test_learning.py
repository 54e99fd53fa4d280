"""Stage 1 and stage 2 from the command line: pictures are learnt from, a stop in the middle changes nothing of it.

The baseline is blind: the same captions, each with a grey picture, in training and in validation. It learns all that
can be learnt of captions alone; what a model that sees is better by comes from the pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mgpt4_jax.checkpoint import read_leaf, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.train.run_log import read_log, read_losses
from tests.train.world import COLOURS, SHAPES, write_pictures, write_tiny_model

ROOT = Path(__file__).parent.parent.parent
CONFIGS, GOLDEN = ROOT / "configs", ROOT / "tests" / "golden" / "data" / "minigpt4_vicuna"
MARGIN = 0.15  # nats a token; over three models of other random weights it was 0.21 to 0.27
STEPS = {1: 80, 2: 40}
TRAINED = ("projection", "llama", "qformer")  # of a model of random weights: the projection alone could not do it
LIMIT = 240  # seconds for a start on a busy machine
SHORT = {"text.buckets": "[48]", "text.max_length": 48, "text.max_text_length": 16, "epochs": 1, "mesh": "data=1"}
LEARNING = SHORT | {"optim.peak_lr": 3e-3, "trainable": json.dumps([f"{part}/*" for part in TRAINED])}


def train_command(stage: int, model: Path, run: Path, data: str, **options: Any) -> list[str]:
    """``data``: the folder that holds ``train`` and ``validation``."""
    words = ["train", "--config", str(CONFIGS / f"tiny_stage{stage}.yaml"), "--model", str(model), "--run", str(run)]
    for part in ("train", "validation"):
        source = {"kind": "jsonl", "path": str(Path(data) / part / "data.jsonl")}
        words += [f"--data.{part}", json.dumps([source])]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


def validation_loss(run: Path) -> float:
    """Of the last validation."""
    return [record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "validation"][-1]


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    (folder / "digest").write_text(digest(write_tiny_model(folder / "model")))
    for part, count, seed in (("train", 192, 1), ("validation", 48, 2)):
        write_pictures(folder / "seen" / part, count, seed)
        write_pictures(folder / "blind" / part, count, seed, blind=True)
    write_pictures(folder / "unseen", 12, 3)
    return folder


@pytest.fixture(scope="module")
def stopped_at(world: Path) -> int:
    """Stage 1 begins in a process of its own, which SIGTERM stops after some steps."""
    steps = {"steps_per_epoch": STEPS[1], "log.sample_every": STEPS[1], "log.every": 5}
    command = train_command(1, world / "model", world / "runs" / "seen1", str(world / "seen"), **LEARNING, **steps)
    program = Path(sys.executable).parent / "mgpt4"
    running = subprocess.Popen([program, *command], stderr=subprocess.PIPE, text=True)
    log, end = world / "runs" / "seen1" / "log.jsonl", time.monotonic() + LIMIT
    while not (log.exists() and read_losses(log)) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=LIMIT)[1]
    assert running.returncode == 128 + signal.SIGTERM, said
    saved = [int(name) for name in os.listdir(world / "runs" / "seen1" / "checkpoints")]
    assert saved == [len(read_losses(log))]
    return saved[0]


@pytest.fixture(scope="module")
def runs(world: Path, stopped_at: int) -> Path:
    """Both stages, with and without sight; stage 1 of the one that sees goes on from where it was stopped."""
    for sight in ("seen", "blind"):
        for stage in (1, 2):
            model = world / "model" if stage == 1 else world / "runs" / f"{sight}1" / "model"
            shown = STEPS[1] if (sight, stage) == ("seen", 1) else 0
            options = {"steps_per_epoch": STEPS[stage], "log.sample_every": shown, "log.every": 5}
            run = world / "runs" / f"{sight}{stage}"
            assert main(train_command(stage, model, run, str(world / sight), **LEARNING, **options)) == 0
    return world / "runs"


def test_what_was_stopped_goes_on(runs: Path, stopped_at: int) -> None:
    records = read_log(runs / "seen1" / "log.jsonl")
    assert 5 <= stopped_at < STEPS[1]
    assert sum(len(record.get("losses", ())) for record in records) == len(read_losses(runs / "seen1" / "log.jsonl"))
    assert list(read_losses(runs / "seen1" / "log.jsonl")) == list(range(1, STEPS[1] + 1))
    told = [record["text"] for record in records if record["kind"] == "event"]
    assert told[1] == f"goes on from checkpoint {stopped_at}"
    assert told[0] == told[2] and told[0].endswith("frozen parameters are to the bit as they were at the beginning")
    assert len(told) == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_pictures_lower_the_validation_loss(stage: int, runs: Path) -> None:
    seen, blind = validation_loss(runs / f"seen{stage}"), validation_loss(runs / f"blind{stage}")
    print(f"stage {stage}: nats a token, with pictures {seen:.3f}, blind {blind:.3f}")
    assert seen < blind - MARGIN


def test_stage_2_builds_on_stage_1(runs: Path) -> None:
    """It goes on in another format from what was learnt, and ends lower than stage 1."""
    first = read_losses(runs / "seen2" / "log.jsonl")[1]
    assert first < read_losses(runs / "seen1" / "log.jsonl")[1] / 1.5
    assert validation_loss(runs / "seen2") < validation_loss(runs / "seen1")


def test_the_model_looks_at_the_picture_that_it_is_shown(runs: Path, world: Path) -> None:
    """Shown grey pictures it is worse than the model that never saw one (by a step of learning rate 0, validated)."""
    still = dict.fromkeys(("optim.peak_lr", "optim.min_lr", "optim.warmup_lr"), 0)
    run = world / "runs" / "grey"
    command = train_command(
        2, runs / "seen2" / "model", run, str(world / "blind"), **LEARNING | still, steps_per_epoch=1
    )
    assert main(command) == 0
    grey, seen, blind = (validation_loss(runs / name) for name in ("grey", "seen2", "blind2"))
    print(f"nats a token: its own pictures {seen:.3f}, grey ones {grey:.3f}; blind from the start {blind:.3f}")
    assert grey > blind + MARGIN


def test_only_what_is_trained_changes(runs: Path, world: Path) -> None:
    """The frozen parts are read from the first model, which nobody wrote to; all others are in the run's own model."""
    base, trained = read_manifest(world / "model"), read_manifest(runs / "seen2" / "model")
    assert set(trained.base.leaves) == {path for path in base.dtypes if path.split("/")[0] not in TRAINED}
    assert {path.split("/")[0] for path in trained.base.leaves} == {"vit", "ln_vision"}
    assert (runs / "seen2" / "model" / trained.base.path).resolve() == (world / "model").resolve()
    for path in base.dtypes:
        is_same = np.array_equal(read_leaf(world / "model", path), read_leaf(runs / "seen2" / "model", path))
        assert is_same == (path in trained.base.leaves), path
    assert digest(world / "model") == (world / "digest").read_text()


def test_what_a_run_leaves_behind(runs: Path) -> None:
    run = runs / "seen1"
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["objective"], written["steps_per_epoch"]) == ("align", STEPS[1])
    assert main(["train", "--config", str(run / "config.yaml")]) == 0  # complete, and done already
    records = read_log(run / "log.jsonl")
    assert {record["kind"] for record in records} == {"train", "validation", "captions", "event"}
    for record in records:
        if record["kind"] == "train":
            assert all(math.isfinite(record[name]) for name in ("loss", "learning_rate", "grad_norm", "data_wait_ms"))
            assert 0 <= record["padding"] < 1 and record["bad_samples"] == 0
    (captions,) = (record["captions"] for record in records if record["kind"] == "captions")
    assert len(captions) == 4
    for caption in captions:
        assert "data.jsonl:" in caption["name"]
        for text in (caption["reference"], caption["text"]):
            words = text.split()
            assert words[0] == "a" and words[1] in COLOURS and words[2] in SHAPES and len(words) == 3
    assert sum(caption["reference"].split()[1] == caption["text"].split()[1] for caption in captions) >= 3
    with Image.open(run / "curves.png") as picture:
        assert min(picture.size) >= 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # it shows lines and words


def test_the_answering_engine_says_what_was_learnt(runs: Path, world: Path) -> None:
    """Of pictures that nobody has seen, asked as in training."""
    lines = [json.loads(line) for line in (world / "unseen" / "data.jsonl").open()]
    prompt = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
    questions, answers = world / "questions.jsonl", world / "answers.jsonl"
    asked = [{"id": line["id"], "image": f"unseen/{line['image']}", "prompt": prompt} for line in lines]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    words = ["generate", str(runs / "seen2" / "model"), "--input", str(questions), "--output", str(answers)]
    assert main([*words, "--template", "none", "--stop", "###", "--max-new-tokens", "16"]) == 0
    said = [json.loads(line) for line in answers.open()]
    assert [answer["finish_reason"] for answer in said] == ["stop"] * 12
    right = [line["caption"].split()[1] in answer["text"].split() for line, answer in zip(lines, said, strict=True)]
    assert sum(right) >= 10, said


# --- the projection alone, on weights in the published layout ------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> list[str]:
    files = {"vit": "eva_vit_g.pth", "qformer": "blip2_pretrained_flant5xxl.pth", "llm": "llm"}
    words = [word for option, name in files.items() for word in (f"--{option}", str(GOLDEN / name))]
    return [*words, "--overrides", str(CONFIGS / "tiny_overrides.yaml")]


@pytest.fixture(scope="module")
def aligned(world: Path, sources: list[str]) -> Path:
    """A model of converted files, and in ``RUN/model`` what some steps of the recipe as it stands made of it."""
    converted = world / "converted"
    projection = str(GOLDEN / "pretrained_minigpt4.pth")
    assert main(["convert", *sources, "--projection", projection, "--out", str(converted)]) == 0
    before = digest(converted)
    run = world / "runs" / "aligned"
    options = SHORT | {"steps_per_epoch": 3, "log.sample_every": 0}
    assert main(train_command(1, converted, run, str(world / "seen"), **options)) == 0
    assert digest(converted) == before
    return converted


def test_by_default_the_projection_alone_is_trained(aligned: Path, world: Path) -> None:
    model = world / "runs" / "aligned" / "model"
    projection = {"projection/kernel", "projection/bias"}
    assert set(read_manifest(model).trained) == projection
    assert {path.name for path in (model / "params").iterdir() if path.is_dir()} == {
        "projection.kernel",
        "projection.bias",
    }
    for path in read_manifest(aligned).dtypes:
        assert np.array_equal(read_leaf(model, path), read_leaf(aligned, path)) == (path not in projection), path


def test_the_trained_projection_in_the_file_that_the_original_loads(
    aligned: Path, world: Path, sources: list[str]
) -> None:
    model, file = world / "runs" / "aligned" / "model", world / "checkpoint.pth"
    assert main(["export", str(model), "--format", "minigpt4", "--out", str(file)]) == 0
    saved = torch.load(file, weights_only=True)["model"]
    assert set(saved) == {"llama_proj.weight", "llama_proj.bias"}
    np.testing.assert_array_equal(saved["llama_proj.weight"].numpy(), read_leaf(model, "projection/kernel").T)
    np.testing.assert_array_equal(saved["llama_proj.bias"].numpy(), read_leaf(model, "projection/bias"))
    again = world / "converted again"
    assert main(["convert", *sources, "--projection", str(file), "--out", str(again)]) == 0
    for path in read_manifest(again).dtypes:
        np.testing.assert_array_equal(read_leaf(again, path), read_leaf(model, path), err_msg=path)
