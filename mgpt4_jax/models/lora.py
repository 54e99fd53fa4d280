"""Low-rank adapters on matrices of the language model: ``W x + alpha / rank * B A x`` (Hu et al. 2021).

Agrees with peft 0.2, with which MiniGPT-v2 was trained. In training ``W`` is left as it is; for answering and for
files of other programs the two are merged into one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgpt4_jax.config import LoraConfig
from mgpt4_jax.models.layers import dense
from mgpt4_jax.typing import Array, DType

Read = Callable[[str, int | None], Any]
"""``read(path, layer)``: a parameter of the language model, or one layer's slice of a stacked one."""

_MATRIX = re.compile(r"(?:llama/)?(layers/(?:attn|mlp)/(\w+))/kernel")


class LowRank(nn.Module):
    """What an adapter adds to the output of its matrix, whose kernel has the logical axes ``axes``.

    ``a`` is [inputs r], ``b`` [r outputs]: ``a`` begins as PyTorch's linear layers do, ``b`` at zero.
    """

    config: LoraConfig
    features: Sequence[int]
    axes: tuple[str | None, ...]
    inputs: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
        config, inputs = self.config, self.inputs
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=range(inputs), out_axis=-1)
        a_init = nn.with_logical_partitioning(uniform, (*self.axes[:inputs], "rank"))
        b_init = nn.with_logical_partitioning(nn.initializers.zeros, ("rank", *self.axes[inputs:]))
        a = self.param("a", a_init, (*x.shape[-inputs:], config.rank))
        b = self.param("b", b_init, (config.rank, *self.features))
        x = nn.Dropout(config.dropout)(x, deterministic=deterministic)
        low = jnp.tensordot(x, a.astype(self.dtype), inputs)
        return jnp.tensordot(low, b.astype(self.dtype), 1) * (config.alpha / config.rank)


def adapted(
    x: Array,
    features: Sequence[int],
    axes: tuple[str | None, ...],
    lora: LoraConfig | None,
    *,
    name: str,
    dtype: DType,
    inputs: int = 1,
    deterministic: bool = True,
) -> Array:
    """``x`` through the matrix ``name`` and, if ``lora`` targets it, the adapter ``name_lora`` beside it.

    Called inside a compact module, which then owns both.
    """
    y = dense(features, axes, name=name, dtype=dtype, inputs=inputs, use_bias=False)(x)
    if lora is None or name not in lora.targets:
        return y
    adapter = LowRank(lora, tuple(features), axes, inputs, dtype, name=f"{name}_lora")
    return y + adapter(x, deterministic=deterministic)


def merging(lora: LoraConfig | None, read: Read) -> Read:
    """``read`` with the adapters merged into the matrices that it gives; paths may begin with ``llama/``."""
    if lora is None:
        return read
    scale = lora.alpha / lora.rank

    def merged(path: str, layer: int | None) -> Any:
        matrix = _MATRIX.fullmatch(path)
        kernel = read(path, layer)
        if matrix is None or matrix[2] not in lora.targets:
            return kernel
        a, b = (read(path.removesuffix("/kernel") + f"_lora/{side}", layer) for side in "ab")
        return (merge if layer is not None else jax.vmap(merge, (0, 0, 0, None)))(kernel, a, b, scale)

    return merged


@jax.jit
def merge(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """``kernel + scale * a b`` in float32, rounded once to the dtype of ``kernel``."""
    product = jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
