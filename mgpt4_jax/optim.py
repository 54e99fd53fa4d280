"""AdamW as the originals use it: learning rates by their two formulas, and which parameters decay.

The learning rate is computed on the host in float64 and handed to the step as an array: the numbers are the
originals' to the last digit, and a changed schedule compiles nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgpt4_jax.train_config import OptimConfig
from mgpt4_jax.typing import Array, Params

_VECTORS = ("scale", "bias", "q_bias", "v_bias")
"""Leaves that are vectors in the original programs; here heads and stacked layers give them more axes."""


def learning_rate(config: OptimConfig, step: int, *, epochs: int, steps_per_epoch: int) -> float:
    """The rate of step number ``step``, from 0.

    * ``minigpt4`` (``LinearWarmupCosineLRScheduler`` of MiniGPT-4): warm-up counted *within* an epoch, so it
      starts again in the next one if it is longer; then a cosine over all steps, which the warm-up does not
      shift: the rate jumps down where it ends.
    * ``lavis`` (that of LAVIS): warm-up in the first epoch, whose rest stays at the peak; then one rate an epoch.
    * ``constant``: the peak after the warm-up.
    """
    epoch, inner = divmod(step, steps_per_epoch)
    warmup = config.warmup_lr + (config.peak_lr - config.warmup_lr) * inner / max(config.warmup_steps, 1)
    if config.schedule == "lavis":
        if epoch == 0:
            return min(config.peak_lr, warmup) if config.warmup_steps else config.peak_lr
        return _cosine(config, epoch / epochs)
    if step < config.warmup_steps:
        return min(config.peak_lr, warmup)
    return config.peak_lr if config.schedule == "constant" else _cosine(config, step / (epochs * steps_per_epoch))


def _cosine(config: OptimConfig, part: float) -> float:
    return (config.peak_lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * part)) + config.min_lr


def is_decayed(path: str, rule: str) -> bool:
    """Whether weight decay pulls at the parameter ``path``.

    Neither original decays vectors. They differ in ``temp``, a scalar: LAVIS (``Blip2Base.get_optimizer_params``)
    spares what has exactly one dimension, MiniGPT-4 (``runner_base.py``) what has less than two.
    """
    name = path.rsplit("/", 1)[-1]
    return rule == "lavis" if name == "temp" else name not in _VECTORS


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled decay; the caller multiplies by the learning rate (``apply_updates``)."""

    def decay_mask(params: Params) -> Any:
        def one(path: tuple[Any, ...], _: Array) -> bool:
            return is_decayed(jax.tree_util.keystr(path, simple=True, separator="/"), config.decay_rule)

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
    )


def apply_updates(params: Params, updates: Params, learning_rate: Array) -> Params:
    """``params - learning_rate * updates``."""
    return jax.tree.map(lambda p, u: p - learning_rate.astype(p.dtype) * u, params, updates)


def update_average(average: Params, params: Params, decay: float) -> Params:
    """Exponential moving average of the parameters after a step."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, jax.tree.map(jnp.asarray, params))
