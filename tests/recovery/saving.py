"""Saving in a process of its own that has no room left on its disk."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgpt4_jax.errors import UserError
from mgpt4_jax.optim import make_optimizer
from mgpt4_jax.sharding import make_mesh
from mgpt4_jax.train.checkpoints import Checkpoints
from mgpt4_jax.train.state import TrainState, make_state
from mgpt4_jax.train_config import CheckpointConfig, OptimConfig


def allow(size: int) -> None:
    """Files may grow to ``size`` bytes; Python ignores the signal that tells of more, so that the write fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def made_state() -> tuple[TrainState, TrainState]:
    """A state of some kilobytes that no compression makes smaller, and its shapes on one device."""
    kernel = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    state = make_state({"kernel": jnp.asarray(kernel)}, make_optimizer(OptimConfig()), seed=0, with_average=False)
    here = NamedSharding(make_mesh("data=1"), P())
    return state, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state)


def fail_to_save(folder: Path, room: int | None) -> None:
    """Save step 1, then fail to save step 2: a file may have ``room`` bytes; None: no directory can be made."""
    state, _ = made_state()
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1, keep_best=0))
    checkpoints.save(state._replace(step=np.int32(1)), {"run": 1})
    checkpoints.wait()
    elsewhere, told = folder.with_name("elsewhere"), "the last good checkpoint is 1"
    if room is None:
        folder.rename(elsewhere)
        folder.write_text("no directory")
        told = "no checkpoint can be read there"
    else:
        allow(room)
    with pytest.raises(UserError, match=f"a checkpoint could not be written .*; {told}$"):
        checkpoints.save(state._replace(step=np.int32(2)), {"run": 1})
        checkpoints.wait()
    with contextlib.suppress(UserError):
        checkpoints.close()
    if room is None:
        folder.unlink()
        elsewhere.rename(folder)
