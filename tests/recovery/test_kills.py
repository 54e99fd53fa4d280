"""SIGKILL at 30 random moments: the run that is started again and again ends as one that nothing disturbed."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from recovery.attempts import Attempt
from recovery.runs import World, assert_same, checkpoint_steps

from mgpt4_jax.sharding import make_mesh
from mgpt4_jax.train.checkpoints import Checkpoints
from mgpt4_jax.train.run_log import read_losses
from mgpt4_jax.train.setup import make_plan
from mgpt4_jax.train.state import TrainState
from mgpt4_jax.train_config import CheckpointConfig, DataConfig, SourceConfig, TextConfig, TrainConfig

KILLS = 30
KINDS = {"save": 12, "renamed": 3, "log": 3, "model": 2, "any time": 10}
LEAST_IN_SAVES = 8
STEPS, EVERY = 40, 4
SAVE_SECONDS = 0.08  # of a tiny state, about
CHANGES = {"checkpoint": {"every": EVERY, "keep_last": 2}, "log": {"every": 3, "validate_every": 8}}


@dataclass
class Runs:
    """Runs one after the other, until as many kills as wanted have met them."""

    world: World
    folder: Path
    reference: Path
    seconds: float  # that an undisturbed run takes
    random: random.Random
    number: int = 0
    attempts: int = 0
    found: Counter[str] = field(default_factory=Counter)

    @property
    def run(self) -> Path:
        return self.folder / f"run{self.number}"

    def start(self) -> Attempt:
        self.attempts += 1
        return start(self.world, self.run, self.folder / f"screen{self.attempts}.txt")

    def kill(self, kind: str) -> None:
        """One kill of that kind; a run that ends before its moment is held to the reference, and another begins."""
        while True:
            before = checkpoint_steps(self.run)
            attempt = self.start()
            if self._moment(kind, attempt):
                attempt.kill()
                if attempt.exit_code() == -9:
                    return self._look(before, attempt)
            assert attempt.exit_code() == 0, attempt.said()
            self.finish()

    def finish(self) -> None:
        assert_same(self.run, self.reference, STEPS)
        self.number += 1

    def _moment(self, kind: str, attempt: Attempt) -> bool:
        """Wait for it: False if the attempt ended first."""
        checkpoints, run = self.run / "checkpoints", self.run
        if kind == "any time":
            end = time.monotonic() + self.random.uniform(0, self.seconds)
            return attempt.wait_for(lambda: time.monotonic() >= end)
        if kind == "model":
            came = attempt.wait_for((run / "model.partial").exists)
        elif kind == "log":
            size, lines = log_size(run), self.random.randint(1, 4)
            came = attempt.wait_for(lambda: log_size(run) > size + 250 * lines)
        else:
            came = all(
                attempt.wait_for(lambda: unfinished(checkpoints)) and (kind == "save" or renamed(attempt, checkpoints))
                for _ in saves(attempt, checkpoints, self.random.randint(1, 3))
            )
        if kind in ("save", "model") and came:
            time.sleep(self.random.uniform(0, SAVE_SECONDS))
        return came

    def _look(self, before: list[int], attempt: Attempt) -> None:
        """What a kill left: whole checkpoints, none lost, and the losses of all their steps in the log."""
        after, said = checkpoint_steps(self.run), attempt.said()
        assert not before or after[-1] >= before[-1]
        if "goes on from checkpoint" in said:
            assert f"goes on from checkpoint {before[-1]}\n" in said
        elif "step 1/" in said:
            assert not before
        if after:
            losses, expected = read_losses(self.run / "log.jsonl"), read_losses(self.reference / "log.jsonl")
            known = {step: losses.get(step) for step in range(1, after[-1] + 1)}
            assert known == {step: expected[step] for step in known}
        self.found[self._phase(said)] += 1

    def _phase(self, said: str) -> str:
        if unfinished(self.run / "checkpoints"):
            return "in a save"
        if (self.run / "model.partial").exists():
            return "writing the model"
        if "compiled in" not in said:
            return "loading"
        return "in the loop"


def saves(attempt: Attempt, checkpoints: Path, count: int) -> Iterator[int]:
    """Numbers from 1 to ``count``, each when the save before is over."""
    for number in range(1, count + 1):
        yield number
        if number < count:
            renamed(attempt, checkpoints)


def renamed(attempt: Attempt, checkpoints: Path) -> bool:
    return attempt.wait_for(lambda: not unfinished(checkpoints))


def unfinished(checkpoints: Path) -> bool:
    """Whether a save is under way, or was when the trainer died."""
    try:
        return any(".orbax-checkpoint-tmp" in name for name in os.listdir(checkpoints))
    except FileNotFoundError:
        return False


def log_size(run: Path) -> int:
    path = run / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def start(world: World, run: Path, screen: Path) -> Attempt:
    validation = [{"kind": "jsonl", "path": str(world.validation)}]
    config = world.config(run, **CHANGES, steps_per_epoch=STEPS, data={"validation": validation})
    return Attempt(config, screen)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[Path, float]:
    """A whole run, and the seconds that one takes when its programs are compiled already."""
    times = []
    for name in ("compiling", "undisturbed"):
        begin = time.monotonic()
        attempt = start(world, world.root / name, world.root / f"{name}.txt")
        assert attempt.exit_code() == 0, attempt.said()
        times.append(time.monotonic() - begin)
    assert_same(world.root / "compiling", world.root / "undisturbed", STEPS)
    return world.root / "undisturbed", times[-1]


def test_kills(world: World, undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    reference, seconds = undisturbed
    runs = Runs(world, tmp_path, reference, seconds, random.Random(3))
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    assert len(kinds) == KILLS
    runs.random.shuffle(kinds)
    for kind in kinds:
        runs.kill(kind)
    attempt = runs.start()
    assert attempt.exit_code() == 0, attempt.said()
    assert_same(runs.run, reference, STEPS)
    assert_same_state(world, runs.run, reference)
    assert sum(runs.found.values()) == KILLS
    told = ", ".join(f"{count} {phase}" for phase, count in sorted(runs.found.items()))
    print(f"{KILLS} kills of {runs.number + 1} runs: {told}")
    assert runs.found["in a save"] >= LEAST_IN_SAVES, f"of {KILLS} kills were {told}"


def assert_same_state(world: World, run: Path, reference: Path) -> None:
    """The last checkpoints, read again: parameters, moments, step and random key, bit for bit."""
    ours, theirs = (jax.tree.leaves(read_state(world, each)) for each in (run, reference))
    assert len(ours) == len(theirs) > 5
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def read_state(world: World, run: Path) -> TrainState:
    data = DataConfig(train=(SourceConfig("jsonl", str(world.train)),))
    plan = make_plan(TrainConfig(str(world.model), str(run), data, text=TextConfig(max_length=24)), make_mesh("data=1"))
    with contextlib.closing(Checkpoints(run / "checkpoints", CheckpointConfig())) as checkpoints:
        state = checkpoints.restore(STEPS, plan.abstract)
    return state._replace(key=jax.random.key_data(state.key))


def test_killed_with_data_workers(world: World, whole: Path, tmp_path: Path) -> None:
    """They end with their trainer and hold no lock, so the same command goes on at once."""
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(world.config(run, data={"num_workers": 2})))
    command = [sys.executable, "-m", "mgpt4_jax.cli", "train", "--config", str(path)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not checkpoint_steps(run) and first.poll() is None:
        time.sleep(0.001)
    first.kill()
    assert first.wait() == -9
    assert 0 < checkpoint_steps(run)[-1] < 20
    assert world.start(run, data={"num_workers": 2}) == 0
    assert_same(run, whole)
    first.communicate()
