"""EVA ViT: positions in use, every block, ``ln_vision``, and the gradient of every parameter and of the picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, cases_of, recorded
from comparing import LOSS, Compare
from conversion import Converted, convert_case

from mgpt4_jax.checkpoint import flatten, load_params
from mgpt4_jax.models import build

CHECKED = (
    "pos_embed_used",
    "patch_embed",
    "attn_0",
    "mlp_0",
    "block_*",
    "features",
    "ln_vision_out",
    "probe_loss",
    "grads",
    "grad_image",
)


def run(converted: Converted) -> dict[str, Any]:
    """Every quantity by its recorded name, from one compiled program."""
    model, case, params = build(converted.config), converted.case, converted.params
    cotangent = jnp.asarray(case.inputs["cotangent"])

    def probe(params: Any, pixels: jax.Array) -> tuple[jax.Array, Any]:
        out, state = model.apply({"params": params}, pixels, mutable=["intermediates"])
        return jnp.mean(out * cotangent), (out, state["intermediates"]["vit"])

    gradient = jax.jit(jax.value_and_grad(probe, argnums=(0, 1), has_aux=True))
    (loss, (out, sown)), (grads, grad_image) = gradient(params, case.pixels())
    blocks = sown["blocks"]
    hidden = blocks["hidden"][0]
    return {
        "pos_embed_used": params["vit"]["pos_embed"][None],
        "patch_embed": sown["patches"][0],
        "attn_0": blocks["attn_out"][0][0],
        "mlp_0": blocks["mlp_out"][0][0],
        **{f"block_{layer}": states for layer, states in enumerate(hidden)},
        "features": hidden[-1],
        "ln_vision_out": out,
        "probe_loss": loss,
        "grads": converted.to_source(grads),
        "grad_image": jnp.transpose(grad_image, (0, 3, 1, 2)),
    }


@pytest.fixture(scope="module")
def results(converted: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    return cache(lambda case: run(converted(case)))


@pytest.mark.parametrize(("case", "quantity"), recorded("eva", *CHECKED))
def test_recorded(case: Case, quantity: str, results: Any, compare: Compare) -> None:
    actual = results(case)[quantity]
    if quantity == "grads":
        compare.gradients(actual, case.tensors(quantity))
    elif quantity == "grad_image":
        compare.gradients({quantity: actual}, {quantity: case.outputs[quantity]})
    else:
        compare.close(actual, case.outputs[quantity], *[LOSS] * (quantity == "probe_loss"))


@pytest.mark.parametrize("case", cases_of("eva"))
def test_copies_in_other_formats_convert_alike(case: Case, converted: Any, tmp_path: Any) -> None:
    expected = flatten(load_params(converted(case).model_dir))
    for index, copy in enumerate(case.weights["vit"][1:]):
        other = flatten(load_params(convert_case(case, tmp_path / str(index), vit=copy).model_dir))
        assert other.keys() == expected.keys()
        for path, leaf in other.items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
