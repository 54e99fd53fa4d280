"""The best items are exactly the best, whatever the vectors; files are read back or refused."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from mgpt4_jax.errors import UserError
from mgpt4_jax.search.vectors import Vectors


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def brute(rows: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The score of every item."""
    return np.einsum("iqc,nc->inq", rows.astype(np.float64), vectors).max(axis=-1).mean(axis=-1)


def filled(rows: np.ndarray, start: int = 0) -> Vectors:
    vectors = Vectors(*rows.shape[1:])
    vectors.add(np.arange(start, start + len(rows)), rows)
    return vectors


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("count", [1, 5, 200])
@pytest.mark.parametrize("crowded", [False, True])
def test_the_best_are_those_of_brute_force(queries: int, count: int, crowded: bool) -> None:
    """Crowded: one item owns most of the best rows of every vector, others are good on average only."""
    rng = np.random.default_rng(0)
    rows, vectors = unit(rng, 200, 7, 16), unit(rng, queries, 16)
    if crowded:
        rows[:30] = vectors[0] + 0.01 * unit(rng, 30, 7, 16)
    scores = brute(rows, vectors)
    found = filled(rows, start=1000).best(vectors, count)
    assert [item - 1000 for item, _ in found] == list(np.argsort(-scores, kind="stable")[:count])
    np.testing.assert_allclose([score for _, score in found], np.sort(scores)[::-1][:count], rtol=1e-5, atol=1e-6)


def test_it_does_not_stop_before_the_last_of_the_best_is_sure() -> None:
    """The best item on average is second for each vector, behind many that are best for one and bad for the other."""
    vectors = np.eye(2, 3, dtype=np.float32)
    rows = np.zeros((41, 1, 3), np.float32)
    rows[:20, 0], rows[20:40, 0], rows[40, 0] = (0.9, -0.9, 0), (-0.9, 0.9, 0), (0.6, 0.6, 0)
    assert filled(rows).best(vectors, 1) == [(40, pytest.approx(0.6))]


def test_items_leave_and_come_back_from_bytes() -> None:
    rng = np.random.default_rng(1)
    rows = unit(rng, 10, 3, 8)
    vectors = filled(rows)
    vectors.keep([2, 5, 9])
    assert list(vectors.items()) == [2, 5, 9] and len(vectors) == 3
    other = Vectors(3, 8)
    assert list(other.take(vectors.pack(np.array([9, 2])), Path("x"))) == [2, 9]
    np.testing.assert_array_equal(other.rows(np.array([9, 2])), rows[[9, 2]])
    assert other.best(rows[9], 5)[0] == (9, pytest.approx(1))
    vectors.keep([])
    assert vectors.best(rows[9], 5) == []


def test_what_is_no_such_file_is_named() -> None:
    vectors = filled(unit(np.random.default_rng(2), 4, 3, 8))
    data = vectors.pack(np.arange(4))
    plain = faiss.serialize_index(faiss.IndexFlatIP(8)).tobytes()
    for wrong in (b"", data[:40], b"garbage" * 9, plain):
        with pytest.raises(UserError, match=r"^d/a\.faiss: damaged .*faiss cannot read it.* delete the folder d "):
            Vectors(3, 8).take(wrong, Path("d/a.faiss"))
    for queries, width in ((3, 9), (5, 8)):
        with pytest.raises(UserError, match=rf"not {queries} of {width} numbers"):
            Vectors(queries, width).take(data, Path("d/a.faiss"))
    with pytest.raises(UserError, match="no numbers"):
        vectors.add(np.array([9]), np.full((1, 3, 8), np.nan, np.float32))
