"""Losses of arrays. Each returns ``(loss, metrics)`` or the per-token values it is made of; all in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mgpt4_jax.config import IGNORED
from mgpt4_jax.typing import Array, Bool, Float, Int


def token_losses(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], *, label_smoothing: float = 0.0
) -> tuple[Float[Array, "b s"], Bool[Array, "b s"]]:
    """Cross-entropy in nats of each next token (``s = t - 1``), 0 where ignored, and which count.

    Position ``i`` predicts target ``i + 1``. With smoothing the target distribution is
    ``(1 - label_smoothing)`` on the token and the rest spread evenly over all ``v`` (as PyTorch).
    """
    log_probabilities = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    targets = targets[:, 1:]
    counted = targets != IGNORED
    picked = jnp.take_along_axis(log_probabilities, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    losses = -(1 - label_smoothing) * picked - label_smoothing * log_probabilities.mean(axis=-1)
    return jnp.where(counted, losses, 0.0), counted


def caption_loss(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], *, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean over the tokens that count, of the whole batch (``LlamaForCausalLM`` with labels)."""
    losses, counted = token_losses(logits, targets, label_smoothing=label_smoothing)
    num_tokens = counted.sum()
    loss = losses.sum() / jnp.maximum(num_tokens, 1)
    return loss, {"loss": loss, "num_tokens": num_tokens}
