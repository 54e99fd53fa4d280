"""Tables of the EVA-CLIP vision transformer: LAVIS ``eva_vit_g.pth`` and Hugging Face's BLIP-2 files."""

from __future__ import annotations

from dataclasses import dataclass

from mgpt4_jax.config import VitConfig

from .rules import Entry, Ignore, Rule
from .transforms import heads_out, patch_kernel, positions, qkv, qkv_bias, reshape, same, transpose


@dataclass(frozen=True)
class _Names:
    """How a file calls the parts of the tower."""

    cls: str
    positions: str
    patches: str
    block: str
    norm: str
    out: str


_LAVIS = _Names("cls_token", "pos_embed", "patch_embed.proj", "blocks.{l}", "norm", "attn.proj")
_HUGGING_FACE = _Names(
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.position_embedding",
    "vision_model.embeddings.patch_embedding",
    "vision_model.encoder.layers.{l}",
    "layer_norm",
    "self_attn.projection",
)


def lavis_vit(config: VitConfig, *, prefix: str = "", source_grid: int, source_layers: int) -> list[Entry]:
    """``prefix`` is "visual_encoder." in combined files. The raw file has blocks and norms that are not used."""
    n, h, blocks = config.num_heads, config.hidden_size // config.num_heads, range(config.num_layers)
    d = config.hidden_size
    attn = f"{prefix}blocks.{{l}}.attn"
    unused = "|".join(str(layer) for layer in range(config.num_layers, source_layers))
    return [
        *_common(config, _LAVIS, prefix, source_grid),
        Rule(f"{attn}.q_bias", ("vit/blocks/attn/q_bias",), reshape((n, h)), (d,), blocks),
        Rule(f"{attn}.v_bias", ("vit/blocks/attn/v_bias",), reshape((n, h)), (d,), blocks),
        *([Ignore(rf"blocks\.({unused})\..*", "BLIP-2 does not use the last block of EVA")] if unused else []),
        *([] if prefix else [Ignore(r"(norm|fc_norm|head)\..*", "BLIP-2 does not use EVA's final norm and head")]),
    ]


def hugging_face_vit(config: VitConfig, *, source_grid: int) -> list[Entry]:
    """``vision_model.*`` of Blip2 and InstructBlip; ``post_layernorm`` is LAVIS's ``ln_vision``."""
    n, d = config.num_heads, config.hidden_size
    bias = "vision_model.encoder.layers.{l}.self_attn.qkv.bias"
    biases = ("vit/blocks/attn/q_bias", "vit/blocks/attn/v_bias")
    return [
        *_common(config, _HUGGING_FACE, "", source_grid),
        Rule(bias, biases, qkv_bias(n), (3 * d,), range(config.num_layers)),
        *ln_vision(config, "vision_model.post_layernorm"),
    ]


def ln_vision(config: VitConfig, name: str = "ln_vision") -> list[Entry]:
    """The norm after the tower: [e]."""
    shape = (config.hidden_size,)
    return [
        Rule(f"{name}.weight", ("ln_vision/scale",), same(), shape),
        Rule(f"{name}.bias", ("ln_vision/bias",), same(), shape),
    ]


def _common(config: VitConfig, names: _Names, prefix: str, source_grid: int) -> list[Entry]:
    d, f, n, size = config.hidden_size, config.mlp_size, config.num_heads, config.patch_size
    block = prefix + names.block
    rules: list[Entry] = [
        Rule(prefix + names.cls, ("vit/cls_token",), reshape((d,)), (1, 1, d)),
        Rule(
            prefix + names.positions,
            ("vit/pos_embed",),
            positions(source_grid, config.grid_size),
            (1, source_grid**2 + 1, d),
        ),
        Rule(f"{prefix}{names.patches}.weight", ("vit/patch_embed/kernel",), patch_kernel(), (d, 3, size, size)),
        Rule(f"{prefix}{names.patches}.bias", ("vit/patch_embed/bias",), same(), (d,)),
    ]
    attn = "self_attn" if names is _HUGGING_FACE else "attn"
    per_block = [
        (f"{names.norm}1.weight", "norm1/scale", same(), (d,)),
        (f"{names.norm}1.bias", "norm1/bias", same(), (d,)),
        (f"{attn}.qkv.weight", "attn/qkv/kernel", qkv(n), (3 * d, d)),
        (f"{names.out}.weight", "attn/out/kernel", heads_out(n), (d, d)),
        (f"{names.out}.bias", "attn/out/bias", same(), (d,)),
        (f"{names.norm}2.weight", "norm2/scale", same(), (d,)),
        (f"{names.norm}2.bias", "norm2/bias", same(), (d,)),
        ("mlp.fc1.weight", "mlp/fc1/kernel", transpose(), (f, d)),
        ("mlp.fc1.bias", "mlp/fc1/bias", same(), (f,)),
        ("mlp.fc2.weight", "mlp/fc2/kernel", transpose(), (d, f)),
        ("mlp.fc2.bias", "mlp/fc2/bias", same(), (d,)),
    ]
    for name, target, transform, shape in per_block:
        rules.append(Rule(f"{block}.{name}", (f"vit/blocks/{target}",), transform, shape, range(config.num_layers)))
    return rules
