"""What a conversion makes: values, sizes, model.json, tokenisers, the report; and how little memory it takes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from weight_files import GOLDEN, LLAMA2, LLM, OVERRIDES, PROJECTION, QFORMER, VICUNA, VIT, altered, load, save

from mgpt4_jax.checkpoint import load_params, read_leaf, read_manifest
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.inspect import inspect
from mgpt4_jax.convert.readers import open_source
from mgpt4_jax.errors import UserError

STAGE1 = GOLDEN / "blip2_stage1" / "blip2_stage1.pth"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    seen = []
    report = convert(
        vit=VIT,
        qformer=QFORMER,
        llm=LLM,
        projection=PROJECTION,
        out=out,
        overrides=OVERRIDES,
        progress=lambda done, total: seen.append((done, total)),
    )
    return out, report, seen


def test_values_stand_where_the_model_wants_them(converted):
    out, _, _ = converted
    vit, reader, llm = load(VIT), load(QFORMER), open_source(LLM)
    kernel = read_leaf(out, "vit/blocks/attn/qkv/kernel", 1)  # d 3 n h
    assert np.array_equal(kernel[5, 2, 3], vit["blocks.1.attn.qkv.weight"][64 + 24 : 64 + 32, 5].numpy())
    name = "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"
    kernel = read_leaf(out, "qformer/layers/layer_0/cross_attn/key/kernel", 1)  # layer 2 is row 1 of layer_0
    assert np.array_equal(kernel[:, 1, :], reader[name][8:16].numpy().T)
    kernel = read_leaf(out, "llama/layers/attn/out/kernel", 0)  # n h d
    assert np.array_equal(kernel[2], llm.read("model.layers.0.self_attn.o_proj.weight")[:, 24:36].T)
    whole = load_params(out)
    assert whole["projection"]["kernel"].shape == (32, 48)


def test_model_json(converted):
    out, report, _ = converted
    manifest = read_manifest(out)
    assert manifest.config == report.config
    assert (manifest.template, manifest.num_parameters) == ("vicuna_v0", 201_249)
    names = {"vit": VIT, "qformer": QFORMER, "llm": LLM / "model.safetensors", "projection": PROJECTION}
    for source in manifest.sources:
        content = names[source.role].read_bytes()
        assert (source.name, source.size) == (names[source.role].name, len(content))
        assert source.sha256 == hashlib.sha256(content).hexdigest()
    assert {source.role for source in manifest.sources} == set(names)


def test_nothing_is_pickled_and_tokenizers_are_copied(converted):
    out, _, _ = converted
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert not kinds & {".pth", ".bin", ".pkl", ".pt"}
    assert (out / "tokenizer" / "tokenizer.model").read_bytes() == (LLM / "tokenizer.model").read_bytes()
    assert not (out / "qformer_tokenizer").exists()


def test_the_report(converted):
    out, report, seen = converted
    parts = {part.name: (part.num_parameters, part.num_tensors) for part in report.components}
    assert parts["projection"] == (32 * 48 + 48, 2)
    assert sum(count for count, _ in parts.values()) == report.num_parameters
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(report)
    text = console.export_text()
    for words in ("vit", "201,249", "projects into OPT or T5", "a buffer: rotary", str(out), "template vicuna_v0"):
        assert words in text
    done, total = seen[-1]
    assert done == total > 4 * 200_000
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_projection_may_come_later(tmp_path):
    report = convert(vit=VIT, qformer=QFORMER, llm=LLM, out=tmp_path / "model", overrides=OVERRIDES)
    kernel = read_leaf(tmp_path / "model", "projection/kernel")
    assert 0.5 < np.abs(kernel).max() * np.sqrt(32) <= 1
    assert not read_leaf(tmp_path / "model", "projection/bias").any()
    assert any("must be trained" in reason for reason in report.filled)


def test_another_seed_begins_with_another_projection(tmp_path):
    """A Q-Former that learnt to speak through one projection must not find it again where a new one is wanted."""
    files = {"vit": VIT, "qformer": QFORMER, "llm": LLM, "overrides": OVERRIDES}
    kernels = []
    for number, seed in enumerate((0, 1, 1)):
        convert(**files, out=tmp_path / str(number), seed=seed)
        kernels.append(read_leaf(tmp_path / str(number), "projection/kernel"))
    assert np.array_equal(kernels[1], kernels[2])
    assert abs(np.corrcoef(kernels[0].ravel(), kernels[1].ravel())[0, 1]) < 0.2
    with pytest.raises(UserError, match="seed must be at least 0"):
        convert(**files, out=tmp_path / "model", seed=-1)


def test_a_training_run_replaces_what_it_trained(tmp_path):
    """A checkpoint that also holds its Q-Former and ``ln_vision`` wins over the published file."""
    trained = {key: value for key, value in load(QFORMER).items() if not key.startswith("t5_proj")}
    trained["query_tokens"] = trained["query_tokens"] + 1
    checkpoint = tmp_path / "checkpoint_7.pth"
    values = {"model": trained | load(PROJECTION), "optimizer": {"lr": 1.0}, "epoch": 7, "config": {}, "scaler": None}
    torch.save(values, checkpoint)
    files = {"vit": VIT, "qformer": QFORMER, "llm": LLM, "projection": checkpoint}
    report = convert(out=tmp_path / "model", overrides=OVERRIDES, **files)
    found = read_leaf(tmp_path / "model", "qformer/query_tokens")
    assert np.array_equal(found, trained["query_tokens"][0].numpy())
    assert len(report.ignored["the Q-Former is taken from checkpoint_7.pth"]) == 87


def test_without_a_qformer_ln_vision_is_never_loaded(tmp_path):
    """As in the original, which leaves it at one and zero whatever other files hold."""
    vit = altered(LLAMA2 / "eva_vit_g.pth", tmp_path / "v.pth", ln_vision__weight=torch.ones(32) * 3)
    files = {"vit": vit, "llm": LLAMA2 / "llm", "projection": LLAMA2 / "pretrained_minigpt4.pth"}
    report = convert(out=tmp_path / "model", overrides=OVERRIDES, **files)
    assert (read_leaf(tmp_path / "model", "ln_vision/scale") == 1).all()
    assert report.template == "llama2"
    assert report.ignored["ln_vision: not part of this model"] == ["ln_vision.weight"]
    assert report.warnings == ("the overrides of qformer have no effect: this model has no qformer",)


def test_position_embeddings_of_another_size(tmp_path):
    folder = GOLDEN / "eva_b_interp"
    report = convert(vit=folder / "eva_vit_g.pth", out=tmp_path / "model", overrides=OVERRIDES, image_size=84)
    assert report.resized.startswith("position embeddings resized from 4x4 to 6x6 patches (56 to 84 pixels)")
    found = read_leaf(tmp_path / "model", "vit/pos_embed")
    with np.load(folder / "outputs.npz") as outputs:
        np.testing.assert_allclose(found, outputs["pos_embed_used"].reshape(found.shape), atol=1e-5)
    assert found.dtype == np.float32
    assert read_leaf(tmp_path / "model", "vit/cls_token").dtype == np.float16


def test_stage1_for_a_language_model_leaves_its_text_side_out(tmp_path):
    files = {"vit": VIT, "qformer": STAGE1, "llm": LLM, "projection": PROJECTION}
    report = convert(out=tmp_path / "model", overrides=OVERRIDES, **files)
    assert report.config.qformer.with_text is False
    reasons = "\n".join(report.ignored)
    for words in ("the text side", "the captioning head", "matching heads of stage 1", "taken from eva_vit_g.pth"):
        assert words in reasons


def test_a_text_side_wants_its_tokenizer(tmp_path):
    report = convert(qformer=STAGE1, out=tmp_path / "a", overrides=OVERRIDES)
    assert any("--qformer-tokenizer" in line for line in report.warnings)
    vocabulary = GOLDEN / "blip2_stage1" / "bert_tokenizer"
    report = convert(qformer=STAGE1, out=tmp_path / "b", overrides=OVERRIDES, qformer_tokenizer=vocabulary)
    assert report.warnings == ()
    assert (tmp_path / "b" / "qformer_tokenizer" / "vocab.txt").is_file()


def test_layers_of_two_kinds_of_halves_become_float32(tmp_path):
    weight = load(VIT)["blocks.0.mlp.fc1.weight"]
    vit = altered(VIT, tmp_path / "v.pth", wrapped=False, blocks__0__mlp__fc1__weight=weight.half())
    report = convert(vit=vit, out=tmp_path / "model", overrides=OVERRIDES)
    stored = read_leaf(tmp_path / "model", "vit/blocks/mlp/fc1/kernel")
    assert stored.dtype == np.float32
    assert np.array_equal(stored[0], weight.half().float().numpy().T)
    assert report.components[-1].dtypes == ("float32",)


def test_shared_and_strided_tensors(tmp_path):
    """``torch.save`` keeps views of one storage: transposed, sliced, or the same tensor twice."""
    state = load(VIT)
    weight = state["blocks.0.attn.proj.weight"]
    state["blocks.0.attn.proj.weight"] = weight.t().contiguous().t()
    both = torch.cat([state["blocks.1.norm1.weight"], state["blocks.1.norm2.weight"]])
    state["blocks.1.norm1.weight"], state["blocks.1.norm2.weight"] = both[:32], both[32:]
    file = save(tmp_path / "views.pth", state, wrapped=False)
    for key, value in load(VIT).items():
        assert np.array_equal(open_source(file).read(key), value.numpy()), key
    convert(vit=file, out=tmp_path / "model", overrides=OVERRIDES)
    assert np.array_equal(read_leaf(tmp_path / "model", "vit/blocks/norm2/scale", 1), both[32:].numpy())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (VIT, ("EVA-CLIP vision transformer (3 blocks of width 32)", "--vit")),
        (QFORMER, ("Q-Former (6 queries of width 32) + projection into FlanT5", "--qformer")),
        (PROJECTION, ("projection into LLaMA (32 -> 48)", "--projection")),
        (STAGE1, ("with its text side and stage 1's heads", "give no --llm")),
        (LLM, ("Hugging Face LLaMA (2 layers of width 48)", "--llm")),
        (GOLDEN / "adamw_minigpt4" / "checkpoint_0.pth", ("a training run's checkpoint: optimizer, config",)),
        (
            GOLDEN / "minigptv2_lora" / "checkpoint_stage3.pth",
            ("projection into LLaMA", "LoRA adapters of rank 4 on query, value", "--projection"),
        ),
        (GOLDEN / "blip2_opt" / "opt_model", ("Hugging Face OPT (2 layers of width 40)", "--llm")),
        (GOLDEN / "eva_a" / "ln_vision.safetensors", ("ln_vision alone",)),
    ],
)
def test_inspect(path, words):
    found = inspect(path)
    text = "\n".join(found.lines())
    for word in words:
        assert word in text
    tensors = open_source(path).tensors()
    assert found.num_tensors == len(tensors) == sum(found.dtypes.values())
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(found)
    assert next(iter(tensors)) in console.export_text()


def test_inspect_a_model_directory(converted):
    out, report, _ = converted
    found = inspect(out)
    assert (found.kind, found.num_parameters) == ("model", report.num_parameters)
    assert "minigpt4 (vit, qformer, llama), made from eva_vit_g.pth" in found.what
    assert [line.rsplit(" ", 1)[1].rstrip("`") for line in found.can_become] == ["minigpt4", "lavis", "hf"]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_is_bounded_by_a_tensor_not_by_the_model(tmp_path, kind):
    """235 MB of weights pass through a process that grows by less than half of that."""
    source = wide_llama(tmp_path / kind, kind)
    code = f"""
import resource
import torch
from mgpt4_jax.convert import readers, rules
from mgpt4_jax.convert.convert import convert
readers.REMAP_BYTES, rules.IN_FLIGHT_BYTES = 1 << 26, 1 << 25
convert(llm={str(LLM)!r}, out={str(tmp_path / "small")!r})  # imports, compiles, and fills the pools of threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(llm={str(source)!r}, out={str(tmp_path / "model")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "model")
    assert int(done.stdout.split()[-1]) < 115_000  # kB


def wide_llama(out, kind):
    """24 layers of 9.8 MB, in bfloat16."""
    out.mkdir()
    d, f, layers, vocab = 512, 2560, 24, 480
    config = {"model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "vocab_size": vocab}
    (out / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d), "model.norm.weight": (d,)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (d, d) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (f, d) for part in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (d, f)}
        shapes |= {f"{name}.{part}_layernorm.weight": (d,) for part in ("input", "post_attention")}
    state = {key: torch.full(shape, 0.5, dtype=torch.bfloat16) for key, shape in shapes.items()}
    if kind == "bin":
        torch.save(state, out / "pytorch_model.bin")
    else:
        save_file(state, out / "model.safetensors")
    return out


def test_vicuna_directory_is_read_only(converted):
    """Converting writes nothing beside the sources."""
    assert {path.name for path in VICUNA.iterdir()} >= {"llm", "eva_vit_g.pth"}
    assert not list(VICUNA.rglob("*.partial"))
