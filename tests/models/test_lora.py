"""LoRA: the formula of peft with its gradients, merging, dropout, initial values, sharding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from tiny import MINIGPT4, random_params

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import LlamaConfig, LoraConfig, ModelConfig, llama2_7b
from mgpt4_jax.models import abstract_params, build, init_adapters, num_parameters
from mgpt4_jax.models.llama import Llama
from mgpt4_jax.models.lora import LowRank, adapted, merge, merging
from mgpt4_jax.sharding import make_mesh, param_shardings

ALL = ("query", "key", "value", "out", "gate", "up", "down")
GROUPED = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
)
LORA = LoraConfig(rank=4, alpha=6.0, targets=ALL, dropout=0.25)
ADAPTED = ModelConfig("llama", llama=replace(GROUPED, lora=LORA))
BASE = ModelConfig("llama", llama=GROUPED)
LENGTH = 110


def without_adapters(params):
    """The tree of the same model without LoRA."""
    if not isinstance(params, dict):
        return params
    return {name: without_adapters(child) for name, child in params.items() if not name.endswith("_lora")}


def merged_tree(params, lora):
    """Every matrix of the language model with its adapter merged in, read as the decoder reads."""
    leaves = flatten(params)
    read = merging(lora, lambda path, layer: leaves[path] if layer is None else leaves[path][layer])
    return {path: read(path, None) for path in flatten(without_adapters(params))}


@pytest.fixture(scope="module")
def params():
    return random_params(ADAPTED)


@pytest.fixture
def embeds(rng):
    return jnp.asarray(rng.standard_normal((2, LENGTH, 32)), jnp.float32)


@partial(jax.jit, static_argnums=(0, 3))
def logits_of(config, params, embeds, deterministic=True, key=None):
    rngs = None if key is None else {"dropout": key}
    valid = jnp.arange(LENGTH) < jnp.array([[LENGTH], [LENGTH - 9]])
    return Llama(config.llama).apply({"params": params["llama"]}, embeds, valid, deterministic=deterministic, rngs=rngs)


@pytest.mark.parametrize(
    ("shape", "features", "axes", "inputs"),
    [
        ((5, 12), (3, 4), ("embed", "heads", "head_dim"), 1),
        ((5, 3, 4), (12,), ("heads", "head_dim", "embed"), 2),
        ((5, 12), (20,), ("embed", "mlp"), 1),
    ],
)
def test_formula_and_gradients_are_those_of_pytorch(rng, shape, features, axes, inputs):
    """peft: ``y = x W^T + alpha / r * x A^T B^T`` with torch's [out in] matrices."""

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return adapted(x, features, axes, LORA, name="up", dtype=jnp.float32, inputs=inputs)

    d, f, r = int(np.prod(shape[1:])), int(np.prod(features)), LORA.rank
    x, w, a, b = (rng.standard_normal(size).astype(np.float32) for size in (shape, (f, d), (r, d), (f, r)))
    ours = {
        "up": {"kernel": w.T.reshape(*shape[1:], *features)},
        "up_lora": {"a": a.T.reshape(*shape[1:], r), "b": b.T.reshape(r, *features)},
    }
    target = rng.standard_normal((5, *features)).astype(np.float32)

    def loss(params, x):
        return ((Both().apply({"params": params}, x) - target) ** 2).sum()

    value, (gradients, x_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(ours, x)
    theirs = [torch.tensor(array.reshape(5, d) if array is x else array, requires_grad=True) for array in (x, w, a, b)]
    tx, tw, ta, tb = theirs
    y = tx @ tw.T + LORA.alpha / r * (tx @ ta.T @ tb.T)
    expected = ((y - torch.from_numpy(target.reshape(5, f))) ** 2).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    found = [x_gradient.reshape(5, d), gradients["up"]["kernel"].reshape(d, f).T]
    found += [gradients["up_lora"]["a"].reshape(d, r).T, gradients["up_lora"]["b"].reshape(r, f).T]
    for ours, tensor in zip(found, theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.grad, rtol=1e-5, atol=1e-5 * tensor.grad.abs().max())


def test_zero_b_equals_the_base_exactly(params, embeds):
    zeroed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "b" else leaf, params
    )
    base = logits_of(BASE, without_adapters(params), embeds)
    np.testing.assert_array_equal(logits_of(ADAPTED, zeroed, embeds), base)
    assert np.abs(logits_of(ADAPTED, params, embeds) - base).max() > 1e-2


@pytest.mark.parametrize("targets", [ALL, ("query", "value"), ("out", "down")])
def test_merged_equals_unmerged(params, embeds, targets):
    lora = replace(LORA, targets=targets)
    config = ModelConfig("llama", llama=replace(GROUPED, lora=lora))
    kept = {path: leaf for path, leaf in flatten(params).items() if path in flatten(abstract_params(config))}
    tree = jax.tree.unflatten(jax.tree.structure(abstract_params(config)), list(kept.values()))
    whole = jax.tree.unflatten(jax.tree.structure(abstract_params(BASE)), list(merged_tree(tree, lora).values()))
    unmerged = logits_of(config, tree, embeds)
    np.testing.assert_allclose(logits_of(BASE, whole, embeds), unmerged, rtol=1e-5, atol=1e-5)


def test_merging_reads_a_layer_as_it_reads_the_stack(params):
    whole = merged_tree(params, LORA)
    leaves = flatten(params)
    read = merging(LORA, lambda path, layer: leaves[f"llama/{path}"][layer])
    for path in ("layers/attn/out/kernel", "layers/mlp/gate/kernel", "layers/input_norm/scale"):
        np.testing.assert_allclose(read(path, 2), whole[f"llama/{path}"][2], rtol=1e-6, atol=1e-7)
    assert merging(None, read) is read


def test_merging_rounds_once(rng):
    """In float32 throughout: products of bfloat16 would lose what an adapter adds."""
    kernel = rng.standard_normal((32, 4, 8)).astype(ml_dtypes.bfloat16)
    a, b = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((32, 4), (4, 4, 8)))
    exact = kernel.astype(np.float64) + 1.5 * np.tensordot(a.astype(np.float64), b.astype(np.float64), 1)
    found = merge(kernel, a, b, 1.5)
    assert found.dtype == ml_dtypes.bfloat16
    wrong = np.asarray(found) != exact.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert wrong.mean() < 1e-3  # where float64 lies within an error of float32 of the middle of two
    assert (np.asarray(found) != kernel).mean() > 0.5


def test_dropout_acts_on_the_input_of_the_adapter_alone(rng):
    lora = LoraConfig(rank=12, alpha=12.0, targets=("up",), dropout=0.25)
    module, x = LowRank(lora, (12,), ("embed", "mlp"), 1), rng.uniform(1, 2, (400, 12)).astype(np.float32)
    eye = {"params": {"a": np.eye(12, dtype=np.float32), "b": np.eye(12, dtype=np.float32)}}
    out = np.asarray(module.apply(eye, x, deterministic=False, rngs={"dropout": jax.random.key(0)}))
    kept = out != 0
    np.testing.assert_allclose(out[kept], (x / 0.75)[kept], rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_array_equal(module.apply(eye, x), x)


@partial(jax.jit, static_argnums=0)
def adapter_gradients(config, params, embeds, key):
    def loss(params):
        llama = Llama(config.llama)
        return llama.apply({"params": params}, embeds, deterministic=False, rngs={"dropout": key}).std()

    return jax.grad(loss)(params["llama"])["layers"]["attn"]


def test_dropout_is_drawn_anew_for_each_layer_matrix_and_key():
    """Of one token, what is dropped has no gradient in ``a``."""
    config = ModelConfig("llama", llama=replace(GROUPED, lora=LoraConfig(4, 6.0, ("query", "value"), 0.25)))
    params, embeds = random_params(config), np.ones((1, 1, 32), np.float32)

    def dropped(seed):
        gradients = adapter_gradients(config, params, embeds, jax.random.key(seed))
        return (gradients["value_lora"]["a"] == 0).all(axis=-1)

    masks = dropped(0)
    assert masks.shape == (3, 32) and 0.1 < masks.mean() < 0.4
    np.testing.assert_array_equal(dropped(0), masks)
    assert len({mask.tobytes() for mask in [*masks, *dropped(1)]}) == 6


def test_remat_drops_the_same_again(rng):
    """What the backward pass computes a second time has the mask of the first."""
    config = ModelConfig("llama", llama=replace(GROUPED, lora=LoraConfig(4, 6.0, ("query", "value"), 0.25)))
    params, embeds = random_params(config), rng.standard_normal((1, 5, 32)).astype(np.float32)
    remat = replace(config, llama=replace(config.llama, remat=True))
    found = [adapter_gradients(each, params, embeds, jax.random.key(3)) for each in (config, remat)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), *found)


def test_without_dropout_the_flag_changes_nothing(params, embeds):
    none = ModelConfig("llama", llama=replace(GROUPED, lora=replace(LORA, dropout=0.0)))
    programs = {logits_of.lower(none, params, embeds, flag).as_text() for flag in (True, False)}
    assert len(programs) == 1


def test_dropout_needs_a_key_and_says_so(params, embeds):
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        logits_of.lower(ADAPTED, params, embeds, False)


def test_initial_values_are_those_of_peft():
    """``a``: kaiming_uniform(sqrt 5), which is uniform within 1 / sqrt(inputs); ``b``: zero."""
    leaves = flatten(jax.jit(partial(init_adapters, ADAPTED))(jax.random.key(0)))
    assert set(leaves) == {path for path in flatten(abstract_params(ADAPTED)) if "_lora/" in path}
    inputs = {"out": 4 * 16, "down": 48}
    for path, leaf in leaves.items():
        bound = inputs.get(path.split("/")[-2].removesuffix("_lora"), 32) ** -0.5
        if path.endswith("/b"):
            assert not leaf.any()
        else:
            assert 0.9 * bound < np.abs(leaf).max() <= bound, path
            assert abs(float(leaf.std()) - bound / 3**0.5) < 0.1 * bound, path
            assert not np.array_equal(leaf[0], leaf[1])


def test_adapters_of_minigpt_v2_have_the_published_size():
    """Rank 64 on query and value: 33.6 M, besides the base's 6.74 B."""
    config = ModelConfig("llama", llama=replace(llama2_7b(), lora=LoraConfig()))
    assert num_parameters(config) - num_parameters(ModelConfig("llama", llama=llama2_7b())) == 33_554_432
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items() if "_lora/" in path}
    assert shapes == {
        "llama/layers/attn/query_lora/a": (32, 4096, 64),
        "llama/layers/attn/query_lora/b": (32, 64, 32, 128),
        "llama/layers/attn/value_lora/a": (32, 4096, 64),
        "llama/layers/attn/value_lora/b": (32, 64, 32, 128),
    }


@pytest.mark.parametrize("mesh", ["fsdp=8", "tensor=4,data=2", "data=2,fsdp=2,tensor=2"])
def test_adapters_are_cut_over_a_mesh_and_compute_the_same(mesh, rng):
    config = replace(MINIGPT4, llama=replace(MINIGPT4.llama, lora=replace(LORA, dropout=0.0)))
    params, model = random_params(config), build(config)
    shardings = param_shardings(config, make_mesh(mesh))
    if mesh == "data=2,fsdp=2,tensor=2":
        specs = {path: sharding.spec for path, sharding in flatten(shardings["llama"]["layers"]).items()}
        assert specs["attn/query_lora/a"] == P(None, "fsdp", None)
        assert specs["attn/query_lora/b"] == P(None, None, "tensor", None)
        assert specs["attn/out_lora/a"] == P(None, "tensor", None, None)
        assert specs["attn/out_lora/b"] == P(None, None, "fsdp")
        assert specs["mlp/down_lora/a"] == P(None, "tensor", None)
    ids = rng.integers(0, 128, (8, 20))
    slots = np.where(np.arange(20) < 6, np.arange(20), -1)[None].repeat(8, 0)
    pixels = rng.normal(size=(8, 1, 28, 28, 3)).astype(np.float32)

    @jax.jit
    def value_and_grad(params):
        return jax.value_and_grad(
            lambda llama: model.apply({"params": {**params, "llama": llama}}, ids, slots, pixels).std()
        )(params["llama"])

    placed = value_and_grad(jax.device_put(params, shardings))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), placed, value_and_grad(params))


def test_a_model_without_adapters_is_untouched(params, embeds):
    """Whatever the flag says, the program is the same."""
    base = without_adapters(params)
    assert jax.tree.structure(base) == jax.tree.structure(abstract_params(BASE))
    programs = {logits_of.lower(BASE, base, embeds, flag).as_text() for flag in (True, False)}
    assert len(programs) == 1
