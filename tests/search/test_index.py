"""An index finds what brute force finds, embeds only what is new, and survives what befalls files."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mgpt4_jax.errors import UserError
from mgpt4_jax.search import SearchIndex
from mgpt4_jax.search import index as module
from mgpt4_jax.search.index import model_digest
from mgpt4_jax.search.table import read_table, write_table
from tests.search.conftest import Counted, write_picture

TEXTS = ["a cat", "the dog runs on a beach with a ball", "two"]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_words_find_what_brute_force_finds(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    assert index.add(folder).new == len(index) == 20
    reread = SearchIndex.open(tmp_path / "index", model)
    assert reread.pictures == index.pictures == tuple(sorted(index.pictures))
    paths = list(index.pictures)
    similarities = (model.embed_images(paths) @ model.embed_texts(TEXTS).T).max(axis=1)
    for row, text in enumerate(TEXTS):
        order = np.argsort(-similarities[:, row])
        for opened in (index, reread):
            hits = opened.search(text, k=7, candidates=0)
            assert [hit.path for hit in hits] == [paths[place] for place in order[:7]]
            assert [hit.match for hit in hits] == [None] * 7
        np.testing.assert_allclose([hit.similarity for hit in hits], similarities[order[:7], row], rtol=1e-5)
        matches = model.match([paths[place] for place in order[:8]], [text])[:, 0]
        hits = reread.search(text, k=5, candidates=8)
        assert [hit.path for hit in hits] == [paths[order[place]] for place in np.argsort(-matches)[:5]]
        np.testing.assert_allclose([hit.match for hit in hits], np.sort(matches)[::-1][:5], rtol=1e-4)
    assert len(reread.search("two", k=99)) == 20


def test_a_picture_finds_itself_and_then_its_like(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    paths = list(index.pictures)
    vectors = model.embed_images(paths)
    scores = np.einsum("qc,ipc->iqp", vectors[3], vectors).max(axis=-1).mean(axis=-1)
    hits = index.search(image=paths[3], k=6)
    assert hits[0].path == paths[3] and hits[0].similarity == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose([hit.similarity for hit in hits], np.sort(scores)[::-1][:6], rtol=1e-5)
    assert [hit.path for hit in hits] == [paths[place] for place in np.argsort(-scores)[:6]]


def test_only_what_is_new_is_embedded(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    before = files(index.directory)
    again = index.add(folder)
    assert (again.unchanged, again.line()) == (20, "20 unchanged")
    assert model.embedded == 20 and files(index.directory) == before  # nor is anything written
    os.utime(folder / "a/00.png")  # other times, the same bytes
    (folder / "a/02.webp").rename(folder / "b/moved.webp")
    shutil.copy(folder / "a/04.png", folder / "copy.png")
    (folder / "b/01.JPG").unlink()
    write_picture(folder / "a/06.webp", 106)
    write_picture(folder / "new.png", 107)
    added = SearchIndex.open(tmp_path / "index", model).add(folder)
    assert dataclasses.astuple(added) == (2, 2, 17, 2, [])
    assert model.embedded == 22
    assert added.line() == "2 new, 2 moved or copied, 17 unchanged, 2 removed"
    index = SearchIndex.open(tmp_path / "index", model)
    found = [hit.path for hit in index.search("two", k=99, candidates=0)]
    assert sorted(found) == sorted(path for path in folder.rglob("*.*") if path.suffix != ".txt")
    for name in ("a/06.webp", "b/moved.webp", "new.png"):
        assert index.search(image=folder / name, k=1)[0].path == folder / name
    assert {hit.path.name for hit in index.search(image=folder / "copy.png", k=2)} == {"04.png", "copy.png"}


def test_bytes_that_move_while_their_old_name_gets_others(
    model: Counted, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved on the way forgets the replaced picture; its bytes under a later name are then new again."""
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    for name, embedded in (("y.png", 1), ("z.png", 2)):
        (folder / "a/00.png").rename(folder / name)
        write_picture(folder / "a/00.png", 300 + embedded)
        model.embedded = 0
        index.add(folder)
        assert model.embedded == embedded
        assert index.search(image=folder / name, k=1)[0].path == folder / name
        monkeypatch.setattr(module, "SEGMENT", 1)
        monkeypatch.setattr(module, "BATCH", 1)


def test_a_change_of_content_under_an_old_time_is_seen(model: Counted, folder: Path, tmp_path: Path) -> None:
    path = folder / "b/03.bmp"
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    times, size = path.stat(), path.stat().st_size
    write_picture(path, 103)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size and path.stat().st_mtime_ns == times.st_mtime_ns
    assert index.add(folder).new == 1


def test_several_folders_and_their_removal(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder / "a")
    other = write_picture(tmp_path / "other/x.png", 50).parent
    index.add(other)
    assert len(index) == 11
    for overlapping in (folder, folder / "a/.."):
        with pytest.raises(UserError, match="overlaps .*photos/a, which is in the index"):
            index.add(overlapping)
    shutil.rmtree(folder / "a")
    with pytest.raises(UserError, match="no such folder"):
        index.add(folder / "a")
    assert index.remove(folder / "a") == 10
    assert SearchIndex.open(tmp_path / "index", model).pictures == (other / "x.png",)
    with pytest.raises(UserError, match="is not in the index; it holds .*/other$"):
        index.remove(folder / "a")
    assert index.remove(other) == 1 and not len(index) and not list(index.directory.glob("*.faiss"))
    with pytest.raises(UserError, match="holds no pictures yet"):
        index.search("two")


def test_bad_pictures_are_named_and_the_others_found(model: Counted, folder: Path, tmp_path: Path) -> None:
    whole = (folder / "b/01.JPG").read_bytes()
    bad = {
        "empty.png": b"",
        "page.jpg": b"<!doctype html><p>404",
        "cut.png": (folder / "a/00.png").read_bytes()[:60],
        "text.webp": b"words",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "round").symlink_to(folder)
    index = SearchIndex.open(tmp_path / "index", model)
    added = index.add(folder)
    assert added.new == 20 and {line.partition(": ")[0] for line in added.bad} == {*bad, "gone.png", "pipe.png"}
    said = dict(line.split(": ", 1) for line in added.bad)
    assert said["empty.png"] == "the file is empty" and "web page" in said["page.jpg"] and "broken" in said["cut.png"]
    assert said["pipe.png"] == "not a regular file"
    (folder / "empty.png").write_bytes(whole)  # mended: the bytes of another one
    (folder / "b/01.JPG").write_bytes(b"broken since")
    added = index.add(folder)
    assert (added.known, len(added.bad), len(index)) == (1, 6, 20)
    assert folder / "b/01.JPG" not in index.pictures


def test_pictures_that_cannot_be_read_any_more_come_last(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    best = index.search("two", k=20)
    best[0].path.unlink()
    hits = index.search("two", k=20)
    assert [hit.path for hit in hits] == [hit.path for hit in [*best[1:], best[0]]]
    assert hits[-1].match is None and all(hit.match is not None for hit in hits[:-1])


def test_empty_folders_and_queries_are_refused(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no pictures .* right disk"):
        index.add(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no pictures yet; add a folder first"):
        index.search("two")
    index.add(folder)
    for wrong in ({}, {"text": "two", "image": "a.png"}):
        with pytest.raises(UserError, match="by words or by a picture: give one"):
            index.search(**wrong)
    for text, options, message in (
        (" ", {}, "are empty"),
        ("two", {"k": 0}, "at least 1"),
        ("two", {"candidates": -1}, "at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            index.search(text, **options)
    shutil.rmtree(folder)
    folder.mkdir()  # as of a disk that is not mounted: hours of work are not thrown away
    with pytest.raises(UserError, match="holds no pictures"):
        index.add(folder)
    assert len(SearchIndex.open(tmp_path / "index", model)) == 20


def test_another_model_is_refused_and_the_same_in_another_dtype_is_not(
    model: Counted, folder: Path, tmp_path: Path
) -> None:
    SearchIndex.open(tmp_path / "index", model).add(folder)
    params = jax.tree.map(lambda leaf: leaf, model.params)
    half = Counted(
        model.manifest, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), model.tokenizer, "bfloat16"
    )
    assert model_digest(half) == model_digest(model)
    assert len(SearchIndex.open(tmp_path / "index", half)) == 20
    name = next(iter(params["vit"]))
    leaves, tree = jax.tree.flatten(params["vit"][name])
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].add(0.5)
    params = {**params, "vit": {**params["vit"], name: jax.tree.unflatten(tree, leaves)}}
    other = Counted(model.manifest, params, model.tokenizer, model.dtype)
    with pytest.raises(UserError, match=r"index: was made with another model [^\n]*$"):
        SearchIndex.open(tmp_path / "index", other)


def test_what_is_no_index_is_left_alone(model: Counted, folder: Path) -> None:
    for place in (folder, folder / "notes.txt"):
        with pytest.raises(UserError, match="is no index of pictures"):
            SearchIndex.open(place, model)
    with pytest.raises(UserError, match="stage 1"):
        SearchIndex.open(folder.parent / "index", object())


# --- damage and kills --------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damage_is_named(model: Counted, folder: Path, tmp_path: Path) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    [segment] = index.directory.glob("*.faiss")
    table, good = index.directory / "index.json", files(index.directory)
    damages = [
        (segment, lambda path: flip(path, 500), "its digest differs"),
        (segment, lambda path: path.write_bytes(b""), "its digest differs"),
        (segment, lambda path: path.unlink(), "the file is gone"),
        (table, lambda path: flip(path, -20), "its digest differs"),
        (table, lambda path: path.write_bytes(path.read_bytes()[:-20]), "its digest differs"),
        (table, lambda path: path.write_bytes(b""), "JSONDecodeError"),
        (table, lambda path: path.write_bytes(b"[" * 100_000), "damaged"),
        (table, lambda path: path.write_bytes(b"[]\n{}"), "TypeError"),
        (table, lambda path: path.write_bytes(b'{"format_version": 9}\n{}'), "format version 9"),
    ]
    for path, damage, message in damages:
        damage(path)
        with pytest.raises(UserError, match=message) as error:
            SearchIndex.open(index.directory, model)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        path.write_bytes(good[path.name])
    saved = read_table(index.directory)
    write_table(index.directory, dataclasses.replace(saved, segments=()))
    with pytest.raises(UserError, match="the vectors of 20 pictures are in no file"):
        SearchIndex.open(index.directory, model)


class Killed(BaseException):
    pass


def test_a_kill_at_any_write_loses_nothing(
    model: Counted, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every rename and every deletion: the index is the old one or the new one, and the next add mends it."""
    monkeypatch.setattr(module, "SEGMENT", 4)
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "MAX_POOR", 0)
    start = tmp_path / "start"
    SearchIndex.open(start, model).add(folder / "a")
    for name in ("a/00.png", "a/02.webp", "a/04.png"):  # a file of vectors becomes poor
        (folder / name).unlink()
    for seed in range(5):
        write_picture(folder / f"a/new{seed}.png", 200 + seed)
    old, new = set(SearchIndex.open(start, model).pictures), set((folder / "a").iterdir())
    real_replace, real_unlink = os.replace, Path.unlink
    kills = 0
    while True:
        left = kills
        directory = tmp_path / f"killed{kills}"
        shutil.copytree(start, directory)

        def count() -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1

        monkeypatch.setattr(os, "replace", lambda *paths: (count(), real_replace(*paths)))
        monkeypatch.setattr(Path, "unlink", lambda path, **options: (count(), real_unlink(path, **options)))
        try:
            SearchIndex.open(directory, model).add(folder / "a")
            break
        except Killed:
            kills += 1
        finally:
            monkeypatch.setattr(os, "replace", real_replace)
            monkeypatch.setattr(Path, "unlink", real_unlink)
        index = SearchIndex.open(directory, model)
        held = set(index.pictures)
        assert old & new <= held <= old | new
        index.add(folder / "a")
        assert set(SearchIndex.open(directory, model).pictures) == new
        assert {hit.path for hit in index.search("two", k=99, candidates=0)} == new
        assert len(list(directory.glob("*.faiss"))) == len(read_table(directory).segments)
        assert not list(directory.glob("*.partial"))
    assert kills == 5  # two files of vectors, two tables, the deletion of what was joined


def test_what_was_done_is_saved_on_the_way(
    model: Counted, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT", 8)
    monkeypatch.setattr(module, "BATCH", 4)
    index = SearchIndex.open(tmp_path / "index", model)

    def report(done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add(folder, report)
    assert len(SearchIndex.open(tmp_path / "index", model)) == len(index) == 16
    assert index.add(folder).new == 4 and model.embedded == 20


def test_a_full_disk_leaves_the_index_as_it_was(
    model: Counted, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SearchIndex.open(tmp_path / "index", model)
    index.add(folder)
    before = index.search("two", k=99, candidates=0)
    for seed in range(30, 33):
        write_picture(folder / f"{seed}.png", seed)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="cannot be written .No space left on device"):
            index.add(folder)
    assert index.search("two", k=99, candidates=0) == before
    assert index.add(folder).new == 3 and len(index) == 23


def test_a_second_writer_is_refused_and_its_work_is_seen(model: Counted, folder: Path, tmp_path: Path) -> None:
    first, second = (SearchIndex.open(tmp_path / "index", model) for _ in range(2))
    first.add(folder / "a")
    assert second.add(folder / "b").new == 10 and len(second) == 20
    assert first.add(folder / "a").unchanged == 10 and len(first) == 20
    program = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path / "index/writer.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another run is changing this index"):
            first.add(folder / "a")
        holder.communicate(b"\n")
