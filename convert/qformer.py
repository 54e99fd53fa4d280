"""Tables of the Q-Former and of stage 1's heads: LAVIS ``blip2_pretrained*.pth`` and Hugging Face's files."""

from __future__ import annotations

from collections.abc import Iterator

from mgpt4_jax.config import QformerConfig

from .rules import Alias, Entry, Ignore, Rule
from .transforms import Transform, heads_in, heads_out, reshape, same, transpose

BUFFER = "a buffer: positions are counted, not stored"


def lavis_qformer(config: QformerConfig) -> list[Entry]:
    """``query_tokens`` and ``Qformer.*``; the text side is left out of a model that reads no text there."""
    bert = "Qformer.bert"
    table = [
        *_queries(config, f"{bert}.embeddings.LayerNorm"),
        *_layers(config, f"{bert}.encoder.layer", "self"),
        Ignore(r"Qformer\.bert\.embeddings\.position_ids", BUFFER),
    ]
    if config.with_text:
        table += _embeddings(config, f"{bert}.embeddings")
    else:
        reason = "the text side of the Q-Former: this model reads no text there"
        table.append(Ignore(r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", reason))
        table.append(Ignore(r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*", reason))
    if config.with_lm_head:
        table += _lm_head(config)
    else:
        table.append(Ignore(r"Qformer\.cls\..*", "the captioning head of stage 1: not part of this model"))
    return table


def instructblip_qformer(config: QformerConfig) -> list[Entry]:
    """``qformer.*`` of Hugging Face's InstructBLIP, whose Q-Former reads the instruction."""
    return [
        *_queries(config, "qformer.embeddings.layernorm"),
        *_embeddings(config, "qformer.embeddings"),
        *_layers(config, "qformer.encoder.layer", "attention"),
        Ignore(r"qformer\.embeddings\.position_ids", BUFFER),
    ]


def blip2_qformer(config: QformerConfig) -> list[Entry]:
    """``qformer.*`` of Hugging Face's BLIP-2; for retrieval with ``embeddings.*`` at the top level."""
    return [
        *_queries(config, "qformer.layernorm"),
        *(_embeddings(config, "embeddings") if config.with_text else []),
        *_layers(config, "qformer.encoder.layer", "attention"),
        Ignore(r"(qformer\.)?embeddings\.position_ids", BUFFER),
    ]


def stage1_heads(config: QformerConfig, size: int, *, hugging_face: bool = False) -> list[Entry]:
    """Contrastive projections, matching head and temperature (which Hugging Face drops)."""
    names = ("vision_projection", "text_projection") if hugging_face else ("vision_proj", "text_proj")
    d = config.hidden_size
    table: list[Entry] = []
    for name, target, out in (
        (names[0], "vision_proj", size),
        (names[1], "text_proj", size),
        ("itm_head", "itm_head", 2),
    ):
        table += _linear(name, target, transpose(), same(), (out, d))
    if not hugging_face:
        table.append(Rule("temp", ("temp",), same(), ()))
    return table


def _queries(config: QformerConfig, norm: str) -> list[Entry]:
    q, d = config.num_queries, config.hidden_size
    return [
        Rule("query_tokens", ("qformer/query_tokens",), reshape((q, d)), (1, q, d)),
        *_norm(norm, "qformer/embeddings/norm", d),
    ]


def _embeddings(config: QformerConfig, name: str) -> list[Entry]:
    d = config.hidden_size
    words, places = (config.vocab_size, d), (config.max_positions, d)
    return [
        Rule(f"{name}.word_embeddings.weight", ("qformer/embeddings/word/embedding",), same(), words),
        Rule(f"{name}.position_embeddings.weight", ("qformer/embeddings/position/embedding",), same(), places),
    ]


def _lm_head(config: QformerConfig) -> list[Entry]:
    """The decoder is the word embedding under a second name; so is its bias."""
    name, d = "Qformer.cls.predictions", config.hidden_size
    return [
        *_linear(f"{name}.transform.dense", "qformer/lm_head/dense", transpose(), same(), (d, d)),
        *_norm(f"{name}.transform.LayerNorm", "qformer/lm_head/norm", d),
        Rule(f"{name}.bias", ("qformer/lm_head/bias",), same(), (config.vocab_size,)),
        Alias(f"{name}.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
        Alias(f"{name}.decoder.bias", f"{name}.bias"),
    ]


def _layers(config: QformerConfig, root: str, inner: str) -> list[Entry]:
    table: list[Entry] = []
    for place, layers, source, has_cross_attention in _places(config, root):
        table += _attention(config, f"{source}.attention", inner, f"{place}/attn", config.hidden_size, layers)
        if has_cross_attention:
            name, target = f"{source}.crossattention", f"{place}/cross_attn"
            table += _attention(config, name, inner, target, config.encoder_size, layers)
        table += _mlp(config, source, "_query", f"{place}/query_mlp", layers)
        if config.with_text:
            table += _mlp(config, source, "", f"{place}/text_mlp", layers)
    return table


def _places(config: QformerConfig, root: str) -> Iterator[tuple[str, range | None, str, bool]]:
    """(our place, source layers stacked there, source template, whether it has cross-attention).

    Layer g * F + j of the file is row g of ``layer_j``; layers beyond the last whole group are the tail.
    """
    frequency = config.cross_attention_frequency
    groups, rest = divmod(config.num_layers, frequency)
    for j in range(frequency if groups else 0):
        yield f"qformer/layers/layer_{j}", range(j, groups * frequency, frequency), f"{root}.{{l}}", j == 0
    for j in range(rest):
        yield f"qformer/tail/layer_{j}", None, f"{root}.{groups * frequency + j}", j == 0


def _attention(
    config: QformerConfig, name: str, inner: str, target: str, source_size: int, layers: range | None
) -> list[Entry]:
    d, split = config.hidden_size, heads_in(config.num_heads)
    table: list[Entry] = []
    for part, width in (("query", d), ("key", source_size), ("value", source_size)):
        table += _linear(f"{name}.{inner}.{part}", f"{target}/{part}", split, split, (d, width), layers)
    out = heads_out(config.num_heads)
    table += _linear(f"{name}.output.dense", f"{target}/out", out, same(), (d, d), layers)
    return table + _norm(f"{name}.output.LayerNorm", f"{target}/norm", d, layers)


def _mlp(config: QformerConfig, name: str, suffix: str, target: str, layers: range | None) -> list[Entry]:
    d, f = config.hidden_size, config.mlp_size
    return [
        *_linear(f"{name}.intermediate{suffix}.dense", f"{target}/fc1", transpose(), same(), (f, d), layers),
        *_linear(f"{name}.output{suffix}.dense", f"{target}/fc2", transpose(), same(), (d, f), layers),
        *_norm(f"{name}.output{suffix}.LayerNorm", f"{target}/norm", d, layers),
    ]


def _linear(
    name: str, target: str, kernel: Transform, bias: Transform, shape: tuple[int, int], layers: range | None = None
) -> list[Entry]:
    return [
        Rule(f"{name}.weight", (f"{target}/kernel",), kernel, shape, layers),
        Rule(f"{name}.bias", (f"{target}/bias",), bias, shape[:1], layers),
    ]


def _norm(name: str, target: str, size: int, layers: range | None = None) -> list[Entry]:
    return [
        Rule(f"{name}.weight", (f"{target}/scale",), same(), (size,), layers),
        Rule(f"{name}.bias", (f"{target}/bias",), same(), (size,), layers),
    ]
