"""Sources made in memory. A module of its own, because worker processes import it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mgpt4_jax.data.samples import Sample
from mgpt4_jax.errors import UserError

WORDS = "a red cat sits on the blue mat beside two green dogs while rain falls over old town roofs".split()


def picture(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class MemorySource:
    """Samples named ``name/0``, ``name/1``, ..., each with its own picture and caption.

    Args:
      bad: indices that cannot be read.
      broken: indices whose picture is none.
      instructions, answers: of single samples, where not the ordinary ones.
      blind: indices without a picture.
      hook: called with each index that is read.
    """

    name: str
    size: int
    bad: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    blind: frozenset[int] = frozenset()
    instructions: dict[int, str] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    hook: Callable[[int], None] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if self.hook is not None:
            self.hook(index)
        name = f"{self.name}/{index}"
        if index in self.bad:
            raise UserError(f"{name}: is unreadable")
        image = b"<html>" if index in self.broken else picture(index)
        return Sample(
            name=name,
            image=None if index in self.blind else image,
            answer=self.answers.get(index, " ".join(WORDS[: 1 + index % len(WORDS)])),
            instruction=self.instructions.get(index),
        )

    def fingerprint(self) -> str:
        return f"{self.name} {self.size}"


def needs_no_accelerator(index: int) -> None:
    """A hook that fails where JAX has opened its devices."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    assert bridge is None or not bridge.backends_are_initialized(), "a backend runs"
