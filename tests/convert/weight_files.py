"""Files to convert: the recorded ones, altered copies of them, and manifests of the real ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgpt4_jax.convert.readers import Source, TensorInfo, open_source

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
VICUNA, LLAMA2 = GOLDEN / "minigpt4_vicuna", GOLDEN / "minigpt4_llama2"
VIT, QFORMER = VICUNA / "eva_vit_g.pth", VICUNA / "blip2_pretrained_flant5xxl.pth"
LLM, PROJECTION = VICUNA / "llm", VICUNA / "pretrained_minigpt4.pth"
OVERRIDES = {"vit": {"num_heads": 4}, "qformer": {"num_heads": 4}}


def load(path: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(path, weights_only=True)
    return dict(saved.get("model", saved))


def save(path: Path, state: Mapping[str, Any], *, wrapped: bool = True, **kwargs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": dict(state)} if wrapped else dict(state), path, **kwargs)
    return path


def altered(path: Path, out: Path, *, wrapped: bool = True, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """A copy of a ``.pth`` with some tensors dropped, changed or added (``__`` stands for a dot)."""
    state = {key: value for key, value in load(path).items() if key not in drop}
    return save(out, state | {key.replace("__", "."): value for key, value in changes.items()}, wrapped=wrapped)


def assert_same_tensors(ours: Source | Path, theirs: Source | Path, *, left_out: set[str] | None = None) -> None:
    """Every tensor of ``ours`` is in ``theirs``, equal to the bit; the rest of theirs is ``left_out``."""
    ours = open_source(ours) if isinstance(ours, Path) else ours
    theirs = open_source(theirs) if isinstance(theirs, Path) else theirs
    for key in ours.tensors():
        one, other = ours.read(key), theirs.read(key)
        assert one.dtype == other.dtype, key
        assert one.shape == other.shape, key
        assert one.tobytes() == other.tobytes(), key
    assert set(theirs.tensors()) - set(ours.tensors()) == (left_out or set())


@dataclass
class Manifest:
    """Keys and shapes of a real file, as a source that cannot be read."""

    path: Path
    config: dict[str, Any] | None = None
    wrapper: tuple[str, ...] = ()
    kind: str = "torch"
    files: tuple[Path, ...] = ()
    _tensors: dict[str, TensorInfo] = field(default_factory=dict)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, key: str) -> np.ndarray:
        raise AssertionError("a manifest has no values")


def manifest(name: str) -> Manifest:
    path = Path(__file__).parent / "manifests" / f"{name}.json"
    values = json.loads(path.read_text())
    tensors = {}
    for template, shape in values["shapes"].items():
        dtype = "int64" if template.endswith("position_ids") else "float16"
        for key in expand(template):
            tensors[key] = TensorInfo(tuple(shape), dtype, path)
    return Manifest(Path(name), values.get("config"), _tensors=tensors)


def expand(template: str) -> list[str]:
    match = re.search(r"\{([\d,-]+)\}", template)
    if match is None:
        return [template]
    if "-" in match[1]:
        first, last = map(int, match[1].split("-"))
        numbers = range(first, last + 1)
    else:
        numbers = [int(number) for number in match[1].split(",")]
    return [template.replace(match[0], str(number)) for number in numbers]
