"""Every rule table covers the real files at full size: nothing unmatched, nothing unfilled."""

from __future__ import annotations

import pytest
from weight_files import QFORMER as QFORMER_FILE
from weight_files import VIT, manifest

from mgpt4_jax.convert.convert import open_sources
from mgpt4_jax.convert.infer import infer
from mgpt4_jax.convert.readers import SumSource, TensorInfo
from mgpt4_jax.convert.rules import plan
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import abstract_params

VIT_G, LN_VISION, QFORMER = 985_894_528, 2_816, 105_162_240
LLAMA_7B, LLAMA_13B, LLAMA_33B, LLAMA_65B = 6_738_415_616, 13_015_864_320, 32_528_943_616, 65_285_660_672
OPT_2_7B, OPT_6_7B = 2_651_596_800, 6_658_473_984
FLAN_T5_XL, FLAN_T5_XXL = 2_849_757_184, 11_135_332_352
QFORMER_TEXT = 30_523 * 768 + 512 * 768 + 12 * (2 * 768 * 3072 + 3072 + 768 + 2 * 768)
STAGE1 = {"vit": "eva_vit_g", "qformer": "blip2_pretrained"}
MINIGPT4 = {"vit": "eva_vit_g", "qformer": "blip2_pretrained_flant5xxl"}


def count_at_full_size(files, **options):
    """Infer and plan; gives the configuration, the plan and its count of parameters."""
    sources = {role: manifest(name) for role, name in files.items()}
    inferred = infer(sources, **options)
    planned = plan(inferred.parts, abstract_params(inferred.config))
    claimed = len(planned.moves) + len(planned.aliases) + sum(map(len, planned.ignored.values()))
    assert claimed == sum(len(source.tensors()) for source in sources.values())
    return inferred.config, planned, planned.num_parameters


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama_7b", LLAMA_7B),
        ("llama_13b", LLAMA_13B),
        ("llama_33b", LLAMA_33B),
        ("llama_65b", LLAMA_65B),
        ("vicuna_7b_v0", LLAMA_7B + 2 * 4096),
        ("vicuna_13b_v0", LLAMA_13B + 2 * 5120),
        ("llama2_7b_chat", LLAMA_7B),
        ("llama2_70b", 68_976_648_192),
        ("llama31_8b", 8_030_261_248),
    ],
)
def test_language_models(name, count):
    config, _, found = count_at_full_size({"llm": name})
    assert (config.architecture, found) == ("llama", count)


@pytest.mark.parametrize(
    ("name", "architecture", "count"),
    [
        ("opt_2.7b", "opt", OPT_2_7B),
        ("opt_6.7b", "opt", OPT_6_7B),
        ("flan_t5_xl", "t5", FLAN_T5_XL),
        ("flan_t5_xxl", "t5", FLAN_T5_XXL),
    ],
)
@pytest.mark.parametrize("role", ["llm", "model"])
def test_opt_and_t5(name, architecture, count, role):
    config, planned, found = count_at_full_size({role: name})
    assert (config.architecture, found) == (architecture, count)
    assert len(planned.aliases) == (1 if architecture == "opt" else 2)
    assert config.t5 is None or config.t5.activation == "gelu_new"  # as Google trained it


@pytest.mark.parametrize(
    ("reader", "llm", "count"),
    [
        ("blip2_pretrained_opt2.7b", "opt_2.7b", OPT_2_7B + 769 * 2560),
        ("blip2_pretrained_opt6.7b", "opt_6.7b", OPT_6_7B + 769 * 4096),
        ("blip2_pretrained_flant5xl", "flan_t5_xl", FLAN_T5_XL + 769 * 2048),
        ("blip2_pretrained_flant5xxl", "flan_t5_xxl", FLAN_T5_XXL + 769 * 4096),
        ("instruct_blip_flanxl_trimmed", "flan_t5_xl", FLAN_T5_XL + 769 * 2048 + QFORMER_TEXT),
        ("blip2_pretrained", "opt_2.7b", OPT_2_7B + 769 * 2560),  # where stage 2 begins
        ("blip2_pretrained_opt2.7b", "flan_t5_xl", FLAN_T5_XL + 769 * 2048),
    ],
)
def test_blip2_on_opt_and_flan_t5(reader, llm, count):
    config, planned, found = count_at_full_size({"vit": "eva_vit_g", "qformer": reader, "llm": llm})
    kind = "opt" if "opt" in llm else "t5"
    assert (config.architecture, config.tokens_per_image) == (f"blip2_{kind}", 32)
    assert found == VIT_G + LN_VISION + QFORMER + count
    assert config.qformer.with_text == ("instruct" in reader)
    assert config.t5 is None or config.t5.activation == "gelu"  # as LAVIS runs it
    is_trained = reader.removeprefix("blip2_pretrained_").replace("flant5", "flan_t5_").replace("opt", "opt_") == llm
    assert bool(planned.fills) != (is_trained or "instruct" in reader)


def test_the_wrong_flan_t5_is_named():
    with pytest.raises(UserError, match="projects to width 4096, but the language model flan_t5_xl has width 2048"):
        count_at_full_size({"vit": "eva_vit_g", "qformer": "blip2_pretrained_flant5xxl", "llm": "flan_t5_xl"})


def test_opt_needs_a_qformer():
    with pytest.raises(UserError, match="reads pictures with a Q-Former; add --qformer"):
        count_at_full_size({"vit": "eva_vit_g", "llm": "opt_2.7b"})


def test_eva_alone_leaves_out_its_last_block_and_its_end():
    config, planned, found = count_at_full_size({"vit": "eva_vit_g"})
    assert (config.architecture, config.vit.num_layers, config.vit.num_heads) == ("encoder", 39, 16)
    assert found == VIT_G + LN_VISION
    ignored = {reason: len(keys) for reason, keys in planned.ignored.items()}
    assert sorted(ignored.values()) == [4, 13]


def test_stage_1_begins_with_bert():
    """The same model as that which stage 1 leaves; 16 tensors of each layer, 12 elsewhere."""
    config, planned, found = count_at_full_size({"vit": "eva_vit_g", "bert": "bert_base_uncased"})
    trained, _, count = count_at_full_size(STAGE1)
    assert (config, found) == (trained, count)
    moved = [move for move in planned.moves if move.part.name == "bert_base_uncased"]
    assert len(moved) == 12 * 16 + 9
    assert {alias.source for _, alias in planned.aliases} == {"cls.predictions.decoder.weight"}
    assert sorted(map(len, planned.ignored.values())) == [1, 2, 2, 4, 13]  # segments, pooler, next sentence; EVA's end


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bert.encoder.layer.12.output.dense.bias": (768,)}, "1 unknown tensors; first: . bert.encoder.layer.12"),
        ({"bert.encoder.layer.0.crossattention.self.query.bias": (768,)}, "1 unknown tensors; first: .*crossattention"),
        ({"bert.encoder.layer.3.output.LayerNorm.gamma": None}, "1 missing tensors; first: .*layer.3.output.LayerNorm"),
        ({"cls.predictions.transform.dense.weight": None}, "1 missing tensors"),
        ({"cls.predictions.bias": None}, "--bert wants bert-base-uncased with its prediction head"),
        ({"bert.embeddings.word_embeddings.weight": (30523, 768)}, "1 tensors of another shape"),
    ],
)
def test_a_bert_that_is_not_whole_is_refused(changes, match):
    bert = manifest("bert_base_uncased")
    for key, shape in changes.items():
        bert._tensors[key] = TensorInfo(shape, "float16", bert.path)
        if shape is None:
            del bert._tensors[key]
    with pytest.raises(UserError, match=match):
        inferred = infer({"vit": manifest("eva_vit_g"), "bert": bert})
        plan(inferred.parts, abstract_params(inferred.config))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; --bert wants bert-base-uncased"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": "768"}, "hidden_size must be a whole number, got '768'"),
    ],
)
def test_another_kind_of_bert_is_refused(fields, match):
    bert = manifest("bert_base_uncased")
    bert.config |= fields
    with pytest.raises(UserError, match=match):
        infer({"vit": manifest("eva_vit_g"), "bert": bert})


def test_bert_wants_its_vision_transformer_and_no_trained_qformer():
    with pytest.raises(UserError, match="add --vit eva_vit_g.pth"):
        infer({"bert": manifest("bert_base_uncased")})
    with pytest.raises(UserError, match="leave out --qformer, or --bert"):
        open_sources(vit=VIT, qformer=QFORMER_FILE, bert=VIT)


@pytest.mark.parametrize("name", ["blip2_pretrained_flant5xxl", "blip2_pretrained_opt2.7b", "blip2_pretrained"])
@pytest.mark.parametrize(
    ("llm", "projection", "count"),
    [
        ("vicuna_13b_v0", "pretrained_minigpt4_13b", LLAMA_13B + 2 * 5120 + 769 * 5120),
        ("vicuna_13b_v0", "checkpoint_stage1_13b", LLAMA_13B + 2 * 5120 + 769 * 5120),
        ("vicuna_7b_v0", "pretrained_minigpt4_7b", LLAMA_7B + 2 * 4096 + 769 * 4096),
    ],
)
def test_minigpt4_on_vicuna(name, llm, projection, count):
    files = {"vit": "eva_vit_g", "qformer": name, "llm": llm, "projection": projection}
    config, _, found = count_at_full_size(files)
    assert (config.architecture, config.tokens_per_image) == ("minigpt4", 32)
    assert found == VIT_G + LN_VISION + QFORMER + count


def test_minigpt4_on_llama2_has_no_qformer():
    files = {"vit": "eva_vit_g", "llm": "llama2_7b_chat", "projection": "pretrained_minigpt4_llama2_7b"}
    config, planned, found = count_at_full_size(files)
    assert (config.qformer, config.tokens_per_image) == (None, 64)
    assert found == VIT_G + LN_VISION + LLAMA_7B + 5633 * 4096
    assert {fill.target for fill in planned.fills} == {"ln_vision/scale", "ln_vision/bias"}


def test_llama2_with_a_vicuna_projection_is_refused_unless_allowed():
    files = MINIGPT4 | {"llm": "llama2_7b_chat", "projection": "pretrained_minigpt4_7b"}
    with pytest.raises(UserError, match="looks like LLaMA-2.*--allow-llm-mismatch"):
        count_at_full_size(files)
    assert count_at_full_size(files, allow_llm_mismatch=True)[0].architecture == "minigpt4"


def test_stage1_with_its_heads():
    config, _, found = count_at_full_size(STAGE1)
    assert (config.architecture, config.projection_size, config.qformer.with_lm_head) == ("blip2", 256, True)
    text = 30_523 * 768 + 512 * 768 + 12 * (2 * 768 * 3072 + 3072 + 768 + 2 * 768)
    head = 769 * 768 + 2 * 768 + 30_523
    assert found == VIT_G + LN_VISION + QFORMER + text + head + 2 * 769 * 256 + 769 * 2 + 1


def test_coco_finetune_holds_its_own_vit_at_364_pixels():
    config, _, _ = count_at_full_size({"qformer": "blip2_finetune_coco"})
    assert (config.vit.image_size, config.vit.num_positions) == (364, 677)
    config, planned, _ = count_at_full_size(STAGE1 | {"qformer": "blip2_finetune_coco"})
    assert config.vit.image_size == 224
    assert len(planned.ignored["the vision transformer is taken from eva_vit_g"]) == 511


@pytest.mark.parametrize("name", ["blip2_pretrained_flant5xxl", "blip2_pretrained_opt2.7b"])
def test_picture_side_alone(name):
    config, _, found = count_at_full_size({"vit": "eva_vit_g", "qformer": name})
    assert (config.architecture, found) == ("encoder", VIT_G + LN_VISION + QFORMER)
    assert (QFORMER + LN_VISION) // 100_000 == 1051  # published, cut: 105.1 M


@pytest.mark.parametrize(
    ("name", "architecture", "count"),
    [
        ("hf_blip2_itm_vit_g", "blip2", QFORMER_TEXT + 2 * 769 * 256 + 769 * 2 + 1),
        ("hf_blip2_opt_2.7b", "blip2_opt", OPT_2_7B + 769 * 2560),
        ("hf_blip2_flan_t5_xl", "blip2_t5", FLAN_T5_XL + 769 * 2048),
        ("hf_instructblip_vicuna_7b", "instructblip", LLAMA_7B + 2 * 4096 + 769 * 4096 + QFORMER_TEXT),
        ("hf_instructblip_flan_t5_xl", "blip2_t5", FLAN_T5_XL + 769 * 2048 + QFORMER_TEXT),
    ],
)
def test_hugging_face_directories(name, architecture, count):
    config, planned, found = count_at_full_size({"model": name})
    assert config.architecture == architecture
    assert (config.vit.hidden_size, config.qformer.num_heads) == (1408, 12)
    assert not planned.ignored
    assert found == VIT_G + LN_VISION + QFORMER + count
    assert config.qformer.with_text == ("itm" in name or "instructblip" in name)
    assert config.t5 is None or (config.t5.activation, config.t5.scale_logits) == ("gelu", False)


def test_delta_has_one_row_more_than_its_base():
    source = SumSource(manifest("llama_7b"), manifest("vicuna_7b_v0"))
    inferred = infer({"llm": source})
    planned = plan(inferred.parts, abstract_params(inferred.config))
    assert inferred.config.llama.vocab_size == 32001
    assert planned.num_parameters == LLAMA_7B + 2 * 4096


def test_delta_of_another_size_is_refused():
    with pytest.raises(UserError, match="not its delta|must hold the same tensors"):
        SumSource(manifest("llama_13b"), manifest("vicuna_7b_v0"))


def test_a_projection_for_another_width_is_refused():
    files = MINIGPT4 | {"llm": "vicuna_7b_v0", "projection": "pretrained_minigpt4_13b"}
    with pytest.raises(UserError, match=r"projects to width 5120.*has width 4096"):
        count_at_full_size(files)


def test_nothing_to_convert():
    with pytest.raises(UserError, match="nothing to convert"):
        open_sources()
