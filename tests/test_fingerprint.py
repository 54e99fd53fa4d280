"""Fingerprints: every bit and every place counts, the sharding does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgpt4_jax.fingerprint import _sums, fingerprint
from mgpt4_jax.sharding import make_mesh

DTYPES = ["float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool"]


def of(values) -> str:
    return fingerprint({"leaf": values})["leaf"]


def random_bits(dtype: str, shape=(8, 6, 4), seed: int = 0):
    """Any bits at all, NaN and infinity among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    size = jnp.dtype(dtype).itemsize
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * size)).astype(np.uint8).view(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_it(dtype):
    values = random_bits(dtype)
    seen = {of(values)}
    bits = values.view(np.uint8).reshape(-1)
    rng = np.random.default_rng(1)
    for byte in rng.choice(bits.size, 12, replace=False):
        for bit in [0] if dtype == "bool" else range(8):
            bits[byte] ^= 1 << bit
            seen.add(of(values))
            bits[byte] ^= 1 << bit
    assert len(seen) == 1 + 12 * (1 if dtype == "bool" else 8)


def test_swapped_elements_change_it():
    """Also a number and its negative, of which a sum of products with odd numbers knows nothing."""
    values = np.arange(1, 33, dtype=np.float32).reshape(4, 8)
    values[3, 5] = -values[0, 2]
    seen = {of(values)}
    for other in [(0, 1), (0, 3), (1, 2), (3, 5)]:
        swapped = values.copy()
        swapped[0, 2], swapped[other] = values[other], values[0, 2]
        seen.add(of(swapped))
    assert len(seen) == 5
    assert of(values[::-1]) != of(values) != of(values.T.copy())


def test_what_is_cut_off_or_zeroed_changes_it():
    values = np.zeros((4, 8), np.float32)
    values[:2] = 1
    halved = values.copy()
    halved[1] = 0
    parts = [values, halved, values[:3], values[:, :4], np.zeros_like(values), np.zeros((3, 8), np.float32)]
    shapes = [np.zeros(shape, np.float32) for shape in [(8, 4), (32,), (), (0,), (0, 3)]]
    kinds = [np.zeros((4, 8), dtype) for dtype in ["int32", "float16", "bool"]] + [jnp.zeros((4, 8), "bfloat16")]
    assert len({of(array) for array in parts + shapes + kinds}) == len(parts + shapes + kinds)
    assert of(np.float32(0.0)) != of(np.float32(-0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [P("data"), P(None, "fsdp"), P("fsdp", None, "tensor"), P(("data", "fsdp")), P()])
def test_the_sharding_does_not_show(dtype, spec):
    tree = {"a": {"b": random_bits(dtype), "scalar": jnp.zeros((), dtype)}, "empty": jnp.zeros((0, 4), dtype)}
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    spread = dict(
        tree, a={"b": jax.device_put(tree["a"]["b"], NamedSharding(mesh, spec)), "scalar": tree["a"]["scalar"]}
    )
    found = fingerprint(spread)
    assert found == fingerprint(tree)
    assert list(found) == ["a/b", "a/scalar", "empty"]
    assert all(len(digits) == 16 and int(digits, 16) >= 0 for digits in found.values())


def test_a_sharded_array_is_neither_gathered_nor_copied():
    """No device holds more than its share of it, and every host can read the result."""
    mesh = make_mesh("fsdp=8")
    values = jax.device_put(np.zeros((4, 64, 512), np.float32), NamedSharding(mesh, P(None, "fsdp")))
    compiled = _sums.lower([values]).compile()
    assert "f32[4,8,512]" in compiled.as_text() and "[4,64,512]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < values.nbytes / 8 / 10
    assert _sums([values]).sharding.is_fully_replicated


def test_recorded_digits_stay():
    """Runs keep them: another formula would refuse every earlier run."""
    assert of(np.arange(6, dtype=np.float32).reshape(2, 3)) == "cb499b2584862075"
    assert fingerprint({}) == {}


def test_wide_integers_count_both_words():
    with jax.enable_x64(True):
        values = np.arange(4, dtype=np.int64)
        assert len({of(values), of(values + (1 << 40)), of(values.astype(np.float64))}) == 3
