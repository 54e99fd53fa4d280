"""Attention masks: boolean, True where a query position (row) may attend to a key position (column).

They become minus infinity in one place only, ``layers.attend``. Masks have shape ``[b t s]``;
a size of 1 broadcasts. The matrices drawn here are the literals of ``tests/models/test_masks.py``.
"""

from __future__ import annotations

import jax.numpy as jnp

from mgpt4_jax.typing import Array, Bool, Int


def causal_mask(length: int) -> Bool[Array, "1 t t"]:
    """Each position sees itself and its past.

    ::

        causal_mask(3):  1 0 0
                         1 1 0
                         1 1 1
    """
    position = jnp.arange(length)
    return (position[None, :] <= position[:, None])[None]


def padding_mask(valid: Bool[Array, "b s"]) -> Bool[Array, "b 1 s"]:
    """Every position sees the valid keys.

    ::

        padding_mask([[1, 1, 0]]):  1 1 0     (for each row)
    """
    return valid[:, None, :]


def decode_mask(positions: Int[Array, "b t"], capacity: int) -> Bool[Array, "b t s"]:
    """Queries that stand at ``positions`` of a cache with room for ``capacity`` keys.

    ::

        decode_mask([[2, 3]], 5):  1 1 1 0 0
                                   1 1 1 1 0
    """
    return jnp.arange(capacity)[None, None, :] <= positions[:, :, None]


def unimodal_mask(num_queries: int, text_valid: Bool[Array, "b t"]) -> Bool[Array, "b s s"]:
    """ITC: queries see queries, text sees text (BLIP-2, section 3.2, figure 2 right).

    ::

        2 queries, text 1 1 0:  1 1 0 0 0
                                1 1 0 0 0
                                0 0 1 1 0
                                0 0 1 1 0
                                0 0 1 1 0
    """
    is_text = jnp.arange(num_queries + text_valid.shape[1]) >= num_queries
    return (is_text[:, None] == is_text[None, :])[None] & _joint_valid(num_queries, text_valid)


def multimodal_causal_mask(num_queries: int, text_valid: Bool[Array, "b t"]) -> Bool[Array, "b s s"]:
    """ITG: queries see queries only, text sees all queries and its own past ("UniLM").

    ::

        2 queries, text 1 1 0:  1 1 0 0 0
                                1 1 0 0 0
                                1 1 1 0 0
                                1 1 1 1 0
                                1 1 1 1 0
    """
    position = jnp.arange(num_queries + text_valid.shape[1])
    is_query = position < num_queries
    allowed = is_query[None, :] | (position[None, :] <= position[:, None]) & ~is_query[:, None]
    return allowed[None] & _joint_valid(num_queries, text_valid)


def bidirectional_mask(num_queries: int, text_valid: Bool[Array, "b t"]) -> Bool[Array, "b 1 s"]:
    """ITM: everything sees everything that is not padding.

    ::

        2 queries, text 1 1 0:  1 1 1 1 0     (for each row)
    """
    return _joint_valid(num_queries, text_valid)


def _joint_valid(num_queries: int, text_valid: Bool[Array, "b t"]) -> Bool[Array, "b 1 s"]:
    queries = jnp.ones((text_valid.shape[0], num_queries), bool)
    return padding_mask(jnp.concatenate([queries, text_valid.astype(bool)], axis=1))
