"""Where the samples of a tar are: its headers are read once, nothing is unpacked.

Members belong together by their name up to the *first* dot of the last part, as in webdataset: ``000017.jpg``,
``000017.json`` and ``000017.txt`` are the sample ``000017``. The table is kept as ``<tar>.index.npz`` beside the tar
and holds for one size and modification time of it; a table that does not fit or is damaged is made again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import os
import signal
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mgpt4_jax.data.files import Stamp, find_files, refuse_impostor, stamp_of
from mgpt4_jax.errors import UserError

VERSION = 1
INDEX_SUFFIX = ".index.npz"
PICTURE, JSON, TEXT = range(3)  # columns
PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of several in one sample the first of these counts
TEXT_SUFFIXES = ("txt", "caption")
BLOCK = tarfile.BLOCKSIZE
LOADING_THREADS = 16  # which wait for network disks together
PARALLEL_BYTES = 2**30  # of tars without a table: below it, starting processes takes longer than the work

_COLUMNS = dict.fromkeys(PICTURE_SUFFIXES, PICTURE) | {"json": JSON} | dict.fromkeys(TEXT_SUFFIXES, TEXT)
_RANK = {suffix: rank for rank, suffix in enumerate((*PICTURE_SUFFIXES, "json", *TEXT_SUFFIXES))}
_CACHE_ERRORS = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)

_log = logging.getLogger(__name__)
Report = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar, in the order of their first members. Columns: picture, JSON, text.

    28 bytes a sample and its key: five million samples are in reach of every worker's memory.
    """

    stamp: Stamp
    blocks: np.ndarray  # uint32 [n 3]; where a member's bytes begin, in blocks of 512; 0: there is no such member
    sizes: np.ndarray  # uint32 [n 3]; bytes
    keys: np.ndarray  # uint8 [sum of their lengths]
    key_ends: np.ndarray  # uint32 [n]
    duplicates: np.ndarray  # uint32; samples that have a member twice

    def __len__(self) -> int:
        return len(self.blocks)

    def key(self, index: int) -> str:
        start = int(self.key_ends[index - 1]) if index else 0
        return self.keys[start : int(self.key_ends[index])].tobytes().decode("utf-8", "backslashreplace")

    def member(self, index: int, column: int) -> tuple[int, int] | None:
        """Offset and size in bytes of a sample's member, if it has it."""
        block = int(self.blocks[index, column])
        return (block * BLOCK, int(self.sizes[index, column])) if block else None

    def is_duplicated(self, index: int) -> bool:
        place = int(np.searchsorted(self.duplicates, index))
        return place < len(self.duplicates) and int(self.duplicates[place]) == index

    def digest(self) -> str:
        """SHA-256 (hex) of names, places and sizes."""
        digest = hashlib.sha256()
        for array in (self.blocks, self.sizes, self.keys, self.key_ends, self.duplicates):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def find_tars(pattern: str) -> list[Path]:
    """Tars that a pattern names, as ``find_files`` reads it; ``laion/*`` does not mean the tables beside them."""
    return [path for path in find_files(pattern, "*.tar") if not path.name.endswith(INDEX_SUFFIX)]


def index_tars(paths: Sequence[Path], report: Report | None = None, processes: int | None = None) -> list[TarIndex]:
    """Tables of all tars, from beside them where they fit, else made (in parallel when it is much work).

    Args:
      report: called with tars done and tars in all.
      processes: None: one for each core that may be used, if there is at least a gibibyte to look through.

    Raises:
      UserError: names the first tar that cannot be read, and how many others there are.
    """
    found = try_index_tars(paths, report, processes)
    if errors := [index for index in found if isinstance(index, UserError)]:
        others = f" ({len(errors) - 1} more of {len(paths)} tars cannot be read; `mgpt4 data index` lists them)"
        raise UserError(str(errors[0]) + (others if len(errors) > 1 else ""))
    return [index for index in found if isinstance(index, TarIndex)]


def try_index_tars(
    paths: Sequence[Path], report: Report | None = None, processes: int | None = None
) -> list[TarIndex | UserError]:
    """As ``index_tars``, but with the error in the place of a tar that cannot be read."""
    found: list[TarIndex | UserError | None] = []
    done = 0
    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        for loaded in pool.map(load_index, paths):
            found.append(loaded)
            done += loaded is not None
            if report and loaded:
                report(done, len(paths))
    missing = [place for place, index in enumerate(found) if index is None]
    unwritten: list[str] = []
    for place, (index, problem) in _make_indexes([paths[place] for place in missing], processes):
        found[missing[place]] = index
        unwritten += [problem] if problem else []
        done += 1
        if report:
            report(done, len(paths))
    if unwritten:
        _log.warning(
            "%s; the tables of %d tars are kept in memory and made again by the next run", unwritten[0], len(unwritten)
        )
    return [index for index in found if index is not None]


def scan_tar(path: Path) -> TarIndex:
    """Read the headers of one tar.

    Raises:
      UserError: it is no tar, compressed, truncated, damaged, or changes meanwhile.
    """
    stamp = stamp_of(path)
    try:
        with path.open("rb") as file:
            refuse_impostor(path, file.read(BLOCK))
            index = _table(_members(path, file, stamp.size), stamp)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if stamp_of(path) != stamp:
        raise UserError(f"{path}: changes while it is read; wait until it is written")
    return index


def index_path(path: Path) -> Path:
    """Where the table of a tar is kept."""
    return path.with_name(path.name + INDEX_SUFFIX)


def load_index(path: Path) -> TarIndex | None:
    """The table beside a tar, if it is there, whole, and fits the tar as it is now."""
    try:
        with index_path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            version, size, mtime_ns = file["tar"].tolist()
            stamp = Stamp(size, mtime_ns)
            if version != VERSION or stamp != stamp_of(path):
                return None
            index = TarIndex(stamp, file["blocks"], file["sizes"], file["keys"], file["key_ends"], file["duplicates"])
    except UserError:
        return None  # the tar itself is not there: scanning it will say so
    except _CACHE_ERRORS:
        return None
    return index if _is_sound(index) else None


def save_index(index: TarIndex, path: Path) -> None:
    """Write the table beside its tar; a reader sees the old one or the new one, never half of it."""
    target = index_path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    content = io.BytesIO()
    np.savez(
        content,
        tar=np.array([VERSION, *index.stamp], np.int64),
        blocks=index.blocks,
        sizes=index.sizes,
        keys=index.keys,
        key_ends=index.key_ends,
        duplicates=index.duplicates,
    )
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# --- making tables -----------------------------------------------------------------------------------------

Made = tuple[TarIndex | UserError, str | None]


def _make_indexes(paths: Sequence[Path], processes: int | None) -> Iterator[tuple[int, Made]]:
    """Tables in the order in which they are ready, with their places."""
    if processes is None:
        size = sum(path.stat().st_size for path in paths if path.exists())
        processes = len(os.sched_getaffinity(0)) if size >= PARALLEL_BYTES else 1
    processes = min(processes, len(paths))
    if processes < 2:
        yield from ((place, _make_index(path)) for place, path in enumerate(paths))
        return
    # Reading headers is Python's work, which threads would not share; a fork would copy JAX's threads half.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield from _as_ready(pool, paths)
    except BrokenProcessPool as error:
        raise UserError(
            "the processes that index tars died: if this is a program of yours, put its work under "
            "`if __name__ == '__main__':`, or run `mgpt4 data index` first"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C is the main process's to handle; a table that is being made is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_ready(pool: Executor, paths: Sequence[Path]) -> Iterator[tuple[int, Made]]:
    places: dict[Future[Made], int] = {pool.submit(_make_index, path): place for place, path in enumerate(paths)}
    for future in as_completed(places):
        yield places[future], future.result()


def _make_index(path: Path) -> Made:
    """The table or why there is none, and why it could not be kept."""
    try:
        index = scan_tar(path)
    except UserError as error:
        return error, None
    try:
        save_index(index, path)
    except OSError as error:
        return index, f"{index_path(path)}: cannot be written ({error.strerror or error})"
    return index, None


def _members(path: Path, file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Headers of the tar's members; unlike ``tarfile`` alone, it does not take damage for the end."""
    file.seek(0)
    offset = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                if member.offset <= offset:
                    raise UserError(f"{path}: is damaged at byte {offset}: a header points backwards; write it again")
                offset = member.offset
                tar.members.clear()  # type: ignore[attr-defined]  # they would grow with the tar
                yield member
            end = tar.offset
    except tarfile.ReadError as error:
        mend = "write or download it again"
        if "end of data" in str(error):
            raise UserError(f"{path}: is truncated in its last member (at {size:,} bytes); {mend}") from error
        raise UserError(f"{path}: is not a tar, or is damaged ({error}); {mend}") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: is damaged behind byte {max(offset, 0):,} ({error}); write it again") from error
    file.seek(end)
    rest = file.read(2**20)
    if len(rest) % BLOCK:
        raise UserError(f"{path}: is truncated (at {size:,} bytes); write or download it again")
    if rest.strip(b"\0"):
        raise UserError(f"{path}: is damaged at byte {end:,}, or more tars were joined to it; write it again as one")


def _table(members: Iterable[tarfile.TarInfo], stamp: Stamp) -> TarIndex:
    places: dict[bytes, int] = {}
    rows: list[list[int]] = []  # for each sample and column: block, size, rank of the suffix
    duplicates: set[int] = set()
    for member in members:
        name = member.name.removeprefix("./")
        folder, slash, last = name.rpartition("/")
        stem, dot, suffix = last.partition(".")
        column = _COLUMNS.get(suffix.lower()) if dot and stem and not last.startswith("__") else None
        if column is None or not member.isreg() or member.issparse():
            continue
        place = places.setdefault(os.fsencode(folder + slash + stem), len(rows))
        if place == len(rows):
            rows.append([0] * 9)
        row, rank = rows[place], _RANK[suffix.lower()]
        block, _, held = row[3 * column : 3 * column + 3]
        if block and held == rank:
            duplicates.add(place)
        elif not block or rank < held:
            row[3 * column : 3 * column + 3] = member.offset_data // BLOCK, min(member.size, 2**32 - 1), rank
    table = np.array(rows, np.uint32).reshape(-1, 3, 3)
    return TarIndex(
        stamp,
        blocks=np.ascontiguousarray(table[:, :, 0]),
        sizes=np.ascontiguousarray(table[:, :, 1]),
        keys=np.frombuffer(b"".join(places), np.uint8),
        key_ends=np.cumsum([len(key) for key in places], dtype=np.uint32),
        duplicates=np.array(sorted(duplicates), np.uint32),
    )


def _is_sound(index: TarIndex) -> bool:
    """Whether a table's arrays fit each other and the tar."""
    count = len(index.blocks)
    shapes = {"blocks": (count, 3), "sizes": (count, 3), "key_ends": (count,)}
    if any(getattr(index, name).shape != shape for name, shape in shapes.items()):
        return False
    if any(array.dtype != np.uint32 for array in (index.blocks, index.sizes, index.key_ends, index.duplicates)):
        return False
    if index.keys.dtype != np.uint8 or index.keys.ndim != 1 or index.duplicates.ndim != 1:
        return False
    ends = index.blocks.astype(np.int64) * BLOCK + index.sizes
    return (
        bool(np.all(ends <= index.stamp.size))
        and bool(np.all(np.diff(index.key_ends.astype(np.int64), prepend=0) > 0))
        and (int(index.key_ends[-1]) if count else 0) == len(index.keys)
        and bool(np.all(index.duplicates < count))
    )
