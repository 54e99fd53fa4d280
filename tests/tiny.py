"""Tiny models with random weights, made without compiling anything."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mgpt4_jax.config import LlamaConfig, ModelConfig, QformerConfig, VitConfig
from mgpt4_jax.models import abstract_params

VIT = VitConfig(image_size=28, patch_size=14, hidden_size=32, mlp_size=64, num_layers=2, num_heads=4)
QFORMER = QformerConfig(
    hidden_size=32,
    mlp_size=64,
    num_layers=4,
    num_heads=4,
    num_queries=6,
    encoder_size=32,
    vocab_size=60,
    max_positions=40,
)
LLAMA = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    mlp_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_positions=512,
)
MINIGPT4 = ModelConfig("minigpt4", VIT, QFORMER, LLAMA)


def random_params(config: ModelConfig, seed: int = 0, scale: float = 0.08) -> Any:
    """Normal weights around 0, norm scales around 1: every term of every formula takes part."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(size=leaf.shape).astype(np.float32) * scale
        return values + 1 if path[-1].key == "scale" else values

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
