"""The rule table: every parameter gets the partition that was meant, on any mesh."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import MINIGPT4, random_params

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import blip2_stage1, minigpt4, vicuna_7b
from mgpt4_jax.errors import UserError
from mgpt4_jax.models import boxed_params, build
from mgpt4_jax.sharding import RULES, make_mesh, param_shardings, parse_mesh


@pytest.mark.parametrize("config", [minigpt4(vicuna_7b()), minigpt4(vicuna_7b(), with_qformer=False), blip2_stage1()])
def test_every_axis_of_every_parameter_is_named_in_the_table(config):
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for path, box in jax.tree_util.tree_flatten_with_path(boxed_params(config), is_leaf=is_box)[0]:
        if is_box(box):
            assert len(box.names) == box.value.ndim, path
            assert all(name is None or name in RULES for name in box.names), (path, box.names)
        else:
            assert box.ndim == 0, path  # only the temperature, a scalar, has nothing to name


def test_partitions_are_those_that_were_meant():
    specs = {
        k: s.spec for k, s in flatten(param_shardings(minigpt4(vicuna_7b()), make_mesh("fsdp=2,tensor=4"))).items()
    }
    assert specs["llama/layers/attn/query/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["llama/layers/attn/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["llama/layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["vit/blocks/attn/qkv/kernel"] == P(None, "fsdp", None, "tensor", None)
    assert specs["vit/blocks/mlp/fc1/bias"] == P(None, "tensor")
    assert specs["llama/layers/input_norm/scale"] == P(None, None)


def test_a_dimension_that_does_not_divide_is_kept_whole_and_said(caplog):
    with caplog.at_level("INFO", logger="mgpt4_jax.sharding"):
        specs = flatten(param_shardings(minigpt4(vicuna_7b()), make_mesh("tensor=4")))
    assert specs["llama/lm_head/kernel"].spec == P("fsdp", None)  # Vicuna has 32001 rows
    assert "llama/lm_head/kernel: vocab of 32001 is not divisible by tensor=4" in caplog.text


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"])
def test_sharded_forward_equals_unsharded(mesh):
    model, params = build(MINIGPT4), random_params(MINIGPT4)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(8, 1, 28, 28, 3)).astype(np.float32)
    ids = rng.integers(0, 128, (8, 20))
    slots = np.where(np.arange(20) < 6, np.arange(20), -1)[None].repeat(8, 0)
    forward = jax.jit(lambda p: model.apply({"params": p}, ids, slots, pixels))
    placed = jax.device_put(params, param_shardings(MINIGPT4, make_mesh(mesh)))
    np.testing.assert_allclose(forward(placed), forward(params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["data=2,batch=4", "fsdp", "tensor=0", "tensor=two", "data:2", "fsdp=²"])
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match="cannot read"):
        parse_mesh(text)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(UserError, match="needs 64 devices and 8 are here"):
        make_mesh("data=64")
