"""What the tests of BLIP-2 on OPT and on T5 share: the program's results under the names that were recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cases import Case
from comparing import LOSS, Compare
from conversion import Converted

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.train.state import join, split, trainable_paths

TRAINABLE = ("qformer/*", "ln_vision/*", "projection/*")
"""What the original trains in stage 2."""


def trained(converted: Converted) -> tuple[Any, Any]:
    """(trained, frozen) parameters."""
    return split(converted.params, trainable_paths(flatten(converted.params), TRAINABLE))


def loss_and_gradients(converted: Converted, loss_of: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """(loss, what ``loss_of(params)`` gives besides, gradients of what is trained)."""
    trainable, frozen = trained(converted)
    run = jax.jit(jax.value_and_grad(lambda leaves: loss_of(join(leaves, frozen)), has_aux=True))
    (loss, rest), gradients = run(trainable)
    return loss, rest, gradients


def compare_recorded(
    case: Case, quantity: str, field: str, found: dict[str, Any], converted: Converted, compare: Compare
) -> None:
    """One field of a batch; ids, masks and targets are the same, numbers close."""
    if field == "grads":
        compare.gradients(converted.to_source(found["grads"]), case.tensors(quantity))
    elif field == "loss":
        compare.close(found["loss"], case.outputs[quantity], LOSS)
    elif np.issubdtype(found[field].dtype, np.floating):
        compare.close(found[field], case.outputs[quantity])
    else:
        compare.equal(np.asarray(found[field]), case.outputs[quantity].astype(found[field].dtype))


def compare_trained(case: Case, converted: Converted, compare: Compare) -> None:
    """The parameters that are trained have the original's names."""
    compare.equal(set(converted.to_source(trained(converted)[0])), set(case.config["trainable"]))
