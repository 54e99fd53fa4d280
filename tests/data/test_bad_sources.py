"""What is wrong with a data set is named: a sample when it is read, a set when it is opened."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgpt4_jax.data.records import write_array_record
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import SourceConfig
from tests.data.making import (
    make_pairs,
    members_of,
    open_tar,
    picture,
    read_all,
    write_tar,
)

PAIRS = make_pairs(7)


# --- bad samples: named when they are read, and the others are there ---------------------------------------

JPG = picture()
GOOD = [("good.jpg", JPG), ("good.json", b'{"caption": "good"}')]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.jpg", JPG)], "has a picture but no caption"),
        ([("x.json", b'{"caption": "a"}')], "has a caption but no picture"),
        ([("x.jpg", JPG), ("x.json", b'{"url": "a"}')], 'has a .json without "caption"'),
        ([("x.jpg", b""), ("x.json", b'{"caption": "a"}')], "the picture is empty (0 bytes)"),
        ([("x.jpg", JPG), ("x.json", b"")], "the .json: is not valid JSON"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": ')], "the .json: is not valid JSON"),
        ([("x.jpg", JPG), ("x.json", b'["caption"]')], "not a list"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": ""}')], "the caption is empty"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": " \\n"}')], "the caption is empty"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": null}')], "the caption must be text, got NoneType"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": ["a", "b"]}')], "the caption must be text, got list: \"['a', 'b']"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": "\xff\xfe"}')], "is not valid UTF-8"),
        ([("x.jpg", JPG), ("x.txt", b"\xff\xfe")], "is not valid UTF-8"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": "\\ud800"}')], "lone surrogate"),
        ([("x.jpg", JPG), ("x.json", b"[" * 100_000)], "is not valid JSON"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": ' + b"1" * 5000 + b"}")], "is not valid JSON"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": "a"}'), ("x.jpg", JPG)], "holds this sample twice"),
        ([("x.jpg", JPG), ("x.json", b'{"caption": "a"}'), ("x.json", b'{"caption": "b"}')], "holds this sample twice"),
        ([("x.jpg", JPG), ("x.JPG", JPG), ("x.txt", b"a")], "holds this sample twice"),
        ([("x.json", b'{"caption": "a"}'), ("x/y.jpg", JPG), ("x/y.txt", b"a")], "x: has a caption but no picture"),
    ],
)
def test_bad_samples_of_a_tar(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [*members, *GOOD])
    source = open_tar(path)
    with pytest.raises(UserError) as caught:
        source[0]
    assert str(caught.value).startswith(f"{path}: x") and message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert source[len(source) - 1].answer == "good"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "is not valid JSON"),
        (b'{"image": "a.jpg", "caption": "a"', "is not valid JSON"),
        (b'"a.jpg"', "must be an object"),
        (b"[1]", "must be an object"),
        (b'{"image": "a.jpg"}', 'needs either "caption", or "answer"'),
        (b'{"image": "a.jpg", "caption": "a", "answer": "b"}', 'needs either "caption", or "answer"'),
        (b'{"image": "a.jpg", "caption": "a", "instruction": "b"}', 'call the text to predict "answer"'),
        (b'{"picture": "a.jpg", "caption": "a"}', 'has no "image"'),
        (b'{"image": ["a.jpg"], "caption": "a"}', '"image" must be a path or a data URI'),
        (b'{"image": "", "caption": "a"}', '"image" must be a path or a data URI'),
        (b'{"image": "http://host/a.jpg", "caption": "a"}', "http:// is not read"),
        (b'{"image": "file:///etc/passwd", "caption": "a"}', "file:// is not read"),
        (b'{"image": "data:image/png,abc", "caption": "a"}', "is not base64"),
        (b'{"image": "data:image/png;base64,????", "caption": "a"}', "broken base64"),
        (b'{"image": "a.jpg", "caption": ""}', "the caption is empty"),
        (b'{"image": "a.jpg", "caption": ["a"]}', "must be text, got list"),
        (b'{"image": "a.jpg", "instruction": 3, "answer": "a"}', "the instruction must be text, got int"),
        (b'{"image": "a.jpg", "instruction": "", "answer": "a"}', "the instruction is empty"),
        (b'{"image": "a.jpg", "instruction": "a", "answer": " "}', "the answer is empty"),
        (b'{"image": "a.jpg", "caption": "\xe4"}', "is not valid UTF-8"),
        (b'{"image": "a.jpg", "caption": "\\udc00"}', "lone surrogate"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b'{"image": "a.jpg", "caption": "good"}\n' + line + b'\n{"image": "a.jpg", "caption": "good"}\n')
    source = open_source(SourceConfig("jsonl", str(path)))
    assert source[0].answer == source[2].answer == "good"
    with pytest.raises(UserError) as caught:
        source[1]
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("text", "must be an object"),
        ({"image_id": "1"}, 'must be an object with "image_id" and "caption"'),
        ({"caption": "a"}, 'must be an object with "image_id" and "caption"'),
        ({"image_id": "1", "caption": ["a"]}, "must be text, got list"),
        ({"image_id": "1", "caption": ""}, "the caption is empty"),
        ({"image_id": "../secret", "caption": "a"}, "must be the name of a picture"),
        ({"image_id": 1.5, "caption": "a"}, "must be the name of a picture"),
        ({"image_id": "", "caption": "a"}, "must be the name of a picture"),
    ],
)
def test_bad_annotations(tmp_path: Path, annotation: Any, message: str) -> None:
    (tmp_path / "image").mkdir()
    values = {"annotations": [annotation, {"image_id": 7, "caption": "good"}]}
    (tmp_path / "filter_cap.json").write_text(json.dumps(values))
    source = open_source(SourceConfig("cc_sbu_align", str(tmp_path)))
    assert source[1].image == tmp_path / "image" / "7.jpg"
    with pytest.raises(UserError) as caught:
        source[0]
    assert "filter_cap.json: annotation 0: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xd8\xff\xe0 no line break", "has no line of JSON"),
        (b"\xff\xd8\n\xff\xe0", "is not valid UTF-8"),
        (b"{]\n", "is not valid JSON"),
        (b'{"answer": "a"}\n', 'must hold "answer" and "image_size"'),
        (b'{"answer": "a", "image_size": 9}\n1234', "holds 4 bytes of a picture, but says 9"),
        (b'{"answer": "a", "image_size": "4"}\n1234', "holds 4 bytes of a picture, but says 4"),
        (b'{"answer": "a", "image_size": null}\n1234', "but says None"),
        (b'{"answer": "", "image_size": 4}\n1234', "the answer is empty"),
        (b'{"answer": {}, "image_size": 4}\n1234', "must be text, got dict"),
    ],
)
def test_bad_records(tmp_path: Path, record: bytes, message: str) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b'{"answer": "good", "image_size": 2}\n\n\n')
    writer.write(record)
    writer.close()
    source = open_source(SourceConfig("array_record", str(path)))
    assert source[0] == Sample(f"{path}: record 0", b"\n\n", "good")
    with pytest.raises(UserError) as caught:
        source[1]
    assert str(caught.value).startswith(f"{path}: record 1: ") and message in str(caught.value)


def test_a_flipped_bit_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    samples = [Sample(str(i), np.random.default_rng(i).bytes(3000), f"caption {i}") for i in range(20)]
    assert write_array_record(path, samples) == 20
    content = bytearray(path.read_bytes())
    content[content.index(b"caption 7") + 500] ^= 1
    path.write_bytes(content)
    source = open_source(SourceConfig("array_record", str(path)))
    bad = []
    for i in range(20):
        try:
            assert source[i].answer == f"caption {i}"
        except UserError as error:
            bad.append(str(error))
    assert len(bad) == 1 and bad[0].startswith(f"{path}: record 7: is damaged")


# --- bad data sets: refused when they are opened -----------------------------------------------------------


def whole_tar(path: Path) -> bytes:
    return write_tar(path, members_of(PAIRS), tarfile.USTAR_FORMAT).read_bytes()


HTML, POINTER = b"<!DOCTYPE html>\n<html><body>404</body></html>", b"version https://git-lfs.github.com/spec/v1\noid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: b"", "is empty (0 bytes)"),
        (lambda tar: HTML, "is a web page"),
        (lambda tar: POINTER, "is a Git LFS pointer"),
        (lambda tar: b"\x1f\x8b" + tar, "is compressed with gzip"),
        (lambda tar: b"PK\x03\x04" + tar, "is a ZIP archive"),
        (lambda tar: JPG * 9, "is not a tar, or is damaged"),
        (lambda tar: b"\0" * 10240, "holds no samples (Loaded 0 records)"),
        (lambda tar: tar[:600], "is truncated in its last member"),
        (lambda tar: tar[:100], "is not a tar, or is damaged"),
        (lambda tar: tar[: 512 * 9 + 300], "is truncated"),
        (lambda tar: tar + tar, "more tars were joined to it"),
        (lambda tar: tar.replace(b"00003.json", b"\xff\x00\xff\x00\xff\x00\xff\x00\xff\x00"), "is damaged at byte"),
    ],
)
def test_bad_tars(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(change(whole_tar(tmp_path / "whole")))
    with pytest.raises(UserError) as caught:
        open_tar(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tars_without_pictures_are_no_data_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.parquet", b"1"), ("b.npy", b"2")])
    with pytest.raises(UserError, match="Loaded 0 records"):
        open_tar(tmp_path / "a.tar")


def test_an_empty_shard_among_others_is_no_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", members_of(PAIRS[:1]))
    write_tar(tmp_path / "2.tar", [])
    source = open_source(SourceConfig("webdataset", str(tmp_path)))
    assert [row[1] for row in read_all(source)] == [PAIRS[0][2]]


def test_the_first_bad_tar_is_named_and_the_others_counted(tmp_path: Path) -> None:
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", members_of(PAIRS))
    for i in (1, 3):
        (tmp_path / f"{i}.tar").write_bytes(HTML)
    with pytest.raises(UserError, match=r"1\.tar: is a web page.*1 more of 4 tars"):
        open_source(SourceConfig("webdataset", str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\n\n  \n", "Loaded 0 records"),
        (HTML, "is a web page"),
        (POINTER, "is a Git LFS pointer"),
        (b'[{"image": "a.jpg", "caption": "a"}]', "is one JSON array"),
        ('{"image": "a.jpg", "caption": "a"}\n'.encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(SourceConfig("jsonl", str(path)))
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpt4_jax.data.sources.MAX_LINE_BYTES", 1000)
    (tmp_path / "my.jsonl").write_bytes(b'{"a": 1}\n' + b" " * 5000)
    with pytest.raises(UserError, match=r"my\.jsonl:2: the line is over"):
        open_source(SourceConfig("jsonl", str(tmp_path / "my.jsonl")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (HTML, "is a web page"),
        (POINTER, "is a Git LFS pointer"),
        (b'{"annotations": [', "is not valid JSON"),
        (b"[]", "not a list"),
        (b"{}", 'has no list "annotations"'),
        (b'{"annotations": {"1": "a"}}', 'has no list "annotations"'),
        (b'{"annotations": []}', "Loaded 0 records"),
        (b'{"annotations": [{"image_id": "1", "caption": "\xff"}]}', "is not valid UTF-8"),
        (None, "filter_cap.json: is not there"),
    ],
)
def test_bad_filter_cap(tmp_path: Path, content: bytes | None, message: str) -> None:
    (tmp_path / "image").mkdir()
    if content is not None:
        (tmp_path / "filter_cap.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(SourceConfig("cc_sbu_align", str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and message in str(caught.value)


def test_cc_sbu_align_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_source(SourceConfig("cc_sbu_align", str(tmp_path / "nowhere")))
    (tmp_path / "filter_cap.json").write_text('{"annotations": [{"image_id": "1", "caption": "a"}]}')
    with pytest.raises(UserError, match="is not a folder"):
        open_source(SourceConfig("cc_sbu_align", str(tmp_path / "filter_cap.json")))
    with pytest.raises(UserError, match="image: is not there"):
        open_source(SourceConfig("cc_sbu_align", str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: b"", "is empty (0 bytes)"),
        (lambda file: HTML, "is a web page"),
        (lambda file: file[: len(file) // 2], "is not an ArrayRecord file, or is truncated"),
        (lambda file: zlib.compress(file), "is not an ArrayRecord file"),
    ],
)
def test_bad_array_records(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "a.array_record"
    write_array_record(path, [Sample(str(i), os.urandom(5000), "a") for i in range(40)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        open_source(SourceConfig("array_record", str(path)))
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_writing_records_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_array_record(path, [Sample("0", b"old", "old")])
    bad = [Sample("0", b"new", "new"), Sample("my.jsonl:2", tmp_path / "gone.jpg", "a")]
    with pytest.raises(UserError, match=r"my\.jsonl:2: .*gone\.jpg: cannot be read"):
        write_array_record(path, bad)
    with pytest.raises(UserError, match="there are no samples"):
        write_array_record(path, [])
    with pytest.raises(UserError, match="cannot be written"):
        write_array_record(tmp_path / "nowhere" / "a.array_record", [Sample("0", b"new", "new")])
    assert open_source(SourceConfig("array_record", str(path)))[0].answer == "old"
    assert os.listdir(tmp_path) == ["a.array_record"]
