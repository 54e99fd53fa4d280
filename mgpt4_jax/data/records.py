"""Data sets in ArrayRecord files: our own, which ``write_array_record`` writes, and those that TFDS prepared.

A record of ours is one line of JSON, a line break, and the bytes of the picture file. The line holds ``answer`` and
``image_size`` (bytes; null for words alone) and may hold ``instruction``. Other programs need ten lines to write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from mgpt4_jax.data.files import (
    MAX_READ_BYTES,
    find_files,
    read_head,
    read_whole,
    refuse_address,
    refuse_impostor,
    relative_names,
)
from mgpt4_jax.data.samples import JoinedSource, Sample, Source, make_sample, parse_object
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import SourceConfig

_BLOCK = 2**16
_HEADER_EXAMPLE = '{"answer": "a cat", "image_size": 7000}'
_TEXT_FEATURES = ("caption", "answer", "text")
_LIBRARY_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)

# --- our own records ---------------------------------------------------------------------------------------


def write_array_record(path: str | Path, samples: Iterable[Sample]) -> int:
    """Write samples to one file, which appears under its name only when it is whole.

    Returns:
      How many were written.

    Raises:
      UserError: there are none, a picture cannot be read, or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")  # a record can be read without its neighbours
        try:
            for sample in samples:
                writer.write(_encode(sample))
                count += 1
        finally:
            writer.close()
        if not count:
            raise UserError(f"{path}: there are no samples to write")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def open_array_record(config: SourceConfig) -> Source:
    """The files that ``config.path`` names, or all ``*.array_record*`` of the folder."""
    paths = find_files(config.path, "*.array_record*")
    parts = [
        RecordPart(path, name, _open_records(path)) for path, name in zip(paths, relative_names(paths), strict=True)
    ]
    return JoinedSource(config.path, config.kind, parts)


@dataclass(frozen=True, eq=False)
class RecordPart:
    """One ArrayRecord file; the library opens it lazily, keeps it open, and may be pickled."""

    path: Path
    name: str  # below the data set's folder
    records: ArrayRecordDataSource

    def __len__(self) -> int:
        return len(self.records)

    def get(self, index: int) -> Sample:
        name = f"{self.path}: record {index}"
        try:
            record = self.records[index]
        except _LIBRARY_ERRORS as error:
            raise UserError(f"{name}: is damaged ({str(error)[:80]}); write the file again") from error
        return _decode(record, name)

    def identity(self) -> str:
        return _identity(self.path, self.name, len(self))


def _identity(path: Path, name: str, count: int) -> str:
    """The end of an ArrayRecord file says where each of its records begins: it differs when one does in length."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_BLOCK))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _BLOCK, 0))
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return f"{name} {size} {count} {digest.hexdigest()}"


def _open_records(path: Path) -> ArrayRecordDataSource:
    refuse_impostor(path, read_head(path))
    try:
        return ArrayRecordDataSource(str(path))
    except _LIBRARY_ERRORS as error:
        reason = str(error).split(";")[0][:120]
        raise UserError(f"{path}: is not an ArrayRecord file, or is truncated ({reason}); write it again") from error


def _encode(sample: Sample) -> bytes:
    try:
        image = read_whole(sample.image) if isinstance(sample.image, Path) else sample.image
    except UserError as error:
        raise UserError(f"{sample.name}: {error}") from error
    header: dict[str, Any] = {"answer": sample.answer, "image_size": None if image is None else len(image)}
    if sample.instruction is not None:
        header["instruction"] = sample.instruction
    record = json.dumps(header).encode() + b"\n" + (image or b"")
    if len(record) > MAX_READ_BYTES:
        raise UserError(f"{sample.name}: {len(record):,} bytes are over the cap of {MAX_READ_BYTES >> 20} MiB")
    return record


def _decode(record: bytes, name: str) -> Sample:
    head, line_break, image = record.partition(b"\n")
    if not line_break:
        raise UserError(f"{name}: has no line of JSON such as {_HEADER_EXAMPLE} before the picture")
    header = parse_object(head, f"{name}: its first line", _HEADER_EXAMPLE)
    if not {"answer", "image_size"} <= header.keys():
        raise UserError(f'{name}: its first line must hold "answer" and "image_size", as in {_HEADER_EXAMPLE}')
    size = header["image_size"]
    if (size or 0) != len(image):
        raise UserError(f"{name}: holds {len(image)} bytes of a picture, but says {size}; write the file again")
    return make_sample(
        name, None if size is None else image, header["answer"], header.get("instruction"), called="answer"
    )


# --- TFDS --------------------------------------------------------------------------------------------------


def open_tfds(config: SourceConfig) -> Source:
    """A data set that TFDS prepared as ArrayRecord, without TensorFlow.

    Its features must have ``image`` and one of ``caption``, ``answer`` or ``text``; ``instruction`` is taken too.
    """
    refuse_address(config.path)
    folder = Path(config.path).expanduser()
    info = folder / "dataset_info.json"
    if not info.is_file():
        raise UserError(f"{info}: is not there; give the folder of a prepared data set, such as flowers/1.0.0")
    tfds = _import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        splits, names = builder.info.splits, tuple(builder.info.features)
    except _tfds_errors() as error:
        raise UserError(f"{folder}: is not a data set that TFDS can read ({_first_line(error)})") from error
    try:
        split = splits[config.split]  # or a part of one, such as train[:95%]
        files = [Path(file) for file in split.filepaths] if split.num_examples else []
    except _tfds_errors() as error:
        raise UserError(f"{folder}: has no split {config.split!r}; it has {', '.join(splits)}") from error
    if not files:
        raise UserError(f"{folder}: the split {config.split!r} holds no samples (Loaded 0 records)")
    answer = next((name for name in _TEXT_FEATURES if name in names), None)
    if "image" not in names or answer is None:
        raise UserError(f"{folder}: needs the features image and caption (or answer, text); it has {', '.join(names)}")
    try:
        decoders = {"image": tfds.decode.SkipDecoding()}  # the bytes of the file: pictures are decoded in one place
        records = builder.as_data_source(split=config.split, decoders=decoders)
    except _tfds_errors() as error:
        mend = "prepare it with file_format='array_record'"
        raise UserError(f"{folder}: cannot be read at random ({_first_line(error)}); {mend}") from error
    described = [_identity(file, file.name, len(records)) for file in files]
    part = TfdsPart(f"{folder} {config.split}", records, answer, " ".join([config.split, *described]))
    return JoinedSource(config.path, config.kind, [part])


@dataclass(frozen=True, eq=False)
class TfdsPart:
    """One split."""

    name: str
    records: Any  # of bytes, or dictionaries of them
    answer: str  # the feature to predict
    described: str

    def __len__(self) -> int:
        return len(self.records)

    def get(self, index: int) -> Sample:
        name = f"{self.name}: record {index}"
        try:
            record = self.records[index]
        except _LIBRARY_ERRORS as error:
            raise UserError(f"{name}: is damaged ({_first_line(error)}); prepare the data set again") from error
        texts = {key: _text(record.get(key), f"{name}: the {key}") for key in (self.answer, "instruction")}
        return make_sample(name, record["image"], texts[self.answer], texts["instruction"], called=self.answer)

    def identity(self) -> str:
        return self.described


def _import_tfds() -> types.ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"data sets of the kind tfds need tensorflow-datasets ({error}): pip install 'mgpt4-jax[data]'"
        ) from error
    return tensorflow_datasets


def _tfds_errors() -> tuple[type[Exception], ...]:
    """What TFDS raises on folders that it cannot read; its JSON is read by protobuf."""
    from google.protobuf.json_format import Error

    return (*_LIBRARY_ERRORS, Error)


def _text(value: Any, name: str) -> Any:
    """A text feature as a string; other values as they are, for ``make_sample`` to refuse."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not valid UTF-8 (byte {error.start})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
