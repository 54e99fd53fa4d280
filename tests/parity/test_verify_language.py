"""``verify`` of OPT and T5, alone and under BLIP-2: it passes on what was converted, and names what was altered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tensorstore
import torch
from tiny_hf import OPT, QFORMER, T5, VISION
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
HEADS = {"vit": {"num_heads": 4, "image_size": 56}, "qformer": {"num_heads": 4}}


def _opt(**fields):
    return OPTForCausalLM(OPTConfig(**OPT | fields))


def _t5(**fields):
    model = T5ForConditionalGeneration(T5Config(**T5 | fields))
    if not (T5 | fields)["tie_word_embeddings"]:  # transformers 5 ties unless the head is another tensor
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


MODELS = {
    "opt": _opt,
    "opt_350m": lambda: _opt(word_embed_proj_dim=20, do_layer_norm_before=False),
    "flan_t5": _t5,
    "t5_tied": lambda: _t5(feed_forward_proj="relu", tie_word_embeddings=True),
}


@pytest.fixture(params=MODELS, scope="module")
def language(request, convert_model):
    return convert_model(MODELS[request.param]())


def test_language_models_pass(language):
    seen = []
    report = verify(language.model_dir, from_dir=language.source, progress=lambda *step: seen.append(step))
    assert report.passed, report.failures
    assert not report.skipped
    names = {row.component for row in report.rows}
    if language.config.opt is not None:
        assert names >= {"opt/embed_tokens", "opt/embed_positions", "opt/layers/1", "opt/logits"}
        assert seen[-1] == (2, 2)
    else:
        assert names >= {"t5/encoder/layers/1", "t5/decoder/layers/2", "t5/decoder/relative_bias", "t5/logits"}
        assert seen[-1] == (5, 5)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_blip2_passes_with_its_recorded_outputs(name, tmp_path):
    folder = GOLDEN / f"blip2_{name}"
    files = {"qformer": folder / f"blip2_{name}.pth", "llm": folder / f"{name}_model"}
    convert(**files, out=tmp_path / "model", tokenizer=folder / f"{name}_tokenizer", overrides=HEADS)
    report = verify(tmp_path / "model", **files, golden=folder)
    assert report.passed, report.failures
    assert not report.skipped
    names = {row.component for row in report.rows}
    assert {"projection, from the picture on", f"{name}/logits, from the text on"} <= names
    recorded = {"opt": {"noprompt_logits", "prompt_logits"}, "t5": {"encoder_last", "logits"}}
    assert {f"recorded/{key}" for key in recorded[name]} <= names


def test_instructblip_on_flan_t5(convert_model):
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={"model_type": "t5", **T5, "dense_act_fn": "gelu"},
        num_query_tokens=6,
        image_token_index=70,
    )
    model = InstructBlipForConditionalGeneration(config)
    model.language_model.lm_head.weight = torch.nn.Parameter(torch.zeros(T5["vocab_size"], T5["d_model"]))
    made = convert_model(model)
    report = verify(made.model_dir, from_dir=made.source)
    assert report.passed, report.failures
    assert not report.skipped


ALTERED = {
    "opt": {
        "opt/embed_positions/embedding": "opt/embed_positions",
        "opt/layers/attn/value/bias": "opt/layers/1",
        "opt/final_norm/bias": "opt/logits",
    },
    "flan_t5": {
        "t5/encoder/relative_bias": "t5/encoder/relative_bias",
        "t5/encoder/layers/mlp/gate/kernel": "t5/encoder/layers/1",
        "t5/decoder/layers/cross_attn/key/kernel": "t5/decoder/layers/1",
        "t5/decoder/norm/scale": "t5/decoder/norm",
        "t5/lm_head/kernel": "t5/logits",
    },
}


@pytest.mark.parametrize("language", ALTERED, indirect=True)
def test_one_altered_weight_is_named(language, request, tmp_path):
    for path, component in ALTERED[request.node.callspec.params["language"]].items():
        model_dir = tmp_path / component.replace("/", ".")
        shutil.copytree(language.model_dir, model_dir)
        file = {"driver": "file", "path": str(model_dir / "params" / path.replace("/", "."))}
        store = tensorstore.open({"driver": "zarr3", "kvstore": file}).result()
        values = store.read().result()
        row = values[1] if "/layers/" in path else values
        row.reshape(-1)[:7] *= -1  # rows of a position table that are used, too
        row.reshape(-1)[-40:] *= -1
        store.write(values).result()
        report = verify(model_dir, from_dir=language.source)
        assert [row.component for row in report.failures if row.weights is False] == [component]
