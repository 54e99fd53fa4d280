"""Data sets give what was written, from anywhere."""

from __future__ import annotations

import base64
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from mgpt4_jax.data import files, samples
from mgpt4_jax.data.files import find_files
from mgpt4_jax.data.images import load_image
from mgpt4_jax.data.records import write_array_record
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import SourceConfig
from tests.data.making import (
    KINDS,
    make_data_set,
    make_pairs,
    make_tfds,
    members_of,
    open_lines,
    open_tar,
    picture,
    read_all,
    read_some,
    write_tar,
)

PAIRS = make_pairs(7)


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    """One data set of each kind, of the same samples; not to be changed."""
    return {kind: make_data_set(kind, tmp_path_factory.mktemp(kind) / "set", PAIRS) for kind in KINDS}


# --- what was written comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_what_was_written(configs: dict[str, SourceConfig], kind: str) -> None:
    source = open_source(configs[kind])
    assert len(source) == 7 and source.name == configs[kind].path
    found = read_all(source)
    assert [row[:3] for row in found] == [(image, caption, None) for _, image, caption in PAIRS]
    assert len({row[3] for row in found}) == 7
    assert load_image(source[3].image).size == (24, 16)
    for index in (-1, 7):
        with pytest.raises(IndexError):
            source[index]


def test_names_say_where_a_sample_is(configs: dict[str, SourceConfig]) -> None:
    names = {kind: open_source(configs[kind])[4].name for kind in KINDS}
    ends = {
        "webdataset": "00001.tar: 00004",
        "cc_sbu_align": "filter_cap.json: annotation 4",
        "jsonl": "my.jsonl:5",
        "array_record": "1.array_record: record 1",
        "tfds": "train: record 4",
    }
    assert all(names[kind].endswith(end) for kind, end in ends.items()), names


def test_instructions_and_answers(tmp_path: Path) -> None:
    image, expected = picture(), [("What?", "A cat."), ("Where?", "On the mat.")]
    (tmp_path / "a.jpg").write_bytes(image)
    lines = [{"image": "a.jpg", "instruction": q, "answer": a} for q, a in expected]
    write_array_record(tmp_path / "a.array_record", [Sample("", tmp_path / "a.jpg", a, q) for q, a in expected])
    records = [{"image": image, "instruction": q, "text": a} for q, a in expected]
    sources = [
        open_lines(tmp_path, lines),
        open_source(SourceConfig("array_record", str(tmp_path / "a.array_record"))),
        open_source(make_tfds(tmp_path / "tfds", records)),
    ]
    for source in sources:
        found = read_all(source)
        assert [(instruction, answer) for _, answer, instruction, _ in found] == expected
        assert {row[0] for row in found} == {image}


def test_lines_may_hold_data_uris_absolute_paths_and_words_alone(tmp_path: Path) -> None:
    image = picture()
    (tmp_path / "a.jpg").write_bytes(image)
    lines = [
        {"image": "data:image/jpeg;base64," + base64.b64encode(image).decode(), "caption": "uri"},
        {"image": str(tmp_path / "a.jpg"), "caption": "absolute"},
        {"image": "sub/../a.jpg", "caption": "relative"},
        {"image": None, "instruction": "Say hello.", "answer": "Hello."},
        {"image": "a.jpg", "answer": "no instruction", "source": "kept out"},
    ]
    (tmp_path / "sub").mkdir()
    found = read_all(open_lines(tmp_path, lines))
    assert [row[0] for row in found] == [image, image, image, None, image]
    assert [row[1] for row in found] == ["uri", "absolute", "relative", "Hello.", "no instruction"]


def test_lines_of_any_editor(tmp_path: Path) -> None:
    """A byte order mark, blank lines, Windows line ends, no line break at the end: numbers stay those of the editor."""
    path = tmp_path / "my.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"image": "a.jpg", "caption": "one"}\r\n\r\n  \n{"image": "b.jpg", "caption": "zw\xc3\xb6lf"}'
    )
    source = open_source(SourceConfig("jsonl", str(path)))
    found = [(sample.name, sample.answer) for sample in (source[0], source[1])]
    assert len(source) == 2
    assert found == [(f"{path}:1", "one"), (f"{path}:4", "zwölf")]


def test_captions_of_a_tar(tmp_path: Path) -> None:
    """JSON wins over text; text is enough; every picture suffix counts, the first of several; the rest is ignored."""
    other, image = picture(1), picture()
    members = [
        ("./a/0.1.jpg", image),
        ("a/0.json", b'{"caption": "json"}'),
        ("a/0.txt", b"text"),
        ("a/0.jpg", image),
        ("b.PNG", image),
        ("b.txt", b"text alone\n"),
        ("c.webp", image),
        ("c.caption", "ü".encode()),
        ("d.jpeg", image),
        ("d.json", b'{"url": "x"}'),
        ("d.txt", b"json without caption"),
        ("e.png", other),
        ("e.jpg", image),
        ("e.json", b'{"caption": "two pictures"}'),
        ("f.parquet", b"?"),
        ("__meta.json", b"{}"),
        (".hidden.jpg", b""),
        ("README", b"no suffix"),
    ]
    source = open_tar(write_tar(tmp_path / "a.tar", members))
    found = read_all(source)
    assert [row[1] for row in found] == ["json", "text alone", "ü", "json without caption", "two pictures"]
    assert {row[0] for row in found} == {image}
    assert found[0][3] == f"{tmp_path / 'a.tar'}: a/0"


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members = sorted(members_of(PAIRS), key=lambda member: member[0][::-1])
    found = read_all(open_tar(write_tar(tmp_path / "a.tar", members)))
    assert {(row[0], row[1]) for row in found} == {(image, caption) for _, image, caption in PAIRS}


# --- patterns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("0000{0..1}.tar", ["00000.tar", "00001.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{b,a}/{0..1}.tar", ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]),
        ("0000?.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{a,b}/*.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("**/[01].tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("a", ["a/0.tar", "a/1.tar"]),
        ("odd{1..2}[x].tar", ["odd{1..2}[x].tar"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = "00000 00001 00002 8 9 10 11 a/0 a/1 b/0 b/1 odd{1..2}[x]".split()
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(b"")
    (tmp_path / "a" / "0.tar.index.npz").write_bytes(b"")
    found = find_files(f"{tmp_path}/{pattern}", "*.tar")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{00000..00004}.tar", "00002.tar: is not there (nor are 2 others)"),
        ("nothing*.tar", "no such file"),
        ("nowhere/a.tar", "no such file"),
        ("{0..99999999999}.tar", "over 1,000 files"),
        ("{1..0}.tar", "no such file"),
        ("\0.tar", "no such file"),
    ],
)
def test_patterns_that_miss(tmp_path: Path, pattern: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_EXPANDED", 1000)
    for name in ("00000.tar", "00001.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        find_files(f"{tmp_path}/{pattern}", "*.tar")
    assert message in str(caught.value)


@pytest.mark.parametrize("address", ["s3://bucket/a.tar", "https://host/{0..9}.tar", "pipe:cat a.tar", "gs://b/a"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched(kind: str, address: str) -> None:
    with pytest.raises(UserError, match="is not read; download the data"):
        open_source(SourceConfig(kind, address))  # type: ignore[arg-type]


# --- fingerprints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_knows_neither_place_nor_time(configs: dict[str, SourceConfig], kind: str, tmp_path: Path) -> None:
    first = open_source(configs[kind]).fingerprint()
    root = next(parent for parent in Path(configs[kind].path).parents if parent.name.startswith(kind))
    shutil.copytree(root, tmp_path / "copy")  # with the time of now
    moved = SourceConfig(kind, configs[kind].path.replace(str(root), str(tmp_path / "copy")))  # type: ignore[arg-type]
    assert open_source(moved).fingerprint() == first
    assert len(first) == 64 and int(first, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_tells_changes(configs: dict[str, SourceConfig], kind: str, tmp_path: Path) -> None:
    changes = {
        "fewer": PAIRS[:-1],
        "another order": PAIRS[::-1],
        "another caption": [(*PAIRS[0][:2], "another caption"), *PAIRS[1:]],
    }
    found = [open_source(make_data_set(kind, tmp_path / name, pairs)).fingerprint() for name, pairs in changes.items()]
    assert len({open_source(configs[kind]).fingerprint(), *found}) == 4


@pytest.mark.parametrize("kind", ["jsonl", "cc_sbu_align"])
def test_a_picture_that_was_replaced_is_told_by_its_size(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an unchanged list; not in a large set, where looking at each would take long."""
    config = make_data_set(kind, tmp_path / "set", PAIRS)
    source = open_source(config)
    before, list_before, image = source.picture_sizes(), source.fingerprint(), source[3].image
    assert isinstance(image, Path)
    image.write_bytes(picture(99, width=30))
    assert "" != source.picture_sizes() != before
    assert source.fingerprint() == list_before
    monkeypatch.setattr(samples, "MAX_SIZED", len(PAIRS) - 1)
    assert open_source(config).picture_sizes() == ""


def test_kinds_never_share_a_fingerprint(configs: dict[str, SourceConfig]) -> None:
    assert len({open_source(config).fingerprint() for config in configs.values()}) == len(KINDS)


# --- processes and threads ---------------------------------------------------------------------------------


def test_sources_go_to_other_processes(configs: dict[str, SourceConfig]) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for kind in KINDS:
            source = open_source(configs[kind])
            expected = read_all(source)  # with files open here
            assert pool.submit(read_all, source).result() == expected, kind
            assert pool.submit(type(source).fingerprint, source).result() == source.fingerprint(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_at_once(configs: dict[str, SourceConfig], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.Reads.__init__, "__defaults__", (1,))  # one open file: each thread closes another's
    source = open_source(configs[kind])
    orders = [np.random.default_rng(seed).integers(0, 7, 200).tolist() for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda order: read_some(source, order), orders))
    finally:
        sys.setswitchinterval(interval)
    assert found == [[PAIRS[index][2] for index in order] for order in orders]


def test_open_files_are_bounded(tmp_path: Path) -> None:
    for i in range(100):
        write_tar(tmp_path / f"{i}.tar", members_of([(str(i), b"picture", f"caption {i}")]))
    source = open_source(SourceConfig("webdataset", str(tmp_path / "{0..99}.tar")))
    before = len(os.listdir("/proc/self/fd"))
    assert read_some(source, range(100)) == [f"caption {i}" for i in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    del source
    assert len(os.listdir("/proc/self/fd")) == before


# --- TFDS --------------------------------------------------------------------------------------------------


def test_tfds_without_its_package_names_the_extra(
    configs: dict[str, SourceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mgpt4-jax\[data\]'"):
        open_source(configs["tfds"])


def test_tfds_brings_no_tensorflow(configs: dict[str, SourceConfig]) -> None:
    open_source(configs["tfds"])
    assert "tensorflow" not in sys.modules


def test_bad_tfds(configs: dict[str, SourceConfig], tmp_path: Path) -> None:
    good = configs["tfds"]
    with pytest.raises(UserError, match=r"has no split 'test'; it has train"):
        open_source(SourceConfig("tfds", good.path, split="test"))
    for split in ("train[", "train[:1:2]", "test[:1]", ""):
        with pytest.raises(UserError, match="has no split"):
            open_source(SourceConfig("tfds", good.path, split=split))
    with pytest.raises(UserError, match=r"Loaded 0 records"):
        open_source(SourceConfig("tfds", good.path, split="train[:0]"))
    with pytest.raises(UserError, match=r"dataset_info\.json: is not there"):
        open_source(SourceConfig("tfds", str(tmp_path)))
    with pytest.raises(UserError, match="needs the features image and caption"):
        open_source(make_tfds(tmp_path / "words", [{"caption": "a"}]))
    with pytest.raises(UserError, match="needs the features image and caption"):
        open_source(make_tfds(tmp_path / "pictures", [{"image": picture(), "label": "a"}]))
    for name in ("dataset_info.json", "features.json"):
        for content in (b"", b"{", b"[]", b'{"splits": 3}', b"\xff"):
            broken = tmp_path / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(good.path, broken)
            (broken / name).write_bytes(content)
            with pytest.raises(UserError, match="is not a data set that TFDS can read|needs the features"):
                open_source(SourceConfig("tfds", str(broken)))


def test_parts_of_a_split(configs: dict[str, SourceConfig]) -> None:
    path, captions = configs["tfds"].path, [caption for _, _, caption in PAIRS]
    first, rest = (open_source(SourceConfig("tfds", path, split=split)) for split in ("train[:3]", "train[3:]"))
    assert [row[1] for row in read_all(first) + read_all(rest)] == captions
    assert first.fingerprint() != rest.fingerprint()
    assert first[0].name.endswith("train[:3]: record 0")


def test_tfds_samples_are_checked(tmp_path: Path) -> None:
    source = open_source(
        make_tfds(tmp_path, [{"image": picture(), "caption": ""}, {"image": picture(), "caption": b"\xff"}])
    )
    for index, message in enumerate(("the caption is empty", "is not valid UTF-8")):
        with pytest.raises(UserError, match=message):
            source[index]


# --- changes while it is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webdataset", "jsonl"])
def test_a_file_that_changes_under_a_run_is_refused(kind: str, tmp_path: Path) -> None:
    config = make_data_set(kind, tmp_path / "set", PAIRS)
    source = open_source(config)
    for path in (tmp_path / "set").iterdir():
        os.utime(path, (1, 1))
    with pytest.raises(UserError, match="was changed since it was opened"):
        source[0]


def test_progress_is_reported(configs: dict[str, SourceConfig], tmp_path: Path) -> None:
    config = make_data_set("webdataset", tmp_path / "set", PAIRS)
    calls: list[tuple[int, int]] = []
    open_source(config, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
