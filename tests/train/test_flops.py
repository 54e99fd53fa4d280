"""Counts against hand formulas, against XLA where there is no loop, and against the published sizes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P

from mgpt4_jax.config import LlamaConfig, ModelConfig, llama_7b, llama_13b, minigpt4, vicuna_7b
from mgpt4_jax.models import abstract_params, build
from mgpt4_jax.sharding import make_mesh
from mgpt4_jax.train.flops import count_flops, peak_flops
from tests.tiny import LLAMA


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


SQUARE = shape(4, 4)
PRODUCT = 2 * 4**3  # of two of them


def test_dense() -> None:
    layer = nn.Dense(7)
    params = jax.eval_shape(layer.init, jax.random.key(0), shape(3, 5))
    assert count_flops(layer.apply, params, shape(3, 5)) == 2 * 3 * 5 * 7


def test_attention_by_einsum() -> None:
    b, t, s, n, h = 2, 3, 5, 4, 8

    def attend(query: Any, key: Any, value: Any) -> Any:
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key)), value)

    assert count_flops(attend, shape(b, t, n, h), shape(b, s, n, h), shape(b, s, n, h)) == 2 * 2 * b * n * t * s * h


def chain(x: Any, weights: Any) -> Any:
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def test_a_scan_counts_as_often_as_it_runs() -> None:
    assert count_flops(chain, shape(2, 4), shape(9, 4, 4)) == 9 * 2 * 2 * 4 * 4


def test_the_gradient_of_a_scan() -> None:
    """Forward, and backwards a product for the input and one for the weight."""

    def loss(weights: Any, x: Any) -> Any:
        return chain(x, weights).sum()

    forward = 9 * 2 * 2 * 4 * 4
    assert count_flops(jax.value_and_grad(loss), shape(9, 4, 4), shape(2, 4)) == 3 * forward
    assert count_flops(jax.value_and_grad(loss, argnums=1), shape(9, 4, 4), shape(2, 4)) == 2 * forward


def test_what_is_computed_again_counts_again() -> None:
    def loss(x: Any) -> Any:
        return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ x) @ x))(x).sum()

    plain, again = jax.value_and_grad(lambda x: jnp.tanh(jnp.tanh(x @ x) @ x).sum()), jax.value_and_grad(loss)
    assert count_flops(plain, SQUARE) == 6 * PRODUCT
    assert count_flops(again, SQUARE) == 8 * PRODUCT


def with_rule(x: Any) -> Any:
    """A custom gradient of three products."""

    @jax.custom_vjp
    def square(x: Any) -> Any:
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x @ x,))
    return square(x)


def in_pallas(x: Any) -> Any:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] @ x[...]

    return pallas.pallas_call(kernel, out_shape=SQUARE, grid=(3,), interpret=True)(x)


def on_each_device(x: Any) -> Any:
    """8 x 4 by 4 x 4, two rows of it on each of four devices."""
    cut = jax.shard_map(
        lambda part, x: part @ x, mesh=make_mesh("fsdp=4"), in_specs=(P("fsdp"), P()), out_specs=P("fsdp")
    )
    return cut(jnp.concatenate([x, x]), x)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x: jax.jit(lambda x: x @ x)(x) @ x, 2),
        (lambda x: jax.vmap(lambda row: row @ x)(x), 1),
        (lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), 5),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), 2),
        (lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(lambda x: x @ x)(x), None), x, length=3)[0], 3),
        (lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x @ x), 1),
        (lambda x: nn.relu(x @ x), 1),
        (with_rule, 1),
        (lambda x: jax.value_and_grad(lambda x: with_rule(x).sum())(x), 4),
        (in_pallas, 3),
        (on_each_device, 2),
    ],
)
def test_nested_programs(function: Callable[[Any], Any], products: int) -> None:
    assert count_flops(function, SQUARE) == products * PRODUCT


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="how often a while loop"):
        count_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), SQUARE)


def test_a_hidden_product_is_refused() -> None:
    call = jax.ffi.ffi_call("nobody_knows", SQUARE)
    with pytest.raises(ValueError, match="cannot see how many operations ffi_call takes"):
        count_flops(call, SQUARE)


CONVOLUTIONS = [
    {"window_strides": (2, 2), "padding": "VALID"},
    {"window_strides": (3, 2), "padding": "SAME"},
    {"window_strides": (1, 1), "padding": [(2, 1), (0, 3)], "rhs_dilation": (2, 1)},
    {"window_strides": (2, 1), "padding": "SAME", "feature_group_count": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_and_their_gradients_as_xla_counts_them(options: dict[str, Any]) -> None:
    groups = options.get("feature_group_count", 1)

    def convolve(image: Any, kernel: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, dimension_numbers=numbers, **options)

    image, kernel = shape(2, 11, 9, 4), shape(3, 2, 4 // groups, 6)

    forward = count_flops(convolve, image, kernel)
    assert forward == jax.jit(convolve).lower(image, kernel).cost_analysis()["flops"]
    change = jax.eval_shape(convolve, image, kernel)
    of_image = jax.linear_transpose(lambda image: convolve(image, jnp.ones(kernel.shape)), image)
    of_kernel = jax.linear_transpose(lambda kernel: convolve(jnp.ones(image.shape), kernel), kernel)
    assert count_flops(of_image, change) == count_flops(of_kernel, change) == forward, "the same pairs meet"


def llama_flops(config: LlamaConfig, b: int, t: int) -> int:
    model = ModelConfig("llama", llama=config)

    def forward(params: Any, ids: Any) -> Any:
        return build(model).apply({"params": params}, ids, ids, None)

    return count_flops(forward, abstract_params(model), shape(b, t, dtype=jnp.int32))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama_by_hand(kv_heads: int) -> None:
    """2 x parameters x tokens, and the attention of each layer (4 x t x t x width)."""
    b, t, config = 3, 11, dataclasses.replace(LLAMA, num_kv_heads=kv_heads)
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    layer = 2 * d * heads + 2 * d * kv_heads * config.head_dim + 3 * d * config.mlp_size
    weights = config.num_layers * layer + d * config.vocab_size
    assert llama_flops(config, b, t) == 2 * weights * b * t + config.num_layers * 4 * b * t * t * heads


@pytest.mark.parametrize(("config", "teraflops"), [(llama_7b(), 0.861), (llama_13b(), 1.674)])
def test_published_sizes(config: LlamaConfig, teraflops: float) -> None:
    """One row of 65 positions, the longest of stage 1."""
    assert llama_flops(config, 1, 65) / 1e12 == pytest.approx(teraflops, rel=0.001)


def test_a_frozen_minigpt4_step_is_twice_the_language_model_and_the_picture_once() -> None:
    config = minigpt4(vicuna_7b())
    model, params = build(config), abstract_params(config)
    ids, pixels = shape(1, 65, dtype=jnp.int32), shape(1, 1, 224, 224, 3)
    frozen = {name: tree for name, tree in params.items() if name != "projection"}

    def loss(trained: Any, frozen: Any) -> Any:
        def apply(ids: Any, pixels: Any) -> Any:
            return model.apply({"params": {**frozen, "projection": trained}}, ids, ids, pixels)

        return apply(jnp.zeros(ids.shape, ids.dtype), jnp.zeros(pixels.shape)).sum()

    step = count_flops(jax.value_and_grad(loss), params["projection"], frozen)
    assert step / 1e12 == pytest.approx(2.256, rel=0.002)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v3", 61.5e12),  # a core
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # half a chip
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_published_peaks(kind: str, peak: float | None) -> None:
    device: Any = types.SimpleNamespace(device_kind=kind)
    assert peak_flops(device, jnp.bfloat16) == peak
    assert peak_flops(device, "float32") is None


def test_this_processor_has_no_published_peak() -> None:
    assert peak_flops(jax.devices()[0], jnp.bfloat16) is None
