"""A disk that is full, and places that cannot be written: nothing that was saved is lost.

Full is a limit on the size of files: what is written beyond it fails in the middle, as on a disk without room.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recovery.attempts import in_child
from recovery.runs import (
    STEPS,
    STOPPED_AT,
    World,
    after_step,
    assert_same,
    checkpoint_steps,
    contents,
    copy,
    error_line,
)
from recovery.saving import allow, fail_to_save, made_state

from mgpt4_jax.train import loop
from mgpt4_jax.train.checkpoints import Checkpoints
from mgpt4_jax.train.run_log import read_losses
from mgpt4_jax.train_config import CheckpointConfig

ROOM = 8000  # bytes that a file may have: more than the log needs, less than a checkpoint's arrays


@contextlib.contextmanager
def restored_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_after(step: int, size: Callable[[], int]) -> Iterator[None]:
    with restored_limit(), after_step(step, lambda: allow(size())):
        yield


def room_when_saved(run: Path, step: int) -> int:
    end = time.monotonic() + 60
    while step not in checkpoint_steps(run):
        assert time.monotonic() < end
        time.sleep(0.01)
    return ROOM


@pytest.mark.parametrize("keep_last", [1, 3])
@pytest.mark.parametrize("step", [STOPPED_AT + 1, STEPS])
def test_no_room_for_a_checkpoint(
    world: World,
    whole: Path,
    stopped: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    step: int,
    keep_last: int,
) -> None:
    """The one of step 15 is refused, or that of the last step: those before stay, also where one more would go."""
    run, keeps = copy(stopped, tmp_path / "run"), {"checkpoint": {"keep_last": keep_last}}
    with full_after(step, lambda: ROOM if step < 15 else room_when_saved(run, 15)):
        assert world.start(run, **keeps) == 2
    saved = checkpoint_steps(run)
    assert saved[-1] == (STOPPED_AT if step < 15 else 15)
    assert (
        error_line(capfd.readouterr().err)
        == f"{run}/checkpoints: a checkpoint could not be written (File too large); free some space and run again; "
        f"the last good checkpoint is {saved[-1]}"
    )
    kept = contents(stopped / "checkpoints" / str(STOPPED_AT))
    assert STOPPED_AT not in saved or contents(run / "checkpoints" / str(STOPPED_AT)) == kept
    assert world.start(run, **keeps) == 0
    assert_same(run, whole)


def test_no_room_for_the_log(
    world: World, whole: Path, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run")
    log = run / "log.jsonl"
    with full_after(STOPPED_AT + 1, lambda: log.stat().st_size + 20):
        assert world.start(run) == 2
    assert (
        error_line(capfd.readouterr().err)
        == f"{log}: cannot be written (File too large); free space there, or choose another run"
    )
    assert checkpoint_steps(run) == [5, 10, STOPPED_AT]
    assert list(read_losses(log)) == list(range(1, STOPPED_AT + 1))  # a line that was cut off is none
    assert world.start(run) == 0
    assert_same(run, whole)


def test_no_room_for_the_trained_model(
    world: World, whole: Path, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An earlier one stays, and so does the last checkpoint."""
    run = copy(stopped, tmp_path / "run")
    before = contents(run / "model")
    original = loop._Trainer._finish

    def finish(self: Any, done: int) -> None:
        allow(3000)
        original(self, done)

    with restored_limit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_finish", finish)
        assert world.start(run) == 2
    message = error_line(capfd.readouterr().err)
    assert message.startswith(f"{run}: the trained model and its curves cannot be written (File too large)")
    assert message.endswith(f"the last good checkpoint is {STEPS}")
    assert contents(run / "model") == before
    assert not (run / "model.partial").exists()
    assert world.start(run) == 0
    assert_same(run, whole)


# -- wherever a save fails --------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 10, 60, 200, 500, 1000, 2000, 4000, 6000, None])
def test_a_save_that_fails_at_any_file(tmp_path: Path, room: int | None) -> None:
    """Some have room for the first files, some for all but the largest; None: not even for a directory.

    What was saved before can be read, the process ends at once, and the next one saves.
    """
    folder, config = tmp_path / "checkpoints", CheckpointConfig(keep_last=1, keep_best=0)
    assert in_child(fail_to_save, folder, room) < 60
    state, abstract = made_state()
    for step in (2, 3):
        with contextlib.closing(Checkpoints(folder, config)) as checkpoints:
            assert checkpoints.steps() == [step - 1]
            found = checkpoints.restore(step - 1, abstract)
            np.testing.assert_array_equal(found.trainable["kernel"], state.trainable["kernel"])
            assert checkpoints.about(step - 1)["run"] == step - 1
            checkpoints.save(state._replace(step=np.int32(step)), {"run": step})
    assert checkpoint_steps(tmp_path) == [3]


# -- places that cannot be written ------------------------------------------------------------------------


def test_a_run_below_a_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a letter")
    path = tmp_path / "file" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert world.start(tmp_path / "run", "--run", str(path)) == 2
    assert error_line(capsys.readouterr().err).startswith(
        f"{path}: the run directory cannot be written (Not a directory)"
    )
    assert (tmp_path / "file").read_text() == "a letter"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("checkpoints", "checkpoints: cannot hold checkpoints ("),
        ("lock/", "the run directory cannot be written (Is a directory)"),
        ("log.jsonl/", "log.jsonl: cannot be "),
        ("config.yaml.partial/", "config.yaml: cannot be written (Is a directory)"),
        ("model", "model: is no model that a run wrote"),
        ("model/", "model: is no model that a run wrote"),
    ],
)
def test_something_lies_where_the_run_writes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    """It is refused before the first step, and stays as it is."""
    run = tmp_path / "run"
    path = run / name
    run.mkdir()
    if name.endswith("/"):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        path.write_text("mine")
    assert world.start(run) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith(str(run)) and expected in message
    assert (path / "mine.txt" if name.endswith("/") else path).read_text() == "mine"
    assert not (run / "curves.png").exists()
    assert not (run / "checkpoints").is_dir() or checkpoint_steps(run) == []


def test_the_model_directory_is_no_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy(world.model, tmp_path / "model")
    before = contents(model)
    assert world.start(model, model=str(model)) == 2
    assert error_line(capsys.readouterr().err).startswith(f"{model}: is the model directory to start from")
    assert contents(model) == before
