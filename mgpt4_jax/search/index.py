"""``SearchIndex``: pictures of folders, found by words or by a picture.

An index is a directory: ``index.json`` (see ``table.py``) and files of vectors, each written once. What is added is
saved every ``SEGMENT`` pictures, so that a killed run has lost the last of them at most and nothing of before.

Similarities are those of BLIP-2. Of words to a picture: the dot product with the best of the picture's query vectors
(ITC); the ``candidates`` best are then ordered by the probability that words and picture match (ITM), which reads the
files again. Of a picture to another: for each of its own query vectors the best of the other's, on average; each part
of what one picture shows is looked for in the other. ITM does not apply there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import ModelConfig, model_config_to_dict
from mgpt4_jax.data.images import ImageSource, load_image
from mgpt4_jax.errors import UserError
from mgpt4_jax.fingerprint import fingerprint
from mgpt4_jax.progress import Report
from mgpt4_jax.search.files import FileStamp, Read, find_pictures, read_picture
from mgpt4_jax.search.table import NAME, Picture, Segment, Table, read_table, write_file, write_table
from mgpt4_jax.search.vectors import Vectors, damaged
from mgpt4_jax.typing import Float, Params

BATCH = 16  # pictures embedded together
SEGMENT = 1024  # pictures after which what was done is saved
MAX_POOR = 8  # files of vectors that are less than half full, before they are joined
CANDIDATES = 32  # that ITM looks at; each costs a pass of the image encoder
READERS = 4  # threads that read and decode


class Embedder(Protocol):
    """What the index needs of a model: ``mgpt4_jax.api.RetrievalModel`` is one."""

    config: ModelConfig
    params: Params

    def embed_images(self, images: Sequence[ImageSource]) -> Float[np.ndarray, "i q c"]: ...

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "b c"]: ...

    def match(self, images: Sequence[ImageSource], texts: Sequence[str]) -> Float[np.ndarray, "i b"]: ...


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    path: Path
    similarity: float
    match: float | None = None  # of words, if it was asked for and the file can still be read


@dataclass
class Added:
    """What ``add`` did with the files of a folder."""

    new: int = 0  # embedded
    known: int = 0  # of the same bytes as another picture, now or before: moved or copied
    unchanged: int = 0
    removed: int = 0
    bad: list[str] = field(default_factory=list)  # "name: why"

    def line(self) -> str:
        counts = (
            ("new", self.new),
            ("moved or copied", self.known),
            ("unchanged", self.unchanged),
            ("removed", self.removed),
        )
        said = ", ".join(f"{count:,} {name}" for name, count in counts if count) or "no pictures"
        return f"{said}, {len(self.bad):,} bad" if self.bad else said


class SearchIndex:
    """An index and the model that it belongs to. Not for several threads at once; several processes may read it."""

    def __init__(self, directory: Path, model: Embedder) -> None:
        self.directory, self.model = directory, model
        self._digest = model_digest(model)
        self._table: Table
        self._vectors: Vectors | None  # None before the first picture
        self._segments: dict[str, np.ndarray]  # the items in each file of vectors
        self._load()

    @classmethod
    def open(cls, directory: str | Path, model: Embedder) -> SearchIndex:
        """Open an index; where there is none, an empty one, of which nothing is written before ``add``.

        Raises:
          UserError: it is damaged or of another model, or the directory holds something else.
        """
        directory = Path(directory)
        if directory.exists() and not (directory / NAME).exists():
            ours = (".faiss", ".partial", ".lock")  # of a first run that was killed
            if not directory.is_dir() or any(path.suffix not in ours for path in directory.iterdir()):
                raise UserError(f"{directory}: is no index of pictures (no {NAME} in it); name a new directory")
        if not hasattr(model, "embed_images"):
            raise UserError("search needs a model that embeds pictures and texts: convert one of BLIP-2's stage 1")
        return cls(directory, model)

    def __len__(self) -> int:
        return len(self._table.pictures)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The paths of all pictures in it."""
        return tuple(one.path for one in self._table.pictures)

    def add(self, folder: str | Path, report: Report | None = None) -> Added:
        """Make the index hold the pictures of ``folder`` and of its folders, as they are now.

        New and changed pictures are embedded; a file of known bytes is not, nor is an unchanged one read. Files that
        are gone are forgotten, and so is one that can no longer be read. Other folders in the index stay as they are.

        Raises:
          UserError: there is no such folder or no picture in it, it lies in another one of the index or around it, or
            another run is adding.
        """
        root = Path(folder).resolve()
        with self._alone():
            for other in {one.folder for one in self._table.pictures} - {str(root)}:
                if root.is_relative_to(other) or Path(other).is_relative_to(root):
                    raise UserError(
                        f"{folder}: overlaps {other}, which is in the index; add that one again, or remove it first"
                    )
            found = find_pictures(root)
            if not found:
                raise UserError(
                    f"{folder}: holds no pictures (.jpg, .png, .webp, ...); is the right disk mounted? "
                    "To take a folder out of the index, remove it (--remove)"
                )
            return self._add(str(root), found, report or (lambda done, total: None))

    def remove(self, folder: str | Path) -> int:
        """Forget all pictures of a folder that was added, which need not exist any more; their number."""
        names = {str(Path(folder).resolve()), str(folder)}
        with self._alone():
            others = [one for one in self._table.pictures if one.folder not in names]
            if not (count := len(self) - len(others)):
                raise UserError(
                    f"{folder}: is not in the index; it holds {', '.join(self._folders()) or 'no folder yet'}"
                )
            self._commit(others, [], [])
        return count

    def search(
        self,
        text: str | None = None,
        *,
        image: ImageSource | None = None,
        k: int = 10,
        candidates: int = CANDIDATES,
    ) -> list[Hit]:
        """The ``k`` pictures that fit words or another picture best, best first; fewer if there are not so many.

        Args:
          candidates: of words, so many of the most similar pictures are ordered by ITM (at least ``k``); 0: none.

        Raises:
          UserError: the index is empty, or not one of ``text`` and ``image`` is given.
        """
        if (text is None) == (image is None):
            raise UserError("search by words or by a picture: give one of them")
        if k < 1 or candidates < 0:
            raise UserError(f"k must be at least 1 and candidates at least 0, got {k} and {candidates}")
        if not len(self):
            raise UserError(f"{self.directory}: holds no pictures yet; add a folder first (--add FOLDER)")
        if text is None:
            picture = load_image(image)  # type: ignore[arg-type]  # just seen to be given
            return self._hits(self._vectors.best(self.model.embed_images([picture])[0], k))[:k]
        if not text.strip():
            raise UserError("the words to search for are empty; describe a picture")
        best = self._vectors.best(self.model.embed_texts([text]), max(k, candidates))
        hits = self._hits(best)
        return (self._rerank(hits, text) if candidates else hits)[:k]

    def _rerank(self, hits: list[Hit], text: str) -> list[Hit]:
        """Ordered by ITM, equal ones by similarity; files that cannot be read any more come last."""
        with ThreadPoolExecutor(READERS) as pool:
            images = list(pool.map(_try_load, hits))
        readable = [place for place, image in enumerate(images) if image is not None]
        if readable:
            matches = self.model.match([images[place] for place in readable], [text])[:, 0]
            for place, match in zip(readable, matches, strict=True):
                hits[place] = dataclasses.replace(hits[place], match=float(match))
        return sorted(hits, key=lambda hit: (-1.0 if hit.match is None else hit.match, hit.similarity), reverse=True)

    def _hits(self, best: list[tuple[int, float]]) -> list[Hit]:
        """Every file of each item; those of the same bytes stand together."""
        paths: dict[int, list[Path]] = {item: [] for item, _ in best}
        for one in self._table.pictures:
            if one.item in paths:
                paths[one.item].append(one.path)
        return [Hit(path, score) for item, score in best for path in paths[item]]

    def _add(self, folder: str, found: dict[str, FileStamp], report: Report) -> Added:
        others = [one for one in self._table.pictures if one.folder != folder]
        before = {one.name: one for one in self._table.pictures if one.folder == folder}
        now = {name: one for name, one in before.items() if name in found}
        left = [name for name, stamp in found.items() if name not in before or before[name].stamp != stamp]
        added = Added(unchanged=len(found) - len(left), removed=len(before) - len(now))
        items = {one.sha256: one.item for one in self._table.pictures}  # also of files that are gone: they may be moved
        next_item = self._table.next_item
        new_items: list[int] = []
        new_rows: list[np.ndarray] = []
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(left), BATCH):
                report(start, len(left))
                read = partial(read_picture, Path(folder), known=frozenset(items))
                files = list(pool.map(read, left[start : start + BATCH]))
                fresh = {file.sha256: file.image for file in files if file.image is not None}
                if fresh:
                    new_rows.append(self.model.embed_images(list(fresh.values())))
                    numbers = range(next_item, next_item := next_item + len(fresh))
                    items |= zip(fresh, numbers, strict=True)
                    new_items += numbers
                _note(files, folder, items, set(fresh), now, added)
                if len(new_items) >= SEGMENT:
                    gone = [one for name, one in before.items() if name not in now]  # their items may be wanted yet
                    self._commit([*others, *gone, *now.values()], new_items, new_rows)
                    new_items, new_rows = [], []
                    items = {one.sha256: one.item for one in self._table.pictures}  # what was replaced is gone
        self._commit([*others, *now.values()], new_items, new_rows)
        report(len(left), len(left))
        return added

    def _commit(self, pictures: Sequence[Picture], items: list[int], rows: list[np.ndarray]) -> None:
        """Hold exactly ``pictures``, with the vectors of the new ``items``, on the disk and then here."""
        if self._vectors is None and rows:
            self._vectors = Vectors(*rows[0].shape[1:])
        if items:
            self._vectors.add(np.array(items), np.concatenate(rows))
        try:
            table = self._write(pictures, items)
            self._table = table
            self._segments = {one.name: self._segments[one.name] for one in table.segments}
        finally:  # also when the disk is full: what is here is what is there
            if self._vectors is not None:
                self._vectors.keep({one.item for one in self._table.pictures})
        for path in (*self.directory.glob("*.faiss"), *self.directory.glob("*.partial")):
            if path.name not in self._segments:  # replaced, or left by a killed run
                path.unlink(missing_ok=True)

    def _write(self, pictures: Sequence[Picture], items: list[int]) -> Table:
        """Write the files of vectors that are new, and the table."""
        wanted = {one.item for one in pictures}
        segments, number = self._write_segments(wanted, [item for item in items if item in wanted])
        table = Table(
            self._digest,
            0 if self._vectors is None else self._vectors.queries,
            0 if self._vectors is None else self._vectors.width,
            max([self._table.next_item, *(item + 1 for item in items)]),
            number,
            segments,
            tuple(sorted(pictures, key=lambda one: (one.folder, one.name))),
        )
        if table != self._table:
            write_table(self.directory, table)
        return table

    def _write_segments(self, wanted: set[int], fresh: list[int]) -> tuple[tuple[Segment, ...], int]:
        """The files of vectors for ``wanted``: those there are, and new ones for ``fresh`` and for what is joined."""
        alive = {name: np.array([item for item in items if item in wanted]) for name, items in self._segments.items()}
        kept = [segment for segment in self._table.segments if len(alive[segment.name])]
        poor = [segment for segment in kept if len(alive[segment.name]) < SEGMENT // 2]
        if len(poor) > MAX_POOR:
            kept = [segment for segment in kept if segment not in poor]
            fresh = [*(int(item) for segment in poor for item in alive[segment.name]), *fresh]
        number = self._table.next_segment
        for start in range(0, len(fresh), SEGMENT):
            items = np.array(fresh[start : start + SEGMENT])
            data = self._vectors.pack(items)
            digest = hashlib.sha256(data).hexdigest()
            # The digest is in the name, too: what a killed run left under the same number is another file.
            segment = Segment(f"{number:06d}-{digest[:8]}.faiss", digest)
            write_file(self.directory / segment.name, data)
            self._segments[segment.name] = items
            kept, number = [*kept, segment], number + 1
        return tuple(kept), number

    def _load(self) -> None:
        """Read what is on the disk, once more if another run replaces it meanwhile."""
        table = read_table(self.directory)
        if table is None:
            self._table, self._vectors, self._segments = Table(self._digest), None, {}
            return
        if table.model != self._digest:
            raise UserError(
                f"{self.directory}: was made with another model (its weights or configuration differ); "
                "use that one, or name a new directory and add the pictures to it"
            )
        vectors = Vectors(table.queries, table.width) if table.segments else None
        try:
            segments = {segment.name: vectors.take(*self._read(segment)) for segment in table.segments}
        except FileNotFoundError as error:
            if read_table(self.directory) != table:
                return self._load()
            raise damaged(Path(error.filename), "the file is gone") from error
        wanted = {one.item for one in table.pictures}
        if lost := wanted - {int(item) for items in segments.values() for item in items}:
            raise damaged(self.directory / NAME, f"the vectors of {len(lost):,} pictures are in no file")
        if vectors is not None:
            vectors.keep(wanted)
        self._table, self._vectors, self._segments = table, vectors, segments

    def _read(self, segment: Segment) -> tuple[bytes, Path]:
        path = self.directory / segment.name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != segment.sha256:
            raise damaged(path, "its digest differs")
        return data, path

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the directory, with the index as it is now; a second writer is refused."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.directory / "writer.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror}); choose another --index"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.directory}: another run is changing this index; wait for it") from error
            if (read_table(self.directory) or Table(self._digest)) != self._table:
                self._load()
            yield
        finally:
            os.close(lock)

    def _folders(self) -> list[str]:
        return list(dict.fromkeys(one.folder for one in self._table.pictures))


def _note(
    files: Sequence[Read], folder: str, items: dict[str, int], fresh: set[str], now: dict[str, Picture], added: Added
) -> None:
    """Enter what was read into the pictures of ``now`` and the counts of ``added``."""
    for file in files:
        if file.sha256 in items and not file.error:
            same = file.name in now and now[file.name].sha256 == file.sha256  # only its times have changed
            now[file.name] = Picture(folder, file.name, file.stamp, file.sha256, items[file.sha256])
            added.new += file.sha256 in fresh
            added.unchanged += same
            added.known += file.sha256 not in fresh and not same
            fresh.discard(file.sha256)  # a second file of the same bytes is not embedded
        else:
            now.pop(file.name, None)
            added.bad.append(f"{file.name}: {file.error}")


def _try_load(hit: Hit) -> Any:
    try:
        return load_image(hit.path)
    except UserError:
        return None


def model_digest(model: Embedder) -> str:
    """Names a model by its configuration and parameters, the latter as bfloat16: the same however it was loaded."""
    digits = {
        path: fingerprint({path: leaf.astype(jnp.bfloat16)})[path] for path, leaf in flatten(model.params).items()
    }
    described = json.dumps([model_config_to_dict(model.config), sorted(digits.items())], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()
