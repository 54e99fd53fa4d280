"""The train step: gradients of the trainable tree alone, AdamW, one compiled program.

``jax.jit`` with shardings taken from its arguments (what ``pjit`` was). The state is donated: a step needs no
second copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mgpt4_jax.optim import apply_updates, update_average
from mgpt4_jax.sharding import ACTIVATIONS
from mgpt4_jax.train.objectives import Batch, Metrics, Objective
from mgpt4_jax.train.state import TrainState, join
from mgpt4_jax.typing import Array, Float, Params

TrainStep = Callable[[TrainState, Params, Batch, Float[Array, ""]], tuple[TrainState, Metrics]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
) -> Any:
    """The jitted ``(state, frozen, batch, learning_rate) -> (state, metrics)``.

    A step whose loss or gradient is not finite changes nothing but ``step``: the state stays the last good one,
    and ``metrics["is_finite"]`` says so.
    """

    def step(state: TrainState, frozen: Params, batch: Batch, rate: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradients, means = gradient(objective, state.trainable, frozen, batch, key, accumulation)
        norm = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = apply_updates(state.trainable, updates, rate)
        average = None if state.average is None else update_average(state.average, trainable, ema_decay)
        is_finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norm)
        new, old = (trainable, moments, average), (state.trainable, state.optimizer, state.average)
        trainable, moments, average = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)
        metrics = {**means, "grad_norm": norm, "is_finite": is_finite}
        return TrainState(state.step + 1, trainable, moments, average, state.key), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_evaluation(objective: Objective) -> Any:
    """The jitted ``(trainable, frozen, batch) -> metrics`` with ``loss`` and ``weight``, without dropout."""

    def evaluate(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        with nn.logical_axis_rules(ACTIVATIONS):
            loss, metrics = objective(join(trainable, frozen), batch, None)
        return {"loss": loss, **metrics}

    return jax.jit(evaluate)


def gradient(
    objective: Objective, trainable: Params, frozen: Params, batch: Batch, key: Array, accumulation: int
) -> tuple[Params, Metrics]:
    """Gradient and means (``loss``, and what the objective gives; ``weight`` is the sum) of the whole batch.

    It may be cut into ``accumulation`` parts, one after the other. Parts count by their weight, so for a mean over
    tokens the result is that of the batch in one piece. MiniGPT-4 adds the parts' means without dividing and LAVIS
    divides by their number; both equal this when all parts weigh the same and, for MiniGPT-4, but for the factor
    ``accumulation``.
    """

    def loss_of(trainable: Params, part: Batch, key: Array) -> tuple[Array, Metrics]:
        with nn.logical_axis_rules(ACTIVATIONS):
            loss, metrics = objective(join(trainable, frozen), part, key)
        return loss, {"loss": loss, **metrics}

    differentiate = jax.grad(loss_of, has_aux=True)
    if accumulation == 1:
        return differentiate(trainable, batch, key)

    def add(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
        part, index = inputs
        gradients, metrics = differentiate(trainable, part, jax.random.fold_in(key, index))
        weight = metrics.pop("weight")
        weighted = jax.tree.map(lambda value: value * weight, (gradients, metrics))
        return jax.tree.map(jnp.add, total, (weighted, weight)), None

    parts = jax.tree.map(lambda x: _parts(x, accumulation), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, trainable, first, key))
    weight = zeros[1].pop("weight")
    ((gradients, means), weight), _ = jax.lax.scan(add, (zeros, weight), (parts, jnp.arange(accumulation)))
    gradients, means = jax.tree.map(lambda value: value / jnp.maximum(weight, 1), (gradients, means))
    return gradients, {**means, "weight": weight}


def _parts(x: Array, count: int) -> Array:
    """``[count b/count ...]``; a part takes every ``count``-th row, so that each device keeps its own rows."""
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
