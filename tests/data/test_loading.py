"""Batches are functions of the seed and the step, whoever makes them."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from picture_sources import MemorySource, needs_no_accelerator

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data import prefetching
from mgpt4_jax.data.images import crop_resize, load_image, normalise, random_crop_box, resize
from mgpt4_jax.data.loading import BadSamples, Loader, TrainBatch, pad_batch
from mgpt4_jax.data.prompts import VICUNA_V0
from mgpt4_jax.data.rows import RowBuilder
from mgpt4_jax.errors import TrainingStopped, UserError
from mgpt4_jax.train_config import DataConfig, SourceConfig, TextConfig

FIELDS = ("step", "ids", "slots", "targets", "mask", "pixels", "names", "bad")
INSTRUCTIONS = tuple(f"<Img><ImageHere></Img> Question {number}?" for number in range(10))
SIZE = 28

Make = Callable[..., Loader]


@pytest.fixture(scope="session")
def make(golden_dir: Path) -> Make:
    """A loader of two sources, 115 : 14, with few threads and no worker."""

    def make(
        sources: Sequence[Any] | None = None,
        *,
        text: TextConfig | None = None,
        objective: str = "align",
        weights: Sequence[float] = (115, 14),
        data: dict[str, Any] | None = None,
        **options: Any,
    ) -> Loader:
        sources = [MemorySource("laion", 300), MemorySource("cc_sbu", 70)] if sources is None else sources
        configs = tuple(
            SourceConfig("jsonl", source.name, weight) for source, weight in zip(sources, weights, strict=True)
        )
        settings = {"num_threads": 2, "prefetch": 2, "transform": "crop"} | (data or {})
        rows = RowBuilder(golden_dir / "minigpt4_vicuna" / "llm", text or TextConfig(), VICUNA_V0, 6, objective)
        options = {"batch_size": 6, "image_size": SIZE, "seed": 7} | options
        return Loader(sources, rows, DataConfig(train=configs, **settings), **options)

    return make


def take(loader: Loader, count: int, start: int = 0) -> list[TrainBatch]:
    with loader.batches(start) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(batches: Sequence[TrainBatch], expected: Sequence[TrainBatch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(batch, field), getattr(other, field), err_msg=field)


def test_workers_and_threads_change_nothing(make: Make) -> None:
    bad = [MemorySource("laion", 300, bad=frozenset(range(0, 300, 11))), MemorySource("cc_sbu", 70)]
    alone = take(make(bad, data={"num_threads": 1, "prefetch": 1}), 12)
    assert any(batch.bad for batch in alone)
    assert_same(take(make(bad, data={"num_threads": 4, "prefetch": 7}), 12), alone)
    assert_same(take(make(bad, data={"num_workers": 2}), 12), alone)
    assert_same(take(make(bad, data={"num_workers": 3, "num_threads": 1}), 7, start=5), alone[5:])
    assert type(take(make(bad, data={"num_workers": 1}), 1)[0].pixels) is np.ndarray


@pytest.mark.parametrize("start", [1, 8, 1000, 2**33])
def test_any_start_gives_the_same_steps(make: Make, start: int) -> None:
    batches = take(make(), 2, start)
    assert [batch.step for batch in batches] == [start, start + 1]
    assert_same(batches[1:], take(make(), 1, start + 1))


def test_shapes_and_types(make: Make) -> None:
    batch = take(make(), 1)[0]
    length = batch.ids.shape[1]
    for name, kind in {"ids": np.int32, "slots": np.int32, "targets": np.int32, "mask": np.bool_}.items():
        assert getattr(batch, name).shape == (6, length)
        assert getattr(batch, name).dtype == kind
    assert batch.pixels.shape == (6, 1, SIZE, SIZE, 3)
    assert batch.pixels.dtype == np.uint8
    assert len(set(batch.names)) == 6
    assert batch.bad == []


def test_processes_share_a_batch(make: Make) -> None:
    whole = take(make(batch_size=7), 4)
    parts = [take(make(batch_size=7, rows_of_process=part), 4) for part in (slice(0, 3), slice(3, 7))]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first.names + second.names == batch.names
        np.testing.assert_array_equal(np.concatenate([first.pixels, second.pixels]), batch.pixels)
        length = max(first.ids.shape[1], second.ids.shape[1])
        first, second = (pad_batch(part, length, pad_id=pad_id(make)) for part in (first, second))
        for field in ("ids", "slots", "targets", "mask"):
            joined = np.concatenate([getattr(first, field), getattr(second, field)])
            np.testing.assert_array_equal(joined, getattr(batch, field))


def pad_id(make: Make) -> int:
    return make()._settings.rows.tokenizer.pad_id


def test_replacements_are_the_same_for_any_split(make: Make) -> None:
    sources = [MemorySource("laion", 40, bad=frozenset(range(0, 40, 3))), MemorySource("cc_sbu", 9)]
    whole = take(make(sources), 6)
    parts = [take(make(sources, rows_of_process=slice(row, row + 1)), 6) for row in range(6)]
    for step, batch in enumerate(whole):
        assert [part[step].names[0] for part in parts] == batch.names
        assert [line for part in parts for line in part[step].bad] == batch.bad


def test_batches_come_whole_from_one_source(make: Make) -> None:
    batches = take(make(), 60)
    origins = [{name.split("/")[0] for name in batch.names} for batch in batches]
    assert all(len(origin) == 1 for origin in origins)
    assert 5 <= sum(origin == {"cc_sbu"} for origin in origins) <= 8


def test_an_epoch_holds_each_sample_once(make: Make) -> None:
    loader = make([MemorySource("one", 20)], weights=[1], batch_size=8)
    names = [name for batch in take(loader, 5) for name in batch.names]
    assert sorted(names[:20]) == sorted(names[20:]) == sorted(f"one/{index}" for index in range(20))


def test_fewer_samples_than_a_batch(make: Make) -> None:
    batch = take(make([MemorySource("few", 2)], weights=[1]), 1)[0]
    assert sorted(batch.names) == ["few/0"] * 3 + ["few/1"] * 3


def test_pixels_are_the_transforms(make: Make) -> None:
    """``crop`` and ``resize`` to the byte, the random choices from the seed, the step and the row alone."""
    loader = make()
    source = {"laion": MemorySource("laion", 300), "cc_sbu": MemorySource("cc_sbu", 70)}
    flips = set()
    for batch, plain in zip(take(loader, 8), take(make(data={"transform": "resize"}), 8), strict=True):
        assert plain.names == batch.names
        for row, name in enumerate(batch.names):
            origin, index = name.split("/")
            image = load_image(source[origin][int(index)].image)
            rng = np.random.default_rng((7, batch.step, row, 1))
            box, flip = random_crop_box(rng, *image.size), bool(rng.random() < 0.5)
            flips.add(flip)
            np.testing.assert_array_equal(batch.pixels[row, 0], crop_resize(image, SIZE, box, flip))
            np.testing.assert_array_equal(plain.pixels[row, 0], resize(image, SIZE))
    assert flips == {True, False}


def test_a_picture_is_cropped_anew_each_time(make: Make) -> None:
    batch = take(make([MemorySource("one", 1)], weights=[1]), 1)[0]
    assert len({row.tobytes() for row in batch.pixels}) == 6


def test_rows_are_those_of_the_builder(make: Make) -> None:
    loader = make(data={"transform": "resize"})
    batch = take(loader, 1)[0]
    rows = loader._settings.rows
    source = MemorySource("laion", 300)
    for number, name in enumerate(batch.names):
        row = rows.row(source[int(name.split("/")[1])])
        np.testing.assert_array_equal(batch.ids[number, : len(row)], row.ids)
        np.testing.assert_array_equal(batch.targets[number, : len(row)], row.targets)
        np.testing.assert_array_equal(batch.mask[number], np.arange(batch.mask.shape[1]) < len(row))
        assert (batch.targets[number, len(row) :] == IGNORED).all()


def test_one_instruction_for_a_batch(make: Make) -> None:
    text = TextConfig(end_symbol="###", max_text_length=160, instructions=INSTRUCTIONS)
    sources = [MemorySource("laion", 300, instructions=dict.fromkeys(range(0, 300, 2), "My own?"))]
    loader = make(sources, weights=[1], text=text, objective="finetune")
    tokenizer, drawn = loader._settings.rows.tokenizer, []
    for batch in take(loader, 20):
        asked = set()
        for name, ids, slots, targets in zip(batch.names, batch.ids, batch.slots, batch.targets, strict=True):
            prompt = tokenizer.decode(ids[(slots < 0) & (targets == IGNORED)].tolist())
            if int(name.split("/")[1]) % 2:
                asked.add(prompt.split("Question ")[1][0])
                assert "My own" not in prompt
            else:
                assert "My own?" in prompt
                assert "Question" not in prompt
        assert len(asked) <= 1
        drawn += asked
    assert len(set(drawn)) > 4


def test_words_without_a_picture_have_black_pixels(make: Make) -> None:
    batch = take(make([MemorySource("text", 8, blind=frozenset(range(0, 8, 2)))], weights=[1]), 1)[0]
    for row, name in enumerate(batch.names):
        is_blind = int(name.split("/")[1]) % 2 == 0
        assert (batch.slots[row].max() < 0) == is_blind
        assert (batch.pixels[row].max() == 0) == is_blind


def test_lengths_are_buckets(make: Make) -> None:
    text = TextConfig(buckets=(12, 20, 40))
    batches = take(make(text=text), 30)
    lengths = {batch.ids.shape[1] for batch in batches}
    assert lengths <= {12, 20, 40}
    for batch in batches:
        longest = int(batch.mask.sum(1).max())
        assert batch.ids.shape[1] == min(bucket for bucket in (12, 20, 40) if bucket >= longest)
        assert batch.padding == pytest.approx(1 - batch.mask.sum() / batch.mask.size)
    assert {batch.ids.shape[1] for batch in take(make(text=text, buckets=(64,)), 3)} == {64}


def test_rows_over_the_longest_bucket_are_bad(make: Make) -> None:
    batches = take(make([MemorySource("long", 18)], weights=[1], buckets=(14,)), 3)
    bad = [line for batch in batches for line in batch.bad]
    assert bad
    assert all("the longest bucket is 14" in line and line.startswith("long/") for line in bad)
    assert max(int(batch.mask.sum(1).max()) for batch in batches) <= 14


def test_pad_batch(make: Make) -> None:
    batch = take(make(), 1)[0]
    padded = pad_batch(batch, 96, pad_id=5)
    width = batch.ids.shape[1]
    for field, fill in {"ids": 5, "slots": -1, "targets": IGNORED, "mask": False}.items():
        values = getattr(padded, field)
        np.testing.assert_array_equal(values[:, :width], getattr(batch, field))
        assert (values[:, width:] == fill).all()
        assert values.dtype == getattr(batch, field).dtype
    assert pad_batch(padded, 96, pad_id=5).ids.shape == (6, 96)
    with pytest.raises(UserError, match="96 positions cannot be padded to 32"):
        pad_batch(padded, 32, pad_id=5)


def test_bad_samples_are_replaced_and_named(make: Make) -> None:
    bad, broken = frozenset({3, 4, 17}), frozenset({8})
    source = MemorySource("laion", 24, bad=bad, broken=broken, answers={11: "   "})
    batches = take(make([source], weights=[1]), 4)  # one epoch
    used = [int(name.split("/")[1]) for batch in batches for name in batch.names]
    assert len(used) == 24
    assert not set(used) & (bad | broken | {11})
    found = sorted({line for batch in batches for line in batch.bad})
    assert [line.split(":")[0] for line in found] == ["laion/11", "laion/17", "laion/3", "laion/4", "laion/8"]
    assert "the caption is empty" in found[0]
    assert "this is a web page, not a picture" in found[-1]


def test_a_row_is_never_looked_for_without_end(make: Make) -> None:
    """One error after 100 tries, also through a worker process."""
    source = MemorySource("gone", 5000, bad=frozenset(range(5000)))
    with pytest.raises(
        TrainingStopped, match="gone: 100 samples were tried for one row and all are bad; the last: gone/"
    ):
        take(make([source], weights=[1]), 1)
    with pytest.raises(TrainingStopped, match="gone: 100 samples were tried for one row"):
        take(make([source], weights=[1], data={"num_workers": 1}), 1)
    with pytest.raises(TrainingStopped, match="few: 3 samples were tried"):
        take(make([MemorySource("few", 3, bad=frozenset(range(3)))], weights=[1]), 1)


def test_the_share_of_bad_samples_stops_training() -> None:
    counter = BadSamples(0.01)
    for _ in range(3):
        counter.add(32, [])
    counter.add(31, ["a/1: no picture"])  # 1 of 128
    with pytest.raises(TrainingStopped) as stopped:
        counter.add(30, ["a/2: broken", "a/3: broken", "a/4: broken"])
    assert str(stopped.value) == (
        "4 of 161 samples are bad, over data.max_bad_share = 0.01: "
        "a/1: no picture; a/2: broken; a/3: broken; ...; `mgpt4 data validate` names them all"
    )
    assert counter.share == pytest.approx(4 / 161)


def test_few_samples_prove_nothing_unless_all_are_bad() -> None:
    counter = BadSamples(0.01)
    counter.add(10, ["a/1: broken"])
    assert (counter.seen, counter.count, counter.first) == (11, 1, ["a/1: broken"])
    with pytest.raises(TrainingStopped, match="3 of 3 samples are bad"):
        BadSamples(0.01).add(0, ["x"], num_bad=3)
    BadSamples(1.0).add(0, ["x"])  # whatever happens
    many = BadSamples(0.5, keep=3)
    many.add(1000, [f"a/{index}: broken" for index in range(50)], num_bad=80)
    assert (many.count, len(many.first)) == (80, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_counts_each_sample_once(make: Make, workers: int) -> None:
    sources = [MemorySource("first", 9, bad=frozenset({4})), MemorySource("second", 5)]
    loader = make(data={"num_workers": workers})
    with loader.validation_batches(sources) as batches:
        found = list(batches)
    assert [batch.step for batch in found] == [0, 1, 2]
    names = [f"first/{index}" for index in range(9)] + [f"second/{index}" for index in range(5)] + [""] * 4
    names[4] = ""
    assert [name for batch in found for name in batch.names] == names
    assert [batch.bad for batch in found] == [["first/4: is unreadable"], [], []]
    for batch in found:
        for row, name in enumerate(batch.names):
            assert (batch.targets[row] != IGNORED).any() == bool(name)
            assert batch.mask[row, 0]
            assert batch.mask[row].sum() > 1 or not name
            origin = {"first": sources[0], "second": sources[1]}.get(name.split("/")[0])
            if origin is not None:  # never cropped
                image = load_image(origin[int(name.split("/")[1])].image)
                np.testing.assert_array_equal(batch.pixels[row, 0], resize(image, SIZE))
    with loader.validation_batches(sources, limit=2) as batches:
        assert_same(list(batches), found[:2])


def test_one_batch_of_validation_starts_no_worker(make: Make) -> None:
    before = multiprocessing.active_children()
    loader = make(data={"num_workers": 2})
    with loader.validation_batches([MemorySource("v", 30)], limit=1) as batches:
        assert len(list(batches)) == 1
        assert multiprocessing.active_children() == before


def test_validation_over_processes_counts_each_sample_once(make: Make) -> None:
    sources = [MemorySource("only", 8)]
    names, counts = [], []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        with make(rows_of_process=rows).validation_batches(sources) as batches:
            found = list(batches)
        counts.append(len(found))
        names += [name for batch in found for name in batch.names if name]
    assert counts == [2, 2, 2]  # a process with nothing left still takes part
    assert sorted(names) == [f"only/{index}" for index in range(8)]


def test_validation_asks_the_same_each_time(make: Make) -> None:
    text = TextConfig(end_symbol="###", instructions=INSTRUCTIONS)
    loader = make(text=text, objective="finetune")
    runs = []
    for _ in range(2):
        with loader.validation_batches([MemorySource("v", 13)]) as batches:
            runs.append(list(batches))
    assert_same(*runs)
    assert len({batch.ids[0].tobytes() for batch in runs[0]}) > 1


def test_the_fingerprint_is_of_what_a_batch_holds(make: Make) -> None:
    usual = make().fingerprint()
    assert usual == make(data={"num_workers": 2, "num_threads": 9, "prefetch": 5}).fingerprint()
    assert usual == make(rows_of_process=slice(0, 2)).fingerprint()
    others = [
        make(seed=8),
        make(batch_size=5),
        make(image_size=56),
        make(weights=(115, 15)),
        make([MemorySource("laion", 301), MemorySource("cc_sbu", 70)]),
        make(data={"transform": "resize"}),
        make(text=TextConfig(max_text_length=31)),
        make(text=TextConfig(instructions=INSTRUCTIONS), objective="finetune"),
    ]
    assert len({usual, *(loader.fingerprint() for loader in others)}) == 9


def test_sources_must_hold_samples(make: Make) -> None:
    with pytest.raises(UserError, match="none holds 0 samples"):
        make([MemorySource("none", 0)], weights=[1])
    with pytest.raises(UserError, match="none holds 0 samples"):
        make().validation_batches([MemorySource("none", 0)])
    with pytest.raises(UserError, match=r"holds 2,147,483,648 samples; a source needs 1 to 2,147,483,647"):
        make([MemorySource("vast", 2**31)], weights=[1])


def test_workers_start_no_accelerator(make: Make) -> None:
    """A worker that opened the accelerator would take it from the trainer."""
    source = MemorySource("laion", 30, hook=needs_no_accelerator)
    take(make([source], weights=[1], data={"num_workers": 1}), 2)
    with pytest.raises(AssertionError, match="a backend runs"):  # which this process has: the hook can tell
        take(make([source], weights=[1]), 1)


@contextlib.contextmanager
def worker_of(loader: Loader) -> Iterator[tuple[Any, int]]:
    """Batches that one worker makes, and its process id."""
    before = {child.pid for child in multiprocessing.active_children()}
    with loader.batches() as batches:
        next(batches)
        (worker,) = [child for child in multiprocessing.active_children() if child.pid not in before]
        yield batches, worker.pid


def test_a_dead_worker_is_told(make: Make) -> None:
    """Killed while large batches wait in it, which must not leave the trainer waiting."""
    loader = make(data={"num_workers": 1}, batch_size=300)
    with worker_of(loader) as (batches, worker):
        time.sleep(0.5)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(UserError, match="a data worker process was ended from outside"):
            for _ in range(20):
                next(batches)


def test_a_worker_outlives_the_signals_of_its_trainer(make: Make) -> None:
    """Ctrl-C and SIGTERM reach the whole group, and the trainer needs batches until it has saved."""
    loader = make(data={"num_workers": 1})
    with worker_of(loader) as (batches, worker):
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        assert [next(batches).step for _ in range(10)] == list(range(1, 11))


ORPHANS = """
import os, signal, sys
sys.path[:0] = {path!r}
import multiprocessing
from picture_sources import MemorySource
from mgpt4_jax.data.loading import Loader
from mgpt4_jax.data.prompts import VICUNA_V0
from mgpt4_jax.data.rows import RowBuilder
from mgpt4_jax.train_config import DataConfig, SourceConfig, TextConfig
if __name__ == "__main__":
    data = DataConfig((SourceConfig("jsonl", "a"),), num_workers=1)
    rows = RowBuilder({tokenizer!r}, TextConfig(), VICUNA_V0, 6)
    batches = Loader([MemorySource("a", 9)], rows, data, batch_size=2, image_size=28, seed=0).batches()
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "pass"])
def test_workers_end_with_their_trainer(tmp_path: Path, golden_dir: Path, end: str) -> None:
    """Also when it is killed, or ends without a close."""
    program = tmp_path / "trainer.py"
    tokenizer = str(golden_dir.resolve() / "minigpt4_vicuna" / "llm")
    program.write_text(ORPHANS.format(path=[str(Path(__file__).parent.parent)], tokenizer=tokenizer, end=end))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    (worker,) = map(int, done.stdout.split())
    assert done.returncode == (0 if end == "pass" else -signal.SIGKILL), done.stderr
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker waits for a trainer that is gone")


def is_running(process: int) -> bool:
    """Whether there is such a process, other than one that ended and waits to be counted."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_too_little_shared_memory_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker would die of a bus error."""
    monkeypatch.setattr(prefetching, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(prefetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with pytest.raises(UserError, match=r"has 64 MiB free and should have \d+; .*--shm-size"):
        make(data={"num_workers": 2}, batch_size=256, image_size=224).batches()
    take(make(data={"num_workers": 1}), 1)


def test_a_closed_iterator_gives_nothing(make: Make) -> None:
    batches = make().batches()
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_normalised_bytes_are_the_training_transform(make: Make) -> None:
    """What the device makes of ``pixels`` is the recorded transform (tests/golden holds that one)."""
    from mgpt4_jax.data.images import crop_transform

    image = load_image(MemorySource("laion", 1)[0].image)
    box = random_crop_box(np.random.default_rng(0), *image.size)
    pixels = crop_resize(image, SIZE, box, True)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(normalise(pixels), crop_transform(image, SIZE, box, True))


def test_a_batch_is_frozen(make: Make) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        take(make(), 1)[0].step = 3
