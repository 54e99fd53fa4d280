"""Read Hugging Face's ``config.json``: what we support becomes our configuration, the rest is refused by key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mgpt4_jax.config import LlamaConfig, ModelConfig, OptConfig, QformerConfig, RopeScaling, T5Config, VitConfig
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
    with _told_with(file):
        return _llama_config(values)


@contextlib.contextmanager
def _told_with(file: str) -> Iterator[None]:
    """What is wrong with a value, with the file that holds it."""
    try:
        yield
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


def opt_config(values: Values, path: Path) -> OptConfig:
    """``config.json`` of ``OPTForCausalLM``; defaults are those of ``transformers``."""
    file = f"{path}/config.json"
    require(values, file, "activation_function", "relu", "relu")
    require(values, file, "enable_bias", True, True)
    require(values, file, "layer_norm_elementwise_affine", True, True)
    require(values, file, "_remove_final_layer_norm", False, False)
    require(values, file, "tie_word_embeddings", True, True)
    with _told_with(file):
        width = values.get("hidden_size", 768)
        return OptConfig(
            vocab_size=values.get("vocab_size", 50272),
            hidden_size=width,
            mlp_size=values.get("ffn_dim", 3072),
            num_layers=values.get("num_hidden_layers", 12),
            num_heads=values.get("num_attention_heads", 12),
            embed_size=values.get("word_embed_proj_dim") or width,
            max_positions=values.get("max_position_embeddings", 2048),
            norm_first=values.get("do_layer_norm_before", True),
        )


def t5_config(values: Values, path: Path, *, has_head: bool, exact_gelu: bool) -> T5Config:
    """``config.json`` of ``T5ForConditionalGeneration``; defaults are those of ``transformers``.

    Version 4 says by ``tie_word_embeddings`` both that the head is the embedding and that its input is scaled;
    version 5 calls the second ``scale_decoder_outputs``, and ties unless the file has a head (``has_head``).
    ``exact_gelu`` puts the exact GELU in the place of its approximation.
    """
    file = f"{path}/config.json"
    form = values.get("feed_forward_proj", "relu")
    if form not in ("relu", "gated-gelu"):
        raise UserError(f"{file}: feed_forward_proj is {form!r}; only 'relu' and 'gated-gelu' are supported")
    activation: Any = values.get("dense_act_fn") or ("relu" if form == "relu" else "gelu_new")
    with _told_with(file):
        is_tied = not has_head if "scale_decoder_outputs" in values else values.get("tie_word_embeddings", True)
        layers = values.get("num_layers", 6)
        return T5Config(
            vocab_size=values.get("vocab_size", 32128),
            hidden_size=values.get("d_model", 512),
            mlp_size=values.get("d_ff", 2048),
            num_layers=layers,
            num_decoder_layers=values.get("num_decoder_layers") or layers,
            num_heads=values.get("num_heads", 8),
            head_dim=values.get("d_kv", 64),
            num_buckets=values.get("relative_attention_num_buckets", 32),
            max_distance=values.get("relative_attention_max_distance", 128),
            layer_norm_eps=values.get("layer_norm_epsilon", 1e-6),
            gated=form == "gated-gelu",
            activation="gelu" if exact_gelu and activation == "gelu_new" else activation,
            tie_embeddings=is_tied,
            scale_logits=values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True)),
            start_id=values.get("decoder_start_token_id") or values.get("pad_token_id") or 0,
        )


def require(values: Values, file: str, key: str, default: Any, wanted: Any) -> None:
    found = values.get(key, default)
    if found != wanted:
        raise UserError(f"{file}: {key} is {found!r}; only {wanted!r} is supported")


def export_config(config: ModelConfig, dtypes: dict[str, str]) -> dict[str, Any]:
    """``config.json`` that ``transformers`` builds the same model from."""
    dtype = max(set(dtypes.values()), key=list(dtypes.values()).count)
    if config.vit is None:
        names = {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM", "t5": "T5ForConditionalGeneration"}
        return {"architectures": [names[config.architecture]], **_export_language(config), "torch_dtype": dtype}
    architecture, model_type = "Blip2ForConditionalGeneration", "blip-2"
    if config.language_model is None:
        architecture = "Blip2ForImageTextRetrieval"
    elif config.qformer.with_text:
        architecture, model_type = "InstructBlipForConditionalGeneration", "instructblip"
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "num_query_tokens": config.qformer.num_queries,
        "vision_config": _export_vit(config.vit, model_type),
        "qformer_config": _export_qformer(config.qformer, model_type),
        "torch_dtype": dtype,
    }
    if config.language_model is not None:
        values["text_config"] = _export_language(config)
        values["use_decoder_only_language_model"] = config.t5 is None
    else:
        values["image_text_hidden_size"] = config.projection_size
    return values


def _export_language(config: ModelConfig) -> dict[str, Any]:
    if config.opt is not None:
        return _export_opt(config.opt)
    return _export_llama(config.llama) if config.t5 is None else _export_t5(config.t5)


def _export_opt(config: OptConfig) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_dim": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "word_embed_proj_dim": config.embed_size,
        "max_position_embeddings": config.max_positions,
        "do_layer_norm_before": config.norm_first,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _export_t5(config: T5Config) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.layer_norm_eps,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "dense_act_fn": config.activation,
        "tie_word_embeddings": config.scale_logits,  # version 4: both; version 5 ties what has no head
        "scale_decoder_outputs": config.scale_logits,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.start_id,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


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
