"""LAVIS's annotation lists, of retrieval, captioning and visual questions: one JSON list of objects.

An object is ``{"image": file, "caption": text or texts, "image_id": any}`` or ``{"image": file, "question": text,
"answer": text or texts}``. Each text is a sample: of ten people's answers each counts as often as it was given, which
is what LAVIS's weights of answers come to.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.data.files import read_whole, refuse_address, refuse_impostor
from mgpt4_jax.data.samples import JoinedSource, Sample, Source, make_sample
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import SourceConfig

_EXAMPLE = '[{"image": "val2014/1.jpg", "caption": ["a cat", "a tabby"], "image_id": "coco_1"}]'


@dataclass(frozen=True, eq=False)
class ListPart:
    """One list; ``entries[i]`` and ``texts[i]`` say which text of which object sample ``i`` is."""

    path: Path
    images: Path  # the folder that pictures are named from
    objects: list[Any]
    entries: np.ndarray  # int32 [n]
    texts: np.ndarray  # int32 [n]; -1: the object has one text, or none that can be read
    sha256: str  # of the file

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, index: int) -> Sample:
        place, text = int(self.entries[index]), int(self.texts[index])
        name, entry = f"{self.path}: entry {place}", self.objects[place]
        if not isinstance(entry, dict):
            raise UserError(f"{name}: must be an object, as in {_EXAMPLE}")
        image = entry.get("image")
        if not isinstance(image, str) or not image:
            raise UserError(f'{name}: "image" must be the file of a picture, got {str(image)[:60]!r}')
        refuse_address(image)
        called = _called(entry)
        if called not in entry:
            raise UserError(f'{name}: needs "caption", or "question" and "answer"')
        said = entry[called] if text < 0 else entry[called][text]
        identity = entry.get("image_id", image)
        return make_sample(name, self.images / image, said, entry.get("question"), called=called, image_id=identity)

    def identity(self) -> str:
        return f"lavis {self.sha256}"


def open_lavis(config: SourceConfig) -> Source:
    """The list at ``config.path``, with its pictures in ``config.images``, else beside it."""
    refuse_address(config.path)
    path = Path(config.path).expanduser()
    images = path.parent if config.images is None else Path(config.images).expanduser()
    if not images.is_dir():
        raise UserError(f"{images}: is no folder; set images of {config.path} to the one that its pictures lie in")
    raw = read_whole(path)
    refuse_impostor(path, raw[:512])
    try:
        objects = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(objects, list):
        raise UserError(f"{path}: must be a list like {_EXAMPLE}, not a {type(objects).__name__}")
    entries: list[int] = []
    texts: list[int] = []
    for place, entry in enumerate(objects):
        said = entry.get(_called(entry)) if isinstance(entry, dict) else None
        count = len(said) if isinstance(said, list) else 0
        entries += [place] * max(count, 1)
        texts += range(count) if count else [-1]
    columns = np.array(entries, np.int32), np.array(texts, np.int32)
    part = ListPart(path, images, objects, *columns, hashlib.sha256(raw).hexdigest())
    return JoinedSource(config.path, config.kind, [part])


def _called(entry: dict[str, Any]) -> str:
    return "answer" if "question" in entry else "caption"
