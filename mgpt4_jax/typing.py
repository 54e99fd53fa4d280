"""Array aliases and the dimension letters used by every signature.

| letter | dimension                       | letter | dimension              |
|--------|---------------------------------|--------|------------------------|
| b      | batch                           | n      | attention heads        |
| t      | text (or query-side) positions  | k      | key/value heads        |
| q      | learned queries                 | h      | width of one head      |
| p      | patches (with the class token)  | f      | feed-forward width     |
| s      | key positions                   | v      | vocabulary             |
| d      | model width                     | l      | layers                 |
| e      | width of the image encoder      | i      | pictures               |
| r      | rank of an adapter              |        |                        |

The same letters stand in einsum strings, in sharding rules and in the README.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8

Params: TypeAlias = Mapping[str, Any]
"""A plain nested dict of arrays, e.g. ``params["llama"]["norm"]["scale"]``."""

DType: TypeAlias = Any
"""Anything ``jnp.dtype`` accepts."""

PRNGKey: TypeAlias = jax.Array

__all__ = ["Array", "Bool", "DType", "Float", "Int", "PRNGKey", "Params", "UInt8"]
