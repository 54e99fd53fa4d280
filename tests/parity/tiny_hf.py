"""Sizes of the tiny models of ``transformers``; no two widths are equal, so that no mix-up fits."""

from __future__ import annotations

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
