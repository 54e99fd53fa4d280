"""Read Hugging Face's ``config.json``: what we support becomes our configuration, the rest is refused by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgpt4_jax.config import LlamaConfig, ModelConfig, QformerConfig, RopeScaling, VitConfig
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
    try:
        return _llama_config(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: a value is of the wrong type ({error})") from error


def _llama_config(values: Values) -> LlamaConfig:
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
        rope_scaling=_rope_scaling(rope, values),
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


def _rope_scaling(rope: Values, values: Values) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(_needed(rope, "factor")))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(_needed(rope, "factor")),
            float(rope.get("low_freq_factor", 1.0)),
            float(rope.get("high_freq_factor", 4.0)),
            int(rope.get("original_max_position_embeddings") or values.get("max_position_embeddings", 8192)),
        )
    raise UserError(f"rope_scaling of type {kind!r} is not supported; linear and llama3 are")


def _needed(values: Values, key: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"rope_scaling lacks {key!r}")
    return values[key]


def require(values: Values, file: str, key: str, default: Any, wanted: Any) -> None:
    found = values.get(key, default)
    if found != wanted:
        raise UserError(f"{file}: {key} is {found!r}; only {wanted!r} is supported")


def export_config(config: ModelConfig, dtypes: dict[str, str]) -> dict[str, Any]:
    """``config.json`` that ``transformers`` builds the same model from."""
    dtype = max(set(dtypes.values()), key=list(dtypes.values()).count)
    if config.architecture == "llama":
        return {"architectures": ["LlamaForCausalLM"], **_export_llama(config.llama), "torch_dtype": dtype}
    names = {
        "blip2": ("Blip2ForImageTextRetrieval", "blip-2"),
        "minigpt4": ("Blip2ForConditionalGeneration", "blip-2"),
        "instructblip": ("InstructBlipForConditionalGeneration", "instructblip"),
    }
    architecture, model_type = names[config.architecture]
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "num_query_tokens": config.qformer.num_queries,
        "vision_config": _export_vit(config.vit, model_type),
        "qformer_config": _export_qformer(config.qformer, model_type),
        "torch_dtype": dtype,
    }
    if config.llama is not None:
        values["text_config"] = _export_llama(config.llama)
        values["use_decoder_only_language_model"] = True
    else:
        values["image_text_hidden_size"] = config.projection_size
    return values


def _export_llama(config: LlamaConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if (scaling := config.rope_scaling) is not None:
        values["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            values["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    return values


def _export_vit(config: VitConfig, model_type: str) -> dict[str, Any]:
    return {
        "model_type": f"{model_type.replace('-', '_')}_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.layer_norm_eps,  # one field for the blocks and for ln_vision
        "hidden_act": "gelu",
        "qkv_bias": True,
    }


def _export_qformer(config: QformerConfig, model_type: str) -> dict[str, Any]:
    return {
        "model_type": f"{model_type.replace('-', '_')}_qformer",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.layer_norm_eps,
        "cross_attention_frequency": config.cross_attention_frequency,
        "encoder_hidden_size": config.encoder_size,
        "hidden_act": "gelu",
        "use_qformer_text_input": config.with_text,
    }
