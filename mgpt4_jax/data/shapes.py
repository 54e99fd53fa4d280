"""A small world that can be drawn: scenes of coloured shapes, a seed a scene, and their pictures.

A scene is a square of 2x2 cells with one to three things in it, no two of one colour or one shape, so that each can be
asked for by either. Some pairs of colour and shape are never drawn for training (``HELD_OUT``): a picture of them
shows whether a model has learnt colours and shapes, or pictures.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 70),
    "blue": (45, 90, 220),
    "yellow": (240, 205, 40),
    "purple": (150, 70, 180),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES = ("small", "big")
PLACES = ("northwest", "northeast", "southwest", "southeast")
MOST = 3  # things in a scene
HELD_OUT = frozenset(
    [("red", "star"), ("green", "cross"), ("blue", "triangle"), ("yellow", "square"), ("purple", "circle")]
)
"""Pairs that no picture to learn from shows, one of each colour and of each shape."""

IMAGE_SIZE = 64
_CELL = IMAGE_SIZE // 2
_SIDES = {"small": (14, 16), "big": (24, 26)}  # pixels, both ends included
_OFF_CENTRE = 1  # pixels that a thing may lie off the middle of its cell, in each direction
_SUPERSAMPLING = 4  # edges are drawn finer and reduced, as a photograph has them
_BACKGROUNDS = (225, 255)  # from this grey to this one

Part = Literal["train", "test", "unseen"]
"""``train`` and ``test`` share no scene and show no held-out pair, ``unseen`` shows one in each."""
_TEST_SHARE = 10  # one scene in so many is for tests


class Thing(NamedTuple):
    """One shape; ``place`` is one of ``PLACES``."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}, {self.size}"

    @property
    def word(self) -> str:
        """All of it in one word: what the language model reads in the place of a picture."""
        return f"{self.size}-{self.colour}-{self.shape}-{self.place}"


Scene = tuple[Thing, ...]
"""Things in reading order."""


def every_word() -> list[str]:
    """The word of each thing that there can be, of the held-out pairs too."""
    return [Thing(*attributes).word for attributes in itertools.product(SIZES, COLOURS, SHAPES, PLACES)]


def part_of(scene: Scene) -> Part:
    """Which part of the world a scene belongs to, whatever the seed: so that no run can learn from another's tests."""
    if any((thing.colour, thing.shape) in HELD_OUT for thing in scene):
        return "unseen"
    digits = zlib.crc32("|".join(f"{thing.name} {thing.place}" for thing in scene).encode())
    return "train" if digits % _TEST_SHARE else "test"


def draw_scene(rng: np.random.Generator, part: Part = "train", most: int = MOST) -> Scene:
    """One to ``most`` things, of a part of the world."""
    while True:
        count = int(rng.integers(1, most + 1))
        places = sorted(rng.choice(len(PLACES), size=count, replace=False))
        colours = rng.choice(list(COLOURS), size=count, replace=False)
        shapes = rng.choice(SHAPES, size=count, replace=False)
        scene = tuple(
            Thing(str(rng.choice(SIZES)), str(colour), str(shape), PLACES[place])
            for place, colour, shape in zip(places, colours, shapes, strict=True)
        )
        if part_of(scene) == part:
            return scene


def different_scenes(count: int, rng: np.random.Generator, part: Part) -> list[Scene]:
    """No two alike. There are few scenes of one thing: among many different ones they are rare."""
    found: dict[Scene, None] = {}
    while len(found) < count:
        found[draw_scene(rng, part)] = None
    return list(found)


def draw_picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """RGB ``[64 64]``: a thing lies near the middle of its cell, a little larger or smaller, lighter or darker."""
    scale = _SUPERSAMPLING
    grey = int(rng.integers(_BACKGROUNDS[0], _BACKGROUNDS[1] + 1))
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(PLACES.index(thing.place), 2)
        low, high = _SIDES[thing.size]
        side = int(rng.integers(low, high + 1))
        across, down = (int(rng.integers(-_OFF_CENTRE, _OFF_CENTRE + 1)) for _ in range(2))
        left = column * _CELL + (_CELL - side) // 2 + across
        top = row * _CELL + (_CELL - side) // 2 + down
        light = int(rng.integers(-18, 19))
        red, green, blue = (min(max(part + light, 0), 255) for part in COLOURS[thing.colour])
        box = (left * scale, top * scale, (left + side) * scale, (top + side) * scale)
        _draw_shape(pen, thing.shape, box, (red, green, blue))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], fill: tuple[int, int, int]
) -> None:
    left, top, right, bottom = box
    across, middle = right - left, (left + right) / 2
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(middle, top), (left, bottom), (right, bottom)], fill=fill)
    elif shape == "cross":
        arm, centre = across / 6, (top + bottom) / 2
        pen.rectangle((middle - arm, top, middle + arm, bottom), fill=fill)
        pen.rectangle((left, centre - arm, right, centre + arm), fill=fill)
    else:
        pen.polygon(_star(middle, (top + bottom) / 2, across / 2), fill=fill)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Five points, one upwards; the inner corners lie at two fifths of the radius."""
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    lengths = np.where(np.arange(10) % 2 == 0, radius, radius * 0.4)
    return [(float(x + r * np.cos(a)), float(y + r * np.sin(a))) for a, r in zip(angles, lengths, strict=True)]
