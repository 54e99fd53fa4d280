"""Perplexity: how well a model foretells the answers of a data set, by the rows and the loss of its training.

Of each sample the loss in nats of its answer's tokens, its end symbol with them, is a line of ``losses.jsonl``; what is
reported is the mean over all tokens, and its exponential. A row's loss is that of the row alone: neither the batch that
it is computed in nor the rows that only fill one count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax

from mgpt4_jax.checkpoint import load_params, read_manifest
from mgpt4_jax.data.loading import Loader
from mgpt4_jax.data.rows import RowBuilder, Rows
from mgpt4_jax.data.samples import Sample, Source
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.errors import UserError
from mgpt4_jax.evaluate.metrics import perplexity
from mgpt4_jax.evaluate.page import Example, spread, write_examples
from mgpt4_jax.evaluate.run import write_json
from mgpt4_jax.generate.requests import length_buckets
from mgpt4_jax.progress import Report
from mgpt4_jax.sharding import make_mesh, process_rows, put_batch
from mgpt4_jax.train.objectives import Batch, Objective, training_model
from mgpt4_jax.train.setup import Plan, device_arrays, make_plan
from mgpt4_jax.train.stages import STAGES
from mgpt4_jax.train_config import DataConfig, SourceConfig, TextConfig, TrainConfig
from mgpt4_jax.typing import Array, Params

LONGEST = 2048  # positions of a row of T5, which has no limit of its own
OBJECTIVES = {
    "minigpt4": "align",
    "llama": "language",
    "blip2_opt": "generative",
    "blip2_t5": "generative",
    "instructblip": "generative",
}
NOTE = "Samples from the worst to the best: picture, what stands before the answer, the answer."


@dataclasses.dataclass(frozen=True)
class RowLoss:
    """One line of ``losses.jsonl``: of the sample with this index ``id``, or why it has none."""

    id: int
    sample: str
    nats: float = 0.0  # of the whole answer
    tokens: int = 0  # of the answer
    picture: bool = False
    error: str | None = None


class Meter:
    """A model and the program that measures batches of rows, cut over the devices of its mesh."""

    def __init__(self, config: TrainConfig, *, own_instructions: bool = False):
        """``config`` says which model, data, rows, batch and mesh; nothing of it is trained.

        Args:
          own_instructions: what a sample has as its instruction stands before its answer although the objective asks
            nothing.
        """
        self.config = config
        self._plan: Plan = make_plan(config, make_mesh(config.mesh))
        process_rows(self._plan.mesh, config.batch_size)  # refuses a batch that the mesh cannot share out
        self.rows = self._rows(own_instructions)
        module = training_model(config, self._plan.model, (), self._plan.dtype)
        self._losses = row_losses(STAGES[config.objective].objective(module, self.rows))

    def _rows(self, own_instructions: bool) -> Rows:
        rows = STAGES[self.config.objective].rows(self.config, self._plan.manifest)
        if own_instructions and isinstance(rows, RowBuilder):
            return dataclasses.replace(rows, objective="finetune")
        return rows

    def measure(self, source: Source, done: int = 0) -> Iterator[RowLoss]:
        """Losses of the samples from number ``done`` on, in order."""
        config, plan = self.config, self._plan
        params = load_params(config.model, plan.dtype, plan.mesh)
        loader = Loader(
            [source],
            self.rows,
            config.data,
            batch_size=config.batch_size,
            image_size=plan.model.image_size,
            seed=config.seed,
            buckets=config.text.buckets or length_buckets(config.text.max_length),
        )
        with loader.validation_batches([_Rest(source, done)]) as batches:
            for batch in batches:
                found = self._losses(params, put_batch(plan.mesh, device_arrays(batch)))
                nats, tokens = jax.device_get(found)
                bad, start = iter(batch.bad), done + batch.step * config.batch_size
                for row in range(min(config.batch_size, len(source) - start)):
                    if not batch.names[row]:
                        yield RowLoss(start + row, "", error=next(bad))
                        continue
                    has_picture = bool(batch.slots[row].max() >= 0)
                    loss = RowLoss(start + row, batch.names[row], float(nats[row]), int(tokens[row]), has_picture)
                    if not math.isfinite(loss.nats):
                        reason = f"the loss is {loss.nats}; is the tokeniser of {config.model} the model's own?"
                        raise UserError(f"{loss.sample}: {reason}")
                    yield loss


def row_losses(objective: Objective) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """The jitted ``(params, batch) -> (nats [b], tokens [b])``: the objective of each row, as if it were a batch."""

    def one(params: Params, row: Batch) -> tuple[Array, Array]:
        loss, metrics = objective(params, {name: values[None] for name, values in row.items()}, None)
        return loss * metrics["weight"], metrics["weight"]

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))


class _Rest:
    """The samples of ``source`` from number ``start`` on."""

    def __init__(self, source: Source, start: int):
        self.name, self._source, self._start = source.name, source, start

    def __len__(self) -> int:
        return len(self._source) - self._start

    def __getitem__(self, index: int) -> Sample:
        return self._source[index + self._start]

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} from {self._start}"

    def picture_sizes(self) -> str:
        return self._source.picture_sizes()


def perplexity_config(
    model: Path,
    data: Path,
    out: Path,
    *,
    prompt: str | None = None,
    template: str | None = None,
    like: TrainConfig | None = None,
    batch_size: int = 8,
    mesh: str | None = None,
    dtype: str = "auto",
) -> TrainConfig:
    """The configuration of a ``Meter``.

    Args:
      data: JSONL, as training reads it.
      prompt: stands before the answer of a sample that has no instruction of its own.
      like: a run whose rows are measured: its objective, ``text`` (of several instructions the first, so that no row
        depends on its batch) and ``data.clean_captions``; it takes the place of prompt and template.

    Raises:
      UserError: the model writes no answers, or the options do not fit together.
    """
    manifest = read_manifest(model)
    kind = manifest.config.architecture
    if kind not in OBJECTIVES:
        raise UserError(f"{model}: a {kind} model has no answers to foretell; take one of {', '.join(OBJECTIVES)}")
    if like is not None and (prompt is not None or template is not None):
        raise UserError("--rows says what stands before an answer; leave --prompt and --template out")
    objective, clean = OBJECTIVES[kind], False
    if like is not None:
        objective, clean = like.objective, like.data.clean_captions
        text = dataclasses.replace(like.text, instructions=like.text.instructions[:1])
    else:
        if prompt is not None and kind == "minigpt4":
            objective = "finetune"
        elif prompt is not None and kind == "llama":
            raise UserError(f"{model}: a llama model is measured on words alone, without a --prompt; leave it out")
        limit = getattr(manifest.config.language_model, "max_positions", LONGEST)
        asked = () if prompt is None else (prompt,)
        text = TextConfig(max_text_length=limit, max_length=limit, instructions=asked, template=template)
    return TrainConfig(
        model=str(model),
        run=str(out),
        data=DataConfig(train=(SourceConfig("jsonl", str(data)),), clean_captions=clean),
        objective=objective,  # type: ignore[arg-type]  # of OBJECTIVES
        text=text,
        trainable=("*",),
        batch_size=batch_size,
        mesh=mesh,
        dtype=dtype,  # type: ignore[arg-type]  # checked there
    )


def run_perplexity(
    meter: Meter, out: Path, *, examples: int = 24, report: Report | None = None
) -> tuple[dict[str, float], int]:
    """Measure every sample that has no line in ``out`` yet, and the whole.

    Writes ``losses.jsonl`` (as it goes), ``scores.json`` and ``page.html``.

    Returns:
      ``nats_per_token``, ``perplexity``, and both of samples with and without a picture where there are both; and how
      many samples could not be used, which count in none of them.

    Raises:
      UserError: no sample can be used; another run writes there.
    """
    source = open_source(meter.config.data.train[0])
    path = out / "losses.jsonl"
    with _open(path) as file:
        found = _read(file, path)
        if len(found) < len(source):
            for loss in meter.measure(source, len(found)):
                file.write(json.dumps(dataclasses.asdict(loss)).encode() + b"\n")
                file.flush()
                found.append(loss)
                if report:
                    report(len(found), len(source))
        os.fsync(file.fileno())
    failed = sum(loss.error is not None for loss in found)
    good = [loss for loss in found if loss.error is None]
    if not good:
        raise UserError(f"{source.name}: no sample can be measured; the first: {found[0].error}")
    scores = scores_of(good)
    counts = {"samples": len(good), "tokens": sum(loss.tokens for loss in good), "failed": failed}
    write_json(out / "scores.json", {**scores, **counts})
    table = list({**scores, **counts}.items())
    write_examples(out / "page.html", "Perplexity", table, _examples(source, good, examples), NOTE)
    return scores, failed


def scores_of(losses: Sequence[RowLoss]) -> dict[str, float]:
    """Of all tokens, and of those of answers about pictures and in words alone, if there are both."""
    kinds = {"": list(losses)}
    with_picture = [loss for loss in losses if loss.picture]
    if 0 < len(with_picture) < len(losses):
        kinds |= {"_pictures": with_picture, "_words": [loss for loss in losses if not loss.picture]}
    scores: dict[str, float] = {}
    for name, some in kinds.items():
        value = perplexity([loss.nats / loss.tokens for loss in some], [loss.tokens for loss in some])
        scores |= {f"nats_per_token{name}": math.log(value), f"perplexity{name}": value}
    return scores


def _examples(source: Source, losses: Sequence[RowLoss], limit: int) -> list[Example]:
    ordered = sorted(losses, key=lambda loss: -loss.nats / loss.tokens)
    shown = []
    for index in spread(len(ordered), limit):
        loss = ordered[index]
        sample: Any = source[loss.id]
        score = f"{loss.nats / loss.tokens:.3g} nats a token, {loss.tokens} tokens"
        shown.append(Example(loss.sample, sample.image or "", sample.instruction or "", [sample.answer], [], score))
    return shown


# --- losses.jsonl -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading and appending, and ours alone."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another run is writing it; wait for it or choose another --out") from error
        yield file


def _read(file: BinaryIO, path: Path) -> list[RowLoss]:
    """What was measured before, in order from the first sample. A line torn by a kill is cut off."""
    file.seek(0)
    found: list[RowLoss] = []
    whole = 0
    for raw in file:
        if not raw.endswith(b"\n"):
            break
        try:
            loss = RowLoss(**json.loads(raw))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{len(found) + 1}: is not a loss of this program; choose another --out") from error
        if loss.id != len(found):
            raise UserError(f"{path}:{len(found) + 1}: is of sample {loss.id}, out of order; choose another --out")
        found.append(loss)
        whole += len(raw)
    file.truncate(whole)
    return found
