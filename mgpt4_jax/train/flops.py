"""How many floating-point operations a program takes, and how many a device can do in a second.

XLA's own count takes the body of a loop once, whatever its length, so the program is walked here instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.typing import DType

OPAQUE = ("ffi_call", "dot_product_attention", "scaled_matmul", "ragged_dot")
"""Beginnings of names of operations that do products nobody can see from outside."""


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations of the matrix products and convolutions of ``function(*args)``, a multiply-add being two.

    ``args`` may be ``jax.ShapeDtypeStruct``: nothing is computed. The count is of the whole program, over all
    devices that it is cut onto. It leaves out everything but products (1 or 2 % of a transformer), and a padded
    border of a convolution. A scan counts as often as it runs, of a ``cond`` the dearest branch.

    What is computed again (``jax.checkpoint``) counts again: for a share of peak that compares with others, count
    the function without it.

    Raises ``ValueError`` for products in a ``while`` loop, whose number of turns nobody knows, and in operations
    that hide what they do.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name.startswith(OPAQUE):
        raise ValueError(f"cannot see how many operations {name} takes")
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "while" and any(inner):
        raise ValueError("cannot know how often a while loop with matrix products runs; use scan or a static fori_loop")
    return _turns(name, params) * (max(inner) if name == "cond" else sum(inner))


def _turns(name: str, params: dict[str, Any]) -> int:
    """How often the program inside an operation runs."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # on every device along these axes, on its part
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an operation: bodies of loops, branches, functions that are called."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)  # of a closed one
            if hasattr(inner, "eqns"):
                yield inner


def _convolution_flops(equation: Any) -> int:
    """Of each output position the kernel's positions that meet an input, not padding and not a dilation's gap."""
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel, out = (var.aval.shape for var in (*equation.invars[:2], equation.outvars[0]))
    pairs = 1
    for index, (low, _) in enumerate(params["padding"]):
        size = image[numbers.lhs_spec[2 + index]]
        starts = np.arange(out[numbers.out_spec[2 + index]]) * params["window_strides"][index] - low
        offsets = np.arange(kernel[numbers.rhs_spec[2 + index]]) * params["rhs_dilation"][index]
        places, gap = starts[:, None] + offsets, params["lhs_dilation"][index]
        pairs *= int(np.sum((places >= 0) & (places <= (size - 1) * gap) & (places % gap == 0)))
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * pairs


# -- devices ----------------------------------------------------------------------------------------

_PEAKS: tuple[tuple[str, float], ...] = (
    # Dense products of bfloat16 a second, as the makers publish them, of one JAX device. The first name that the
    # device's kind begins with counts. A device is a chip, but half a chip of TPU v2, v3 and 7x.
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
)


def peak_flops(device: jax.Device, dtype: DType) -> float | None:
    """Operations a second that the maker promises of ``device`` for dense products of ``dtype``.

    None where nobody promised: processors, unknown devices, and float32, which accelerators compute in several
    ways (of which ``jax_default_matmul_precision`` chooses).
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return None
    return next((peak for name, peak in _PEAKS if device.device_kind.startswith(name)), None)
