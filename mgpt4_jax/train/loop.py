"""The loop: batch, step, report; validate, show captions, save; stop where it is told to, and go on from there."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from mgpt4_jax.checkpoint import flatten, write_trained_model
from mgpt4_jax.data.loading import BadSamples, TrainBatch, pad_batch
from mgpt4_jax.distributed import agree_max, barrier, is_main, telling_others
from mgpt4_jax.errors import TrainingStopped, UserError
from mgpt4_jax.fingerprint import fingerprint
from mgpt4_jax.optim import learning_rate
from mgpt4_jax.sharding import make_mesh, put_batch
from mgpt4_jax.train.captions import SampleCaptions
from mgpt4_jax.train.checkpoints import Checkpoints, plain, system_reason
from mgpt4_jax.train.curves import draw_curves
from mgpt4_jax.train.flops import peak_flops
from mgpt4_jax.train.monitor import LossGuard, Monitor, Speed
from mgpt4_jax.train.run import Signals, check_unchanged, require_room, run_directory, write_config
from mgpt4_jax.train.run_log import read_log, read_losses
from mgpt4_jax.train.screen import printable
from mgpt4_jax.train.setup import Data, Plan, Programs, device_arrays, load_state, make_plan, open_data, weight_table
from mgpt4_jax.train.stages import STAGES
from mgpt4_jax.train.trackers import require_packages
from mgpt4_jax.train_config import TrainConfig, train_config_to_dict
from mgpt4_jax.typing import Params

PROFILED_STEPS = 3


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``signal`` is what stopped it before its last step, or None."""

    step: int
    signal: int | None
    validation_loss: float | None


def train(config: TrainConfig, *, resume_from: int | None = None) -> Outcome:
    """Start the run in ``config.run``, or go on with it.

    Args:
      resume_from: the checkpoint to go on from; None: the newest. A damaged one is never passed over by itself.

    Raises:
      UserError: something does not fit together; nothing that was saved is lost.
      TrainingStopped: the loss became no number, or too many samples are bad.
    """
    run = Path(config.run)
    require_room(run, Path(config.model))
    with run_directory(run, is_main=is_main()):
        say = _printer()
        if is_main():  # who alone opens them
            require_packages(config.log)
        plan = make_plan(config, make_mesh(config.mesh, all_devices=True))
        say(weight_table(plan))
        data = open_data(plan, say)
        trainer = _Trainer(plan, data, run, say)
        with contextlib.closing(trainer.checkpoints), telling_others():
            trainer.begin(resume_from)
            return trainer.run_loop()


def _printer() -> Callable[[str], None]:
    """Lines on stderr, of the main process."""
    return (lambda text: print(text, file=sys.stderr, flush=True)) if is_main() else (lambda text: None)


@dataclass
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    batch: TrainBatch
    rate: float
    wait: float
    flops: float


@dataclass
class _Trainer:
    """One run, from its first step here to its last."""

    plan: Plan
    data: Data
    run: Path
    say: Callable[[str], None]
    validation_loss: float | None = None
    pending: _Pending | None = None
    bad: BadSamples = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.plan.config
        _ = self.data.rows.tokenizer  # read before the weights, which may take minutes
        self.checkpoints = Checkpoints(self.run / "checkpoints", self.config.checkpoint)
        self.bad = BadSamples(self.config.data.max_bad_share)

    # -- beginning ------------------------------------------------------------------------------

    def begin(self, resume_from: int | None) -> None:
        """Load the parameters, and the state of the checkpoint that is gone on from."""
        steps = self.checkpoints.steps()
        if resume_from is not None and resume_from not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.run}: has no checkpoint {resume_from}; it has {there}")
        self.state, self.frozen = load_state(self.plan)
        self.about = plain(
            {
                "config": train_config_to_dict(self.config) | {"dtype": self.plan.dtype.name},
                "mesh": ",".join(f"{axis}={size}" for axis, size in self.plan.mesh.shape.items()),
                "data": self.data.loader.fingerprint(),
                "pictures": self.data.loader.picture_sizes(),
                "frozen": fingerprint(self.frozen),
            }
        )
        self.start, self.events = 0, []
        if steps:
            self.start = steps[-1] if resume_from is None else resume_from
            changes = check_unchanged(self.checkpoints.about(self.start), self.about)
            self.state = self.checkpoints.restore(self.start, self.plan.abstract)
            self.events = [f"goes on from checkpoint {self.start}", *(f"changed: {change}" for change in changes)]
            if newer := self.checkpoints.set_aside_after(self.start):
                self.events.append(
                    f"newer checkpoints {', '.join(map(str, newer))} were moved to {self.run}/replaced-*"
                )
        elif (self.run / "log.jsonl").exists():
            self.events = ["starts again from the beginning: an earlier start saved nothing"]
        self._remember_log()
        if is_main():
            write_config(self.run, self.about["config"])
        self.programs = Programs(self.plan, self.data.rows, self.frozen, self.say)
        self.stage = STAGES[self.config.objective]
        if self.stage.tells:
            self.captions = SampleCaptions(self.plan, self.data, self.programs.module)

    def _remember_log(self) -> None:
        """What the steps up to the start have shown: their losses, and how many samples were bad."""
        path, start = self.run / "log.jsonl", self.start
        records = [record for record in read_log(path) if record["step"] <= start] if path.exists() else []
        losses = read_losses(path) if records else {}
        self.guard = LossGuard(self.config.log.spike_factor, (losses[step] for step in losses if step <= start))
        for record in records:
            self.bad.count = record.get("bad_samples", self.bad.count)
        self.bad.seen = start * self.config.batch_size // jax.process_count() + self.bad.count

    # -- the loop -------------------------------------------------------------------------------

    def run_loop(self) -> Outcome:
        config, total, done = self.config, self.config.num_steps, self.start
        if done < total:
            self.programs.step(self.data.buckets[-1])  # the largest, so that what does not fit is refused here
        peak = peak_flops(self.plan.mesh.devices.flat[0], self.plan.dtype)
        speed = Speed(config.batch_size, None, peak, self.plan.mesh.size)
        monitor = Monitor(
            self.run,
            config.log,
            num_steps=total,
            speed=speed,
            start_step=self.start,
            is_main_process=is_main(),
            settings=self.about["config"],
        )
        with Signals() as signals, monitor as self.monitor, self.data.loader.batches(self.start) as batches:
            for event in self.events:
                monitor.event(self.start, event)
            while done < total and not self._is_told_to_stop(done, signals):
                with self._profiled(done + 1):
                    self._step(done, batches)
                done += 1
                self._after(done)
            self._settle()
            if self.checkpoints.last_saved != done:
                self._save(done)
            self.checkpoints.wait()
            self._compare_frozen(done)
            self._finish(done)
        return Outcome(done, signals.received if done < total else None, self.validation_loss)

    def _is_told_to_stop(self, done: int, signals: Signals) -> bool:
        """Several hosts must stop at the same step; they ask each other now and then, since that waits for devices."""
        if jax.process_count() == 1:
            return signals.received is not None
        if not _is_due(done, self.config.log.every):
            return False
        if told := agree_max(signals.received or 0):
            signals.received = told  # by one of them; all exit alike
        return told > 0

    def _step(self, done: int, batches: Iterator[TrainBatch]) -> None:
        """Start step number ``done + 1`` and, while it runs, report the one before."""
        config, before = self.config, time.perf_counter()
        batch = self._agreed(next(batches))
        wait = time.perf_counter() - before
        rate = learning_rate(config.optim, done, epochs=config.epochs, steps_per_epoch=config.steps_per_epoch)
        length = batch.ids.shape[1]
        step = self.programs.step(length)
        arrays = put_batch(self.plan.mesh, device_arrays(batch))
        self.state, metrics = step(self.state, self.frozen, arrays, np.float32(rate))
        self._settle()
        self.pending = _Pending(done + 1, metrics, batch, rate, wait, self.programs.flops[length])

    def _agreed(self, batch: TrainBatch) -> TrainBatch:
        """Padded to the longest bucket that any host needs for this step; with one bucket nobody need ask.

        Its words must have rows in the model's table: others would be NaN.
        """
        model = self.plan.model
        read = [("--tokenizer", max(batch.ids.max(), batch.targets.max()), model.language_model or model.qformer)]
        if batch.qformer_ids is not None:
            read.append(("--qformer-tokenizer", batch.qformer_ids.max(), model.qformer))
        for option, largest, part in read:
            if largest >= part.vocab_size:
                raise UserError(
                    f"{self.config.model}: its tokeniser gives token {largest} and its model knows "
                    f"{part.vocab_size:,}, so one of them is another model's; convert it again with the right {option}"
                )
        if len(self.data.buckets) == 1:
            return batch
        return pad_batch(batch, agree_max(batch.ids.shape[1]), pad_id=self.data.rows.pad_id)

    def _settle(self) -> None:
        """Fetch the numbers of the pending step, report them, and stop the run if they are bad."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        metrics = jax.device_get(pending.metrics)
        loss = float(metrics["loss"])
        if not metrics["is_finite"]:
            samples, norm = _some(pending.batch.names), float(metrics["grad_norm"])
            raise TrainingStopped(
                f"step {pending.step}: the loss is {loss} and the gradient's norm {norm}, and nothing was changed by "
                f"it; its samples: {samples}; {self.checkpoints.last_good()}; look at the samples, or lower "
                "optim.peak_lr"
            )
        for text in pending.batch.bad:
            self._event(pending.step, f"bad sample, replaced: {text}")
        try:
            self.bad.add(len(pending.batch.names), pending.batch.bad)
        except TrainingStopped as error:
            raise TrainingStopped(f"step {pending.step}: {error}; {self.checkpoints.last_good()}") from error
        numbers = {
            "loss": loss,
            "learning_rate": pending.rate,
            **{name: float(value) for name, value in metrics.items() if name.startswith("loss_")},
            "grad_norm": float(metrics["grad_norm"]),
            "padding": pending.batch.padding,
            "bad_samples": self.bad.count,
        }
        self.monitor.step(pending.step, numbers, data_wait=pending.wait, flops=pending.flops)
        try:
            self.guard.check(pending.step, loss)
        except TrainingStopped as error:
            samples = _some(pending.batch.names)
            raise TrainingStopped(f"{error}; its samples: {samples}; {self.checkpoints.last_good()}") from error

    # -- what happens between steps -------------------------------------------------------------

    def _event(self, step: int, text: str) -> None:
        """Into the log; what another process than the main one saw, it says itself."""
        self.monitor.event(step, text)
        if not is_main():
            print(f"process {jax.process_index()}: step {step}: {printable(text)}", file=sys.stderr, flush=True)

    def _after(self, done: int) -> None:
        log, every, is_last = self.config.log, self.config.checkpoint.every, done == self.config.num_steps
        validates = bool(self.data.validation) and (is_last or _is_due(done, log.validate_every))
        samples, saves = self.stage.tells and _is_due(done, log.sample_every), is_last or _is_due(done, every)
        if not (validates or samples or saves):
            return
        self._settle()
        with self.monitor.paused():
            if validates:
                self._validate(done)
            if samples:
                self.monitor.captions(done, self.captions.write(self._trained(), self.frozen))
            if saves:
                self._save(done, self.validation_loss if validates else None)

    def _trained(self) -> Params:
        """What is validated and written: the moving average if there is one."""
        return self.state.trainable if self.state.average is None else self.state.average

    def _validate(self, done: int) -> None:
        """Means over the validation set: over its predicted tokens, or whatever the objective counts in."""
        totals: dict[str, float] = {}
        limit, whole = self.config.log.validation_batches, self.stage.needs_whole_batches
        with self.data.loader.validation_batches(self.data.validation, limit=limit, whole=whole) as batches:
            for batch in map(self._agreed, batches):
                evaluate = self.programs.evaluation(batch.ids.shape[1])
                arrays = put_batch(self.plan.mesh, device_arrays(batch))
                found = jax.device_get(evaluate(self._trained(), self.frozen, arrays))
                weight = float(found.pop("weight"))
                for name, value in {**found, "weight": 1.0}.items():
                    totals[name] = totals.get(name, 0.0) + float(value) * weight
                for text in batch.bad:
                    self._event(done, f"bad validation sample, left out: {text}")
        weight = totals.pop("weight", 0.0)
        if not weight:
            raise UserError("data.validation: no sample of it can be used; `mgpt4 data validate` says why")
        means = {name: total / weight for name, total in totals.items()}
        self.validation_loss = means["loss"]
        self.monitor.validation(done, means)

    def _save(self, done: int, validation_loss: float | None = None) -> None:
        self.monitor.flush()
        self.checkpoints.save(self.state, self.about, validation_loss)

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        """Around each step: a trace of three of them, from ``log.profile_step`` on."""
        first = self.config.log.profile_step
        if first and step == first:
            jax.profiler.start_trace(str(self.run / "profile"))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if first and step in (first + PROFILED_STEPS - 1, self.config.num_steps) and step >= first:
            self._settle()
            jax.profiler.stop_trace()
            self.say(f"profile of steps {first} to {step}: {self.run / 'profile'}")

    def _compare_frozen(self, done: int) -> None:
        """What a run does not train is at its end, to the bit, what it was at its beginning; the log says so."""
        now = fingerprint(self.frozen)
        if altered := [path for path, digits in self.about["frozen"].items() if now[path] != digits]:
            raise TrainingStopped(
                f"step {done}: the frozen parameter {altered[0]} is not what it was when the run began, which no step "
                f"can do; {self.checkpoints.last_good()}, and may be spoilt too; test this machine's memory"
            )
        if now:
            self.monitor.event(done, f"{len(now)} frozen parameters are to the bit as they were at the beginning")

    def _finish(self, done: int) -> None:
        """The trained model and the curves; all is saved already."""
        model = self.run / "model"
        try:
            write_trained_model(
                model, Path(self.config.model), flatten(self._trained()), self.plan.model, self.plan.manifest.template
            )
            if is_main():
                self.monitor.flush()
                draw_curves(self.run / "log.jsonl", self.run / "curves.png")
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            if (reason := system_reason(error)) is None:
                raise
            raise UserError(
                f"{self.run}: the trained model and its curves cannot be written ({reason}); free some space and run "
                f"again; {self.checkpoints.last_good()}"
            ) from error
        barrier("finished")
        where = f"the trained model is {model}, its curves {self.run / 'curves.png'}"
        self.say(f"step {done} of {self.config.num_steps}: {where}")


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
