"""Data sets of every kind, made from the same samples. A module of its own, because worker processes import it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgpt4_jax.data.records import write_array_record
from mgpt4_jax.data.samples import Sample, Source
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.train_config import SourceConfig

KINDS = ("webdataset", "cc_sbu_align", "jsonl", "array_record", "tfds")

Pair = tuple[str, bytes, str]  # key, picture file, caption


def picture(seed: int = 0, width: int = 24, height: int = 16, format: str = "JPEG") -> bytes:
    """A picture file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def make_pairs(count: int) -> list[Pair]:
    return [(f"{i:05d}", picture(i), f"caption {i} – über {'word ' * i}end") for i in range(count)]


def make_data_set(kind: str, folder: Path, pairs: Sequence[Pair]) -> SourceConfig:
    """Write ``pairs`` as a data set of ``kind`` into an empty or new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return _MAKERS[kind](folder, pairs)


def members_of(pairs: Iterable[Pair]) -> list[tuple[str, bytes]]:
    """Names and contents as img2dataset writes them into a tar."""
    members = []
    for key, image, caption in pairs:
        values = {"caption": caption, "url": f"http://example.org/{key}", "key": key, "status": "success"}
        members += [
            (f"{key}.jpg", image),
            (f"{key}.json", json.dumps(values).encode()),
            (f"{key}.txt", caption.encode()),
        ]
    return members


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content))
    return path


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def read_all(source: Source) -> list[tuple[Any, str, str | None, str]]:
    """Pictures as bytes, answers, instructions, names."""
    samples = [source[index] for index in range(len(source))]
    return [
        (s.image.read_bytes() if isinstance(s.image, Path) else s.image, s.answer, s.instruction, s.name)
        for s in samples
    ]


def read_some(source: Source, indices: Sequence[int]) -> list[str]:
    return [source[index].answer for index in indices]


def _webdataset(folder: Path, pairs: Sequence[Pair]) -> SourceConfig:
    half = len(pairs) // 2
    for shard, part in enumerate((pairs[:half], pairs[half:])):
        write_tar(folder / f"{shard:05d}.tar", members_of(part))
    return SourceConfig("webdataset", str(folder / "{00000..00001}.tar"))


def _cc_sbu_align(folder: Path, pairs: Sequence[Pair]) -> SourceConfig:
    (folder / "image").mkdir()
    for key, image, _ in pairs:
        (folder / "image" / f"{key}.jpg").write_bytes(image)
    annotations = [{"image_id": key, "caption": caption} for key, _, caption in pairs]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return SourceConfig("cc_sbu_align", str(folder))


def _jsonl(folder: Path, pairs: Sequence[Pair]) -> SourceConfig:
    for key, image, _ in pairs:
        (folder / f"{key}.jpg").write_bytes(image)
    lines = [{"id": i, "image": f"{key}.jpg", "caption": caption} for i, (key, _, caption) in enumerate(pairs)]
    return SourceConfig("jsonl", str(write_lines(folder / "my.jsonl", lines)))


def _array_record(folder: Path, pairs: Sequence[Pair]) -> SourceConfig:
    half = len(pairs) // 2
    for shard, part in enumerate((pairs[:half], pairs[half:])):
        write_array_record(folder / f"{shard}.array_record", [Sample(key, image, text) for key, image, text in part])
    return SourceConfig("array_record", str(folder))


def _tfds(folder: Path, pairs: Sequence[Pair]) -> SourceConfig:
    return make_tfds(folder, [{"image": image, "caption": caption} for _, image, caption in pairs])


def make_tfds(folder: Path, records: Sequence[dict[str, Any]]) -> SourceConfig:
    """A prepared data set, as ArrayRecord; pictures are given as the bytes of their files."""
    import tensorflow_datasets as tfds

    features = {key: tfds.features.Image() if key == "image" else tfds.features.Text() for key in records[0]}

    with tfds.core.registered.skip_registration():

        class Pictures(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = Path(__file__).parent  # it would look there for a description, and
            code_path = None  # beside its code for checksums, with a package that it does not require

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                for index, record in enumerate(records):
                    yield index, {**record, "image": io.BytesIO(record["image"])} if "image" in record else record

    builder = Pictures(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return SourceConfig("tfds", str(builder.data_dir))


_MAKERS = {
    "webdataset": _webdataset,
    "cc_sbu_align": _cc_sbu_align,
    "jsonl": _jsonl,
    "array_record": _array_record,
    "tfds": _tfds,
}


def open_tar(path: Path) -> Source:
    return open_source(SourceConfig("webdataset", str(path)))


def open_lines(path: Path, lines: list[Any]) -> Source:
    return open_source(SourceConfig("jsonl", str(write_lines(path / "my.jsonl", lines))))
