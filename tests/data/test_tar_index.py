"""The table of a tar: as ``tarfile`` reads it, kept beside it, made again when it does not fit, never half right."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mgpt4_jax.data import tar_index
from mgpt4_jax.data.tar_index import (
    JSON,
    PICTURE,
    TEXT,
    TarIndex,
    index_path,
    index_tars,
    load_index,
    save_index,
    scan_tar,
    try_index_tars,
)
from mgpt4_jax.errors import UserError
from tests.data.making import make_pairs, members_of, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def contents(path: Path, index: TarIndex) -> dict[str, list[bytes | None]]:
    """What the table finds in the tar: picture, JSON and text by key."""
    raw = path.read_bytes()
    places = {index.key(i): [index.member(i, column) for column in (PICTURE, JSON, TEXT)] for i in range(len(index))}
    return {
        key: [raw[place[0] : place[0] + place[1]] if place else None for place in row] for key, row in places.items()
    }


def grouped(members: list[tuple[str, bytes]]) -> dict[str, list[bytes | None]]:
    found: dict[str, list[bytes | None]] = {}
    for name, content in members:
        key, suffix = name.split(".")
        found.setdefault(key, [None] * 3)[{"jpg": PICTURE, "json": JSON, "txt": TEXT}[suffix]] = content
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_table_finds_every_member(tmp_path: Path, format: str) -> None:
    pairs = [*make_pairs(20), ("empty", b"", "x"), ("block", b"x" * 512, "y"), ("block1", b"x" * 513, "z")]
    if format != "ustar":
        pairs += [("folder/" * 40 + "key", b"deep", "a"), ("k" * 300, b"long", "b"), ("größe/日本", b"unicode", "c")]
    members = members_of(pairs)
    path = write_tar(tmp_path / "a.tar", members, FORMATS[format])
    index = scan_tar(path)
    assert contents(path, index) == grouped(members)
    assert list(contents(path, index)) == [key for key, _, _ in pairs]


def test_only_regular_files_count(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        for name, kind in (("d.jpg", tarfile.FIFOTYPE), ("e.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("f.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"jpg"))
        info = tarfile.TarInfo("g.jpg")
        info.size, info.pax_headers = 3, {"GNU.sparse.major": "0", "GNU.sparse.map": "0,3", "GNU.sparse.size": "9"}
        tar.addfile(info, io.BytesIO(b"jpg"))
    assert contents(path, scan_tar(path)) == {"f": [b"jpg", None, None]}
    assert os.listdir(tmp_path) == ["a.tar"]  # nothing is unpacked


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("\udcff\udcfe.jpg")
        tar.addfile(info, io.BytesIO())
    assert scan_tar(path).key(0) == r"\xff\xfe"


def test_duplicates_are_marked(tmp_path: Path) -> None:
    members = members_of(make_pairs(5))
    path = write_tar(tmp_path / "a.tar", [*members, members[3], members[10], members[3]])
    index = scan_tar(path)
    assert [index.is_duplicated(i) for i in range(5)] == [False, True, False, True, False]


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_tar_is_refused_or_whole(tmp_path: Path, format: str) -> None:
    """At whatever byte a write was cut off: an error that names the tar, or exactly the members before the cut."""
    members = members_of(make_pairs(2))
    path = write_tar(tmp_path / "a.tar", members, FORMATS[format])
    raw, expected = path.read_bytes(), grouped(members)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + len(members[-1][1])
    refused = 0
    for cut in [*range(0, end, 53), *range(0, end, 512), *range(end - 3, end)]:
        path.write_bytes(raw[:cut])
        try:
            found = contents(path, scan_tar(path))
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "again" in str(error)
        else:
            assert cut % 512 == 0
            for key, row in found.items():
                assert all(part in (None, whole) for part, whole in zip(row, expected[key], strict=True))
    assert refused > end // 53 / 2


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_tar_never_crashes(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = write_tar(tmp_path / "a.tar", members_of(make_pairs(6)), list(FORMATS.values())[seed % 3])
    raw = bytearray(path.read_bytes())
    for _ in range(30):
        start = int(rng.integers(len(raw) // 512)) * 512  # of a header, more often than of bytes
        raw[start + int(rng.integers(512))] = int(rng.integers(256))
    path.write_bytes(raw)
    try:
        index = scan_tar(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert tar_index._is_sound(index)


def test_a_header_that_points_backwards_ends(tmp_path: Path) -> None:
    """A negative size in an extended header: Python before 3.11.14 runs in a circle."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.pax_headers = {"size": "-2048"} if i == 1 else {}
            tar.addfile(info)
    with pytest.raises(UserError, match="is damaged"):
        scan_tar(path)


# --- the table beside the tar ------------------------------------------------------------------------------


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tars that were really looked through."""
    seen: list[Path] = []

    def scan(path: Path) -> TarIndex:
        seen.append(path)
        return scan_tar(path)

    monkeypatch.setattr(tar_index, "scan_tar", scan)
    return seen


def test_a_kept_table_is_used(tmp_path: Path, scans: list[Path]) -> None:
    path = write_tar(tmp_path / "a.tar", members_of(make_pairs(5)))
    (first,) = index_tars([path])
    (second,) = index_tars([path])
    assert scans == [path]
    assert first.digest() == second.digest() and first.stamp == second.stamp
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.npz"]


def test_a_changed_tar_gets_a_new_table(tmp_path: Path, scans: list[Path]) -> None:
    path = write_tar(tmp_path / "a.tar", members_of(make_pairs(5)))
    index_tars([path])
    write_tar(path, members_of(make_pairs(6)))
    assert len(index_tars([path])[0]) == 6
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # as long as before, but touched
    index_tars([path])
    path.write_bytes(b"<html>")
    (index,) = try_index_tars([path])
    assert isinstance(index, UserError) and "is a web page" in str(index)
    assert len(scans) == 4


def damages() -> dict[str, Callable[[Path], None]]:
    def rewrite(**changes: object) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            with np.load(path) as file:
                arrays = dict(file) | changes
            np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

        return change

    return {
        "empty": lambda path: path.write_bytes(b"") and None,
        "text": lambda path: path.write_bytes(b"hello") and None,
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]) and None,
        "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"00003", b"00004")) and None,
        "pickled": rewrite(keys=np.array([{"a": 1}], object)),
        "missing": rewrite(sizes=None),
        "old version": rewrite(tar=np.array([0, 0, 0])),
        "short": rewrite(tar=np.array([1])),
        "wrong shape": rewrite(blocks=np.zeros((5, 2), np.uint32)),
        "wrong count": rewrite(key_ends=np.zeros(3, np.uint32)),
        "wrong type": rewrite(sizes=np.zeros((5, 3), np.float64)),
        "wrong keys": rewrite(keys=np.zeros(3, np.uint8)),
        "beyond the end": rewrite(sizes=np.full((5, 3), 2**31, np.uint32)),
        "duplicates beyond": rewrite(duplicates=np.array([77], np.uint32)),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_table_is_made_again(tmp_path: Path, damage: str, scans: list[Path]) -> None:
    path = write_tar(tmp_path / "a.tar", members_of(make_pairs(5)))
    (expected,) = index_tars([path])
    whole = index_path(path).read_bytes()
    damages()[damage](index_path(path))
    assert index_path(path).read_bytes() != whole
    assert load_index(path) is None
    (found,) = index_tars([path])
    assert len(scans) == 2 and found.digest() == expected.digest()
    assert load_index(path) is not None


def test_where_no_table_can_be_written_it_is_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scans: list[Path]
) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", members_of(make_pairs(3))) for i in range(3)]
    for path in paths:
        index_path(path).mkdir()  # root may write anywhere, but not over a folder
    with caplog.at_level(logging.WARNING):
        assert [len(index) for index in index_tars(paths)] == [3, 3, 3]
    assert len(caplog.records) == 1
    assert "0.tar.index.npz: cannot be written" in caplog.text and "3 tars" in caplog.text
    assert not list(tmp_path.glob("*.tmp"))
    assert len(index_tars(paths)) == 3 and len(scans) == 6


def test_no_half_table_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", members_of(make_pairs(3)))

    def write_bytes(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        assert len(index_tars([path])[0]) == 3
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_tar_that_grows_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", members_of(make_pairs(3)))
    table = tar_index._table

    def grow(*arguments: object) -> TarIndex:
        with path.open("ab") as file:
            file.write(b"\0" * 512)
        return table(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tar_index, "_table", grow)
    with pytest.raises(UserError, match="changes while it is read"):
        scan_tar(path)


# --- many tars ---------------------------------------------------------------------------------------------


def test_processes_give_the_same_tables(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", members_of(make_pairs(i + 1))) for i in range(4)]
    paths[2].write_bytes(b"<html>")
    alone = [scan_tar(path) for path in paths if path != paths[2]]
    calls: list[tuple[int, int]] = []
    together = try_index_tars(paths, lambda done, total: calls.append((done, total)), processes=2)
    assert isinstance(together[2], UserError) and "2.tar: is a web page" in str(together[2])
    tables = [index for index in together if isinstance(index, TarIndex)]
    assert [index.digest() for index in tables] == [index.digest() for index in alone]
    assert calls == [(i, 4) for i in range(1, 5)]
    assert [load_index(path) is None for path in paths] == [False, False, True, False]


def test_a_program_without_a_main_is_told(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", members_of(make_pairs(2)))
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\nfrom mgpt4_jax.data.tar_index import index_tars\n"
        "index_tars(sorted(Path(__file__).parent.glob('*.tar')), processes=2)\n"
    )
    finished = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "UserError: the processes that index tars died" in finished.stderr


def test_a_table_is_small(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members_of((f"{i:09d}", b"x" * 100, "caption") for i in range(2000)))
    index = scan_tar(path)
    assert len(index) == 2000 and index.key(1999) == "000001999"
    save_index(index, path)
    assert index_path(path).stat().st_size < 40 * 2000
