"""What a data set gives: one picture with the words about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mgpt4_jax.data.text import require_encodable
from mgpt4_jax.errors import UserError

MAX_SIZED = 20_000
"""Samples of a data set whose pictures' sizes tell it from another: 50 to 100 microseconds each, on a local disk."""
_IN_FILES = ("jsonl", "lavis", "cc_sbu_align")
_LOOKED_AT = 100


@dataclass(frozen=True)
class Sample:
    """One pair.

    Args:
      name: how errors call it: ``laion/00003.tar: 000030017`` or ``my.jsonl:17``.
      image: the bytes of a picture file, or its path; None: words alone.
      answer: the text to predict, not empty.
      instruction: the question of this sample; None: one of the run's.
      image_id: what the data set calls its picture, which others may share; None: it does not say.
    """

    name: str
    image: bytes | Path | None
    answer: str
    instruction: str | None = None
    image_id: Any = None


class Source(Protocol):
    """A data set with random access, from any thread; it may be pickled for worker processes."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; a bad one raises ``UserError`` with its name, one out of range ``IndexError``."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what tells the data set's content and order, wherever it lies and whenever it was copied."""
        ...

    def picture_sizes(self) -> str:
        """SHA-256 (hex) of the sizes of pictures that are files of their own beside a list, which says not what is in
        them; "": there are none, or too many to look at each."""
        ...


class Part(Protocol):
    """One file of a data set."""

    def __len__(self) -> int: ...

    def get(self, index: int) -> Sample: ...

    def identity(self) -> str:
        """One line that differs when the file's samples differ."""
        ...


class JoinedSource:
    """Parts one after the other."""

    def __init__(self, name: str, kind: str, parts: Sequence[Part]) -> None:
        self.name = name
        self._kind = kind
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        if not len(self):
            raise UserError(f"{name}: holds no samples (Loaded 0 records); check the path and the kind {kind!r}")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, there is no sample {index}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[place]
        return part.get(int(index) - int(self._ends[place]) + len(part))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._kind} {len(self)}\n".encode())
        for part in self._parts:
            digest.update(part.identity().encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()

    def picture_sizes(self) -> str:
        if self._kind not in _IN_FILES or len(self) > MAX_SIZED:
            return ""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(b"".join(b"%d " % _picture_size(part, index) for index in range(len(part))))
        return digest.hexdigest()


def _picture_size(part: Part, index: int) -> int:
    """Bytes of the file of a picture; -1: the sample cannot be read, or has no such file."""
    try:
        image = part.get(index).image
        return image.stat().st_size if isinstance(image, Path) else -1
    except (UserError, OSError):
        return -1


def make_sample(
    name: str,
    image: bytes | Path | None,
    answer: Any,
    instruction: Any = None,
    *,
    called: str = "caption",
    image_id: Any = None,
) -> Sample:
    """A sample whose words are checked; ``called`` is how the data set calls the answer."""
    texts = {called: answer} if instruction is None else {"instruction": instruction, called: answer}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{name}: the {key} must be text, got {type(text).__name__}: {str(text)[:60]!r}")
        if not text.strip():
            raise UserError(f"{name}: the {key} is empty; write one, or leave the sample out")
        try:
            require_encodable(text)
        except UserError as error:
            raise UserError(f"{name}: the {key}: {error}") from error
    return Sample(name, image, answer, instruction, image_id)


def name_pictures(sources: Sequence[Source]) -> bool:
    """Whether a source says which picture its samples show; its first sample that can be read tells."""
    for source in sources:
        for index in range(min(len(source), _LOOKED_AT)):
            try:
                sample = source[index]
            except UserError:
                continue
            if sample.image_id is not None:
                return True
            break
    return False


def parse_object(raw: bytes, name: str, example: str) -> dict[str, Any]:
    """The JSON object in ``raw``; ``name`` and ``example`` are for the error."""
    try:
        values = json.loads(raw.decode("utf-8-sig"))  # Windows editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not valid UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: must be an object such as {example}, not a {type(values).__name__}")
    return values
