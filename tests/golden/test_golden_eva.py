"""EVA ViT: positions in use, every block, ``ln_vision``, and the gradient of every parameter and of the picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case, recorded
from claims import EVA
from comparing import LOSS, Compare
from conversion import Converted

from mgpt4_jax.models import build


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


@pytest.mark.parametrize(("case", "quantity"), recorded("eva", *EVA))
def test_recorded(case: Case, quantity: str, results: Any, compare: Compare) -> None:
    actual = results(case)[quantity]
    if quantity == "grads":
        compare.gradients(actual, case.tensors(quantity))
    elif quantity == "grad_image":
        compare.gradients({quantity: actual}, {quantity: case.outputs[quantity]})
    else:
        compare.close(actual, case.outputs[quantity], *[LOSS] * (quantity == "probe_loss"))
