"""A world for tiny runs: pictures of one coloured shape with their captions, and a model to be trained on them.

The model has random weights and the recorded tokeniser; nothing of it was ever trained.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tiny import MINIGPT4, QFORMER, VIT, random_params

from mgpt4_jax.checkpoint import new_directory, write_model
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models import num_parameters

TOKENIZER = Path(__file__).parent.parent / "golden" / "data" / "minigpt4_vicuna" / "llm"
VOCAB = 480
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("square", "circle")
SIZE = 28


def tiny_model(**llama: Any) -> ModelConfig:
    """The tiny MiniGPT-4 with room for the recorded tokeniser's vocabulary."""
    return dataclasses.replace(
        MINIGPT4,
        vit=VIT,
        qformer=QFORMER,
        llama=dataclasses.replace(MINIGPT4.llama, **{"vocab_size": VOCAB, "max_positions": 256} | llama),
    )


def write_tiny_model(out: Path, config: ModelConfig | None = None, seed: int = 0) -> Path:
    """A model directory of random weights."""
    config = config or tiny_model()
    with new_directory(out) as partial:
        fields = {"config": config, "template": "vicuna_v0", "num_parameters": num_parameters(config)}
        write_model(partial, random_params(config, seed), fields)
        (partial / "tokenizer").mkdir()
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, partial / "tokenizer" / name)
    return out


def draw(colour: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """One shape somewhere on grey."""
    picture = Image.new("RGB", (SIZE, SIZE), "grey")
    left, top, side = (int(rng.integers(1, 8)), int(rng.integers(1, 8)), int(rng.integers(14, 20)))
    box = (left, top, left + side, top + side)
    pen = ImageDraw.Draw(picture)
    (pen.rectangle if shape == "square" else pen.ellipse)(box, fill=colour)
    return picture


def write_pictures(folder: Path, count: int, seed: int = 0, *, blind: bool = False) -> Path:
    """``folder/data.jsonl`` and its pictures; ``blind``: the same captions with a grey picture each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        colour, shape = str(rng.choice(COLOURS)), str(rng.choice(SHAPES))
        picture = draw(colour, shape, rng)
        name = f"{number:05d}.png"
        (Image.new("RGB", (SIZE, SIZE), "grey") if blind else picture).save(folder / name)
        lines.append({"id": number, "image": name, "caption": f"a {colour} {shape}"})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(model: Path, run: Path, train: Path, validation: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A configuration of a short run, as a YAML file has it."""
    source = lambda path: [{"kind": "jsonl", "path": str(path)}]  # noqa: E731
    base: dict[str, Any] = {
        "model": str(model),
        "run": str(run),
        "data": {"train": source(train), "validation": source(validation) if validation else [], "num_threads": 1},
        "text": {"max_text_length": 16, "buckets": [24], "max_length": 24},
        "optim": {"peak_lr": 3e-3, "min_lr": 3e-4, "warmup_lr": 1e-4, "warmup_steps": 5},
        "epochs": 1,
        "steps_per_epoch": 20,
        "batch_size": 8,
        "mesh": "data=1",
        "checkpoint": {"every": 5},
        "log": {"every": 5, "validate_every": 10, "sample_every": 0},
    }
    return merge(base, changes)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, dicts within dicts."""
    merged = dict(base)
    for key, value in changes.items():
        is_deeper = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if is_deeper else value
    return merged
