"""A world for Q-Former pre-training: pictures of several coloured things, and captions that tell them apart.

A picture is 3x3 cells with two or three things, each of a colour and a shape, a little moved within its cell; the
caption names colour, shape and place of each. A scene belongs to the pictures that are trained on or to those held out,
never to both. The model begins random: vision tower, Q-Former, heads, and word pieces of its own.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from mgpt4_jax.config import ModelConfig, QformerConfig, VitConfig
from mgpt4_jax.initial import init_model

CELL = 16  # pixels, and the patch of the tower
SIZE = 3 * CELL
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 215, 50)}
SHAPES = ("square", "circle", "triangle", "cross")
PLACES = tuple(" ".join(pair) for pair in itertools.product(("top", "middle", "bottom"), ("left", "centre", "right")))
PIECES = (  # some words are in pieces, as in a real vocabulary
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", *COLOURS, "square", "circle", "cross", "tri", "##angle"),
    *("top", "middle", "bottom", "left", "centre", "right"),
)
LONGEST = 19  # word pieces of a caption, with [CLS] and [SEP]: three things of at most 5, and two commas

VIT = VitConfig(image_size=SIZE, patch_size=CELL, hidden_size=96, mlp_size=192, num_layers=3, num_heads=4)
QFORMER = QformerConfig(
    hidden_size=96,
    mlp_size=192,
    num_layers=4,
    num_heads=4,
    num_queries=8,
    encoder_size=96,
    with_text=True,
    with_lm_head=True,
    vocab_size=len(PIECES) + 1,  # and [DEC]
    max_positions=40,
    dropout=0.0,
)
MODEL = ModelConfig("blip2", VIT, QFORMER, projection_size=64)


class Thing(NamedTuple):
    """``place`` counts the cells row by row."""

    place: int
    colour: str
    shape: str


Scene = tuple[Thing, ...]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Two or three things, in reading order."""
    places = sorted(rng.choice(len(PLACES), size=int(rng.integers(2, 4)), replace=False))
    return tuple(Thing(int(place), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for place in places)


def scenes(count: int, seed: int, *, without: frozenset[Scene] = frozenset()) -> list[Scene]:
    """Different scenes, none of them in ``without``."""
    rng, found = np.random.default_rng(seed), dict[Scene, None]()
    while len(found) < count:
        if (scene := draw_scene(rng)) not in without:
            found[scene] = None
    return list(found)


def caption(scene: Scene) -> str:
    return ", ".join(f"{thing.colour} {thing.shape} {PLACES[thing.place]}" for thing in scene)


def picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """[48 48] on grey; a thing is 11 to 13 pixels wide."""
    image = Image.new("RGB", (SIZE, SIZE), "grey")
    pen = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(thing.place, 3)
        side = int(rng.integers(11, 14))
        left, top = column * CELL + int(rng.integers(0, CELL - side)), row * CELL + int(rng.integers(0, CELL - side))
        _draw_thing(pen, thing, (left, top, left + side, top + side))
    return image


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    fill = COLOURS[thing.colour]
    if thing.shape == "square":
        pen.rectangle(box, fill=fill)
    elif thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "triangle":
        pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=fill)
    else:
        middle, centre = (left + right) // 2, (top + bottom) // 2
        pen.rectangle((middle - 2, top, middle + 2, bottom), fill=fill)
        pen.rectangle((left, centre - 2, right, centre + 2), fill=fill)


def write_pairs(folder: Path, chosen: list[Scene], seed: int) -> Path:
    """``folder/data.jsonl`` and its pictures, one pair a scene; ``pairs.json`` is the same as a list of LAVIS."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for number, scene in enumerate(chosen):
        picture(scene, rng).save(folder / f"{number:05d}.png")
        lines.append({"id": number, "image": f"{number:05d}.png", "caption": caption(scene)})
    pairs = [{"image": line["image"], "caption": [line["caption"]]} for line in lines]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_world(folder: Path, *, train: int, held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """(pairs to train on, pairs of other scenes)."""
    others = scenes(held_out, seed + 1)
    ours = scenes(train, seed, without=frozenset(others))
    return write_pairs(folder / "train", ours, seed), write_pairs(folder / "held_out", others, seed + 1)


def write_pairs_model(out: Path, seed: int = 0, config: ModelConfig = MODEL) -> Path:
    """A ``blip2`` model directory that begins random."""
    words = out.with_name(f"{out.name}_words")
    words.mkdir()
    (words / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return init_model(config, out, seed=seed, qformer_tokenizer=words)
