"""The matrices drawn in ``models/masks.py``, literally."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mgpt4_jax.models import masks

TEXT_VALID = jnp.array([[1, 1, 0]])  # integers, as tokenisers give them


def _matrix(mask, rows: int) -> list[str]:
    """One row of a mask as strings of 0 and 1, with size-1 axes broadcast."""
    assert mask.dtype == jnp.bool_
    full = np.broadcast_to(mask[0], (rows, mask.shape[-1])).astype(int)
    return ["".join(map(str, row)) for row in full]


def test_causal_mask():
    assert masks.causal_mask(3).shape == (1, 3, 3)
    assert _matrix(masks.causal_mask(3), 3) == ["100", "110", "111"]


def test_padding_mask():
    mask = masks.padding_mask(TEXT_VALID.astype(bool))
    assert mask.shape == (1, 1, 3)
    assert _matrix(mask, 3) == ["110", "110", "110"]


def test_decode_mask():
    assert _matrix(masks.decode_mask(jnp.array([[2, 3]]), 5), 2) == ["11100", "11110"]


def test_decode_mask_of_one_row_at_its_own_position():
    mask = masks.decode_mask(jnp.array([[0], [2]]), 3)
    assert mask.tolist() == [[[True, False, False]], [[True, True, True]]]


def test_unimodal_mask():
    expected = ["11000", "11000", "00110", "00110", "00110"]
    assert _matrix(masks.unimodal_mask(2, TEXT_VALID), 5) == expected


def test_multimodal_causal_mask():
    expected = ["11000", "11000", "11100", "11110", "11110"]
    assert _matrix(masks.multimodal_causal_mask(2, TEXT_VALID), 5) == expected


def test_bidirectional_mask():
    assert _matrix(masks.bidirectional_mask(2, TEXT_VALID), 5) == ["11110"] * 5


def test_rows_of_a_batch_keep_their_own_padding():
    valid = jnp.array([[1, 1, 1], [1, 0, 0]])
    for make in (masks.unimodal_mask, masks.multimodal_causal_mask, masks.bidirectional_mask):
        both = make(2, valid)
        for row in range(2):
            np.testing.assert_array_equal(both[row], make(2, valid[row : row + 1])[0])
