"""A run that was stopped goes on as if nothing had happened, or says what is different."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    events,
    signal_after,
)
from train.world import write_tiny_model

from mgpt4_jax.train import loop
from mgpt4_jax.train.run import FIXED, run_directory
from mgpt4_jax.train.run_log import read_log, read_losses

# -- signals ----------------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_run_goes_on(world: World, whole: Path, stopped: Path, tmp_path: Path) -> None:
    run = copy(stopped, tmp_path / "run")  # elsewhere: a run may be moved
    assert checkpoint_steps(run) == [5, 10, STOPPED_AT]
    assert (run / "model" / "model.json").exists()
    assert world.start(run) == 0
    assert_same(run, whole)
    assert f"goes on from checkpoint {STOPPED_AT}" in events(run)


def test_sigint_saves(world: World, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with signal_after(7, signal.SIGINT):
        assert world.start(run) == 130
    assert checkpoint_steps(run) == [5, 7]
    with signal_after(7 + 1, signal.SIGINT), signal_after(7 + 2, signal.SIGINT):  # and at once again
        assert world.start(run) == 130
    assert checkpoint_steps(run) == [5, 7, 8]
    assert world.start(run) == 0
    assert_same(run, whole)


def test_a_second_sigint_interrupts_at_once(
    world: World, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with after_step(12, twice):
        assert world.start(run) == 130
    assert error_line(capsys.readouterr().err) == "interrupted"
    assert checkpoint_steps(run) == [5, 10]
    assert not (run / "model").exists()
    assert world.start(run) == 0
    assert_same(run, whole)


def test_an_error_of_any_kind_loses_no_checkpoint(
    world: World, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def fail() -> None:
        raise MemoryError("no room for a batch")

    with after_step(14, fail):
        assert world.start(run) == 1
    assert "MemoryError: no room for a batch" in error_line(capsys.readouterr().err)
    assert checkpoint_steps(run) == [5, 10]
    assert list(read_losses(run / "log.jsonl")) == list(range(1, 14))
    assert world.start(run) == 0
    assert_same(run, whole)


# -- the same run, differently ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 2, "dropout": 0.1}, "trainable": []},
        {
            "trainable": ["projection/*", "ln_vision/*"],
            "optim": {"ema_decay": 0.9, "clip_norm": 0.5},
            "accumulation": 2,
            "data": {"transform": "crop"},
        },
    ],
    ids=["adapters with dropout", "an average, clipped, in two parts, cropped"],
)
def test_whatever_is_trained(world: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    reference, run = tmp_path / "whole", tmp_path / "run"
    assert world.start(reference, **changes) == 0
    with signal_after(13, signal.SIGTERM):
        assert world.start(run, **changes) == 128 + signal.SIGTERM
    assert world.start(run, **changes) == 0
    assert_same(run, reference)


def test_with_two_data_workers(
    world: World, whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run")
    assert world.start(run, data={"num_workers": 2}) == 0
    assert_same(run, whole)
    assert "changed: data.num_workers: 0 -> 2" in events(run)
    assert f"step {STOPPED_AT}: changed: data.num_workers: 0 -> 2" in capsys.readouterr().err


def test_on_another_mesh(
    world: World, whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same samples in the same order, added up in another one."""
    run = copy(stopped, tmp_path / "run")
    assert world.start(run, mesh="data=2,fsdp=2") == 0
    ours, theirs = read_losses(run / "log.jsonl"), read_losses(whole / "log.jsonl")
    assert list(ours) == list(theirs)
    assert all(ours[step] == theirs[step] for step in range(1, STOPPED_AT + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    change = "changed: mesh: 'data=1,fsdp=1,tensor=1' -> 'data=2,fsdp=2,tensor=1'"
    assert change in events(run)
    assert change in capsys.readouterr().err


def test_a_run_that_is_done_changes_nothing(world: World, whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path / "run")
    before = contents(run)
    assert world.start(run) == 0
    after = contents(run)
    assert_same(run, whole)
    kept = [name for name in before if name.startswith("checkpoints/")]
    assert kept and {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_more_steps_than_at_first(world: World, tmp_path: Path) -> None:
    constant = {"optim": {"schedule": "constant"}}
    reference, run = tmp_path / "whole", tmp_path / "run"
    assert world.start(reference, **constant) == 0
    assert world.start(run, **constant, steps_per_epoch=12) == 0
    assert world.start(run, **constant) == 0
    assert_same(run, reference)
    assert f"changed: steps_per_epoch: 12 -> {STEPS}" in events(run)


def test_other_settings_are_announced(
    world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path / "run")
    changes: dict[str, Any] = {"optim": {"peak_lr": 1e-3}, "checkpoint": {"every": 4}, "accumulation": 4}
    assert world.start(run, **changes) == 0
    told = ["optim.peak_lr: 0.003 -> 0.001", "checkpoint.every: 5 -> 4", "accumulation: 1 -> 4"]
    screen = capsys.readouterr().err
    assert {f"changed: {change}" for change in told} == {text for text in events(run) if text.startswith("changed")}
    assert all(f"changed: {change}" in screen for change in told)
    assert checkpoint_steps(run) == [STOPPED_AT, 16, STEPS]


# -- what may not change ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "objective": ("objective", {"objective": "finetune", "text": {"instructions": ["What is it?"]}}),
    "text": ("text.max_text_length", {"text": {"max_text_length": 8}}),
    "trainable": ("trainable", {"trainable": ["projection/*", "ln_vision/*"]}),
    "lora": ("lora.alpha", {"lora": {"rank": 2}}),
    "batch_size": ("batch_size", {"batch_size": 4}),
    "dtype": ("dtype", {"dtype": "bfloat16"}),
    "seed": ("seed", {"seed": 7}),
    "data.transform": ("data.transform", {"data": {"transform": "crop"}}),
    "data.clean_captions": ("data.clean_captions", {"data": {"clean_captions": True}}),
    "optim.ema_decay": ("optim.ema_decay", {"optim": {"ema_decay": 0.99}}),
}


def test_every_fixed_setting_is_tried() -> None:
    assert REFUSED.keys() == {*FIXED, "optim.ema_decay"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fixed_setting(world: World, stopped: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    key, changes = REFUSED[name]
    before = contents(stopped)
    assert world.start(stopped, **changes) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith(f"{key} was ")
    assert "put it back, or start a new run directory" in message
    assert contents(stopped) == before


def _edit_a_caption(text: str) -> str:
    return text.replace("a red", "a dark red", 1)


def _add_a_line(text: str) -> str:
    return text + text.splitlines()[0] + "\n"


def _swap_two_lines(text: str) -> str:
    first, second, *others = text.splitlines(keepends=True)
    return "".join([second, first, *others])


@pytest.mark.parametrize("edit", [_edit_a_caption, _add_a_line, _swap_two_lines])
def test_another_data_set(
    world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Any
) -> None:
    folder = copy(world.train.parent, tmp_path / "train")
    path = folder / "data.jsonl"
    path.write_text(edit(path.read_text()))
    before = contents(stopped)
    assert world.start(stopped, data={"train": [{"kind": "jsonl", "path": str(path)}]}) == 2
    assert error_line(capsys.readouterr().err).startswith("data.train is not the data set that this run began with")
    assert contents(stopped) == before


def test_the_data_set_may_be_moved(world: World, whole: Path, stopped: Path, tmp_path: Path) -> None:
    folder, run = copy(world.train.parent, tmp_path / "train"), copy(stopped, tmp_path / "run")
    assert world.start(run, data={"train": [{"kind": "jsonl", "path": str(folder / "data.jsonl")}]}) == 0
    assert read_losses(run / "log.jsonl") == read_losses(whole / "log.jsonl")


def test_other_frozen_weights(world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    before = contents(stopped)
    assert world.start(stopped, model=str(other)) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith(f"{other}: the frozen parameter llama/")
    assert "is not the one this run began with" in message
    assert contents(stopped) == before


def test_frozen_weights_that_changed(
    world: World, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their last bits, as memory may do: the run does not end well."""
    compare = loop._Trainer._compare_frozen

    def after_damage(trainer: loop._Trainer, done: int) -> None:
        weight = trainer.frozen["vit"]["pos_embed"]
        trainer.frozen["vit"]["pos_embed"] = weight.at[..., 1].set(np.nextafter(weight[..., 1], np.inf))
        compare(trainer, done)

    run = copy(stopped, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_compare_frozen", after_damage)
        assert world.start(run) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith("step 20: the frozen parameter vit/pos_embed is not what it was when the run began")
    assert world.start(run) == 0
    assert any(text.endswith("frozen parameters are to the bit as they were at the beginning") for text in events(run))


def test_a_second_trainer_in_the_directory(world: World, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(stopped)
    with run_directory(stopped, is_main=True):
        assert world.start(stopped) == 2
    assert error_line(capsys.readouterr().err).startswith(f"{stopped}: another trainer is writing this run")
    assert contents(stopped) == before


# -- guards -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(
    world: World, whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate beyond all measure: three steps later the loss is none."""
    run = copy(stopped, tmp_path / "run")
    saved = contents(run / "checkpoints")
    assert world.start(run, optim={"peak_lr": 1e30, "min_lr": 1e30}) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith(f"step {STOPPED_AT + 3}: the loss is nan")
    assert f"its samples: {world.train}:" in message
    assert f"the last good checkpoint is {STOPPED_AT}" in message
    assert contents(run / "checkpoints") == saved
    assert list(read_losses(run / "log.jsonl")) == list(range(1, STOPPED_AT + 3))
    assert world.start(run) == 0
    assert_same(run, whole)


def test_a_loss_that_jumps(world: World, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every loss is over a tenth of the median: what stops is that 20 losses are known, most of them from before."""
    run = copy(stopped, tmp_path / "run")
    assert world.start(run, log={"spike_factor": 0.1}, steps_per_epoch=40) == 2
    message = error_line(capsys.readouterr().err)
    assert message.startswith("step 21: the loss ")
    assert "over 0.1 times the median" in message
    assert f"its samples: {world.train}:" in message
    assert "the last good checkpoint is 20" in message
    assert checkpoint_steps(run) == [STOPPED_AT, 15, 20]


def test_too_many_bad_samples(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stops when 100 samples are looked at; when the pictures are there again it goes on, and still counts."""
    folder, run = copy(world.train.parent, tmp_path / "train"), tmp_path / "run"
    pictures = sorted(folder.glob("*.png"))[::5]
    good = {picture: picture.read_bytes() for picture in pictures}
    for picture in pictures:
        picture.write_bytes(b"no picture")
    source = {"data": {"train": [{"kind": "jsonl", "path": str(folder / "data.jsonl")}], "max_bad_share": 0.1}}
    assert world.start(run, **source) == 2
    message = error_line(capsys.readouterr().err)
    assert "samples are bad, over data.max_bad_share = 0.1" in message
    assert f"{folder}/data.jsonl:" in message
    step = int(message.split(":")[0].removeprefix("step "))
    saved = checkpoint_steps(run)
    assert saved and saved[-1] <= step
    assert f"the last good checkpoint is {saved[-1]}" in message
    counted = [record["bad_samples"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"]
    assert counted[-1] > 0
    for picture, data in good.items():
        picture.write_bytes(data)
    assert world.start(run, **source | {"data": source["data"] | {"max_bad_share": 1.0}}) == 0
    assert "pictures behind data.train are not of the sizes that they were" in capsys.readouterr().err
    last = [record["bad_samples"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"][-1]
    assert last == next(
        record["bad_samples"]
        for record in read_log(run / "log.jsonl")
        if record["kind"] == "train" and record["step"] == saved[-1]
    )


def test_the_lock_ends_with_its_trainer(world: World, whole: Path, tmp_path: Path) -> None:
    """A lock file that was left behind is no lock."""
    run = tmp_path / "run"
    with contextlib.suppress(RuntimeError), run_directory(run, is_main=True):
        raise RuntimeError
    assert (run / "lock").exists()
    assert world.start(run) == 0
    assert_same(run, whole)
