"""Files of data sets: patterns of paths, reads at an offset, and files that are not what their name says."""

from __future__ import annotations

import glob
import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mgpt4_jax.errors import UserError

MAX_EXPANDED = 1_000_000
MAX_READ_BYTES = 256 * 2**20  # of one picture or caption: beyond it something is wrong

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer; fetch the real file (git lfs pull)"),
    (b"<!doctype html", "is a web page; download the file itself"),
    (b"<html", "is a web page; download the file itself"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it, as samples are read from the middle of it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard; unpack it, as samples are read from the middle of it"),
    (b"pk\x03\x04", "is a ZIP archive; unpack it"),
)


class Stamp(NamedTuple):
    """What tells that a file is still the one that was looked at."""

    size: int
    mtime_ns: int


class Reads:
    """Reads at an offset, from any thread; a few files stay open, in each process its own.

    It may be pickled: the copy opens the files again when it needs them.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Handle] = OrderedDict()

    def read(self, path: Path, offset: int, size: int, stamp: Stamp) -> bytes:
        """``size`` bytes of ``path`` from ``offset``; refused when the file is no longer the one of ``stamp``."""
        if size > MAX_READ_BYTES:
            raise UserError(f"{size:,} bytes are over the cap of {MAX_READ_BYTES >> 20} MiB for one sample")
        handle = self._handle(path, stamp)
        parts: list[bytes] = []
        while size:
            try:
                part = os.pread(handle.descriptor, size, offset)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
            if not part:
                raise UserError(f"{path}: is shorter than when the run began; do not change data while it is read")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def _handle(self, path: Path, stamp: Stamp) -> _Handle:
        with self._lock:
            if handle := self._open.get(path):
                self._open.move_to_end(path)
                return handle
        handle = _Handle(path)  # outside of the lock: on a network disk this takes its time
        if handle.stamp != stamp:
            raise UserError(f"{path}: was changed since it was opened; start again with the data as it is now")
        with self._lock:
            self._open[path] = handle
            while len(self._open) > self._limit:
                self._open.popitem(last=False)  # it closes when the last thread that reads from it lets go
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]


class _Handle:
    """An open file that closes when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self.descriptor)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        self.stamp = Stamp(found.st_size, found.st_mtime_ns)

    def __del__(self, close: Any = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)


def stamp_of(path: Path) -> Stamp:
    """Size and time of a regular file; anything else is refused by name."""
    try:
        found = path.stat()
        regular = path.is_file()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not regular:
        raise UserError(f"{path}: is not a regular file")
    return Stamp(found.st_size, found.st_mtime_ns)


def refuse_impostor(path: Path, head: bytes) -> None:
    """Refuse what a failed download or a clone without its large files leaves under the name of a data set."""
    if not head:
        raise UserError(f"{path}: is empty (0 bytes); write or download it again")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, message in _IMPOSTORS:
        if text.startswith(start):
            raise UserError(f"{path}: {message}")


def read_head(path: Path, size: int = 512) -> bytes:
    """The first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_whole(path: Path) -> bytes:
    """All of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def find_files(pattern: str, inside: str) -> list[Path]:
    """Files that a pattern names: ``{00000..10488}`` and ``{a,b}`` as a shell expands them, then ``*``, ``?``, ``[]``.

    Args:
      pattern: a file, a pattern of files, or a folder, which stands for the files in it that match ``inside``.

    Raises:
      UserError: nothing matches, or a file that braces name is missing.
    """
    refuse_address(pattern)
    pattern = os.path.expanduser(pattern)
    path = Path(pattern)
    if path.is_dir():
        pattern = os.path.join(glob.escape(pattern), inside)
    elif path.exists():
        return [path]
    names = list(itertools.islice(_expand(pattern), MAX_EXPANDED + 1))
    if len(names) > MAX_EXPANDED:
        raise UserError(f"{pattern}: names over {MAX_EXPANDED:,} files; check the range in its braces")
    found: dict[Path, None] = {}
    missing: list[str] = []
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name] * os.path.exists(name)
        missing += [] if matches else [name]
        found |= dict.fromkeys(map(Path, matches))
    if not found:
        raise UserError(f"{pattern}: no such file; check the path and the pattern")
    if missing:
        others = f" (nor are {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: is not there{others}, though {pattern!r} names it; get it, or use * for a range"
        )
    return list(found)


def refuse_address(path: str) -> None:
    """Refuse ``s3://`` and the like: data is read from disks only."""
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|pipe:", path):
        raise UserError(f"{path[:120]}: {scheme[0]} is not read; download the data or mount it, and give its path")


def relative_names(paths: list[Path]) -> list[str]:
    """Names below the deepest folder that holds all of them: they stay when the data set moves."""
    top = os.path.commonpath([path.absolute().parent for path in paths])
    return [Path(os.path.relpath(path.absolute(), top)).as_posix() for path in paths]


def _expand(pattern: str) -> Iterator[str]:
    """Alternatives of the first innermost braces, each expanded further; braces without any stay as they are."""
    for match in _BRACES.finditer(pattern):
        if options := _options(match[1]):
            for option in options:
                yield from _expand(pattern[: match.start()] + option + pattern[match.end() :])
            return
    yield pattern


def _options(text: str) -> Iterator[str] | None:
    if numbers := _RANGE.fullmatch(text):
        first, last = map(int, numbers.groups())
        width = max(map(len, numbers.groups())) if any(len(n) > 1 and n[0] == "0" for n in numbers.groups()) else 0
        return (f"{number:0{width}d}" for number in range(first, last + 1))
    return iter(text.split(",")) if "," in text else None
