"""Tables of the language model (Hugging Face ``LlamaForCausalLM``) and of the projection into it."""

from __future__ import annotations

import numpy as np

from mgpt4_jax.config import LlamaConfig

from .rules import Alias, Entry, Fill, Ignore, Rule
from .transforms import heads_in, heads_out, same, transpose


def llama(config: LlamaConfig, prefix: str = "") -> list[Entry]:
    """``prefix`` is "language_model." inside InstructBLIP. Heads keep Hugging Face's rotary layout."""
    d, f, v, h = config.hidden_size, config.mlp_size, config.vocab_size, config.head_dim
    n, k = config.num_heads, config.num_kv_heads
    per_layer = [
        ("input_layernorm", "input_norm/scale", same(), (d,)),
        ("self_attn.q_proj", "attn/query/kernel", heads_in(n), (n * h, d)),
        ("self_attn.k_proj", "attn/key/kernel", heads_in(k), (k * h, d)),
        ("self_attn.v_proj", "attn/value/kernel", heads_in(k), (k * h, d)),
        ("self_attn.o_proj", "attn/out/kernel", heads_out(n), (d, n * h)),
        ("post_attention_layernorm", "post_norm/scale", same(), (d,)),
        ("mlp.gate_proj", "mlp/gate/kernel", transpose(), (f, d)),
        ("mlp.up_proj", "mlp/up/kernel", transpose(), (f, d)),
        ("mlp.down_proj", "mlp/down/kernel", transpose(), (d, f)),
    ]
    model, layers = f"{prefix}model", range(config.num_layers)
    embed, head = f"{model}.embed_tokens.weight", f"{prefix}lm_head.weight"
    table: list[Entry] = [Rule(embed, ("llama/embed_tokens/embedding",), same(), (v, d))]
    for name, target, transform, shape in per_layer:
        table.append(Rule(f"{model}.layers.{{l}}.{name}.weight", (f"llama/layers/{target}",), transform, shape, layers))
    table.append(Rule(f"{model}.norm.weight", ("llama/norm/scale",), same(), (d,)))
    if config.tie_embeddings:
        table.append(Alias(head, embed))
    else:
        table.append(Rule(head, ("llama/lm_head/kernel",), transpose(), (v, d)))
    root = prefix.replace(".", r"\.")
    buffer = rf"{root}model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return [*table, Ignore(buffer, "a buffer: rotary frequencies are computed")]


def projection(name: str, inputs: int, outputs: int) -> list[Entry]:
    """``llama_proj`` of MiniGPT-4, ``llm_proj`` or ``language_projection`` of InstructBLIP."""
    return [
        Rule(f"{name}.weight", ("projection/kernel",), transpose(), (outputs, inputs)),
        Rule(f"{name}.bias", ("projection/bias",), same(), (outputs,)),
    ]


def untrained_projection(seed: int) -> list[Entry]:
    """For training from here: the values ``torch.nn.Linear`` begins with."""
    reason = "no --projection was given: it begins random and must be trained"

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))

    return [
        Fill("projection/kernel", uniform, reason),
        Fill("projection/bias", lambda shape: np.zeros(shape, np.float32), reason),
    ]


def constant(target: str, value: float, reason: str) -> Fill:
    return Fill(target, lambda shape: np.full(shape, value, np.float32), reason)
