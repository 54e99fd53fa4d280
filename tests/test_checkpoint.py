"""Model directories: exact, sliced, sharded, readable by Orbax, and refused when damaged."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import MINIGPT4 as CONFIG
from tiny import random_params

from mgpt4_jax import checkpoint
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import num_parameters
from mgpt4_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def params():
    tree = random_params(CONFIG)
    for name, dtype in {"vit": np.float16, "llama": ml_dtypes.bfloat16}.items():
        tree[name] = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), tree[name])
    return tree


@pytest.fixture
def model_dir(params, tmp_path):
    fields = {"config": CONFIG, "template": "vicuna_v0", "num_parameters": num_parameters(CONFIG)}
    with checkpoint.new_directory(tmp_path / "model") as partial:
        checkpoint.write_model(partial, params, fields)
    return tmp_path / "model"


def assert_same(ours, theirs):
    def is_same(a, b):
        return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    same = jax.tree.map(is_same, ours, theirs)
    assert jax.tree.all(same), same


def test_a_path_may_lead_up_and_down_again(model_dir, params):
    assert_same(checkpoint.load_params(model_dir / ".." / model_dir.name), params)


def test_what_is_written_is_read_bit_for_bit_in_its_own_dtypes(model_dir, params):
    assert_same(checkpoint.load_params(model_dir), params)
    manifest = checkpoint.read_manifest(model_dir)
    assert manifest.config == CONFIG and manifest.template == "vicuna_v0"
    assert manifest.dtypes["vit/pos_embed"] == "float16" and manifest.dtypes["llama/norm/scale"] == "bfloat16"


def test_one_layer_is_read_alone(model_dir, params):
    layer = checkpoint.read_leaf(model_dir, "llama/layers/mlp/up/kernel", layer=1)
    assert layer.dtype == ml_dtypes.bfloat16
    assert layer.tobytes() == np.asarray(params["llama"]["layers"]["mlp"]["up"]["kernel"][1]).tobytes()


def test_orbax_restores_the_folder(model_dir, params):
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(str(model_dir / "params"))
    assert_same(restored, jax.tree.map(np.asarray, params))


def test_parameters_are_cut_over_a_mesh_and_keep_their_values(model_dir, params):
    loaded = checkpoint.load_params(model_dir, mesh=make_mesh("fsdp=2,tensor=2"))
    kernel = loaded["llama"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 64)
    assert_same(loaded, params)


def test_zeros_are_stored(tmp_path):
    """A chunk of zeros that were left out could not be told from a chunk that was lost."""
    writer = checkpoint.ParamsWriter(tmp_path)
    leaf = writer.create("ln_vision/bias", (4,), np.float32)
    leaf.write(None, np.zeros(4, np.float32))
    leaf.flush()
    assert not checkpoint.read_leaf(tmp_path, "ln_vision/bias").any()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_parameter_is_refused_by_name(model_dir, damage):
    leaf = model_dir / "params/llama.layers.mlp.up.kernel"
    chunk = next(path for path in leaf.rglob("0") if path.is_file())
    content = bytearray(chunk.read_bytes())
    if damage == "flip":
        content[5] ^= 1
        chunk.write_bytes(content)
    elif damage == "truncate":
        chunk.write_bytes(content[:50])
    else:
        chunk.unlink()
    with pytest.raises(UserError, match="llama/layers/mlp/up/kernel is missing or damaged"):
        checkpoint.load_params(model_dir)


def test_other_directories_and_versions_are_refused(model_dir, tmp_path):
    with pytest.raises(UserError, match="no model.json"):
        checkpoint.read_manifest(tmp_path)
    path = model_dir / "model.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        checkpoint.read_manifest(model_dir)
    path.write_text(json.dumps(values)[:100])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_manifest(model_dir)
    path.write_text(json.dumps(values | {"config": values["config"] | {"surprise": 1}}))
    with pytest.raises(UserError, match="unknown key model.surprise"):
        checkpoint.read_manifest(model_dir)


def test_a_failed_write_leaves_the_earlier_result(tmp_path):
    out = tmp_path / "model"
    with checkpoint.new_directory(out) as partial:
        (partial / "model.json").write_text("1")
    with pytest.raises(UserError, match="exists already"), checkpoint.new_directory(out):
        pass
    with pytest.raises(RuntimeError), checkpoint.new_directory(out, overwrite=True):
        raise RuntimeError
    assert (out / "model.json").read_text() == "1" and list(tmp_path.iterdir()) == [out]
    with checkpoint.new_directory(out, overwrite=True) as partial:
        (partial / "second").write_text("2")
    assert [path.name for path in out.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [out]
