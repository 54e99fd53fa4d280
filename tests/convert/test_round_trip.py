"""export(import(x)) equals x to the bit, for every kind of file; the original programs load what we write."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from weight_files import (
    GOLDEN,
    LLAMA2,
    LLM,
    OVERRIDES,
    PROJECTION,
    QFORMER,
    VICUNA,
    VIT,
    assert_same_tensors,
    load,
    save,
)

from mgpt4_jax.checkpoint import read_leaf, read_manifest
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.export import export
from mgpt4_jax.convert.readers import open_source
from mgpt4_jax.errors import UserError

STAGE1 = GOLDEN / "blip2_stage1" / "blip2_stage1.pth"
BUFFER = "Qformer.bert.embeddings.position_ids"
TINY_LLAMA = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TINY_READER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "encoder_hidden_size": 32,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory):
    out = tmp_path_factory.mktemp("minigpt4") / "model"
    convert(vit=VIT, qformer=QFORMER, llm=LLM, projection=PROJECTION, out=out, overrides=OVERRIDES)
    return out


@pytest.fixture(scope="module")
def minigpt4_llama2(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama2") / "model"
    files = {"vit": LLAMA2 / "eva_vit_g.pth", "llm": LLAMA2 / "llm", "projection": LLAMA2 / "pretrained_minigpt4.pth"}
    convert(out=out, overrides=OVERRIDES, **files)
    return out


def with_numpy(dtype):
    return {np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16, np.float32: torch.float32}[dtype]


def test_minigpt4_projection(minigpt4, tmp_path):
    written = export(minigpt4, format="minigpt4", out=tmp_path / "pretrained_minigpt4.pth")
    assert written == [tmp_path / "pretrained_minigpt4.pth"]
    saved, original = torch.load(written[0], weights_only=True), load(PROJECTION)
    assert list(saved) == ["model"]
    assert list(saved["model"]) == ["llama_proj.weight", "llama_proj.bias"]
    for key, value in saved["model"].items():
        assert torch.equal(value, original[key])
    buffers = {BUFFER, "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert_same_tensors(written[0], PROJECTION, left_out=buffers)


def test_lavis_files_of_minigpt4(minigpt4, tmp_path):
    vit, reader, projection = export(minigpt4, format="lavis", out=tmp_path / "lavis")
    assert [path.name for path in (vit, reader, projection)] == [
        "eva_vit_g.pth",
        "blip2_pretrained.pth",
        "pretrained_minigpt4.pth",
    ]
    assert_same_tensors(vit, VIT)
    assert "model" not in torch.load(vit, weights_only=True)
    assert_same_tensors(reader, QFORMER, left_out={BUFFER, "t5_proj.weight", "t5_proj.bias"})
    again = tmp_path / "again"
    convert(vit=vit, qformer=reader, llm=LLM, projection=projection, out=again, overrides=OVERRIDES)
    for path in read_manifest(minigpt4).dtypes:
        assert read_leaf(again, path).tobytes() == read_leaf(minigpt4, path).tobytes(), path


def test_lavis_files_without_a_qformer(minigpt4_llama2, tmp_path):
    vit, projection = export(minigpt4_llama2, format="lavis", out=tmp_path / "lavis")
    assert_same_tensors(vit, LLAMA2 / "eva_vit_g.pth")
    buffer = {"llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert_same_tensors(projection, LLAMA2 / "pretrained_minigpt4.pth", left_out=buffer)
    with pytest.raises(UserError, match="has no class in Hugging Face"):
        export(minigpt4_llama2, format="hf", out=tmp_path / "hf")


def test_stage1_with_tied_tensors(tmp_path):
    convert(qformer=STAGE1, out=tmp_path / "model", overrides=OVERRIDES)
    vit, reader = export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")
    original = load(STAGE1)
    left_out = {key for key in original if key.startswith("visual_encoder.")} | {BUFFER}
    assert_same_tensors(reader, STAGE1, left_out=left_out)
    alone = {key.removeprefix("visual_encoder."): value for key, value in original.items() if "visual_encoder" in key}
    assert_same_tensors(vit, save(tmp_path / "vit.pth", alone, wrapped=False))
    saved = torch.load(reader, weights_only=True)["model"]
    tied = saved["Qformer.cls.predictions.decoder.weight"], saved["Qformer.bert.embeddings.word_embeddings.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_qformer_alone(tmp_path):
    source = GOLDEN / "qformer" / "qformer.pth"
    convert(qformer=source, out=tmp_path / "model", overrides=OVERRIDES)
    (reader,) = export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")
    assert_same_tensors(reader, source, left_out={BUFFER})


@pytest.mark.parametrize("name", ["eva_a", "eva_b_interp"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_eva_alone_with_its_norm(tmp_path, name, suffix):
    folder = GOLDEN / name
    norm = folder / "ln_vision.safetensors"
    file = folder / f"eva_vit_g.{suffix}"
    convert(vit=file, qformer=norm, out=tmp_path / "model", overrides=OVERRIDES)
    vit, written_norm = export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")
    extra = {key for key in open_source(file).tensors() if key.startswith(("blocks.3.", "norm.", "head."))}
    assert_same_tensors(vit, file, left_out=extra)
    assert_same_tensors(written_norm, norm)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_language_models(tmp_path, dtype, layout):
    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(**TINY_LLAMA, rope_parameters=scaling)
    model = transformers.LlamaForCausalLM(config).to(with_numpy(dtype))
    source = save_hugging_face(model, tmp_path / "source", layout)
    report = convert(llm=source, out=tmp_path / "model")
    assert report.config.llama.num_kv_heads == 2
    assert report.config.llama.rope_scaling.kind == "llama3"
    assert report.components[0].dtypes == (np.dtype(dtype).name,)
    export(tmp_path / "model", format="hf", out=tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    ids = torch.arange(40)[None] % 60
    one, other = (
        transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")(ids).logits
        for folder in (source, tmp_path / "back")
    )
    assert torch.equal(one, other)


def save_hugging_face(model, out, layout):
    """As ``transformers`` saves it, or as its older versions did."""
    size = "8KB" if layout.startswith("sharded") else "5GB"
    model.save_pretrained(out, max_shard_size=size)
    if layout.endswith("bin"):
        for file in out.glob("*.safetensors"):
            source = open_source(file)
            state = {key: torch_tensor(source.read(key)) for key in source.tensors()}
            torch.save(state, file.with_name(file.name.replace("model", "pytorch_model").replace("safetensors", "bin")))
            file.unlink()
        index = out / "model.safetensors.index.json"
        if index.exists():
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (out / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    return out


def torch_tensor(values):
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def test_tied_language_model(tmp_path):
    config = transformers.LlamaConfig(**TINY_LLAMA, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "source")
    convert(llm=tmp_path / "source", out=tmp_path / "model")
    assert "llama/lm_head/kernel" not in read_manifest(tmp_path / "model").dtypes
    export(tmp_path / "model", format="hf", out=tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "source")
    both = {**model.state_dict(), "lm_head.weight": model.state_dict()["model.embed_tokens.weight"].clone()}
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(both, tmp_path / "source" / "pytorch_model.bin")
    convert(llm=tmp_path / "source", out=tmp_path / "model", overwrite=True)


TINY_OPT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 50,
}
TINY_T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


def tiny_opt(**fields):
    return transformers.OPTForCausalLM(transformers.OPTConfig(**TINY_OPT | fields))


def tiny_t5(*, own_head, **fields):
    """``transformers`` 5 ties unless the head is another tensor."""
    return untied(transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY_T5 | fields)), own_head)


def untied(model, own_head):
    if own_head:
        t5 = getattr(model, "language_model", model)
        t5.lm_head.weight = torch.nn.Parameter(torch.randn(t5.lm_head.weight.shape))
    return model


OTHERS = {
    "opt": lambda: tiny_opt(),
    "opt_350m": lambda: tiny_opt(word_embed_proj_dim=20, do_layer_norm_before=False),
    "t5": lambda: tiny_t5(own_head=False, feed_forward_proj="relu", tie_word_embeddings=True),
    "flan_t5": lambda: tiny_t5(own_head=True),
    "flan_t5_as_lavis": lambda: tiny_t5(own_head=True, dense_act_fn="gelu"),
    "t5_tied_unscaled": lambda: tiny_t5(own_head=False),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("option", ["llm", "from_dir"])
def test_opt_and_t5(tmp_path, name, option):
    model = OTHERS[name]().eval()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    report = convert(out=tmp_path / "model", **{option: tmp_path / "source"})
    assert report.config.architecture == ("opt" if "opt" in name else "t5")
    assert report.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    export(tmp_path / "model", format="hf", out=tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "source")
    ids = torch.arange(40)[None] % 60
    inputs = {"input_ids": ids} if "opt" in name else {"input_ids": ids, "decoder_input_ids": ids[:, ::2]}
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    assert convert(from_dir=tmp_path / "back", out=tmp_path / "again").config == report.config
    with pytest.raises(UserError, match="is a language model alone"):
        export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")


def test_the_embedding_of_t5_under_each_of_its_names(tmp_path):
    model = tiny_t5(own_head=True)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    state, names = model.state_dict(), ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    keys = [f"{name}.weight" for name in names]
    for kept in (keys, keys[1:], keys[2:]):
        file = tmp_path / "source" / "pytorch_model.bin"
        torch.save({key: value for key, value in state.items() if key not in keys or key in kept}, file)
        convert(llm=tmp_path / "source", out=tmp_path / "model", overwrite=True)
        found = read_leaf(tmp_path / "model", "t5/shared/embedding")
        assert np.array_equal(found, state["shared.weight"].numpy())
    state[keys[1]] = state[keys[1]] + 1
    torch.save(state, file)
    with pytest.raises(UserError, match="encoder.embed_tokens.weight differs from shared.weight, to which it is tied"):
        convert(llm=tmp_path / "source", out=tmp_path / "other")


def test_opt_saved_without_its_head(tmp_path):
    model = tiny_opt()
    model.model.save_pretrained(tmp_path / "source")
    assert "decoder.embed_tokens.weight" in open_source(tmp_path / "source").tensors()
    convert(llm=tmp_path / "source", out=tmp_path / "model")
    found = read_leaf(tmp_path / "model", "opt/embed_tokens/embedding")
    assert np.array_equal(found, model.lm_head.weight.detach().numpy())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tiny_opt(activation_function="gelu"), "activation_function is 'gelu'; only 'relu'"),
        (lambda: tiny_opt(enable_bias=False), "enable_bias is False"),
        (lambda: tiny_t5(own_head=True, feed_forward_proj="gated-silu"), "feed_forward_proj is 'gated-silu'; only"),
    ],
)
def test_opt_and_t5_that_are_not_ours(tmp_path, make, match):
    make().save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=match):
        convert(llm=tmp_path / "source", out=tmp_path / "model")


@pytest.mark.parametrize(("name", "projection"), [("opt", "opt_proj"), ("t5", "t5_proj")])
def test_lavis_files_of_blip2_on_opt_and_t5(tmp_path, name, projection):
    folder = GOLDEN / f"blip2_{name}"
    file, llm = folder / f"blip2_{name}.pth", folder / f"{name}_model"
    files = {"llm": llm, "tokenizer": folder / f"{name}_tokenizer", "overrides": OVERRIDES}
    report = convert(qformer=file, out=tmp_path / "model", **files)
    assert report.config.architecture == f"blip2_{name}"
    assert not report.warnings
    vit, reader = export(tmp_path / "model", format="lavis", out=tmp_path / "lavis")
    original = load(file)
    left_out = {key for key in original if key.startswith("visual_encoder.")} | {BUFFER}
    assert_same_tensors(reader, file, left_out=left_out)
    assert f"{projection}.weight" in torch.load(reader, weights_only=True)["model"]
    convert(vit=vit, qformer=reader, out=tmp_path / "again", **files)
    for path in read_manifest(tmp_path / "model").dtypes:
        assert read_leaf(tmp_path / "again", path).tobytes() == read_leaf(tmp_path / "model", path).tobytes(), path
    for other in ("opt", "t5"):
        if other != name:
            files = {"llm": GOLDEN / f"blip2_{other}" / f"{other}_model", "overrides": OVERRIDES}
            report = convert(vit=vit, qformer=reader, out=tmp_path / "other", **files)
            assert any("projects into" in reason for reason in report.ignored)
            assert any("must be trained" in reason for reason in report.filled)
    with pytest.raises(UserError, match="is no MiniGPT-4 but blip2"):
        export(tmp_path / "model", format="minigpt4", out=tmp_path / "p.pth")


def hugging_face_model(name):
    """A tiny random one; EVA's key bias is zero, as in every published file."""
    name, _, kind = name.partition(" on ")
    reader = {**TINY_READER, "use_qformer_text_input": name == "Blip2ForImageTextRetrieval"}
    text = {"opt": {"model_type": "opt", **TINY_OPT}, "t5": {"model_type": "t5", **TINY_T5, "dense_act_fn": "gelu"}}
    text = text.get(kind) or transformers.LlamaConfig(**TINY_LLAMA).to_dict()
    parts = {"vision_config": TINY_VISION, "qformer_config": reader, "num_query_tokens": 6}
    if name == "InstructBlipForConditionalGeneration":
        config = transformers.InstructBlipConfig(**parts, text_config=text)
    elif name == "Blip2ForImageTextRetrieval":
        config = transformers.Blip2Config(**parts, image_text_hidden_size=16)
    else:
        config = transformers.Blip2Config(**parts, text_config=text)
    model = untied(getattr(transformers, name)(config), kind == "t5")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
            if key.endswith("qkv.bias"):
                parameter[32:64] = 0
    return model.eval()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("InstructBlipForConditionalGeneration", "instructblip"),
        ("Blip2ForImageTextRetrieval", "blip2"),
        ("Blip2ForConditionalGeneration", "minigpt4"),
        ("Blip2ForConditionalGeneration on opt", "blip2_opt"),
        ("Blip2ForConditionalGeneration on t5", "blip2_t5"),
        ("InstructBlipForConditionalGeneration on t5", "blip2_t5"),
    ],
)
def test_hugging_face_directories(tmp_path, name, architecture):
    model = hugging_face_model(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    report = convert(from_dir=tmp_path / "source", out=tmp_path / "model")
    assert report.config.architecture == architecture
    assert report.num_parameters >= sum(p.numel() for p in model.parameters()) - 2 * 32 - 1 - 32
    export(tmp_path / "model", format="hf", out=tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "source")
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for (key, ours), (_, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), key
    assert again.config.qformer_config.num_attention_heads == 4
    assert convert(from_dir=tmp_path / "back", out=tmp_path / "again").config == report.config


def test_a_key_bias_of_its_own_is_refused(tmp_path):
    model = hugging_face_model("Blip2ForImageTextRetrieval")
    with torch.no_grad():
        model.vision_model.encoder.layers[1].self_attn.qkv.bias[40] = 0.5
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="layers.1.self_attn.qkv.bias.*key bias, must be zero"):
        convert(from_dir=tmp_path / "source", out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_minigpt4_opens_in_hugging_face(minigpt4, tmp_path):
    files = export(minigpt4, format="hf", out=tmp_path / "hf")
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {path.name for path in files}
    _, info = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info


def test_export_leaves_what_is_there_alone(minigpt4, tmp_path):
    file = tmp_path / "kept.pth"
    file.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(minigpt4, format="minigpt4", out=file)
    with pytest.raises(UserError, match="exists already"):
        export(minigpt4, format="hf", out=tmp_path)
    assert file.read_text() == "mine"
    export(minigpt4, format="minigpt4", out=file, overwrite=True)
    assert torch.load(file, weights_only=True)["model"]
    with pytest.raises(UserError, match="choose one of"):
        export(minigpt4, format="onnx", out=tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pth"]


def test_an_altered_model_directory_is_not_exported(minigpt4, tmp_path):
    damaged = tmp_path / "model"
    shutil.copytree(minigpt4, damaged)
    chunk = next(
        path for path in (damaged / "params" / "projection.kernel").rglob("*") if path.is_file() and "c" in path.parts
    )
    chunk.write_bytes(chunk.read_bytes()[:-8] + b"changed!")
    with pytest.raises(UserError, match="projection/kernel is missing or damaged"):
        export(damaged, format="minigpt4", out=tmp_path / "p.pth")
    assert not (tmp_path / "p.pth").exists()


def test_delta_plus_base_is_the_sum(tmp_path):
    """FastChat's way: both in float16, element by element, rows that only the delta has added to zero."""
    rng = torch.Generator().manual_seed(0)
    base, delta = tmp_path / "base", tmp_path / "delta"
    for folder, rows, dtype in ((base, 60, torch.float16), (delta, 61, torch.float16)):
        config = transformers.LlamaConfig(**(TINY_LLAMA | {"vocab_size": rows}))
        model = transformers.LlamaForCausalLM(config).to(dtype)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng))
        model.save_pretrained(folder)
    state = dict(open_tensors(delta))
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, delta / "model.safetensors", metadata={"format": "pt"})
    convert(llm=base, llm_delta=delta, out=tmp_path / "model")
    export(tmp_path / "model", format="hf", out=tmp_path / "back")
    bases, sums = dict(open_tensors(base)), dict(open_tensors(tmp_path / "back"))
    assert set(bases) == set(sums)
    for key, found in sums.items():
        grown = torch.zeros_like(state[key])
        grown[: bases[key].shape[0]] = bases[key]
        assert torch.equal(found, state[key] + grown), key
    roles = [source.role for source in read_manifest(tmp_path / "model").sources]
    assert roles == ["llm", "llm_delta"]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 61


def open_tensors(folder):
    source = open_source(folder)
    return ((key, torch_tensor(source.read(key))) for key in source.tensors())


def test_legacy_torch_files(tmp_path):
    old = save(tmp_path / "old.pth", load(VIT), wrapped=False, _use_new_zipfile_serialization=False)
    assert open_source(old).kind == "torch-legacy"
    assert_same_tensors(old, VIT)
    convert(vit=old, out=tmp_path / "model", overrides=OVERRIDES)
    assert (VICUNA / "llm").is_dir()
