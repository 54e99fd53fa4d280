"""Pictures of a folder: which there are, whether they are still the same, and what they hold."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mgpt4_jax.data.images import load_image
from mgpt4_jax.errors import UserError

SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .jp2 .j2k .avif".split())
MAX_BYTES = 256 * 2**20  # of one file: beyond it something is wrong


class FileStamp(NamedTuple):
    """What tells, without reading it, that a file is still the one that was looked at.

    The time of change is no one's to set, so that a tool that puts old times back shows.
    """

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Read:
    """A file as it was read: its stamp, the digest of its bytes, and the picture or why there is none."""

    name: str  # from its folder
    stamp: FileStamp
    sha256: str = ""
    image: Image.Image | None = None
    error: str = ""


def find_pictures(folder: Path) -> dict[str, FileStamp]:
    """Files below ``folder`` whose ending is a picture's, by their path from it, in order.

    Links to folders are not followed, since they may lead round in a circle; links to pictures are.

    Raises:
      UserError: a folder cannot be read; what it holds would seem to be deleted.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); nothing was added or removed") from error

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of pictures")
    found = {}
    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                path = os.path.join(parent, name)
                found[os.path.relpath(path, folder)] = stamp_of(path)
    return {name: found[name] for name in sorted(found)}


def stamp_of(path: str | Path) -> FileStamp:
    """The stamp of a file; of one that is gone or not regular, zeros: reading it will tell why."""
    try:
        status = os.stat(path)
    except OSError:
        return FileStamp(0, 0, 0)
    regular = stat.S_ISREG(status.st_mode)
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns) if regular else FileStamp(0, 0, 0)


def read_picture(folder: Path, name: str, known: frozenset[str]) -> Read:
    """Read and decode one file; one whose digest is in ``known`` is not decoded.

    The stamp is taken before, so that a file written meanwhile is looked at again the next time.
    """
    path = folder / name
    stamp = stamp_of(path)
    try:
        if not path.is_file():
            raise UserError("no longer there" if not os.path.lexists(path) else "not a regular file")
        if stamp.size > MAX_BYTES:
            raise UserError(f"{stamp.size:,} bytes are over the cap of {MAX_BYTES >> 20} MiB for one picture")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        image = None if digest in known else load_image(data)
        return Read(name, stamp, digest, image)
    except OSError as error:
        return Read(name, stamp, error=error.strerror or str(error))
    except UserError as error:
        return Read(name, stamp, error=str(error).removeprefix("the picture's bytes: "))
