"""Batches made ahead of time, by threads or by worker processes, in the order of their steps.

Grain does the work. What is added: batches are plain arrays that may be kept, workers end with their trainer and
not with its signals, and a worker that died or cannot work says so in one line.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
import threading
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
_EMPTY = np.zeros(0, np.uint8)


class PixelBatch(Protocol):
    """A frozen dataclass with one large array."""

    @property
    def pixels(self) -> np.ndarray: ...


T = TypeVar("T", bound=PixelBatch)
T_co = TypeVar("T_co", bound=PixelBatch, covariant=True)


class Maker(Protocol[T_co]):
    """Makes the batch of a step; picklable, and safe in threads."""

    def __getitem__(self, step: int) -> T_co: ...


class Prefetcher(Generic[T]):
    """An iterator over ``maker[start]``, ``maker[start + 1]``, ... up to ``stop``, to be closed after use.

    Args:
      num_workers: processes; 0: threads of this one.
      num_threads: threads, in each process.
      ready: batches that wait.
      bytes_per_batch: checked against the shared memory that workers pass batches through.
    """

    def __init__(
        self,
        maker: Maker[T],
        *,
        start: int,
        stop: int | None,
        num_workers: int,
        num_threads: int,
        ready: int,
        bytes_per_batch: int,
    ) -> None:
        self._num_workers = num_workers
        steps = grain.MapDataset.source(_Steps(maker, start, sys.maxsize if stop is None else stop))
        # Each thread makes a whole batch, so fewer slots than threads would leave some of them idle.
        slots = num_threads if num_workers else max(ready, num_threads)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=slots))
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads one, and only an absl program parses them
                flags.FLAGS.mark_as_parsed()
            per_worker = -(-ready // num_workers)
            _check_shared_memory(bytes_per_batch * ((per_worker + 1) * num_workers + 1))
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=per_worker)
            batches = batches.mp_prefetch(options, worker_init_fn=_prepare_worker)
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            pixels, batch = next(self._batches)
        except RuntimeError as error:
            if self._num_workers and "terminated unexpectedly" in str(error):
                raise UserError(_DEAD_WORKER) from error
            raise
        # What came through shared memory is freed with its last view, which a device may outlive.
        own = np.array(pixels) if type(pixels) is not np.ndarray else pixels
        return dataclasses.replace(batch, pixels=own)

    def close(self) -> None:
        """End the threads and workers; doing it twice does no harm."""
        self._batches.close()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Steps(Generic[T]):
    """The batches as Grain's random access source. The pixels come beside the rest: arrays travel fast, objects not."""

    def __init__(self, maker: Maker[T], start: int, stop: int) -> None:
        self._maker, self._start, self._stop = maker, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, number: int) -> tuple[np.ndarray, Any]:
        batch: Any = self._maker[self._start + number]
        return batch.pixels, dataclasses.replace(batch, pixels=_EMPTY)

    def __repr__(self) -> str:
        return f"batches {self._start} to {self._stop}"


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
