"""Which samples make which batch: a function of the step alone, for any number of samples.

Nothing is remembered between two steps, so that a run goes on where it stopped, and worker processes and hosts
agree, without a word about it being saved or sent.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

MAX_SAMPLES = 2**31 - 1  # of one source: Grain's shuffle counts in 32 bits
_ENDLESS = 2**62


class Place(NamedTuple):
    """One sample: which source, and where in it."""

    source: int
    position: int


class Order(Protocol):
    """The places of every row of a batch; None for a row that only fills it."""

    def places(self, step: int) -> list[Place | None]: ...


class TrainOrder:
    """Endless batches, each taken whole from one source (MiniGPT-4's ``MultiIterLoader``).

    Each source is shuffled anew in every epoch of its own, and an epoch holds each sample exactly once; a batch may
    span two epochs, and a source with fewer samples than a batch repeats within it. The sources take turns by their
    weights, evenly spread, where the original draws lots with the same expectation.

    Args:
      sizes: samples of each source, from 1.
      weights: how often each source is drawn, above 0; only their ratio counts.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int) -> None:
        self._arguments = (tuple(sizes), tuple(weights), batch_size, seed)
        streams = []
        for number, size in enumerate(sizes):
            shuffled = grain.MapDataset.range(size).shuffle(seed=_seed_of_source(seed, number))
            endless = shuffled.repeat(_ENDLESS // size)  # repeat() counts too far for batches of one
            streams.append(endless.batch(batch_size).map(_Tag(number)))
        self._batches = grain.MapDataset.mix(streams, list(weights))
        self[0]  # Grain prepares itself at the first look, which threads must not do at once

    def __getitem__(self, step: int) -> tuple[int, np.ndarray]:
        """The source of batch ``step`` and the indices of its samples: int64 [batch_size]."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        return self._batches[step]

    def places(self, step: int) -> list[Place | None]:
        source, indices = self[step]
        return [Place(source, int(index)) for index in indices]

    def __reduce__(self) -> tuple[type[TrainOrder], tuple[tuple[int, ...], tuple[float, ...], int, int]]:
        return TrainOrder, self._arguments


class SequentialOrder:
    """Every sample of every source once, in order; the last batch is filled up with None."""

    def __init__(self, sizes: Sequence[int], batch_size: int) -> None:
        self._ends = list(itertools.accumulate(sizes))
        self._batch_size = batch_size

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self._ends[-1] // self._batch_size) if self._ends else 0

    def places(self, step: int) -> list[Place | None]:
        first = step * self._batch_size
        return [self._place(position) for position in range(first, first + self._batch_size)]

    def _place(self, position: int) -> Place | None:
        source = bisect.bisect_right(self._ends, position)
        if source == len(self._ends):
            return None
        return Place(source, position - (self._ends[source - 1] if source else 0))


def replacements(index: int, size: int) -> Iterator[int]:
    """Where to look for a sample instead of ``index``: every other place of a source of ``size`` samples, once.

    The steps are long, about 0.62 of the source: what lies beside a bad sample, in the same damaged file, is
    likely bad too.
    """
    stride = max(round(size * 0.618), 1)
    while math.gcd(stride, size) != 1:
        stride += 1
    return ((index + attempt * stride) % size for attempt in range(1, size))


class _Tag:
    """Puts the number of its source beside a batch of indices."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, indices: np.ndarray) -> tuple[int, np.ndarray]:
        return self._number, indices.astype(np.int64)


def _seed_of_source(seed: int, number: int) -> int:
    """A seed of 32 bits. Grain adds the epoch to it, so that seeds in a row would share their epochs."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
