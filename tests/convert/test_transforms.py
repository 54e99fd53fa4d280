"""Each transform against a formula written out, and forward and back without a changed bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from mgpt4_jax.convert import transforms

N, H, D = 4, 3, 12
CASES = {
    "same": (transforms.same(), (5, 7)),
    "reshape": (transforms.reshape((6, 8)), (1, 6, 8)),
    "transpose": (transforms.transpose(), (5, 7)),
    "heads_in": (transforms.heads_in(N), (N * H, 5)),
    "heads_in bias": (transforms.heads_in(N), (N * H,)),
    "heads_out": (transforms.heads_out(N), (5, N * H)),
    "qkv": (transforms.qkv(N), (3 * N * H, D)),
    "qkv_bias": (transforms.qkv_bias(N), (3 * N * H,)),
    "patch_kernel": (transforms.patch_kernel(), (8, 3, 14, 14)),
    "positions": (transforms.positions(4, 4), (1, 17, 8)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
def test_back_and_forth_is_exact(name, dtype):
    transform, shape = CASES[name]
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    if name == "qkv_bias":
        x[N * H : 2 * N * H] = 0
    parts = [transforms.contiguous(part) for part in transform.forward(x)]
    back = transforms.contiguous(transform.inverse(parts, shape))
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    assert back.tobytes() == x.tobytes()


def test_heads_stand_where_pytorch_splits_them():
    rng = np.random.default_rng(1)
    weight, x = rng.normal(size=(N * H, D)), rng.normal(size=D)
    (kernel,) = transforms.heads_in(N).forward(weight)
    np.testing.assert_allclose(np.einsum("d,dnh->nh", x, kernel), (weight @ x).reshape(N, H))
    back = rng.normal(size=(D, N * H))
    (kernel,) = transforms.heads_out(N).forward(back)
    y = rng.normal(size=(N, H))
    np.testing.assert_allclose(np.einsum("nh,nhd->d", y, kernel), back @ y.reshape(-1))


def test_qkv_rows_are_query_key_value():
    rng = np.random.default_rng(2)
    weight, x = rng.normal(size=(3 * N * H, D)), rng.normal(size=D)
    (kernel,) = transforms.qkv(N).forward(weight)
    np.testing.assert_allclose(np.einsum("d,dcnh->cnh", x, kernel), (weight @ x).reshape(3, N, H))


def test_patch_kernel_is_the_convolution():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(8, 3, 14, 14)).astype(np.float32)
    pixels = rng.normal(size=(14, 14, 3)).astype(np.float32)
    (kernel,) = transforms.patch_kernel().forward(weight)
    expected = torch.conv2d(torch.from_numpy(pixels.transpose(2, 0, 1))[None], torch.from_numpy(weight), stride=14)
    np.testing.assert_allclose(pixels.reshape(-1) @ kernel, expected.reshape(-1).numpy(), atol=1e-4)


@pytest.mark.parametrize("target", [2, 6, 9])
def test_positions_are_resized_as_pytorch_does(target):
    x = np.random.default_rng(4).normal(size=(1, 17, 8)).astype(np.float16)
    (ours,) = transforms.positions(4, target).forward(x)
    grid = torch.from_numpy(x[0, 1:].astype(np.float32)).reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    expected = grid.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[1:], expected, atol=1e-5)
    np.testing.assert_array_equal(ours[0], x[0, 0].astype(np.float32))


def test_a_key_bias_is_refused():
    with pytest.raises(ValueError, match="key bias"):
        transforms.qkv_bias(N).forward(np.ones(3 * N * H, np.float32))


def test_contiguous_equals_numpy_on_large_views():
    x = np.arange(1 << 20, dtype=np.uint32).view(np.float32).reshape(1024, 4, 256).transpose(2, 0, 1)
    np.testing.assert_array_equal(transforms.contiguous(x).view(np.uint32), np.ascontiguousarray(x).view(np.uint32))
