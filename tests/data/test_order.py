"""Which samples make which batch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from mgpt4_jax.data.order import Place, SequentialOrder, TrainOrder, replacements


def indices(order: TrainOrder, source: int, steps: int) -> np.ndarray:
    """What a source gives over the first ``steps`` batches of all."""
    return np.concatenate([batch for number, batch in map(order.__getitem__, range(steps)) if number == source])


def test_the_order_is_this_one() -> None:
    """Recorded: with another order, a run that goes on would see samples twice and others never."""
    order = TrainOrder([1000, 7], [115, 14], 4, 42)
    recorded = [(0, [950, 730, 83, 229]), (0, [627, 414, 206, 528]), (1, [1, 5, 6, 2])]
    assert [(number, batch.tolist()) for number, batch in map(order.__getitem__, range(7, 10))] == recorded


@pytest.mark.parametrize("size", [1, 2, 10, 37])
def test_an_epoch_holds_each_sample_once(size: int) -> None:
    order = TrainOrder([size], [1.0], 8, seed=3)
    drawn = indices(order, 0, 3 * size)  # 24 epochs
    epochs = drawn.reshape(-1, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (24, 1)))
    if size > 2:
        assert len({tuple(epoch) for epoch in epochs}) > 20  # each shuffled anew


def test_epochs_of_two_sources_are_their_own() -> None:
    order = TrainOrder([30, 30], [1, 1], 5, seed=0)
    first, second = indices(order, 0, 24), indices(order, 1, 24)
    for drawn in (first, second):
        np.testing.assert_array_equal(np.sort(drawn.reshape(2, 30)), np.tile(np.arange(30), (2, 1)))
    assert not np.array_equal(first, second)


def test_batches_are_whole_and_mixed_by_weight() -> None:
    order = TrainOrder([500_000, 80_000], [115, 14], 3, seed=1)
    counts = np.bincount([order[step][0] for step in range(1290)])
    assert abs(counts[0] - 1150) <= 1
    assert counts.sum() == 1290
    for start in range(0, 1290, 129):  # and evenly
        assert abs(sum(order[step][0] for step in range(start, start + 129)) - 14) <= 1


@pytest.mark.parametrize("weights", [[1.0], [0.5, 2.5], [1e-3, 1.0], [3, 2, 1]])
def test_weights_of_any_size(weights: list[float]) -> None:
    order = TrainOrder([100_000] * len(weights), weights, 1, seed=0)
    counts = np.bincount([order[step][0] for step in range(6006)], minlength=len(weights))
    np.testing.assert_allclose(counts / 6006, np.array(weights) / sum(weights), atol=1e-3)


def test_a_step_needs_no_other() -> None:
    order = TrainOrder([50, 20], [2, 1], 4, seed=9)
    forward = [order[step][1].tolist() for step in range(40)]
    again = pickle.loads(pickle.dumps(TrainOrder([50, 20], [2, 1], 4, seed=9)))  # noqa: S301
    assert [again[step][1].tolist() for step in reversed(range(40))] == forward[::-1]
    assert order.places(3) == [Place(order[3][0], index) for index in forward[3]]


def test_seeds_differ() -> None:
    one, two = TrainOrder([100], [1], 20, seed=1), TrainOrder([100], [1], 20, seed=2)
    assert one[0][1].tolist() != two[0][1].tolist()
    # Grain adds the epoch to a seed: a run must not begin with the second epoch of its neighbour
    assert indices(one, 0, 10)[100:].tolist() != indices(two, 0, 5).tolist()


def test_another_process_draws_the_same() -> None:
    program = "from mgpt4_jax.data.order import TrainOrder; print(TrainOrder([50, 20], [2, 1], 4, 9)[11][1].tolist())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(TrainOrder([50, 20], [2, 1], 4, 9)[11][1].tolist())


def test_millions_of_samples_cost_no_lists() -> None:
    program = """
import resource
from mgpt4_jax.data.order import TrainOrder, replacements
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
order = TrainOrder([2**31 - 1, 5_000_000], [115, 14], 64, 0)
seen = [order[step][1].max() for step in (0, 1, 100, 10**9, 10**12)]
next(replacements(5, 5_000_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, max(seen))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    kilobytes, largest = map(int, done.stdout.split())
    assert kilobytes < 4000
    assert largest > 2**30


def test_steps_before_the_first_are_refused() -> None:
    with pytest.raises(IndexError, match="from 0, got -1"):
        TrainOrder([5], [1], 2, 0)[-1]


def test_validation_sees_each_sample_once() -> None:
    order = SequentialOrder([3, 1, 4], 3)
    assert len(order) == 3
    assert [order.places(step) for step in range(3)] == [
        [Place(0, 0), Place(0, 1), Place(0, 2)],
        [Place(1, 0), Place(2, 0), Place(2, 1)],
        [Place(2, 2), Place(2, 3), None],
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 100])
def test_replacements_are_every_other_sample_once(size: int) -> None:
    for index in {0, size // 2, size - 1}:
        assert sorted([index, *replacements(index, size)]) == list(range(size))


def test_replacements_leave_the_neighbourhood() -> None:
    near = [abs(other - 2_000_000) for other in islice(replacements(2_000_000, 5_000_000), 20)]
    assert min(near) > 50_000
