"""The vectors of an index, on faiss (``faiss-cpu``): the pictures with the best vectors, none of them missed.

Why faiss: its flat index compares with every vector, so that nothing is missed whatever the data, where a graph of
neighbours gives up some without a word (hnswlib is one; so is usearch's index, which can scan too but builds and stores
its graph all the same). It removes rows, stores itself without pickle, needs NumPy alone, is kept up by those who wrote
it, and comes as one wheel for every Python from 3.10 on, for Linux on x86-64 and arm64, without CUDA. hnswlib comes as
source only.

A flat index of float32 takes 32 KiB of memory for a picture at BLIP-2's size (32 queries of 256): 3 GiB for 100,000.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.errors import UserError
from mgpt4_jax.typing import Float, Int

MARGIN = 1e-5  # between the library's sums and ours
CHUNK = 1024  # items whose rows are looked at together


class Vectors:
    """Unit vectors: ``queries`` rows of ``width`` numbers for each item, which a number names.

    The row of a query has the number ``item * queries + query``. All of them are in memory.
    """

    def __init__(self, queries: int, width: int) -> None:
        self.queries, self.width = queries, width
        self._index = _new_index(width)

    def __len__(self) -> int:
        return self._index.ntotal // self.queries

    def add(self, items: Int[np.ndarray, " i"], rows: Float[np.ndarray, "i q c"]) -> None:
        """Take up new items.

        Raises:
          UserError: a vector is no number, as a broken model gives.
        """
        if not np.isfinite(rows).all():
            raise UserError("the model gives vectors that are no numbers (NaN); convert it again, or use float32")
        flat = np.ascontiguousarray(rows, np.float32).reshape(-1, self.width)
        self._index.add_with_ids(flat, self._numbers(items))

    def keep(self, items: Iterable[int]) -> None:
        """Forget all other items."""
        other = np.setdiff1d(self.items(), np.fromiter(items, np.int64))
        if len(other):
            self._index.remove_ids(self._numbers(other))

    def items(self) -> Int[np.ndarray, " i"]:
        """The numbers of the items, ascending."""
        import faiss

        return np.unique(faiss.vector_to_array(self._index.id_map) // self.queries)

    def rows(self, items: Int[np.ndarray, " i"]) -> Float[np.ndarray, "i q c"]:
        """The vectors of some items."""
        return self._index.reconstruct_batch(self._numbers(items)).reshape(-1, self.queries, self.width)

    def best(self, vectors: Float[np.ndarray, "n c"], count: int) -> list[tuple[int, float]]:
        """The ``count`` items most similar to ``vectors``, best first, with their scores; exactly those.

        An item's score is, averaged over ``vectors``, the dot product with its best row. The library gives the best
        rows of each vector, which name candidates; of items not among them, no row is above the last one given. When
        that cannot reach the last of the best, nothing was missed; until then more rows are asked for.
        """
        count, total = min(count, len(self)), self._index.ntotal
        vectors = np.ascontiguousarray(vectors, np.float32)
        rows = min(total, count * self.queries)
        while count:
            found, numbers = self._index.search(vectors, rows)
            items = np.unique(numbers // self.queries)
            scores = self._scores(vectors, items)
            order = np.argsort(-scores, kind="stable")[:count]
            beyond = float(found[:, -1].mean())
            if rows == total or (len(order) == count and scores[order[-1]] > beyond + MARGIN):
                return [(int(items[i]), float(scores[i])) for i in order]
            rows = min(total, rows * 4)
        return []

    def _scores(self, vectors: Float[np.ndarray, "n c"], items: Int[np.ndarray, " i"]) -> Float[np.ndarray, " i"]:
        parts = [
            (self.rows(items[start : start + CHUNK]) @ vectors.T).max(axis=1).mean(axis=1)
            for start in range(0, len(items), CHUNK)
        ]
        return np.concatenate(parts)

    def _numbers(self, items: Int[np.ndarray, " i"]) -> Int[np.ndarray, " r"]:
        return (np.asarray(items, np.int64)[:, None] * self.queries + np.arange(self.queries)).ravel()

    def pack(self, items: Int[np.ndarray, " i"]) -> bytes:
        """Some items as the bytes of a faiss index."""
        import faiss

        part = Vectors(self.queries, self.width)
        part.add(items, self.rows(items))
        return faiss.serialize_index(part._index).tobytes()

    def take(self, data: bytes, path: Path) -> Int[np.ndarray, " i"]:
        """Add the items that ``pack`` wrote and return their numbers; ``path`` is how errors call the data."""
        import faiss

        try:
            index: Any = faiss.deserialize_index(np.frombuffer(data, np.uint8))
            numbers = faiss.vector_to_array(index.id_map)
        except (RuntimeError, AttributeError) as error:
            raise damaged(path, "faiss cannot read it") from error
        if index.d != self.width or len(numbers) != index.ntotal or len(numbers) % self.queries:
            raise damaged(path, f"its vectors are not {self.queries} of {self.width} numbers a picture")
        self._index.merge_from(index)
        return np.unique(numbers // self.queries)


def damaged(path: Path, why: str) -> UserError:
    """The error of a file of an index that is not as it was written."""
    return UserError(
        f"{path}: damaged ({why}); put the file back, or delete the folder {path.parent} and add the pictures again"
    )


def _new_index(width: int) -> Any:
    """A flat index of inner products whose rows have numbers."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("search needs faiss-cpu; install it with: pip install 'mgpt4-jax[search]'") from error
    return faiss.IndexIDMap2(faiss.IndexFlatIP(width))
