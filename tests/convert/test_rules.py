"""The matcher: one entry a tensor, one value a parameter, and everything that does not fit told at once."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from mgpt4_jax.convert.readers import TensorInfo
from mgpt4_jax.convert.rules import Alias, Fill, Ignore, Part, Rule, is_any_non_finite, plan
from mgpt4_jax.convert.transforms import same, transpose
from mgpt4_jax.errors import UserError

TABLE = [
    Rule("blocks.{l}.weight", ("llama/layers/attn/kernel",), transpose(), (3, 2), range(2)),
    Rule("embed", ("llama/embed_tokens/embedding",), same(), (5, 2)),
    Alias("head", "embed"),
    Ignore(r".*\.inv_freq", "a buffer"),
    Fill("projection/bias", np.zeros, "no file holds it"),
]
TREE = {
    "llama": {
        "layers": {"attn": {"kernel": jax.ShapeDtypeStruct((2, 2, 3), np.float32)}},
        "embed_tokens": {"embedding": jax.ShapeDtypeStruct((5, 2), np.float32)},
    },
    "projection": {"bias": jax.ShapeDtypeStruct((4,), np.float32)},
}
SHAPES = {"blocks.0.weight": (3, 2), "blocks.1.weight": (3, 2), "embed": (5, 2), "head": (5, 2), "x.inv_freq": (1,)}


def part(changes=(), *, drop=(), dtypes=None, table=TABLE):
    shapes = {key: shape for key, shape in (SHAPES | dict(changes)).items() if key not in drop}
    dtypes = dtypes or {}
    infos = {key: TensorInfo(shape, dtypes.get(key, "float16"), Path("f")) for key, shape in shapes.items()}
    return Part("f.pth", infos, table)


def test_a_whole_plan():
    result = plan([part()], TREE)
    assert [(move.key, move.row) for move in result.moves] == [
        ("blocks.0.weight", 0),
        ("blocks.1.weight", 1),
        ("embed", None),
    ]
    assert result.ignored == {"a buffer": ["x.inv_freq"]}
    assert result.num_parameters == 12 + 10 + 4
    assert {path: dtype.name for path, dtype in result.dtypes.items()} == {
        "llama/layers/attn/kernel": "float16",
        "llama/embed_tokens/embedding": "float16",
        "projection/bias": "float32",
    }


@pytest.mark.parametrize(
    ("made", "lines"),
    [
        (part({"extra": (7,)}), ["1 unknown tensors", "+ extra [7]"]),
        (part(drop=("blocks.1.weight",)), ["1 missing tensors", "- blocks.1.weight [3, 2]"]),
        (part({"embed": (2, 5)}), ["1 tensors of another shape", "! embed [2, 5], expected [5, 2]"]),
        (part(dtypes={"embed": "int8"}), ["1 tensors of another type", "! embed int8, expected floats"]),
        (part(table=TABLE[:1] + TABLE[2:]), ["1 unknown tensors", "parameters not filled once", "0 of 1 parts"]),
        (part(table=[*TABLE, TABLE[-1]]), ["parameters not filled once", "projection/bias: 2 of 1 parts"]),
    ],
    ids=["unknown", "missing", "shape", "type", "unfilled", "filled twice"],
)
def test_what_does_not_fit(made, lines):
    with pytest.raises(UserError) as caught:
        plan([made], TREE)
    for line in lines:
        assert line in str(caught.value)
    assert "f.pth" in str(caught.value).splitlines()[0]


def test_everything_is_told_at_once_and_cut():
    many = {f"extra.{number}": (1,) for number in range(40)}
    with pytest.raises(UserError) as caught:
        plan([part(many | {"embed": (2, 5)}, drop=("blocks.0.weight",))], TREE)
    text = str(caught.value)
    assert "40 unknown tensors, 1 tensors of another shape, 1 missing tensors" in text or "40 unknown tensors" in text
    assert "... and 28 more" in text
    assert "- blocks.0.weight" in text
    assert "! embed" in text


def test_two_entries_for_one_tensor_are_our_mistake():
    with pytest.raises(ValueError, match="claimed by 2 entries"):
        plan([part(table=[*TABLE, Ignore("embed", "twice")])], TREE)


def test_a_table_that_does_not_fit_the_model_is_our_mistake():
    wrong = [Rule("embed", ("llama/embed_tokens/embedding",), transpose(), (5, 2)), *TABLE[:1], *TABLE[2:]]
    with pytest.raises(ValueError, match="the model has"):
        plan([part(table=wrong)], TREE)


def test_mixed_halves_become_float32():
    result = plan([part(dtypes={"blocks.0.weight": "bfloat16"})], TREE)
    assert result.dtypes["llama/layers/attn/kernel"] == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_non_finite_values_are_found(dtype, bad):
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.array([0.0, largest, -largest] * 100_000, np.float32).astype(dtype)
    x[1] = ml_dtypes.finfo(dtype).max
    x[2] = ml_dtypes.finfo(dtype).min
    x = np.where(np.isfinite(x.astype(np.float32)), x, np.zeros_like(x))
    if bad is not None:
        x[-2] = bad
    assert is_any_non_finite(x) == (bad is not None)
