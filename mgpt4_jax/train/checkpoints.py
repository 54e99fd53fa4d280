"""Checkpoints of a run: Orbax's manager, and a proof that what is read is what was saved.

``RUN/checkpoints/STEP`` holds the arrays (``state``) and what is no array (``about``: configuration,
fingerprints of the data, of the frozen parameters and of the saved state itself, sealed by a checksum). A
checkpoint takes its name only when it is whole. When it is read, the fingerprint of every array is compared with the
one saved: a cut or altered file is refused by name, and an older checkpoint is taken only if the user says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_ECHOES = ("Event loop is closed", "Encountered error while reading array index")
_LOSS, _SEAL = "validation_loss", "sha256"


@dataclass(frozen=True)
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """The newest, and those of the lowest validation loss: also of losses that an earlier start has measured."""

    config: CheckpointConfig
    losses: Mapping[int, float]  # by step, of checkpoints that were validated

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        validated = sorted((step for step in steps if step in self.losses), key=lambda step: self.losses[step])
        kept = {*steps[-self.config.keep_last :], *validated[: self.config.keep_best]}
        return [step in kept for step in steps]


class Checkpoints:
    """Saves in the background and restores. One writer a directory: the run's lock sees to that."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        _be_quiet()
        self.directory = directory
        self.last_saved: int | None = None
        self._losses: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(config, self._losses),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Else threads wait five minutes for a directory that could not be made, and the program with them.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        except OSError as error:
            raise UserError(f"{directory}: cannot hold checkpoints ({error.strerror}); choose another --run") from error
        for step in self.steps():
            with contextlib.suppress(UserError):  # a damaged one is refused when it is to be gone on from
                self._remember(step, self.about(step))

    def steps(self) -> list[int]:
        """Whole checkpoints, oldest first, as they lie on the disk: one that is still being written has no name."""
        try:
            paths = list(self.directory.iterdir())
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be read ({error.strerror})") from error
        return sorted(int(path.name) for path in paths if path.name.isdecimal() and path.is_dir())

    def save(self, state: TrainState, about: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Copy the state off the devices and write it in the background; waits for an earlier save first.

        Raises ``UserError`` if that earlier save failed: nothing that was saved before it is touched.
        """
        self.wait()
        tree, step = _arrays(state), int(state.step)
        described = dict(about) | {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(tree),
            _LOSS: validation_loss,
        }
        described[_SEAL] = _seal(described)
        self._remember(step, described)
        items = ocp.args.Composite(state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(described))
        try:
            self._manager.save(step, args=items, force=True)
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
        if about.get(_SEAL) != _seal(about):
            raise self._damaged(step, ValueError("its description is not what was saved"))
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
        """Move newer checkpoints to ``RUN/replaced-*``: the run goes on from an older one, and writes them anew."""
        newer = [other for other in self.steps() if other > step]
        barrier("newer")  # all hosts have looked
        if newer and is_main():
            try:
                aside = Path(tempfile.mkdtemp(prefix="replaced-", dir=self.directory.parent))
                for other in newer:
                    (self.directory / str(other)).rename(aside / str(other))
            except OSError as error:
                raise UserError(f"{self.directory}: newer checkpoints cannot be moved ({error.strerror})") from error
        barrier("replaced")
        self._manager.reload()
        for other in newer:
            self._losses.pop(other, None)
        self.last_saved = step
        return newer

    def last_good(self) -> str:
        """Words that name the newest checkpoint; waits for one that is being written."""
        with contextlib.suppress(UserError):  # it could not be: those before it lie there still
            self.wait()
        return self._newest()

    def close(self) -> None:
        self.wait()
        try:
            self._manager.close()
        except Exception as error:  # of a save that failed before it began
            raise self._failed(error) from error

    def _remember(self, step: int, about: Mapping[str, Any]) -> None:
        self._losses.pop(step, None)
        if (loss := about.get(_LOSS)) is not None and math.isfinite(loss):
            self._losses[step] = loss

    def _newest(self) -> str:
        try:
            steps = self.steps()
        except UserError:
            return "no checkpoint can be read there"
        return f"the last good checkpoint is {steps[-1]}" if steps else "there is no checkpoint yet"

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        older = [other for other in self.steps() if other < step]
        mend = f"take an older one with --resume-from {older[-1]}" if older else "start again in a new run directory"
        return UserError(f"{self.directory / str(step)}: the checkpoint is damaged ({reason}); {mend}")

    def _failed(self, error: Exception) -> UserError:
        reason = system_reason(error) or " ".join(str(error).split())[:200]
        return UserError(
            f"{self.directory}: a checkpoint could not be written ({reason}); free some space and run again; "
            f"{self._newest()}"
        )


def _be_quiet() -> None:
    """An error of a read or a write is raised to us, and told in one line; Orbax tells it too, in many.

    It logs it in each of its threads. And the other reads and writes of that checkpoint end, some of them later, with
    nobody to take their result: each would print a traceback or a warning.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook
    if getattr(before, "is_quiet", False):
        return

    def report(unraisable: Any) -> None:
        if not any(text in str(unraisable.exc_value) for text in _ECHOES):
            before(unraisable)

    report.is_quiet = True  # type: ignore[attr-defined]
    sys.unraisablehook = report


def system_reason(error: Exception) -> str | None:
    """What the system says of a read or a write that failed, also in TensorStore's words; None: it says nothing."""
    if isinstance(error, OSError):
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None


def _seal(about: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of all that a checkpoint says of itself."""
    told = {key: value for key, value in about.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


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
