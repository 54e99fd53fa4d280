"""What was found out about the files, and the small questions that are asked of their shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgpt4_jax.config import ModelConfig, QformerConfig, VitConfig, replace_fields
from mgpt4_jax.errors import UserError

from .readers import Source, TensorInfo
from .rules import Part

Overrides = Mapping[str, Mapping[str, Any]]
Keys = Mapping[str, TensorInfo]
QFORMER_HEADS = {768: 12}
PARTS = ("vit", "qformer", "llama", "opt", "t5")


@dataclass
class Inferred:
    """A configuration and, for each source, the table that reads it."""

    config: ModelConfig
    parts: list[Part]
    template: str
    resized: str | None = None
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def qformer_config(
    source: Source, root: str, inner: str, embeddings: str, overrides: Overrides, heads: int | None = None
) -> QformerConfig:
    """Sizes from the shapes; cross-attention must stand in every n-th layer from the first."""
    keys = source.tensors()
    _, q, d = shape_of(source, "query_tokens", 3)
    layers = count_layers(keys, re.escape(root) + r"\.(\d+)\.attention\.")
    pattern = re.compile(re.escape(root) + rf"\.(\d+)\.crossattention\.{inner}\.key\.weight")
    crossed = sorted(int(match[1]) for key in keys if (match := pattern.fullmatch(key)))
    frequency = crossed[1] - crossed[0] if len(crossed) > 1 else layers
    if crossed != list(range(0, layers, max(frequency, 1))):
        raise UserError(
            f"{source.path}: cross-attention stands in layers {crossed} of {layers}; expected every n-th from 0"
        )
    words = f"{embeddings}.word_embeddings.weight"
    text: dict[str, Any] = {}
    if words in keys:
        places = shape_of(source, f"{embeddings}.position_embeddings.weight", 2)[0]
        text = {"with_text": True, "vocab_size": keys[words].shape[0], "max_positions": places}
    return QformerConfig(
        hidden_size=d,
        mlp_size=shape_of(source, f"{root}.0.intermediate_query.dense.weight", 2)[0],
        num_layers=layers,
        num_heads=heads or heads_of("qformer", d, QFORMER_HEADS, overrides, source),
        num_queries=q,
        encoder_size=shape_of(source, f"{root}.0.crossattention.{inner}.key.weight", 2)[1],
        cross_attention_frequency=frequency,
        with_lm_head="Qformer.cls.predictions.bias" in keys,
        **text,
    )


def heads_of(part: str, width: int, known: Mapping[int, int], overrides: Overrides, source: Source) -> int:
    heads = overrides.get(part, {}).get("num_heads") or known.get(width)
    if heads is None:
        raise UserError(
            f"{source.path}: width {width} does not tell its heads; "
            f"write `{part}: {{num_heads: N}}` in a YAML file and give it as --overrides"
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{part}.num_heads={heads} does not divide the width {width} of {source.path}")
    return heads


def shape_of(source: Source, key: str, ndim: int) -> tuple[int, ...]:
    info = source.tensors().get(key)
    if info is None:
        raise UserError(f"{source.path}: lacks {key}; the file is damaged or of another model")
    if len(info.shape) != ndim:
        raise UserError(f"{source.path}: {key} has shape {list(info.shape)}, expected {ndim} axes")
    return info.shape


def grid_of(source: Source, key: str) -> int:
    count = shape_of(source, key, 3)[1] - 1
    grid = math.isqrt(max(count, 0))
    if grid < 1 or grid**2 != count:
        raise UserError(f"{source.path}: {key} has {count} patches, which is no square")
    return grid


def count_layers(keys: Keys, pattern: str) -> int:
    numbers = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
    return max(numbers, default=-1) + 1


def apply_overrides(config: ModelConfig, overrides: Overrides) -> ModelConfig:
    """Overrides of a part that the model lacks are left out (the caller warns)."""
    present = {key: value for key, value in overrides.items() if key not in PARTS or getattr(config, key) is not None}
    return replace_fields(config, present)


def check_config(config: ModelConfig, names: str) -> None:
    """Sizes that must agree across files."""
    vit, reader = config.vit, config.qformer
    if vit is not None and vit.image_size % vit.patch_size:
        raise UserError(f"image size {vit.image_size} is no multiple of the patch size {vit.patch_size}")
    if vit is not None and reader is not None and reader.encoder_size != vit.hidden_size:
        raise UserError(f"{names}: the Q-Former reads width {reader.encoder_size}, the ViT gives {vit.hidden_size}")
    joined = vit is not None and reader is None and config.llama is not None
    if joined and vit.grid_size**2 % config.patches_per_token:
        raise UserError(
            f"{vit.grid_size**2} patches cannot be joined by {config.patches_per_token}; choose another image size"
        )


def guess_template(config: ModelConfig) -> str:
    """The conversation the published weights were trained with; ``--template`` overrides it."""
    if config.architecture != "minigpt4":
        return {"instructblip": "instructblip", "blip2_opt": "blip2", "blip2_t5": "blip2"}.get(
            config.architecture, "none"
        )
    if config.llama.lora is not None and config.qformer is None:
        return "minigpt_v2"
    return "vicuna_v0" if config.qformer is not None else "llama2"


def resized_note(grid: int, vit: VitConfig) -> str:
    size = vit.patch_size
    return (
        f"position embeddings resized from {grid}x{grid} to {vit.grid_size}x{vit.grid_size} patches "
        f"({grid * size} to {vit.image_size} pixels), bicubic in float32 as the original does"
    )
