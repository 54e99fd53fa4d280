"""Sizes of the tiny models of ``transformers``, and answers of ours to compare with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.generate.engine import Engine, Request
from mgpt4_jax.generate.sampling import SamplingParams

VISION = {
    "image_size": 20,
    "patch_size": 5,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
QFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # one whole group and a tail
    "num_attention_heads": 4,
    "encoder_hidden_size": 24,
    "vocab_size": 61,
    "max_position_embeddings": 24,
}
LLAMA = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OPT = {
    "vocab_size": 71,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
T5 = {
    "vocab_size": 71,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


def greedy_ids(
    config: ModelConfig, params: Any, prompts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]], new: int
) -> np.ndarray:
    """[b new] ids of the engine for prompts ``(ids, slots, image tokens)`` of any lengths."""
    engine = Engine(config, params, slots=2, eos_ids=())
    requests = [Request(*prompt, SamplingParams(max_new_tokens=new)) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for update in engine.run(requests):
        found[update.index] += update.ids
    return np.array(found)
