"""Files as they come: each bad one gets one clear line, runs no code, and leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import GOLDEN, LLAMA2, LLM, OVERRIDES, PROJECTION, QFORMER, VICUNA, VIT, altered, load, save

from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.inspect import inspect
from mgpt4_jax.errors import UserError

STAGE1 = GOLDEN / "blip2_stage1" / "blip2_stage1.pth"


class RunsCode:
    """What a hostile pickle looks like: unpickling it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(tmp_path, match, **files):
    """``convert`` refuses with one clear first line, and neither the result nor a part of it exists."""
    out = tmp_path / "made" / "model"
    files.setdefault("overrides", OVERRIDES)
    with pytest.raises(UserError, match=match) as caught:
        convert(out=out, **files)
    line = str(caught.value).splitlines()[0]
    assert 10 < len(line) < 500, line
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())
    return str(caught.value)


def copy_llm(tmp_path, **config):
    """The language model in a directory that may be changed, with fields of its config.json replaced."""
    target = tmp_path / "llm"
    shutil.copytree(LLM, target, copy_function=shutil.copyfile)
    target.chmod(0o755)
    values = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def sharded_llm(tmp_path, suffix):
    """Three shards and an index, as ``.bin`` or ``.safetensors``."""
    target = copy_llm(tmp_path)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = [f"{'model' if suffix == 'safetensors' else 'pytorch_model'}-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    weight_map = {key: names[number % 3] for number, key in enumerate(state)}
    for name in names:
        shard = {key: state[key] for key, home in weight_map.items() if home == name}
        save_file(shard, target / name) if suffix == "safetensors" else torch.save(shard, target / name)
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (target / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target, names, target / index


BYTES = {
    "html": (b"\n<!DOCTYPE html><html><head><title>Quota exceeded</title>", "is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "Git-LFS pointer.*git lfs pull"),
    "empty": (b"", "is empty"),
    "noise": (bytes(range(200, 256)) * 9, "neither a PyTorch nor a safetensors file"),
    "pickle": (pickle.dumps({"model": [1]}), "plain Python pickle"),
    "header": ((1 << 20).to_bytes(8, "little") + b"{" + b" " * 90, "truncated.*header"),
    "garbled": ((40).to_bytes(8, "little") + b"{" + b"x" * 60, "header is damaged"),
}


@pytest.mark.parametrize("name", BYTES)
def test_not_weights_at_all(tmp_path, name):
    content, match = BYTES[name]
    file = tmp_path / "eva_vit_g.pth"
    file.write_bytes(content)
    refused(tmp_path, f"eva_vit_g.pth.*{match}", vit=file)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code(tmp_path, legacy):
    proof = tmp_path / "it ran"
    state = {**load(PROJECTION), "extra": RunsCode(proof)}
    file = save(tmp_path / "evil.pth", state, _use_new_zipfile_serialization=not legacy)
    refused(tmp_path, r"evil.pth: holds the Python object \w+\.mkdir.*nothing was executed", vit=file)
    assert not proof.exists()
    with pytest.raises(UserError, match="nothing was executed"):
        inspect(file)
    torch.load(file, weights_only=False)  # the trap is live: this is what must never be called
    assert proof.exists()


def test_objects_beside_the_weights(tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": load(VIT), "args": argparse.Namespace(lr=1)}, file)
    refused(tmp_path, "checkpoint.pth: holds the Python object argparse.Namespace", vit=file)


@pytest.mark.parametrize("kept", [0.3, 0.98])
def test_half_a_download(tmp_path, kept):
    file, whole = tmp_path / "eva_vit_g.pth", VIT.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    refused(tmp_path, "eva_vit_g.pth: is truncated or damaged.*download it again", vit=file)


def rezip(source, out, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        change(old, new)
    return out


def test_zip_path_tricks(tmp_path):
    def escape(old, new):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("../../outside.txt", "out")

    file = rezip(VIT, tmp_path / "eva.pth", escape)
    refused(tmp_path, r"names a path outside itself \('../../outside.txt'\)", vit=file)


def test_zips_that_are_no_checkpoints(tmp_path):
    photos = rezip(VIT, tmp_path / "photos.pth", lambda old, new: new.writestr("a.jpg", "x"))
    refused(tmp_path, "is a zip archive but not a PyTorch file", vit=photos)
    script = tmp_path / "script.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(script)
    refused(tmp_path, "is a TorchScript program", vit=script)

    def press(old, new):
        for name in old.namelist():
            new.writestr(name, old.read(name), compress_type=zipfile.ZIP_DEFLATED)

    refused(tmp_path, "the archive is compressed", vit=rezip(VIT, tmp_path / "pressed.pth", press))


def test_no_tensors_where_tensors_should_be(tmp_path):
    refused(tmp_path, "holds a list, not a dict", vit=_saved(tmp_path / "list.pth", [torch.ones(2)]))
    refused(tmp_path, "'epoch' is a int, not a tensor", vit=_saved(tmp_path / "odd.pth", {"epoch": 3}))
    sparse = save(tmp_path / "sparse.pth", {"cls_token": torch.eye(3).to_sparse()})
    refused(tmp_path, "cls_token is a sparse", vit=sparse)


def _saved(path, value):
    torch.save(value, path)
    return path


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_missing_shard(tmp_path, suffix):
    target, names, _ = sharded_llm(tmp_path, suffix)
    (target / names[1]).unlink()
    refused(tmp_path, f"{names[1]}: this shard is missing", llm=target)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_truncated_shard(tmp_path, suffix):
    target, names, _ = sharded_llm(tmp_path, suffix)
    whole = (target / names[2]).read_bytes()
    (target / names[2]).write_bytes(whole[: len(whole) - 1000])
    refused(tmp_path, f"{names[2]}: is truncated", llm=target)


def test_an_index_that_is_wrong(tmp_path):
    target, names, index = sharded_llm(tmp_path, "safetensors")
    values = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": values["weight_map"] | {"a": "../../etc/passwd"}}))
    refused(tmp_path, "names a file outside the directory", llm=target)
    index.write_text(json.dumps({"weight_map": values["weight_map"] | {"model.more": names[0]}}))
    refused(tmp_path, f"{names[0]}: lacks model.more, which the index puts there", llm=target)
    index.write_text("{")
    refused(tmp_path, "index.json: is not valid JSON", llm=target)
    index.unlink()
    refused(tmp_path, "but no index", llm=target)


def test_the_same_tensor_in_two_shards(tmp_path):
    target, names, _ = sharded_llm(tmp_path, "safetensors")
    both = load_file(target / names[0]) | load_file(target / names[1])
    save_file(both, target / names[1])
    refused(tmp_path, f"stands in {names[0]} too", llm=target)


def test_a_directory_without_weights(tmp_path):
    refused(tmp_path, "holds no weights", llm=GOLDEN / "preprocess")
    refused(tmp_path, "no such file or directory", vit=tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; only llama, opt, t5 are"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks 'factor'"),
        ({"vocab_size": 500}, r"embed_tokens.weight \[480, 48\], expected \[500, 48\]"),
        ({"num_hidden_layers": 3}, r"9 missing tensors.*model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"9 unknown tensors.*model.layers.1"),
    ],
)
def test_language_models_that_are_not_ours(tmp_path, fields, match):
    refused(tmp_path, f"(?s){match}", llm=copy_llm(tmp_path, **fields))


def test_config_json(tmp_path):
    target = copy_llm(tmp_path)
    (target / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    refused(tmp_path, "config.json: is a Git-LFS pointer", llm=target)
    (target / "config.json").unlink()
    refused(tmp_path, "has no config.json", llm=target)
    (target / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, "model_type 'bert' is not one of", from_dir=target)


def test_the_wrong_width(tmp_path):
    wide = altered(
        PROJECTION, tmp_path / "p.pth", llama_proj__weight=torch.ones(64, 32), llama_proj__bias=torch.ones(64)
    )
    files = {"vit": VIT, "qformer": QFORMER, "llm": LLM}
    refused(tmp_path, "p.pth: projects to width 64.*has width 48", projection=wide, **files)
    odd = altered(PROJECTION, tmp_path / "q.pth", llama_proj__weight=torch.ones(48, 30))
    refused(tmp_path, "q.pth: projects from width 30; the Q-Former has 32", projection=odd, **files)


def test_llama2_with_a_vicuna_projection(tmp_path):
    llm = copy_llm(tmp_path, rms_norm_eps=1e-5, max_position_embeddings=4096)
    files = {"vit": VIT, "qformer": QFORMER, "llm": llm, "projection": PROJECTION}
    refused(tmp_path, "looks like LLaMA-2.*--allow-llm-mismatch", **files)
    convert(out=tmp_path / "allowed", overrides=OVERRIDES, allow_llm_mismatch=True, **files)


def test_parts_that_do_not_belong_together(tmp_path):
    joined = LLAMA2 / "pretrained_minigpt4.pth"
    refused(tmp_path, "leave --qformer out", vit=VIT, qformer=QFORMER, llm=LLM, projection=joined)
    refused(tmp_path, "add --qformer", vit=VIT, llm=LLM, projection=PROJECTION)
    refused(tmp_path, "add --vit", qformer=QFORMER)
    refused(tmp_path, "add --vit", llm=LLM, projection=PROJECTION)
    refused(tmp_path, "add --llm", vit=VIT, qformer=QFORMER, projection=PROJECTION)
    refused(tmp_path, "holds no vision transformer", vit=PROJECTION)
    refused(tmp_path, "holds no Q-Former", vit=VIT, qformer=PROJECTION)
    refused(tmp_path, "holds no llama_proj", vit=VIT, llm=LLM, projection=QFORMER)
    refused(tmp_path, "needs --llm", vit=VIT, llm_delta=LLM)
    refused(tmp_path, "is a whole model; leave out --vit", vit=VIT, from_dir=LLM)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_weights(tmp_path, value, dtype):
    weight = torch.ones(96, 32)
    weight[5, 7] = value
    file = altered(VIT, tmp_path / "e.pth", wrapped=False, blocks__1__attn__qkv__weight=weight.to(dtype))
    refused(tmp_path, "e.pth: blocks.1.attn.qkv.weight holds NaN or infinity", vit=file)


def test_tensors_too_many_too_few_or_misshapen(tmp_path):
    more = altered(VIT, tmp_path / "more.pth", wrapped=False, blocks__0__gamma_1=torch.ones(32))
    refused(tmp_path, r"more.pth.*1 unknown tensors; first: \+ blocks.0.gamma_1 \[32\]", vit=more)
    less = altered(VIT, tmp_path / "less.pth", wrapped=False, drop=("blocks.2.mlp.fc2.bias",))
    refused(tmp_path, r"1 missing tensors; first: - blocks.2.mlp.fc2.bias \[32\]", vit=less)
    bent = altered(VIT, tmp_path / "bent.pth", wrapped=False, blocks__1__norm1__weight=torch.ones(31))
    refused(tmp_path, r"! blocks.1.norm1.weight \[31\], expected \[32\]", vit=bent)
    int8 = altered(VIT, tmp_path / "int8.pth", wrapped=False, blocks__1__norm1__weight=torch.ones(32, dtype=torch.int8))
    refused(tmp_path, "norm1.weight int8, expected floats; is the file quantised", vit=int8)
    cut = altered(VIT, tmp_path / "cut.pth", wrapped=False, drop=("pos_embed",))
    refused(tmp_path, "cut.pth: lacks pos_embed", vit=cut)


def test_shapes_that_make_no_model(tmp_path):
    oblong = altered(VIT, tmp_path / "oblong.pth", wrapped=False, pos_embed=torch.ones(1, 21, 32))
    refused(tmp_path, "pos_embed has 20 patches, which is no square", vit=oblong)
    flat = altered(VIT, tmp_path / "flat.pth", wrapped=False, pos_embed=torch.ones(17, 32))
    refused(tmp_path, r"pos_embed has shape \[17, 32\], expected 3 axes", vit=flat)
    crossed = {key: value for key, value in load(QFORMER).items() if ".layer.0.crossattention." not in key}
    refused(tmp_path, "cross-attention stands in layers", vit=VIT, qformer=save(tmp_path / "q.pth", crossed))
    refused(
        tmp_path, "width 32 does not tell its heads; write `vit: {num_heads: N}`.*--overrides", vit=VIT, overrides={}
    )
    refused(tmp_path, "num_heads=5 does not divide", vit=VIT, overrides={"vit": {"num_heads": 5}})
    refused(tmp_path, "num_heads=four does not divide", vit=VIT, overrides={"vit": {"num_heads": "four"}})
    refused(tmp_path, "vit must map fields to values", vit=VIT, overrides={"vit": 4})
    refused(tmp_path, "unknown template 'vicuna9'", vit=VIT, template="vicuna9")
    refused(tmp_path, "no multiple of the patch size", vit=VIT, image_size=90)
    refused(tmp_path, "unknown key model.vit.depth", vit=VIT, overrides={"vit": {"num_heads": 4, "depth": 3}})


def test_tied_tensors_that_differ(tmp_path):
    key = "Qformer.cls.predictions.decoder.weight"
    moved = altered(STAGE1, tmp_path / "s.pth", **{key: load(STAGE1)[key] + 1})
    refused(tmp_path, f"s.pth: {key} differs from .*word_embeddings.weight", qformer=moved)
    target = copy_llm(tmp_path, tie_word_embeddings=True)
    refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight", llm=target)


def test_an_earlier_result_stays_as_it_was(tmp_path):
    out = tmp_path / "model"
    convert(vit=VIT, out=out, overrides=OVERRIDES)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        convert(vit=VIT, out=out, overrides=OVERRIDES)
    weight = torch.full((32, 139), float("nan"))
    bad = altered(VIT, tmp_path / "bad.pth", wrapped=False, blocks__2__mlp__fc2__weight=weight)
    with pytest.raises(UserError, match="NaN"):
        convert(vit=bad, out=out, overrides=OVERRIDES, overwrite=True)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_a_full_disk_is_told_before_work_begins(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(tmp_path, "needs .* GB, only .* GB are free", vit=VIT)


def test_a_delta_for_another_model(tmp_path):
    delta = copy_llm(tmp_path)
    state = load_file(delta / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layers.1.mlp.up" not in key}, delta / "model.safetensors")
    refused(tmp_path, "lacks model.layers.1.mlp.up_proj.weight; base and delta", llm=LLM, llm_delta=delta)
    state["model.norm.weight"] = torch.ones(50)
    save_file(state, delta / "model.safetensors")
    refused(tmp_path, r"model.norm.weight is \[50\], in the base \[48\]; not its delta", llm=LLM, llm_delta=delta)


def test_a_tokenizer_that_is_none(tmp_path):
    refused(tmp_path, "no tokenizer files", llm=LLM, tokenizer=GOLDEN / "preprocess")


def test_inspect_refuses_what_convert_refuses(tmp_path):
    for name, (content, match) in BYTES.items():
        file = tmp_path / f"{name}.pth"
        file.write_bytes(content)
        with pytest.raises(UserError, match=match):
            inspect(file)
    assert np.isfinite(inspect(VICUNA / "eva_vit_g.pth").num_parameters)
