"""``index.json``: what an index holds. The only file that is ever replaced; the others are written once.

It names the files of vectors with their digests and carries a digest of itself. A change of the index is new files
and then, in one step, a new table: before that step the index is the old one, after it the new one, and what a killed
run leaves is named by no table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgpt4_jax.errors import UserError
from mgpt4_jax.search.files import FileStamp
from mgpt4_jax.search.vectors import damaged

FORMAT_VERSION = 1
NAME = "index.json"


@dataclass(frozen=True)
class Picture:
    """A file in the index. Files of the same bytes are one item."""

    folder: str  # absolute
    name: str  # from there
    stamp: FileStamp
    sha256: str
    item: int

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)


@dataclass(frozen=True)
class Segment:
    """A file of vectors."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Table:
    """What an index holds, and of which model."""

    model: str = ""  # the digest of its parameters and configuration
    queries: int = 0  # vectors of a picture
    width: int = 0  # numbers of a vector
    next_item: int = 0
    next_segment: int = 0
    segments: tuple[Segment, ...] = ()
    pictures: tuple[Picture, ...] = ()


def read_table(directory: Path) -> Table | None:
    """The table of an index, or None if there is none yet.

    Raises:
      UserError: it is damaged or of another version.
    """
    path = directory / NAME
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        about = json.loads(head)
        if (version := about["format_version"]) != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}")
        if hashlib.sha256(body).hexdigest() != about["sha256"]:
            raise damaged(path, "its digest differs")
        values = json.loads(body)
        folders, pictures = values.pop("folders"), values.pop("pictures")
        return Table(
            **values | {"segments": tuple(Segment(*segment) for segment in values["segments"])},
            pictures=tuple(
                Picture(folders[place], name, FileStamp(*stamp), sha256, item)
                for place, name, stamp, sha256, item in pictures
            ),
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise damaged(path, type(error).__name__) from error


def write_table(directory: Path, table: Table) -> None:
    """Put ``table`` in the place of the one that is there, in one step."""
    folders = {folder: place for place, folder in enumerate(dict.fromkeys(one.folder for one in table.pictures))}
    values: dict[str, Any] = {
        field.name: getattr(table, field.name) for field in dataclasses.fields(table) if field.name != "pictures"
    }
    values["segments"] = [dataclasses.astuple(segment) for segment in table.segments]
    values["folders"] = list(folders)
    values["pictures"] = [[folders[one.folder], one.name, one.stamp, one.sha256, one.item] for one in table.pictures]
    body = json.dumps(values).encode()
    head = json.dumps({"format_version": FORMAT_VERSION, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    write_file(directory / NAME, head + b"\n" + body)


def write_file(path: Path, data: bytes) -> None:
    """A file that has its name only when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space there, then add again") from error
