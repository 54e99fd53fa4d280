"""Table of OPT (Hugging Face ``OPTForCausalLM``)."""

from __future__ import annotations

from collections.abc import Container

from mgpt4_jax.config import OptConfig
from mgpt4_jax.models.opt import POSITION_OFFSET

from .rules import Alias, Entry, Rule
from .transforms import Transform, heads_in, heads_out, same, transpose


def opt(config: OptConfig, prefix: str = "", keys: Container[str] = ()) -> list[Entry]:
    """``prefix`` is "language_model." inside BLIP-2. Files saved without a head call ``model.decoder`` ``decoder``."""
    d, f, e = config.hidden_size, config.mlp_size, config.embed_size
    is_headless = f"{prefix}decoder.embed_tokens.weight" in keys
    root = f"{prefix}decoder" if is_headless else f"{prefix}model.decoder"
    layer, layers = f"{root}.layers.{{l}}", range(config.num_layers)
    words = f"{root}.embed_tokens.weight"
    split = heads_in(config.num_heads)
    table: list[Entry] = [
        Rule(words, ("opt/embed_tokens/embedding",), same(), (config.vocab_size, e)),
        Alias(f"{prefix}lm_head.weight", words),
        Rule(
            f"{root}.embed_positions.weight",
            ("opt/embed_positions/embedding",),
            same(),
            (config.max_positions + POSITION_OFFSET, d),
        ),
    ]
    linears: list[tuple[str, str, Transform, Transform, int, int]] = [
        ("self_attn.q_proj", "attn/query", split, split, d, d),
        ("self_attn.k_proj", "attn/key", split, split, d, d),
        ("self_attn.v_proj", "attn/value", split, split, d, d),
        ("self_attn.out_proj", "attn/out", heads_out(config.num_heads), same(), d, d),
        ("fc1", "mlp/fc1", transpose(), same(), f, d),
        ("fc2", "mlp/fc2", transpose(), same(), d, f),
    ]
    for name, target, kernel, bias, outputs, inputs in linears:
        leaf = f"opt/layers/{target}"
        table += [
            Rule(f"{layer}.{name}.weight", (f"{leaf}/kernel",), kernel, (outputs, inputs), layers),
            Rule(f"{layer}.{name}.bias", (f"{leaf}/bias",), bias, (outputs,), layers),
        ]
    table += _norm(f"{layer}.self_attn_layer_norm", "opt/layers/attn_norm", d, layers)
    table += _norm(f"{layer}.final_layer_norm", "opt/layers/mlp_norm", d, layers)
    if config.norm_first:
        table += _norm(f"{root}.final_layer_norm", "opt/final_norm", d)
    if e != d:
        table += [
            Rule(f"{root}.project_in.weight", ("opt/project_in/kernel",), transpose(), (d, e)),
            Rule(f"{root}.project_out.weight", ("opt/project_out/kernel",), transpose(), (e, d)),
        ]
    return table


def _norm(name: str, target: str, size: int, layers: range | None = None) -> list[Entry]:
    return [
        Rule(f"{name}.weight", (f"{target}/scale",), same(), (size,), layers),
        Rule(f"{name}.bias", (f"{target}/bias",), same(), (size,), layers),
    ]
