"""Batches made ahead of time, by threads or by worker processes, in the order of their steps.

Grain does the work. What is added: batches are plain arrays that may be kept, workers end with their trainer and
not with its signals, and a worker that died or cannot work says so in one line.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import grain
import numpy as np
from absl import flags

from mgpt4_jax.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
_PLAIN = "plain values"

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Maker(Protocol[T_co]):
    """Makes the batch of a step; picklable, and safe in threads. A batch is a dataclass of arrays and plain values."""

    def __getitem__(self, step: int) -> T_co: ...


class Prefetcher(Generic[T]):
    """An iterator over ``maker[start]``, ``maker[start + 1]``, ... up to ``stop``, to be closed after use.

    Args:
      kind: the class of a batch.
      num_workers: processes; 0: threads of this one.
      num_threads: threads, in each process.
      ready: batches that wait.
      bytes_per_batch: checked against the shared memory that workers pass batches through.
    """

    def __init__(
        self,
        maker: Maker[T],
        kind: type[T],
        *,
        start: int,
        stop: int | None,
        num_workers: int,
        num_threads: int,
        ready: int,
        bytes_per_batch: int,
    ) -> None:
        self._kind, self._num_workers = kind, num_workers
        self._steps: Iterator[int] = itertools.count(start) if stop is None else iter(range(start, stop))
        steps = grain.MapDataset.source(_Steps(maker, start, stop))
        # Each thread makes a whole batch, so fewer slots than threads would leave some of them idle.
        slots = num_threads if num_workers else max(ready, num_threads)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=slots))
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads one, and only an absl program parses them
                flags.FLAGS.mark_as_parsed()
            # Grain lets that many wait on either side of the pipe, and holds one more on both.
            per_worker = -(-ready // (2 * num_workers))
            _check_shared_memory(bytes_per_batch * ((2 * per_worker + 2) * num_workers + 1))
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=per_worker)
            batches = batches.mp_prefetch(options, worker_init_fn=_prepare_worker)
        self._batches: Iterator[dict[str, np.ndarray]] = iter(batches)
        self._end = weakref.finalize(self, _end, self._batches)  # also when the program ends before it is closed

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        next(self._steps)
        try:
            return _unpack(next(self._batches), self._kind)
        except RuntimeError as error:
            if self._num_workers and "terminated unexpectedly" in str(error):
                raise UserError(_DEAD_WORKER) from error
            raise

    def close(self) -> None:
        """End the threads and workers; doing it twice does no harm. There are no batches any more."""
        self._end()
        self._batches, self._steps = iter(()), iter(())
        if self._num_workers:
            gc.collect()  # Grain's iterators and errors form circles that hold shared memory

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps:
    """The packed batches as Grain's random access source.

    It has no end, behind ``stop`` there are empty dicts: what Grain does at an end takes a second of each worker
    and holds on to the last batches.
    """

    def __init__(self, maker: Maker[Any], start: int, stop: int | None) -> None:
        self._maker, self._start, self._stop = maker, start, stop

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        step = self._start + number
        return _pack(self._maker[step]) if self._stop is None or step < self._stop else {}

    def __repr__(self) -> str:
        return f"batches from {self._start}"


def _end(batches: Any) -> None:
    batches.close()


def _pack(batch: Any) -> dict[str, np.ndarray]:
    """A batch as arrays only, which go through shared memory.

    Anything else would go through a pipe, and a worker that dies with half a message in it leaves the reader
    waiting for ever.
    """
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in values.items() if name not in arrays}
    return {**arrays, _PLAIN: np.frombuffer(json.dumps(plain).encode(), np.uint8)}


def _unpack(packed: dict[str, np.ndarray], kind: type[T]) -> T:
    """The batch again. Shared memory is freed with its last view, which a device may outlive: hence the copies."""
    arrays = {name: value if type(value) is np.ndarray else np.array(value) for name, value in packed.items()}
    return kind(**json.loads(arrays.pop(_PLAIN).tobytes()), **arrays)


_DEAD_WORKER = (
    "a data worker process was ended from outside, most often for lack of memory; "
    "lower data.num_workers, data.num_threads or data.prefetch, and run again"
)


def _prepare_worker(number: int, count: int) -> None:
    """Runs once in each worker.

    Ctrl-C and a scheduler's SIGTERM reach the whole group of processes, but the trainer wants its batches until it
    has saved; it closes its workers itself. If it was killed, they would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-trainer", daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_shared_memory(needed: int) -> None:
    """Refuse before a worker dies of a bus error: containers often have 64 MiB."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"data workers pass batches through {SHARED_MEMORY}, which has {free >> 20} MiB free and should have "
            f"{needed >> 20}; start the container with a larger --shm-size, or set data.num_workers to 0"
        )
