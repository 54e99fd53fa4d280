"""One tiny model, its pictures, and runs that are copied and gone on from: made once for all tests of this folder."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from recovery.runs import STEPS, STOPPED_AT, World, signal_after
from train.world import write_pictures, write_tiny_model


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    return World(
        root,
        write_tiny_model(root / "model"),
        write_pictures(root / "train", 64),
        write_pictures(root / "validation", 16, seed=1),
    )


@pytest.fixture(scope="package")
def whole(world: World) -> Path:
    """A run of ``STEPS`` steps that nothing disturbed."""
    run = world.root / "whole"
    assert world.start(run) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "15", str(STEPS)]
    return run


@pytest.fixture(scope="package")
def stopped(world: World) -> Path:
    """The same run, stopped by SIGTERM after ``STOPPED_AT`` steps; to be copied, not gone on with."""
    run = world.root / "stopped"
    with signal_after(STOPPED_AT, signal.SIGTERM):
        assert world.start(run) == 128 + signal.SIGTERM
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", str(STOPPED_AT), "5"]
    return run
