"""Published parameter counts, and a name of the sharding table for every dimension; nothing is computed."""

from __future__ import annotations

import flax.linen as nn
import jax
import pytest

from mgpt4_jax import config as presets
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models import abstract_params, boxed_params, num_parameters
from mgpt4_jax.sharding import RULES

LANGUAGE = {
    "llama_7b": (presets.llama_7b(), 6_738_415_616),
    "llama_13b": (presets.llama_13b(), 13_015_864_320),
    "llama_33b": (presets.llama_33b(), 32_528_943_616),
    "llama_65b": (presets.llama_65b(), 65_285_660_672),
    "llama2_7b": (presets.llama2_7b(), 6_738_415_616),
    "llama2_70b": (presets.llama2_70b(), 68_976_648_192),
    "llama31_8b": (presets.llama31_8b(), 8_030_261_248),
    "vicuna_7b": (presets.vicuna_7b(), 6_738_415_616 + 2 * 4096),
    "vicuna_13b": (presets.vicuna_13b(), 13_015_864_320 + 2 * 5120),
}
OTHERS = {
    "opt_2_7b": (ModelConfig("opt", opt=presets.opt_2_7b()), 2_651_596_800),
    "opt_6_7b": (ModelConfig("opt", opt=presets.opt_6_7b()), 6_658_473_984),
    "flan_t5_xl": (ModelConfig("t5", t5=presets.flan_t5_xl()), 2_849_757_184),
    "flan_t5_xxl": (ModelConfig("t5", t5=presets.flan_t5_xxl()), 11_135_332_352),
}
WHOLE = {
    "vicuna": presets.minigpt4(presets.vicuna_7b()),
    "llama2": presets.minigpt4(presets.llama2_7b(), with_qformer=False),
    "blip2": presets.blip2_stage1(),
    "instructblip": ModelConfig(
        "instructblip", presets.eva_vit_g(), presets.qformer_base(with_text=True), presets.vicuna_7b()
    ),
    "blip2_opt": presets.blip2_stage2(presets.opt_2_7b()),
    "opt_350m": ModelConfig("opt", opt=presets.OptConfig(hidden_size=1024, embed_size=512, norm_first=False)),
    "instructblip_t5": presets.blip2_stage2(presets.flan_t5_xl(), reads_instruction=True),
    "t5_tied": ModelConfig("t5", t5=presets.T5Config(gated=False, activation="relu", tie_embeddings=True)),
    "grouped": ModelConfig("llama", llama=presets.llama31_8b()),
}


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_have_the_published_size(name):
    config, expected = LANGUAGE[name]
    assert num_parameters(ModelConfig("llama", llama=config)) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_opt_and_flan_t5_have_the_published_size(name):
    config, expected = OTHERS[name]
    assert num_parameters(config) == expected


def test_blip2_on_opt_and_flan_t5():
    picture = 985_894_528 + 105_165_056
    for config, width, name in (
        (presets.blip2_stage2(presets.opt_6_7b()), 4096, "opt_6_7b"),
        (presets.blip2_stage2(presets.flan_t5_xl()), 2048, "flan_t5_xl"),
    ):
        assert num_parameters(config) == picture + 769 * width + OTHERS[name][1]
        assert config.tokens_per_image == 32


def test_picture_side_has_the_published_size():
    params = abstract_params(WHOLE["vicuna"])
    assert _count(params["vit"]) == 985_894_528
    assert _count(params["qformer"]) == 105_162_240
    assert _count(params["qformer"]) + _count(params["ln_vision"]) == 105_165_056
    assert _count(params["projection"]) == 768 * 4096 + 4096


def test_llama2_variant_joins_four_patches():
    params = abstract_params(WHOLE["llama2"])
    assert "qformer" not in params
    assert params["projection"]["kernel"].shape == (5632, 4096)
    assert WHOLE["llama2"].tokens_per_image == 64
    assert WHOLE["vicuna"].tokens_per_image == 32


def test_stage1_keeps_text_side_and_heads():
    params = abstract_params(WHOLE["blip2"])
    with_text, without = params["qformer"], abstract_params(WHOLE["vicuna"])["qformer"]
    text_mlps = 12 * (2 * 768 * 3072 + 3072 + 768 + 2 * 768)
    embeddings = (30523 + 512) * 768
    lm_head = 768 * 768 + 768 + 2 * 768 + 30523
    assert _count(with_text) == _count(without) + text_mlps + embeddings + lm_head
    assert _count(params["vision_proj"]) == _count(params["text_proj"]) == 768 * 256 + 256
    assert _count(params["itm_head"]) == 768 * 2 + 2
    assert params["temp"].shape == ()


def test_stacks_lead_with_the_layers():
    params = abstract_params(WHOLE["vicuna"])
    for tower, stack, layers in (("vit", "blocks", 39), ("qformer", "layers", 6), ("llama", "layers", 32)):
        assert {leaf.shape[0] for leaf in jax.tree.leaves(params[tower][stack])} == {layers}


@pytest.mark.parametrize("name", WHOLE)
def test_every_dimension_has_a_name_that_the_table_knows(name):
    boxes, _ = jax.tree_util.tree_flatten_with_path(
        boxed_params(WHOLE[name]), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    for path, box in boxes:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path == "temp":  # a scalar
            continue
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim, path
        assert {axis for axis in box.names if axis is not None} <= set(RULES), path
        assert (box.names[0] == "layers") == any(stack in path for stack in ("vit/blocks", "/layers/")), path


def test_big_matrices_are_cut_on_both_mesh_axes():
    boxed = boxed_params(WHOLE["vicuna"])["llama"]["layers"]
    for block, name in (("attn", "query"), ("attn", "out"), ("mlp", "gate"), ("mlp", "down")):
        axes = {RULES[axis] for axis in boxed[block][name]["kernel"].names if axis is not None}
        assert {"fsdp", "tensor"} <= axes
