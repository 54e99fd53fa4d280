"""Named layout changes between a PyTorch tensor and our parameters, each with its inverse.

A forward function takes one source tensor and returns the parameters made of it (mostly one); the
inverse takes them back, given the source's shape. All return views where they can; ``contiguous``
makes the one copy. Values are never changed, so a round trip is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    name: str
    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    inverse: Callable[[Sequence[np.ndarray], Shape], np.ndarray]
    dtype: np.dtype | None = None  # of the results, if not the source's


def same() -> Transform:
    return Transform("same", lambda x: (x,), lambda parts, shape: parts[0])


def reshape(target: Shape) -> Transform:
    """Only leading or trailing axes of size 1 differ, or one axis is cut in several."""
    return Transform("reshape", lambda x: (x.reshape(target),), lambda parts, shape: parts[0].reshape(shape))


def transpose() -> Transform:
    """``torch.nn.Linear`` keeps [out in], we keep [in out]."""
    return Transform("transpose", lambda x: (x.T,), lambda parts, shape: parts[0].T)


def heads_in(num_heads: int) -> Transform:
    """A projection onto heads: [(n h) d] -> [d n h]; its bias: [(n h)] -> [n h]."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        heads = x.reshape(num_heads, x.shape[0] // num_heads, *x.shape[1:])
        return (heads if x.ndim == 1 else heads.transpose(2, 0, 1),)

    def inverse(parts: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        return (parts[0] if len(shape) == 1 else parts[0].transpose(1, 2, 0)).reshape(shape)

    return Transform(f"heads_in({num_heads})", forward, inverse)


def heads_out(num_heads: int) -> Transform:
    """The projection back: [d (n h)] -> [n h d]."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.T.reshape(num_heads, x.shape[1] // num_heads, x.shape[0]),)

    return Transform(f"heads_out({num_heads})", forward, lambda parts, shape: parts[0].reshape(shape[::-1]).T)


def qkv(num_heads: int) -> Transform:
    """EVA's joint projection, rows in the order query, key, value: [(3 n h) d] -> [d 3 n h]."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.reshape(3, num_heads, -1, x.shape[1]).transpose(3, 0, 1, 2),)

    return Transform(f"qkv({num_heads})", forward, lambda parts, shape: parts[0].transpose(1, 2, 3, 0).reshape(shape))


def qkv_bias(num_heads: int) -> Transform:
    """Hugging Face joins EVA's biases with a zero key bias: [(3 n h)] -> q_bias [n h], v_bias [n h].

    A key bias shifts every logit of a row alike, but ours has none: a value other than zero is refused.
    """

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        query, key, value = x.reshape(3, num_heads, -1)
        if (key != 0).any():
            raise ValueError("its middle third, the key bias, must be zero as in EVA-CLIP")
        return query, value

    def inverse(parts: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        query, value = parts
        return np.stack([query, np.zeros_like(query), value]).reshape(shape)

    return Transform(f"qkv_bias({num_heads})", forward, inverse)


def patch_kernel() -> Transform:
    """A convolution whose stride is its size: [d c row column] -> [(row column c) d]."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)

    def inverse(parts: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        d, channels, rows, columns = shape
        return parts[0].reshape(rows, columns, channels, d).transpose(3, 2, 0, 1)

    return Transform("patch_kernel", forward, inverse)


def positions(source_grid: int, target_grid: int) -> Transform:
    """[1 p d] -> [p d]; another image size resizes the grid as LAVIS ``interpolate_pos_embed`` does.

    PyTorch's bicubic (a = -0.75) without antialiasing, in float32, the class token kept: the result is
    float32 whatever the file holds. The inverse gives the positions in use, at the new size.
    """

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        x = x.reshape(x.shape[-2:])
        return (x if source_grid == target_grid else resize_positions(x, source_grid, target_grid),)

    resized = source_grid != target_grid
    name = f"positions({source_grid}->{target_grid})" if resized else "positions"
    dtype = np.dtype(np.float32) if resized else None
    return Transform(name, forward, lambda parts, shape: parts[0][None], dtype)


def resize_positions(x: np.ndarray, source_grid: int, target_grid: int) -> np.ndarray:
    if x.dtype == bool:  # only the shape is asked for
        return np.broadcast_to(x[:1], (target_grid**2 + 1, x.shape[1]))
    cls, grid = x[:1].astype(np.float32), x[1:].astype(np.float32).reshape(source_grid, source_grid, -1)
    with jax.default_device(jax.devices("cpu")[0]):
        shape = (target_grid, target_grid, grid.shape[-1])
        grid = np.asarray(jax.image.resize(grid, shape, "bicubic-pytorch", antialias=False))
    return np.concatenate([cls, grid.reshape(target_grid**2, -1)])


def contiguous(x: np.ndarray) -> np.ndarray:
    """``x`` in C order. Big transposes go through XLA's host copy, four times as fast as NumPy's."""
    if x.flags.c_contiguous or x.nbytes < 1 << 20:
        return np.asarray(x, order="C")  # ascontiguousarray makes a scalar one-dimensional
    return np.asarray(jax.device_put(x, jax.devices("cpu")[0]))
