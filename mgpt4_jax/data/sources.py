"""Data sets with random access: webdataset tars, cc_sbu_align, JSONL, LAVIS's lists, ArrayRecord and TFDS.

``open_source`` gives a ``Source``. What is wrong with a data set as a whole is told when it is opened; what is wrong
with one sample is told when that sample is read, so that a loader can skip, count and name it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.data.files import (
    Reads,
    Stamp,
    find_files,
    read_head,
    read_whole,
    refuse_address,
    refuse_impostor,
    relative_names,
    stamp_of,
)
from mgpt4_jax.data.images import parse_data_uri
from mgpt4_jax.data.lavis_lists import open_lavis
from mgpt4_jax.data.samples import JoinedSource, Sample, Source, make_sample, parse_object
from mgpt4_jax.data.tar_index import JSON, PICTURE, TEXT, TarIndex, find_tars, index_tars
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import SourceConfig

__all__ = ["Sample", "Source", "open_source"]

MAX_LINE_BYTES = 128 * 2**20  # a picture of 64 MiB as base64, and words
_LINE_EXAMPLE = '{"image": "cat.jpg", "caption": "a cat"}'
_ANNOTATIONS_EXAMPLE = '{"annotations": [{"image_id": "1", "caption": "a cat"}]}'

Report = Callable[[int, int], None]


def open_source(config: SourceConfig, report: Report | None = None) -> Source:
    """Open a data set.

    Args:
      report: called with the tars (of JSONL: bytes) looked through, and all of them.

    Raises:
      UserError: names the file that is missing, broken or not what its kind says, or says that there are no samples.
    """
    return _OPENERS[config.kind](config, report)


# --- webdataset --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TarPart:
    """One tar. The caption is ``caption`` of the JSON member, else the text member."""

    path: Path
    name: str  # below the data set's folder
    index: TarIndex
    reads: Reads

    def __len__(self) -> int:
        return len(self.index)

    def get(self, index: int) -> Sample:
        name = f"{self.path}: {self.index.key(index)}"
        if self.index.is_duplicated(index):
            raise UserError(f"{name}: the tar holds this sample twice; give each its own name")
        picture = self._read(name, index, PICTURE)
        if picture is None:
            raise UserError(f"{name}: has a caption but no picture (.jpg, .jpeg, .png or .webp)")
        if not picture:
            raise UserError(f"{name}: the picture is empty (0 bytes)")
        return make_sample(name, picture, self._caption(name, index))

    def identity(self) -> str:
        return f"{self.name} {self.index.stamp.size} {len(self.index)} {self.index.digest()}"

    def _caption(self, name: str, index: int) -> Any:
        raw = self._read(name, index, JSON)
        values = {} if raw is None else parse_object(raw, f"{name}: the .json", '{"caption": "a cat"}')
        if "caption" in values:
            return values["caption"]
        text = self._read(name, index, TEXT)
        if text is None:
            reason = "a picture but no caption (.json or .txt)" if raw is None else 'a .json without "caption"'
            raise UserError(f"{name}: has {reason}")
        try:
            return text.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: the caption is not valid UTF-8 (byte {error.start})") from error

    def _read(self, name: str, index: int, column: int) -> bytes | None:
        place = self.index.member(index, column)
        try:
            return self.reads.read(self.path, *place, self.index.stamp) if place else None
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def _open_webdataset(config: SourceConfig, report: Report | None) -> Source:
    paths = find_tars(config.path)
    reads = Reads()
    parts = [
        TarPart(path, name, index, reads)
        for path, name, index in zip(paths, relative_names(paths), index_tars(paths, report), strict=True)
    ]
    return JoinedSource(config.path, config.kind, parts)


# --- cc_sbu_align ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AlignPart:
    """MiniGPT-4's own format: ``filter_cap.json`` lists captions, ``image/ID.jpg`` are the pictures."""

    folder: Path
    annotations: list[Any]
    sha256: str  # of filter_cap.json

    def __len__(self) -> int:
        return len(self.annotations)

    def get(self, index: int) -> Sample:
        name, annotation = f"{self.folder / 'filter_cap.json'}: annotation {index}", self.annotations[index]
        if not isinstance(annotation, dict) or not {"image_id", "caption"} <= annotation.keys():
            raise UserError(f'{name}: must be an object with "image_id" and "caption", got {str(annotation)[:60]!r}')
        identity = annotation["image_id"]
        if type(identity) not in (str, int) or not str(identity) or "/" in str(identity) or "\0" in str(identity):
            raise UserError(f"{name}: image_id must be the name of a picture in image/, got {str(identity)[:60]!r}")
        return make_sample(name, self.folder / "image" / f"{identity}.jpg", annotation["caption"])

    def identity(self) -> str:
        return f"filter_cap.json {self.sha256}"


def _open_cc_sbu_align(config: SourceConfig, report: Report | None) -> Source:
    del report  # a few thousand lines
    refuse_address(config.path)
    folder = Path(config.path).expanduser()
    path = folder / "filter_cap.json"
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{config.path}: {reason}; give the one with filter_cap.json and image/")
    for needed in (path, folder / "image"):
        if not needed.exists():
            raise UserError(f"{needed}: is not there; a cc_sbu_align folder holds filter_cap.json and image/")
    raw = read_whole(path)
    refuse_impostor(path, raw[:512])
    annotations = parse_object(raw, str(path), _ANNOTATIONS_EXAMPLE).get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f'{path}: has no list "annotations"; it must be like {_ANNOTATIONS_EXAMPLE}')
    part = AlignPart(folder, annotations, hashlib.sha256(raw).hexdigest())
    return JoinedSource(config.path, config.kind, [part])


# --- JSONL -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LinesPart:
    """One JSONL file, of which only the places of its lines are held."""

    path: Path
    stamp: Stamp
    starts: np.ndarray  # int64 [n], bytes
    sizes: np.ndarray  # int64 [n], bytes
    numbers: np.ndarray  # int64 [n]; from 1, blank lines counted
    sha256: str
    reads: Reads

    def __len__(self) -> int:
        return len(self.starts)

    def get(self, index: int) -> Sample:
        name = f"{self.path}:{self.numbers[index]}"
        try:
            raw = self.reads.read(self.path, int(self.starts[index]), int(self.sizes[index]), self.stamp)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        values = parse_object(raw, name, _LINE_EXAMPLE)
        if ("caption" in values) == ("answer" in values):
            raise UserError(f'{name}: needs either "caption", or "answer" with "instruction"')
        if "caption" in values and values.get("instruction") is not None:
            raise UserError(f'{name}: has "instruction" and "caption"; call the text to predict "answer"')
        if "image" not in values:
            raise UserError(f'{name}: has no "image"; write "image": null for words alone')
        called = "caption" if "caption" in values else "answer"
        image = self._image(name, values["image"])
        own = {"called": called, "image_id": values.get("image_id")}
        return make_sample(name, image, values[called], values.get("instruction"), **own)

    def identity(self) -> str:
        return self.sha256

    def _image(self, name: str, image: Any) -> bytes | Path | None:
        if image is None:
            return None
        if not isinstance(image, str) or not image:
            raise UserError(f'{name}: "image" must be a path or a data URI, got {str(image)[:60]!r}')
        try:
            if image[:5].lower() == "data:":
                return parse_data_uri(image)
            refuse_address(image)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        return self.path.parent / image


def _open_jsonl(config: SourceConfig, report: Report | None) -> Source:
    reads = Reads()
    parts = [_find_lines(path, reads, report) for path in find_files(config.path, "*.jsonl")]
    return JoinedSource(config.path, config.kind, parts)


def _find_lines(path: Path, reads: Reads, report: Report | None) -> LinesPart:
    stamp = stamp_of(path)
    head = read_head(path)
    refuse_impostor(path, head)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise UserError(f"{path}: is one JSON array; write one object a line, such as {_LINE_EXAMPLE}")
    if b"\0" in head:
        raise UserError(f"{path}: is not UTF-8 text (it holds NUL bytes); save it as UTF-8, one JSON object a line")
    starts, sizes, numbers = array("q"), array("q"), array("q")
    digest, offset, number = hashlib.sha256(), 0, 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raise UserError(f"{path}:{number}: the line is over {MAX_LINE_BYTES >> 20} MiB; is this JSONL?")
                digest.update(raw)
                if raw.strip():
                    starts.append(offset)
                    sizes.append(len(raw))
                    numbers.append(number)
                offset += len(raw)
                if report and number % 4096 == 0:
                    report(offset, stamp.size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    columns = [np.array(values, np.int64) for values in (starts, sizes, numbers)]
    return LinesPart(path, stamp, columns[0], columns[1], columns[2], digest.hexdigest(), reads)


# --- ArrayRecord and TFDS ----------------------------------------------------------------------------------


def _open_records(config: SourceConfig, report: Report | None) -> Source:
    from mgpt4_jax.data import records  # which brings large libraries along

    del report  # their files say at once how many records they hold
    return records.open_tfds(config) if config.kind == "tfds" else records.open_array_record(config)


_OPENERS: dict[str, Callable[[SourceConfig, Report | None], Source]] = {
    "webdataset": _open_webdataset,
    "cc_sbu_align": _open_cc_sbu_align,
    "jsonl": _open_jsonl,
    "lavis": lambda config, report: open_lavis(config),
    "array_record": _open_records,
    "tfds": _open_records,
}
