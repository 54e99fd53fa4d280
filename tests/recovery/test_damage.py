"""Checkpoints with damaged files: none is gone on from unnoticed, and none is passed over or deleted by itself."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import pytest
from recovery.runs import STOPPED_AT, World, assert_same, checkpoint_steps, contents, copy, error_line, events

from mgpt4_jax.errors import UserError
from mgpt4_jax.sharding import make_mesh
from mgpt4_jax.train.checkpoints import Checkpoints
from mgpt4_jax.train.setup import make_plan
from mgpt4_jax.train.state import TrainState
from mgpt4_jax.train_config import CheckpointConfig, DataConfig, SourceConfig, TextConfig, TrainConfig

NEEDED = (
    "about/metadata",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/d/*",
)
"""Files without which nothing can be restored; a bit of Orbax's ``_METADATA`` alone may not matter."""
SPARE = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "about/commit_success.txt",
    "state/commit_success.txt",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
)
"""Files that Orbax writes and does not need, or takes from elsewhere: damage to them is refused or does no harm."""


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return b""


def flipped(part: float) -> Callable[[bytes], bytes]:
    """One bit of the byte at that part of the file."""

    def flip(data: bytes) -> bytes:
        place = int(len(data) * part)
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return flip


def not_json(data: bytes) -> bytes:
    return b"<html>404</html>"


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "truncated": truncated,
    "emptied": emptied,
    "not JSON": not_json,
    "missing": None,
    **{f"flipped at {part}": flipped(part) for part in (0.0, 0.2, 0.4, 0.6, 0.8, 0.99)},
}


def damage(path: Path, how: str) -> None:
    change = DAMAGES[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


# -- each file of a checkpoint ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def abstract(world: World, stopped: Path) -> TrainState:
    """The state of ``stopped``, without its values."""
    data = DataConfig(train=(SourceConfig("jsonl", str(world.train)),))
    config = TrainConfig(str(world.model), str(stopped), data, text=TextConfig(max_length=24))
    return make_plan(config, make_mesh("data=1")).abstract


def read(checkpoints: Path, abstract: TrainState) -> list[np.ndarray]:
    """Every array of the newest checkpoint."""
    opened = Checkpoints(checkpoints, CheckpointConfig())
    with contextlib.closing(opened):
        state = opened.restore(STOPPED_AT, abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]


@pytest.fixture(scope="module")
def intact(stopped: Path, abstract: TrainState) -> list[np.ndarray]:
    return read(stopped / "checkpoints", abstract)


def files(checkpoint: Path, pattern: str) -> list[Path]:
    names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    return [checkpoint / name for name in sorted(names) if fnmatch(name, pattern)]


def test_every_file_is_tried(stopped: Path) -> None:
    checkpoint = stopped / "checkpoints" / str(STOPPED_AT)
    known = {path for pattern in (*NEEDED, *SPARE) for path in files(checkpoint, pattern)}
    assert known == {path for path in checkpoint.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("pattern", [*NEEDED, *SPARE])
def test_one_file(
    stopped: Path, abstract: TrainState, intact: list[np.ndarray], tmp_path: Path, pattern: str, how: str
) -> None:
    """Refused by the name of the checkpoint; if not, the restored state is the saved one bit for bit."""
    checkpoints = copy(stopped / "checkpoints", tmp_path / "checkpoints")
    newest = checkpoints / str(STOPPED_AT)
    for number, path in enumerate(files(newest, pattern)):
        if number:
            shutil.rmtree(newest)
            copy(stopped / "checkpoints" / str(STOPPED_AT), newest)
        damage(path, how)
        try:
            found = read(checkpoints, abstract)
        except UserError as error:
            assert str(error).startswith(f"{newest}: the checkpoint is damaged (")
            assert str(error).endswith("; take an older one with --resume-from 10")
            assert "\n" not in str(error)
        else:
            is_needed = pattern in NEEDED and not (pattern == "state/_METADATA" and how.startswith("flipped"))
            assert not is_needed, f"{path} was {how}, and nobody noticed"
            for one, other in zip(found, intact, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("folder", ["about", "state", "state/d"])
def test_a_folder_is_missing(stopped: Path, abstract: TrainState, tmp_path: Path, folder: str) -> None:
    checkpoints = copy(stopped / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(checkpoints / str(STOPPED_AT) / folder)
    with pytest.raises(UserError, match=f"/checkpoints/{STOPPED_AT}: the checkpoint is damaged .*--resume-from 10"):
        read(checkpoints, abstract)


# -- from the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, how",
    [
        ("state/d/*", "truncated"),
        ("state/d/*", "flipped at 0.6"),
        ("about/metadata", "missing"),
        ("about/metadata", "not JSON"),
    ],
)
def test_a_damaged_newest_checkpoint_is_refused(
    world: World, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], pattern: str, how: str
) -> None:
    """Whatever else prints to stderr: no traceback, and one line with the directory and the mend."""
    run = copy(stopped, tmp_path / "run")
    damage(files(run / "checkpoints" / str(STOPPED_AT), pattern)[0], how)
    before = contents(run)
    assert world.start(run) == 2
    message = error_line(capfd.readouterr().err)
    assert message.startswith(f"{run}/checkpoints/{STOPPED_AT}: the checkpoint is damaged (")
    assert message.endswith("; take an older one with --resume-from 10")
    assert contents(run) == before


def test_an_older_one_is_gone_on_from(
    world: World, whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged one is moved aside, as it is."""
    run = copy(stopped, tmp_path / "run")
    newest = run / "checkpoints" / str(STOPPED_AT)
    damage(files(newest, "state/d/*")[0], "truncated")
    damaged = contents(newest)
    assert world.start(run, "--resume-from", "10") == 0
    assert_same(run, whole)
    (aside,) = run.glob("replaced-*")
    assert contents(aside / str(STOPPED_AT)) == damaged
    assert "goes on from checkpoint 10" in events(run)
    assert f"newer checkpoints {STOPPED_AT} were moved to {run}/replaced-*" in events(run)
    assert "goes on from checkpoint 10" in capsys.readouterr().err


def test_a_good_newer_one_may_be_left_too(world: World, whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    assert world.start(run, "--resume-from", "10") == 0
    assert_same(run, whole)
    (aside,) = run.glob("replaced-*")
    newer = {name: data for name, data in contents(whole / "checkpoints").items() if not name.startswith("10/")}
    assert contents(aside) == newer
    assert checkpoint_steps(run) == [10, 15, 20]


def test_a_damaged_older_one_is_in_nobodys_way(world: World, whole: Path, stopped: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path / "run")
    damage(run / "checkpoints" / "10" / "about" / "metadata", "not JSON")
    assert world.start(run) == 0
    assert_same(run, whole)


def test_the_only_checkpoint_is_damaged(
    world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run")
    for step in (5, 10):
        shutil.rmtree(run / "checkpoints" / str(step))
    damage(run / "checkpoints" / str(STOPPED_AT) / "about" / "metadata", "emptied")
    assert world.start(run) == 2
    assert error_line(capsys.readouterr().err).endswith("; start again in a new run directory")


def test_what_is_no_checkpoint(world: World, whole: Path, stopped: Path, tmp_path: Path) -> None:
    """Files of others, and what a killed save left."""
    run = copy(stopped, tmp_path / "run")
    checkpoints = run / "checkpoints"
    (checkpoints / "notes.txt").write_text("the good one is 10")
    (checkpoints / "99").write_text("a file")
    (checkpoints / "lost+found").mkdir()
    (checkpoints / ".nfs0001").write_text("")
    shutil.copytree(checkpoints / "10", checkpoints / "15.orbax-checkpoint-tmp")
    assert world.start(run) == 0
    assert_same(run, whole)
    assert (checkpoints / "notes.txt").read_text() == "the good one is 10"
    assert not (checkpoints / "15.orbax-checkpoint-tmp").exists()


def test_a_folder_that_looks_like_a_checkpoint(
    world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run")
    (run / "checkpoints" / "99").mkdir()
    assert world.start(run) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith(f"{run}/checkpoints/99: the checkpoint is damaged (")
    assert message.endswith(f"; take an older one with --resume-from {STOPPED_AT}")


def test_a_checkpoint_of_another_version(
    world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run")
    path = run / "checkpoints" / str(STOPPED_AT) / "about" / "metadata"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert world.start(run) == 2
    assert "its description is not one of this program's version" in error_line(capsys.readouterr().err)


# -- which checkpoints stay -------------------------------------------------------------------------------


def test_the_best_one_stays_after_a_restart(stopped: Path, abstract: TrainState, tmp_path: Path) -> None:
    """It was validated by an earlier start, and that the loss was lowest is not forgotten."""
    config, folder = CheckpointConfig(keep_last=2, keep_best=1), tmp_path / "checkpoints"
    with contextlib.closing(Checkpoints(stopped / "checkpoints", CheckpointConfig())) as others:
        state = others.restore(STOPPED_AT, abstract)
    for starts in ([(1, 5.0), (2, 1.0), (3, None), (4, 3.0)], [(5, 4.0), (6, float("nan"))], [(7, None), (8, 2.0)]):
        with contextlib.closing(Checkpoints(folder, config)) as checkpoints:
            for step, loss in starts:
                checkpoints.save(state._replace(step=np.int32(step)), {}, loss)
    assert checkpoint_steps(tmp_path) == [2, 7, 8]
