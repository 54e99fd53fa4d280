"""Checkpoints of a run: Orbax's manager, and a proof that what is read is what was saved.

``RUN/checkpoints/STEP`` holds the arrays (``state``) and what is no array (``about``: configuration,
fingerprints of the data, of the frozen parameters and of the saved state itself). A checkpoint takes its name
only when it is whole. When it is read, the fingerprint of every array is compared with the one saved: a cut or
altered file is refused by name, and an older checkpoint is taken only if the user says so.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mgpt4_jax.distributed import barrier, is_main
from mgpt4_jax.errors import UserError
from mgpt4_jax.fingerprint import fingerprint
from mgpt4_jax.train.state import KEY_IMPL, TrainState
from mgpt4_jax.train_config import CheckpointConfig

FORMAT_VERSION = 1
_LOSS = "validation_loss"


class Checkpoints:
    """Saves in the background and restores. One writer a directory: the run's lock sees to that."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        policy = ocp.checkpoint_managers
        kept: list[Any] = [policy.LatestN(config.keep_last)]
        if config.keep_best:
            best = policy.BestN(
                get_metric_fn=lambda metrics: metrics[_LOSS],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's chatter is not ours
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self.directory = directory
        self.last_saved: int | None = None
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def steps(self) -> list[int]:
        """Whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, about: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Copy the state off the devices and write it in the background; waits for an earlier save first.

        Raises ``UserError`` if that earlier save failed: nothing that was saved before it is touched.
        """
        self.wait()
        tree, step = _arrays(state), int(state.step)
        described = dict(about) | {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(tree)}
        metrics = None if validation_loss is None else {_LOSS: validation_loss}
        items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(described))
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:  # Orbax and TensorStore raise plain Exceptions too
            raise self._failed(error) from error
        self.last_saved = step

    def wait(self) -> None:
        """Until what was saved lies on the disk; ``UserError`` if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise plain Exceptions too
            raise self._failed(error) from error

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself, without its arrays."""
        try:
            items = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = self._manager.restore(step, args=items).about
        except Exception as error:  # as above
            raise self._damaged(step, error) from error
        if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
            raise self._damaged(step, ValueError("its description is not one of this program's version"))
        return about

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of ``step``, laid out as the shardings of ``abstract`` say, whatever mesh it was saved on."""
        saved = self.about(step)["fingerprint"]
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract_arrays(abstract)))
            tree = self._manager.restore(step, args=items).state
        except Exception as error:  # as above
            raise self._damaged(step, error) from error
        found = fingerprint(tree)
        if altered := [path for path in saved if found.get(path) != saved[path]]:
            raise self._damaged(step, ValueError(f"{altered[0]} is not what was saved"))
        return TrainState(**{**tree, "key": jax.random.wrap_key_data(tree["key"], impl=KEY_IMPL)})

    def set_aside_after(self, step: int) -> list[int]:
        """Move newer checkpoints to ``RUN/replaced``: the run goes on from an older one, and writes them anew."""
        newer = [other for other in self.steps() if other > step]
        if newer and is_main():
            aside = Path(tempfile.mkdtemp(prefix="replaced-", dir=self.directory.parent))
            for other in newer:
                (self.directory / str(other)).rename(aside / str(other))
        barrier("replaced")
        self._manager.reload()
        self.last_saved = step
        return newer

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        others = [other for other in self.steps() if other != step]
        mend = f"take an older one with --resume-from {others[-1]}" if others else "start again in a new run directory"
        return UserError(f"{self.directory / str(step)}: the checkpoint is damaged ({reason}); {mend}")

    def _failed(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        steps = self.steps()
        last = f"the last good checkpoint is {steps[-1]}" if steps else "there is no checkpoint yet"
        return UserError(f"{self.directory}: a checkpoint could not be written ({reason}); free some space; {last}")


def _arrays(state: TrainState) -> dict[str, Any]:
    """The state as a tree of plain arrays: a random key is saved as its words."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


def _abstract_arrays(abstract: TrainState) -> dict[str, Any]:
    words = jax.eval_shape(jax.random.key_data, abstract.key)
    words = jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=abstract.key.sharding)
    return abstract._replace(key=words)._asdict()


def plain(values: Any) -> Any:
    """``values`` as JSON gives them back: tuples become lists, NumPy numbers Python's."""
    return json.loads(json.dumps(values, default=lambda value: np.asarray(value).tolist()))
