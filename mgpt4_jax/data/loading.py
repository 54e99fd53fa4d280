"""Batches of training, each a function of the seed and its step alone.

Batch ``step`` is the same whichever thread, worker process or host makes it, from whatever step a run begins. So a
run that goes on needs its step and nothing else, and a change of workers or hosts changes no sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import Batch, TrainingSequence, bucket_for, pad_sequences
from mgpt4_jax.data.images import crop_resize, load_image, random_crop_box, resize
from mgpt4_jax.data.order import MAX_SAMPLES, Order, Place, SequentialOrder, TrainOrder, replacements
from mgpt4_jax.data.prefetching import Prefetcher
from mgpt4_jax.data.rows import Rows, buckets_of
from mgpt4_jax.data.samples import Sample, Source
from mgpt4_jax.errors import TrainingStopped, UserError
from mgpt4_jax.train_config import DataConfig, TextConfig

MAX_TRIES = 100
_ROW, _BATCH, _VALIDATION = 1, 2, 3  # what random numbers are drawn for; never 0, which ends no seed


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """The rows of one step that this process feeds."""

    step: int
    ids: np.ndarray  # int32 [b t]
    slots: np.ndarray  # int32 [b t]; -1 for text
    targets: np.ndarray  # int32 [b t]; IGNORED where nothing is predicted
    mask: np.ndarray  # bool [b t]
    pixels: np.ndarray  # uint8 [b 1 H W 3]; normalised on the device
    names: list[str]  # of the samples; empty for a row that only fills the batch
    bad: list[str]  # 'name: reason' of the samples that were replaced or left out
    qformer_ids: np.ndarray | None = None  # int32 [b q]; only of rows that the Q-Former reads for itself
    qformer_mask: np.ndarray | None = None  # bool [b q]
    image_ids: np.ndarray | None = None  # int32 [b 2]; only of rows that say which picture they show

    @property
    def padding(self) -> float:
        """The share of positions that hold no token."""
        return 1 - float(np.mean(self.mask))


class Loader:
    """Makes batches of ``sources``.

    Args:
      sources: as ``data.train`` names them, in its order.
      rows: how samples become sequences.
      data: the weights of the sources, the transform, and who does the work.
      batch_size: rows of the whole batch, over all processes.
      image_size: side of a picture in pixels.
      buckets: lengths to pad to; empty: those of ``rows.text``. A longer row is a bad sample.
      rows_of_process: the rows of the whole batch that this process loads.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows: Rows,
        data: DataConfig,
        *,
        batch_size: int,
        image_size: int,
        seed: int,
        buckets: Sequence[int] = (),
        rows_of_process: slice = slice(None),
    ) -> None:
        if len(sources) != len(data.train):
            raise UserError(f"data.train names {len(data.train)} sources, but {len(sources)} are open")
        self._sources, self._data, self._seed, self._batch_size = tuple(sources), data, seed, batch_size
        self._settings = _Settings(
            rows=rows,
            crops=data.transform == "crop",
            image_size=image_size,
            seed=seed,
            buckets=tuple(sorted(buckets)) or buckets_of(rows.text),
            rows_of_process=tuple(range(batch_size)[rows_of_process]),
        )
        sizes, weights = _sizes(self._sources), [source.weight for source in data.train]
        self._order = TrainOrder(sizes, weights, batch_size, seed)

    def batches(self, start: int = 0) -> Prefetcher[TrainBatch]:
        """The batches of the steps ``start``, ``start + 1`` and so on, without end.

        To be closed, best by a ``with`` statement.

        Raises:
          TrainingStopped: 100 samples of a source were tried for one row (fewer if it has not so many) and all are bad.
          UserError: a worker process died.
        """
        maker = _BatchMaker(self._settings, self._sources, self._order)
        return self._prefetch(maker, start, None, self._data.num_workers)

    def validation_batches(
        self, sources: Sequence[Source], *, limit: int = 0, whole: bool = False
    ) -> Prefetcher[TrainBatch]:
        """Every sample of ``sources`` once, in order, never cropped; the last batch is filled with empty rows.

        All processes get the same number of batches. A bad sample is not replaced: its row predicts nothing.

        Args:
          limit: most batches; 0: all.
          whole: leave out the rest that fills no batch: where rows count in each other's loss, a batch with empty
            rows would be another one.
        """
        order = SequentialOrder(_sizes(sources), self._batch_size)
        count = sum(_sizes(sources)) // self._batch_size if whole else len(order)
        if not count:
            raise UserError(f"data.validation holds fewer samples than batch_size {self._batch_size}; give more")
        settings = dataclasses.replace(self._settings, crops=False, validates=True)
        count = min(count, limit) if limit else count
        workers = min(self._data.num_workers, count) if count > 1 else 0  # one batch is sooner made than a process
        return self._prefetch(_BatchMaker(settings, tuple(sources), order), 0, count, workers)

    def fingerprint(self) -> str:
        """Of all that decides what a batch holds; the same for any number of workers, threads and processes.

        The indices of the first batch are in it: they tell of a Grain that shuffles differently.
        """
        rows = self._settings.rows
        first = [int(index) for index in self._order[0][1]]
        facts = {
            "sources": [source.fingerprint() for source in self._sources],
            "weights": [source.weight for source in self._data.train],
            "transform": self._data.transform,
            "text": dataclasses.asdict(rows.text),
            "row": rows.facts(),
            "batch": [self._batch_size, self._settings.image_size, self._seed, *self._settings.buckets],
            "first": first,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def picture_sizes(self) -> list[str]:
        """Of each source, as ``Source.picture_sizes``: what ``fingerprint`` does not tell."""
        return [source.picture_sizes() for source in self._sources]

    def _prefetch(self, maker: _BatchMaker, start: int, stop: int | None, workers: int) -> Prefetcher[TrainBatch]:
        return Prefetcher(
            maker,
            TrainBatch,
            start=start,
            stop=stop,
            num_workers=workers,
            num_threads=self._data.num_threads,
            ready=self._data.prefetch,
            bytes_per_batch=self._settings.batch_bytes,
        )


class BadSamples:
    """Counts the samples that could not be used, and stops training when they are too many.

    Args:
      max_share: of all samples that were looked at.
      minimum: samples after which the share means something.
      keep: names kept for the report.
    """

    def __init__(self, max_share: float, *, minimum: int = 100, keep: int = 20) -> None:
        self.max_share = max_share
        self.minimum = minimum
        self.keep = keep
        self.seen = 0
        self.count = 0
        self.first: list[str] = []

    @property
    def share(self) -> float:
        return self.count / max(self.seen, 1)

    def add(self, good: int, bad: Sequence[str], num_bad: int | None = None) -> None:
        """Count one batch.

        Args:
          good: samples that were used.
          bad: 'name: reason' of those that were not.
          num_bad: how many those are, where other hosts have more of them.

        Raises:
          TrainingStopped: the share is over ``max_share``, of at least ``minimum`` samples or of all.
        """
        num_bad = len(bad) if num_bad is None else num_bad
        self.count += num_bad
        self.seen += good + num_bad
        self.first += bad[: self.keep - len(self.first)]
        proven = self.seen >= self.minimum or self.count == self.seen
        if self.count and proven and self.share > self.max_share:
            names = "; ".join([*self.first[:3], *(["..."] if self.count > 3 else [])])
            raise TrainingStopped(
                f"{self.count:,} of {self.seen:,} samples are bad, over data.max_bad_share = {self.max_share:g}: "
                f"{names}; `mgpt4 data validate` names them all"
            )


@dataclass(frozen=True)
class _Settings:
    """What a batch depends on besides its samples."""

    rows: Rows
    crops: bool
    image_size: int
    seed: int
    buckets: tuple[int, ...]
    rows_of_process: tuple[int, ...]
    validates: bool = False

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch, nearly all of them pixels."""
        return len(self.rows_of_process) * (self.image_size**2 * 3 + self.buckets[-1] * 13)


@dataclass(frozen=True)
class _Row:
    """A sample once it is ready."""

    sequence: TrainingSequence
    pixels: np.ndarray | None  # uint8 [H W 3]; None: no picture
    name: str


class _BatchMaker:
    """From a step to its batch. Holds no state, so that threads may share it and processes may copy it."""

    def __init__(self, settings: _Settings, sources: tuple[Source, ...], order: Order) -> None:
        self._settings, self._sources, self._order = settings, sources, order

    def __getitem__(self, step: int) -> TrainBatch:
        settings = self._settings
        places = self._order.places(step)
        kind = _VALIDATION if settings.validates else _BATCH
        instruction = settings.rows.draw_instruction(np.random.default_rng((settings.seed, step, 0, kind)))
        bad: list[str] = []
        rows = [self._row(places[row], step, row, instruction, bad) for row in settings.rows_of_process]
        size = settings.image_size
        pixels = np.zeros((len(rows), 1, size, size, 3), np.uint8)
        for number, row in enumerate(rows):
            if row.pixels is not None:
                pixels[number, 0] = row.pixels
        sequences, names = [row.sequence for row in rows], [row.name for row in rows]
        text, extras = self._pad(sequences), extra_arrays(sequences, settings.rows.text)
        return TrainBatch(step, text.ids, text.slots, text.targets, text.mask, pixels, names, bad, **extras)

    def _pad(self, sequences: list[TrainingSequence]) -> Batch:
        longest = max((len(sequence) for sequence in sequences), default=1)
        length = bucket_for(longest, self._settings.buckets)
        return pad_sequences(sequences, length, pad_id=self._settings.rows.pad_id)

    def _row(self, place: Place | None, step: int, row: int, instruction: str | None, bad: list[str]) -> _Row:
        """The sample at ``place``, or the one that replaces it; what was bad is added to ``bad``."""
        empty = _Row(self._settings.rows.filling_row(), None, "")
        if place is None:
            return empty
        source, tried = self._sources[place.source], len(bad)
        for index in self._candidates(place.position, len(source)):
            sample: Sample | None = None
            try:
                sample = source[index]
                return self._prepare(sample, instruction, (self._settings.seed, step, row, _ROW))
            except UserError as error:
                bad.append(_describe(sample, error))
        if self._settings.validates:
            return empty
        raise TrainingStopped(
            f"{source.name}: {len(bad) - tried} samples were tried for one row and all are bad; the last: {bad[-1]}"
        )

    def _candidates(self, index: int, size: int) -> list[int]:
        if self._settings.validates:
            return [index]
        return [index, *itertools.islice(replacements(index, size), MAX_TRIES - 1)]

    def _prepare(self, sample: Sample, instruction: str | None, seed: tuple[int, ...]) -> _Row:
        settings = self._settings
        sequence = settings.rows.row(sample, instruction)
        bucket_for(len(sequence), settings.buckets)
        if sample.image is None:
            return _Row(sequence, None, sample.name)
        image = load_image(sample.image)
        if not settings.crops:
            return _Row(sequence, resize(image, settings.image_size), sample.name)
        rng = np.random.default_rng(seed)
        box = random_crop_box(rng, *image.size)
        return _Row(sequence, crop_resize(image, settings.image_size, box, bool(rng.random() < 0.5)), sample.name)


def extra_arrays(sequences: Sequence[TrainingSequence], text: TextConfig) -> dict[str, np.ndarray]:
    """What a batch holds besides the fields that all have: all rows of one builder have it, or none."""
    if sequences[0].image_id is not None:
        return {"image_ids": np.stack([sequence.image_id for sequence in sequences])}
    if sequences[0].qformer_ids is None:
        return {}
    shape = (len(sequences), text.max_prompt_length)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for number, sequence in enumerate(sequences):
        assert sequence.qformer_ids is not None
        ids[number, : len(sequence.qformer_ids)] = sequence.qformer_ids
        mask[number, : len(sequence.qformer_ids)] = True
    return {"qformer_ids": ids, "qformer_mask": mask}


def pad_batch(batch: TrainBatch, length: int, *, pad_id: int) -> TrainBatch:
    """``batch`` padded further to ``length`` positions, as when another host has a longer row."""
    have = batch.ids.shape[1]
    if length < have:
        raise UserError(f"a batch of {have} positions cannot be padded to {length}")

    def widen(values: np.ndarray, fill: int | bool) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, length - have)), constant_values=fill)

    return dataclasses.replace(
        batch,
        ids=widen(batch.ids, pad_id),
        slots=widen(batch.slots, -1),
        targets=widen(batch.targets, IGNORED),
        mask=widen(batch.mask, False),
    )


def _sizes(sources: Sequence[Source]) -> list[int]:
    for source in sources:
        if not 1 <= len(source) <= MAX_SAMPLES:
            raise UserError(f"{source.name} holds {len(source):,} samples; a source needs 1 to {MAX_SAMPLES:,}")
    return [len(source) for source in sources]


def _describe(sample: Sample | None, error: UserError) -> str:
    """'name: reason'; a source that could not give the sample names it itself."""
    return str(error) if sample is None or str(error).startswith(sample.name) else f"{sample.name}: {error}"
