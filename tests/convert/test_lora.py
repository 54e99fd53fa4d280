"""LoRA adapters in the files of MiniGPT-v2: read, written again to the bit, merged, verified, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import transformers
from weight_files import (
    GOLDEN,
    LLM,
    OVERRIDES,
    PROJECTION,
    QFORMER,
    VIT,
    Manifest,
    altered,
    assert_same_tensors,
    load,
    manifest,
    save,
)

from mgpt4_jax.checkpoint import read_leaf, read_manifest
from mgpt4_jax.config import LoraConfig
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.export import export
from mgpt4_jax.convert.infer import infer
from mgpt4_jax.convert.inspect import inspect
from mgpt4_jax.convert.readers import TensorInfo, open_source
from mgpt4_jax.convert.rules import plan
from mgpt4_jax.convert.verify import verify
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import abstract_params

V2 = GOLDEN / "minigptv2_lora"
STAGE3 = V2 / "checkpoint_stage3.pth"
V2_FILES = {"vit": V2 / "eva_vit_g.pth", "llm": V2 / "llm", "projection": STAGE3}
VICUNA_FILES = {"vit": VIT, "qformer": QFORMER, "llm": LLM}
ROOT = "llama_model.base_model.model.model.layers"
BUFFERS = {"Qformer.bert.embeddings.position_ids", "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"}
SIZES = {  # of the recorded Vicuna: (inputs, outputs) of each matrix
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (48, 48),
    "self_attn.v_proj": (48, 48),
    "self_attn.o_proj": (48, 48),
    "mlp.gate_proj": (48, 112),
    "mlp.up_proj": (48, 112),
    "mlp.down_proj": (112, 48),
}
TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


def adapters(infix: str = "", root: str = ROOT, rank: int = 3) -> dict[str, torch.Tensor]:
    """Adapters on every matrix, as peft saves them."""
    generator, found = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for name, (inputs, outputs) in SIZES.items():
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                key = f"{root}.{layer}.{name}.lora_{side}{infix}.weight"
                found[key] = torch.randn(shape, generator=generator) * 0.2
    return found


def with_adapters(path: Path, **options) -> Path:
    return save(path, load(PROJECTION) | adapters(**options))


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """(model directory, its checkpoint) of a MiniGPT-4 with a Q-Former and adapters on every matrix; alpha 9."""
    folder = tmp_path_factory.mktemp("everywhere")
    file, overrides = with_adapters(folder / "checkpoint_0.pth"), OVERRIDES | {"llama": {"lora": {"alpha": 9}}}
    report = convert(**VICUNA_FILES, projection=file, out=folder / "model", overrides=overrides)
    assert not any("alpha" in warning for warning in report.warnings)
    return folder / "model", file


def refused(tmp_path, message, **files):
    with pytest.raises(UserError, match=message) as refusal:
        convert(out=tmp_path / "refused", overrides=OVERRIDES, **files)
    assert not (tmp_path / "refused").exists()
    return str(refusal.value)


def test_rank_and_matrices_are_told_by_the_keys_and_alpha_is_said_to_be_assumed(tmp_path):
    report = convert(**V2_FILES, out=tmp_path / "model", overrides=OVERRIDES, image_size=56)
    assert report.config.llama.lora == LoraConfig(rank=4, alpha=16.0, targets=("query", "value"))
    [warning] = [warning for warning in report.warnings if "alpha" in warning]
    assert "16 as in MiniGPT-v2 is taken" in warning and "llama: {lora: {alpha: N}}" in warning
    stored = read_manifest(tmp_path / "model")
    assert stored.template == "minigpt_v2" and stored.config == report.config
    a, key = load(STAGE3)[f"{ROOT}.1.self_attn.v_proj.lora_A.weight"], "llama/layers/attn/value_lora/a"
    assert np.array_equal(read_leaf(tmp_path / "model", key, 1), a.numpy().T)


def test_adapters_on_every_matrix(everywhere):
    model_dir, file = everywhere
    config = read_manifest(model_dir).config.llama
    assert config.lora == LoraConfig(rank=3, alpha=9, targets=TARGETS)
    state = load(file)
    b = state[f"{ROOT}.0.self_attn.k_proj.lora_B.weight"].numpy()
    assert np.array_equal(read_leaf(model_dir, "llama/layers/attn/key_lora/b", 0), b.T.reshape(3, 4, 12))
    a = state[f"{ROOT}.1.self_attn.o_proj.lora_A.weight"].numpy()
    assert np.array_equal(read_leaf(model_dir, "llama/layers/attn/out_lora/a", 1), a.T.reshape(4, 12, 3))


@pytest.mark.parametrize("infix", ["", ".default"])
def test_what_is_exported_is_what_was_read(tmp_path, infix):
    """To the bit, and without peft's name of an adapter, as MiniGPT-v2 saves and loads it."""
    file = with_adapters(tmp_path / "checkpoint.pth", infix=infix)
    convert(**VICUNA_FILES, projection=file, out=tmp_path / "model", overrides=OVERRIDES)
    [written] = export(tmp_path / "model", format="minigpt4", out=tmp_path / "written.pth")
    assert_same_tensors(written, with_adapters(tmp_path / "plain.pth"), left_out=BUFFERS)
    files = export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")
    assert_same_tensors(files[-1], written)


def test_the_recorded_checkpoint_comes_back_whole(tmp_path):
    convert(**V2_FILES, out=tmp_path / "model", overrides=OVERRIDES)
    [written] = export(tmp_path / "model", format="minigpt4", out=tmp_path / "written.pth")
    assert_same_tensors(written, STAGE3)
    assert list(torch.load(written, weights_only=True)) == ["model"]


def test_hugging_face_gets_merged_matrices(everywhere, tmp_path):
    """W + alpha / r * B A, and a language model that transformers runs."""
    model_dir, file = everywhere
    export(model_dir, format="hf", out=tmp_path / "hf")
    model, info = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    found, state = model.language_model.state_dict(), load(file)
    base = transformers.LlamaForCausalLM.from_pretrained(LLM, dtype=torch.float32).state_dict()
    for layer in range(2):
        for name in SIZES:
            a, b = (state[f"{ROOT}.{layer}.{name}.lora_{side}.weight"] for side in "AB")
            key = f"model.layers.{layer}.{name}.weight"
            torch.testing.assert_close(found[key], base[key] + 9 / 3 * (b @ a), rtol=1e-6, atol=1e-6)
            assert not torch.equal(found[key], base[key])
    same = [key for key in base if not any(name in key for name in SIZES)]
    assert len(same) == len(base) - 2 * len(SIZES)
    assert all(torch.equal(found[key], base[key]) for key in same)


def test_merged_matrices_keep_the_dtype_of_the_language_model(everywhere, tmp_path):
    """Half precision is rounded once, from float32."""
    source = tmp_path / "half"
    transformers.LlamaForCausalLM.from_pretrained(LLM, dtype=torch.float16).save_pretrained(source)
    files = VICUNA_FILES | {"llm": source, "projection": everywhere[1]}
    convert(**files, out=tmp_path / "model", overrides=OVERRIDES, allow_llm_mismatch=True)
    export(tmp_path / "model", format="hf", out=tmp_path / "hf")
    key, state = "model.layers.1.mlp.up_proj.weight", load(everywhere[1])
    found = open_source(tmp_path / "hf").read(f"language_model.{key}")
    assert found.dtype == np.float16
    a, b = (state[f"{ROOT}.1.mlp.up_proj.lora_{side}.weight"].double().numpy() for side in "AB")
    exact = (open_source(source).read(key) + 16 / 3 * (b @ a)).astype(np.float16)
    assert (found != exact).mean() < 1e-3  # where float32 lies at the middle of two


def test_full_size_checkpoint_of_minigpt_v2():
    """Rank 64 on query and value of LLaMA-2 7B: 33.6 M adapter parameters, nothing unmatched or unfilled."""
    tensors = {"llama_proj.weight": (4096, 5632), "llama_proj.bias": (4096,)}
    for layer in range(32):
        for name in ("q_proj", "v_proj"):
            tensors[f"{ROOT}.{layer}.self_attn.{name}.lora_A.weight"] = (64, 4096)
            tensors[f"{ROOT}.{layer}.self_attn.{name}.lora_B.weight"] = (4096, 64)
    path = Path("checkpoint_stage3.pth")
    infos = {key: TensorInfo(shape, "float32", path) for key, shape in tensors.items()}
    sources = {"vit": manifest("eva_vit_g"), "llm": manifest("llama2_7b_chat")}
    plain = infer(sources | {"projection": manifest("pretrained_minigpt4_llama2_7b")})
    inferred = infer(sources | {"projection": Manifest(path, _tensors=infos)}, {"vit": {"image_size": 448}})
    assert inferred.config.llama.lora == LoraConfig()
    assert inferred.config.tokens_per_image == 256
    planned = plan(inferred.parts, abstract_params(inferred.config))
    expected = plan(plain.parts, abstract_params(plain.config)).num_parameters + 33_554_432
    assert planned.num_parameters == expected + (1025 - 257) * 1408
    assert {move.key for move in planned.moves} >= set(tensors)


def test_adapters_of_an_instructblip(tmp_path):
    """LAVIS calls the language model ``llm_model``."""
    root = "llm_model.base_model.model.model.layers"
    state = load(PROJECTION)
    projection = {f"llm_proj.{name}": state[f"llama_proj.{name}"] for name in ("weight", "bias")}
    file = save(tmp_path / "instructblip.pth", projection | adapters(root=root))
    stage1 = GOLDEN / "blip2_stage1" / "blip2_stage1.pth"
    head = tuple(key for key in load(stage1) if key.startswith("Qformer.cls."))
    reader = altered(stage1, tmp_path / "reader.pth", drop=head)
    report = convert(vit=VIT, qformer=reader, llm=LLM, projection=file, out=tmp_path / "model", overrides=OVERRIDES)
    assert (report.config.architecture, report.config.llama.lora.rank) == ("instructblip", 3)
    files = {path.name: path for path in export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")}
    written = load(files["blip2_pretrained.pth"])
    assert all(torch.equal(written[key], value) for key, value in load(file).items())


def test_files_that_do_not_fit_are_refused(tmp_path):
    def projection(**options):
        return altered(STAGE3, tmp_path / "changed.pth", **options)

    a, b = (f"{ROOT}.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
    alone = V2_FILES | {"projection": projection(drop=("llama_proj.weight", "llama_proj.bias"))}
    refused(tmp_path, "changed.pth: holds no llama_proj", **alone)
    refused(tmp_path, "add --llm", vit=V2_FILES["vit"], projection=STAGE3)
    refused(
        tmp_path,
        "holds LoRA adapters; add --llm",
        qformer=save(tmp_path / "q.pth", load(QFORMER) | adapters()),
        vit=VIT,
    )
    refused(tmp_path, rf"1 missing tensors; first: - {b}", **V2_FILES | {"projection": projection(drop=(b,))})
    refused(tmp_path, f"lacks {a}", **V2_FILES | {"projection": projection(drop=(a,))})
    wide = projection(**{b.replace(".", "__"): torch.ones(64, 4)})
    refused(
        tmp_path,
        r"another shape; first: ! .*lora_B.weight \[64, 4\], expected \[48, 4\]",
        **V2_FILES | {"projection": wide},
    )
    flat = projection(**{a.replace(".", "__"): torch.ones(4)})
    refused(tmp_path, r"lora_A.weight has shape \[4\], expected 2 axes", **V2_FILES | {"projection": flat})
    other = projection(**{f"{ROOT}.0.self_attn.q_proj.lora_embedding_A".replace(".", "__"): torch.ones(4)})
    refused(tmp_path, r"1 unknown tensors; first: \+ .*lora_embedding_A", **V2_FILES | {"projection": other})
    mixed = projection(**{a.replace("weight", "other.weight").replace(".", "__"): torch.ones(4, 48)})
    refused(tmp_path, "1 unknown tensors", **V2_FILES | {"projection": mixed})
    nan = projection(**{b.replace(".", "__"): torch.full((48, 4), float("nan"))})
    refused(tmp_path, "lora_B.weight holds NaN or infinity", **V2_FILES | {"projection": nan})
    strange = save(tmp_path / "s.pth", {"llama_proj.weight": torch.ones(48, 128), "x.lora_E": torch.ones(3)})
    refused(tmp_path, "x.lora_E is LoRA of a kind that is not read; merge it", **V2_FILES | {"projection": strange})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"alpha": "big"}, "lora.alpha must be a number from 0"),
        ({"rank": 5}, "tensors of another shape"),
        ({"targets": ["query", "gate"]}, "unknown tensors"),
        ({"targets": ["query", "nose"]}, "unknown matrix 'nose'"),
        ({"bias": 1}, "unknown key model.llama.lora.bias"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(tmp_path, lora, message):
    with pytest.raises(UserError, match=message):
        convert(**V2_FILES, out=tmp_path / "model", overrides=OVERRIDES | {"llama": {"lora": lora}})


def test_verify_runs_the_adapters_in_pytorch(everywhere, tmp_path):
    model_dir, file = everywhere
    files = VICUNA_FILES | {"projection": file}
    report = verify(model_dir, **files)
    assert report.passed and not report.skipped, (report.failures, report.skipped)
    assert all(row.weights for row in report.rows if row.component.startswith("llama/layers/"))
    without = verify(model_dir, **VICUNA_FILES)
    assert without.passed
    assert "llama: the file of its LoRA adapters was not given" in without.skipped
    assert not any(row.component.startswith("llama") for row in without.rows)


def test_verify_names_a_layer_whose_adapter_differs(everywhere, tmp_path):
    model_dir, file = everywhere
    shutil.copytree(model_dir, tmp_path / "model")
    kvstore = {"driver": "file", "path": str(tmp_path / "model" / "params" / "llama.layers.mlp.up_lora.b")}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    values = store.read().result()
    values[1, 0, 0] += 0.5
    store.write(values).result()
    report = verify(tmp_path / "model", **VICUNA_FILES, projection=file)
    first = report.failures[0]
    assert (first.component, first.weights) == ("llama/layers/1", False) and first.max_rel > 1e-4


def test_inspect_tells_the_adapters(everywhere):
    model_dir, file = everywhere
    assert "LoRA adapters of rank 3 on query, key, value, out, gate, up, down" in inspect(file).what
    assert inspect(model_dir).tensors["llama/layers/mlp/up_lora/a"].shape == (2, 48, 3)
