"""The models: jax and flax only. They know logical axis names, never meshes, and never tokenise."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models.blip2 import Blip2
from mgpt4_jax.models.blip2_lm import Blip2Opt, Blip2T5
from mgpt4_jax.models.encoder import Encoder
from mgpt4_jax.models.minigpt4 import MiniGPT4
from mgpt4_jax.typing import DType, Params, PRNGKey


def build(config: ModelConfig, dtype: DType = jnp.float32) -> nn.Module:
    """The Linen module of a configuration; ``dtype`` is what it computes in."""
    modules = {
        "blip2": Blip2,
        "blip2_opt": Blip2Opt,
        "blip2_t5": Blip2T5,
        "encoder": Encoder,
        "opt": Blip2Opt,
        "t5": Blip2T5,
    }
    return modules.get(config.architecture, MiniGPT4)(config, dtype)


def example_inputs(config: ModelConfig) -> tuple[Any, ...]:
    """The smallest inputs that reach every parameter, for ``init``."""
    ids = jnp.zeros((1, 1), jnp.int32)
    if config.architecture == "encoder":
        text = (ids, ids == 0) if config.qformer is not None and config.qformer.with_text else ()
        if config.vit is None:
            return jnp.zeros((1, 1, config.qformer.encoder_size)), *text
        return jnp.zeros((1, config.vit.image_size, config.vit.image_size, 3)), *text
    answer = (ids == 0, ids) if config.t5 is not None else ()  # which tokens of the prompt count, the decoder's
    if config.vit is None:
        return ids, ids - 1, None, *answer
    pixels = jnp.zeros((1, config.vit.image_size, config.vit.image_size, 3))
    if config.architecture == "blip2":
        return pixels, ids, ids == 0
    with_text = config.qformer is not None and config.qformer.with_text
    text = (ids[None], ids[None] == 0) if with_text else (None, None)
    if config.opt is not None:
        return ids, ids, pixels[None]
    if config.t5 is not None:
        return ids, ids, pixels[None], *answer, None, *text
    return ids, ids, pixels[None], None, *text


def boxed_params(config: ModelConfig) -> Any:
    """Abstract parameters with their logical axis names (``nn.LogicallyPartitioned`` leaves)."""
    return jax.tree.map(lambda leaf: leaf, _traced(config))  # dicts of the caller's own


@functools.lru_cache(maxsize=32)
def _traced(config: ModelConfig) -> Any:
    """Tracing a model takes a second or more, and a run asks for its shapes some ten times."""
    module = build(config)
    return jax.eval_shape(lambda key: module.init(key, *example_inputs(config)), jax.random.key(0))["params"]


def abstract_params(config: ModelConfig) -> Any:
    """Shapes of every parameter, float32, without computing anything."""
    return nn.unbox(boxed_params(config))


def init_adapters(config: ModelConfig, key: PRNGKey) -> Params:
    """The LoRA adapters alone, as ``init`` draws them: what a model is given that is about to be adapted.

    Under ``jit`` nothing else is computed, so the rest of the model needs no memory.
    """
    params = nn.unbox(build(config).init(key, *example_inputs(config))["params"])
    layers = {
        block: {name: leaves for name, leaves in matrices.items() if name.endswith("_lora")}
        for block, matrices in params["llama"]["layers"].items()
    }
    return {"llama": {"layers": {block: adapters for block, adapters in layers.items() if adapters}}}


def num_parameters(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


__all__ = [
    "Blip2",
    "Blip2Opt",
    "Blip2T5",
    "Encoder",
    "MiniGPT4",
    "abstract_params",
    "boxed_params",
    "build",
    "example_inputs",
    "init_adapters",
    "num_parameters",
]
