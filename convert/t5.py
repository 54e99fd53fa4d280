"""Table of T5, T5 v1.1 and FlanT5 (Hugging Face ``T5ForConditionalGeneration``)."""

from __future__ import annotations

from collections.abc import Container

from mgpt4_jax.config import T5Config

from .rules import Alias, Entry, Ignore, Rule
from .transforms import Transform, heads_in, heads_out, same, transpose

_WORDS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""One embedding under three names, of which a file has one or several."""


def t5(config: T5Config, prefix: str = "", keys: Container[str] = ()) -> list[Entry]:
    """``prefix`` is "language_model." inside BLIP-2; ``keys`` of the file tell which name the embedding has."""
    shape = (config.vocab_size, config.hidden_size)
    names = [prefix + name for name in _WORDS]
    words = next((name for name in names if name in keys), names[0])
    table: list[Entry] = [Rule(words, ("t5/shared/embedding",), same(), shape)]
    table += [Alias(name, words) for name in names if name != words]
    head = f"{prefix}lm_head.weight"
    if config.tie_embeddings:
        table.append(Alias(head, words))
    else:
        table.append(Rule(head, ("t5/lm_head/kernel",), transpose(), shape))
    unused = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    return [
        *table,
        *_tower(config, f"{prefix}encoder", "t5/encoder", range(config.num_layers)),
        *_tower(config, f"{prefix}decoder", "t5/decoder", range(config.num_decoder_layers), has_cross_attention=True),
        Ignore(prefix.replace(".", r"\.") + unused, "cross-attention has no positions: T5 never used it"),
    ]


def _tower(
    config: T5Config, root: str, target: str, layers: range, *, has_cross_attention: bool = False
) -> list[Entry]:
    d, n = config.hidden_size, config.num_heads
    blocks = [("SelfAttention", "attn", "attn_norm", _attention(config))]
    if has_cross_attention:
        blocks.append(("EncDecAttention", "cross_attn", "cross_norm", _attention(config)))
    blocks.append(("DenseReluDense", "mlp", "mlp_norm", _mlp(config)))
    table: list[Entry] = []
    for place, (name, leaf, norm, matrices) in enumerate(blocks):
        layer = f"{root}.block.{{l}}.layer.{place}"
        table += _matrices(f"{layer}.{name}", f"{target}/layers/{leaf}", matrices, layers)
        table.append(Rule(f"{layer}.layer_norm.weight", (f"{target}/layers/{norm}/scale",), same(), (d,), layers))
    bias = f"{root}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table.append(Rule(bias, (f"{target}/relative_bias",), same(), (config.num_buckets, n)))
    return [*table, Rule(f"{root}.final_layer_norm.weight", (f"{target}/norm/scale",), same(), (d,))]


_Matrix = tuple[str, str, Transform, tuple[int, int]]  # its name, ours, how it is turned, its shape


def _attention(config: T5Config) -> list[_Matrix]:
    d, n, wide = config.hidden_size, config.num_heads, config.num_heads * config.head_dim
    inputs = [(name, leaf, heads_in(n), (wide, d)) for name, leaf in (("q", "query"), ("k", "key"), ("v", "value"))]
    return [*inputs, ("o", "out", heads_out(n), (d, wide))]


def _mlp(config: T5Config) -> list[_Matrix]:
    d, f = config.hidden_size, config.mlp_size
    names = [("wi_0", "gate"), ("wi_1", "up")] if config.gated else [("wi", "up")]
    return [*((name, leaf, transpose(), (f, d)) for name, leaf in names), ("wo", "down", transpose(), (d, f))]


def _matrices(name: str, target: str, matrices: list[_Matrix], layers: range) -> list[Entry]:
    return [
        Rule(f"{name}.{theirs}.weight", (f"{target}/{ours}/kernel",), transform, shape, layers)
        for theirs, ours, transform, shape in matrices
    ]
