"""Read Hugging Face's ``config.json``: what we support becomes our configuration, the rest is refused by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgpt4_jax.config import LlamaConfig, RopeScaling
from mgpt4_jax.errors import UserError

Values = Mapping[str, Any]


def llama_config(values: Values | None, path: Path) -> LlamaConfig:
    """``config.json`` of ``LlamaForCausalLM`` (``path`` is its directory, for messages)."""
    if values is None:
        raise UserError(f"{path}: has no config.json; --llm wants the Hugging Face directory of the language model")
    file = f"{path}/config.json"
    require(values, file, "model_type", "llama", "llama")
    require(values, file, "hidden_act", "silu", "silu")
    require(values, file, "attention_bias", False, False)
    require(values, file, "mlp_bias", False, False)
    width, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return LlamaConfig(
        vocab_size=values.get("vocab_size", 32000),
        hidden_size=width,
        mlp_size=values.get("intermediate_size", 11008),
        num_layers=values.get("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        max_positions=values.get("max_position_embeddings", 2048),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope, values, file),
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


def _rope_scaling(rope: Values, values: Values, file: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(_needed(rope, "factor", file)))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(_needed(rope, "factor", file)),
            float(rope.get("low_freq_factor", 1.0)),
            float(rope.get("high_freq_factor", 4.0)),
            int(rope.get("original_max_position_embeddings") or values.get("max_position_embeddings", 8192)),
        )
    raise UserError(f"{file}: rope_scaling of type {kind!r} is not supported; linear and llama3 are")


def _needed(values: Values, key: str, file: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{file}: rope_scaling lacks {key!r}")
    return values[key]


def require(values: Values, file: str, key: str, default: Any, wanted: Any) -> None:
    found = values.get(key, default)
    if found != wanted:
        raise UserError(f"{file}: {key} is {found!r}; only {wanted!r} is supported")
