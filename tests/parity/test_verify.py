"""``verify``: it passes on what was converted, and names what was altered."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
from rich.console import Console
from tiny_hf import LLAMA, QFORMER, VISION
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from mgpt4_jax.checkpoint import read_manifest
from mgpt4_jax.convert.comparison import fingerprint
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.verify import verify
from mgpt4_jax.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
HEADS = {"vit": {"num_heads": 4, "image_size": 56}, "qformer": {"num_heads": 4}}


def _alter(model_dir: Path, path: str, change) -> None:
    """Change a parameter on disk behind the converter's back, with checksums that fit."""
    file = {"driver": "file", "path": str(model_dir / "params" / path.replace("/", "."))}
    store = tensorstore.open({"driver": "zarr3", "kvstore": file}).result()
    values = store.read().result()
    change(values)
    store.write(values).result()


@pytest.fixture(scope="module")
def language(convert_model):
    """A language model alone."""
    return convert_model(LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_key_value_heads": 2})))


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory):
    """(model directory, its files) of a recorded MiniGPT-4 in the users' own layout."""
    case = GOLDEN / "minigpt4_vicuna"
    files = {
        "vit": case / "eva_vit_g.pth",
        "qformer": case / "blip2_pretrained_flant5xxl.pth",
        "llm": case / "llm",
        "projection": case / "pretrained_minigpt4.pth",
    }
    out = tmp_path_factory.mktemp("verify") / "model"
    convert(**files, out=out, overrides=HEADS)
    return out, files


def test_minigpt4_passes_with_its_recorded_outputs(minigpt4):
    out, files = minigpt4
    seen = []
    report = verify(out, **files, golden=GOLDEN / "minigpt4_vicuna", progress=lambda *step: seen.append(step))
    assert report.passed, report.failures
    assert not report.skipped
    config = read_manifest(out).config
    names = [row.component for row in report.rows]
    for tower, part in (("vit/blocks", config.vit), ("qformer/layers", config.qformer), ("llama/layers", config.llama)):
        for index in range(part.num_layers):
            assert f"{tower}/{index}" in names
    expected = {"vit/patches", "ln_vision", "projection", "llama/embed_tokens", "llama/logits", "recorded/img_embeds"}
    assert expected <= set(names)
    assert all(row.weights for row in report.rows if "/layers/" in row.component or "/blocks/" in row.component)
    total = config.vit.num_layers + config.qformer.num_layers + config.llama.num_layers
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_report_is_a_table_and_json(language):
    report = verify(language.model_dir, from_dir=language.source)
    console = Console(width=150, record=True, file=open("/dev/null", "w"))
    console.print(report)
    text = console.export_text()
    assert "llama/layers/1" in text
    assert f"pass: {len(report.rows)} comparisons" in text
    values = json.loads(report.to_json())
    assert values["passed"] is True
    assert len(values["rows"]) == len(report.rows)
    assert values["rows"][0] == dataclasses.asdict(report.rows[0])


def test_stage1_with_text_side_and_heads(tmp_path):
    file = GOLDEN / "blip2_stage1" / "blip2_stage1.pth"
    convert(qformer=file, out=tmp_path / "model", overrides=HEADS)
    report = verify(tmp_path / "model", qformer=file)
    assert report.passed, report.failures
    names = {row.component for row in report.rows}
    uses = {f"qformer/{use}, all layers" for use in ("joint", "text", "caption", "queries")}
    assert names >= uses | {"vision_proj", "text_proj", "itm_head", "temp", "qformer/lm_head", "qformer/embeddings"}


def test_resized_positions_without_qformer(tmp_path):
    case = GOLDEN / "minigpt4_llama2"
    files = {"vit": case / "eva_vit_g.pth", "llm": case / "llm", "projection": case / "pretrained_minigpt4.pth"}
    convert(**files, out=tmp_path / "model", overrides={"vit": {"num_heads": 4, "image_size": 84}}, image_size=56)
    report = verify(tmp_path / "model", **files, golden=case)
    assert report.passed, report.failures
    case = GOLDEN / "eva_b_interp"
    files = {"vit": case / "eva_vit_g.pth", "qformer": case / "ln_vision.safetensors"}
    convert(**files, out=tmp_path / "larger", overrides={"vit": {"num_heads": 4, "image_size": 84}})
    report = verify(tmp_path / "larger", **files, golden=case)
    assert report.passed, report.failures
    assert next(row for row in report.rows if row.component == "vit/embeddings").weights is None


def test_instructblip(convert_model):
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={"model_type": "llama", **LLAMA},
        num_query_tokens=6,
        image_token_index=70,
    )
    pair = convert_model(InstructBlipForConditionalGeneration(config))
    report = verify(pair.model_dir, from_dir=pair.source)
    assert report.passed, report.failures
    assert not report.skipped


def test_delta_weights(tmp_path, language):
    """Vicuna's layout: float16, one more row in the embeddings of the delta."""
    base = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_key_value_heads": 2})).half()
    delta = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_key_value_heads": 2, "vocab_size": 72})).half()
    files = {"llm": tmp_path / "base", "llm_delta": tmp_path / "delta"}
    base.save_pretrained(files["llm"])
    delta.save_pretrained(files["llm_delta"])
    convert(**files, out=tmp_path / "model")
    report = verify(tmp_path / "model", **files)
    assert report.passed, report.failures
    assert all(row.weights for row in report.rows if "layers" in row.component)


def _flip_sign(values):
    index = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[index] = -values[index]


def _flip_lowest_bit(values):
    values.view(np.uint32).reshape(-1)[7] ^= 1


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("vit/blocks/attn/qkv/kernel", "vit/blocks/1"),
        ("vit/blocks/attn/v_bias", "vit/blocks/1"),
        ("vit/pos_embed", "vit/embeddings"),
        ("qformer/layers/layer_1/query_mlp/fc2/kernel", "qformer/layers/3"),
        ("qformer/query_tokens", "qformer/query_tokens"),
        ("llama/layers/mlp/down/kernel", "llama/layers/1"),
        ("llama/embed_tokens/embedding", "llama/embed_tokens"),
        ("projection/kernel", "projection"),
    ],
)
def test_one_altered_weight_is_named(minigpt4, tmp_path, path, component):
    out, files = minigpt4
    shutil.copytree(out, tmp_path / "model")
    stacked = component[-1].isdigit()
    _alter(tmp_path / "model", path, lambda values: _flip_sign(values[1] if stacked else values))
    role = {"vit": "vit", "qformer": "qformer", "llama": "llm", "projection": "projection"}[path.split("/")[0]]
    report = verify(tmp_path / "model", **{role: files[role]})
    assert not report.passed
    assert report.failures[0].component == component
    assert f"the first is {component}" in report.summary()


def test_the_lowest_bit_of_one_weight_is_seen(language, tmp_path):
    shutil.copytree(language.model_dir, tmp_path / "model")
    _alter(tmp_path / "model", "llama/layers/mlp/up/kernel", lambda values: _flip_lowest_bit(values[1]))
    report = verify(tmp_path / "model", from_dir=language.source)
    assert [row.component for row in report.failures] == ["llama/layers/1"]
    assert report.failures[0].weights is False
    assert report.failures[0].max_rel < report.tolerance


def test_exchanged_weights_are_seen(language, tmp_path):
    """The same values in another order."""
    shutil.copytree(language.model_dir, tmp_path / "model")
    _alter(tmp_path / "model", "llama/layers/attn/query/kernel", lambda values: values[0].sort())
    report = verify(tmp_path / "model", from_dir=language.source)
    assert report.failures[0].component == "llama/layers/0"
    assert report.failures[0].weights is True


def test_nan_fails(language, tmp_path):
    shutil.copytree(language.model_dir, tmp_path / "model")
    _alter(tmp_path / "model", "llama/norm/scale", lambda values: values.fill(np.nan))
    report = verify(tmp_path / "model", from_dir=language.source)
    assert report.failures[0].component == "llama/norm"


def test_parts_without_their_file_are_named(minigpt4):
    out, files = minigpt4
    report = verify(out, projection=files["projection"])
    assert report.passed, report.failures
    assert [reason.split(":")[0] for reason in report.skipped] == ["vit", "qformer", "llama"]


def test_another_file_is_refused(minigpt4, tmp_path):
    out, files = minigpt4
    altered = tmp_path / files["projection"].name
    saved = torch.load(files["projection"], weights_only=True)
    saved["model"]["llama_proj.bias"][0] += 1
    torch.save(saved, altered)
    with pytest.raises(UserError, match=r"pretrained_minigpt4\.pth: has another sha256"):
        verify(out, projection=altered)
    with pytest.raises(UserError, match="was not converted from it as qformer"):
        verify(out, qformer=files["vit"])


def test_nothing_to_compare_with_is_refused(minigpt4, language):
    with pytest.raises(UserError, match="nothing to verify against"):
        verify(minigpt4[0])
    with pytest.raises(UserError, match="not a model directory"):
        verify(minigpt4[0].parent, golden=GOLDEN / "minigpt4_vicuna")
    with pytest.raises(UserError, match=r"inputs\.npz: no such file"):
        verify(language.model_dir, golden=GOLDEN / "no_such_case")
    with pytest.raises(UserError, match="records nothing that"):
        verify(language.model_dir, golden=GOLDEN / "eva_a")


def test_without_pytorch_the_extra_is_named(minigpt4, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"install the extra mgpt4-jax\[convert\]"):
        verify(minigpt4[0], vit=minigpt4[1]["vit"])


def test_fingerprint_ignores_order_and_zeros_only():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert fingerprint([values]) == fingerprint([np.zeros(3, np.float32), values[::-1].reshape(10, 100)])
    altered = values.copy()
    altered.view(np.uint32)[500] ^= 1
    assert fingerprint([values]) != fingerprint([altered])
