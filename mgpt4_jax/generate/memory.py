"""How much memory answering takes, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import jax.numpy as jnp
from jax.sharding import Mesh

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.memory import free_memory, readable
from mgpt4_jax.models import abstract_params
from mgpt4_jax.typing import DType

LANGUAGE = ("llama/", "opt/", "t5/")  # where the language models' parameters lie
WORK_BYTES = 1 << 29  # activations of the picture side and of a prefill, and the compiler


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    dtype: str
    language_model: int
    picture_side: int
    cache: int  # keys and values when every slot holds the longest answer
    slots: int
    max_length: int
    free: int | None  # None: the device does not say

    @property
    def total(self) -> int:
        return self.language_model + self.picture_side + self.cache + WORK_BYTES

    @property
    def fits(self) -> bool:
        return self.free is None or self.total <= self.free

    def __str__(self) -> str:
        free = "" if self.free is None else f" of {readable(self.free)} free"
        return (
            f"memory per device ({self.dtype}): language model {readable(self.language_model)}, "
            f"picture side {readable(self.picture_side)}, cache up to {readable(self.cache)} "
            f"({self.slots} x {self.max_length} tokens), "
            f"work {readable(WORK_BYTES)}, in all {readable(self.total)}{free}"
        )


def plan_memory(config: ModelConfig, mesh: Mesh, dtype: DType, slots: int, max_length: int) -> MemoryPlan:
    language, rest = _sizes(config)
    width = jnp.dtype(dtype).itemsize
    cuts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    cache = _cache_size(config) * slots * max_length
    devices = mesh.devices.size
    return MemoryPlan(
        dtype=jnp.dtype(dtype).name,
        language_model=language * width // cuts,
        picture_side=rest * width // cuts,
        cache=cache * width // devices,
        slots=slots,
        max_length=max_length,
        free=free_memory(mesh.devices.flat[0], devices),
    )


def _cache_size(config: ModelConfig) -> int:
    """Numbers that are kept of one position."""
    if config.llama is not None:
        return 2 * config.llama.num_layers * config.llama.num_kv_heads * config.llama.head_dim
    if config.opt is not None:
        return 2 * config.opt.num_layers * config.opt.hidden_size
    if config.t5 is not None:  # a position of the prompt, or of the answer
        return 2 * config.t5.num_decoder_layers * config.t5.num_heads * config.t5.head_dim
    return 0


@lru_cache
def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the language model, and of the rest."""
    leaves = flatten(abstract_params(config))
    language = sum(leaf.size for path, leaf in leaves.items() if path.startswith(LANGUAGE))
    return language, sum(leaf.size for leaf in leaves.values()) - language
