"""Losses of arrays. Each returns ``(loss, metrics)`` or the per-token values it is made of; all in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mgpt4_jax.config import IGNORED
from mgpt4_jax.typing import Array, Bool, Float, Int, PRNGKey


def token_losses(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], *, label_smoothing: float = 0.0
) -> tuple[Float[Array, "b s"], Bool[Array, "b s"]]:
    """Cross-entropy in nats of each next token (``s = t - 1``), 0 where ignored, and which count.

    Position ``i`` predicts target ``i + 1``. With smoothing the target distribution is
    ``(1 - label_smoothing)`` on the token and the rest spread evenly over all ``v`` (as PyTorch).
    """
    return _cross_entropies(logits[:, :-1], targets[:, 1:], label_smoothing)


def _cross_entropies(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], label_smoothing: float
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """Of each position and its own target; the log-probabilities, an array as large as the logits, are never made."""
    logits = logits.astype(jnp.float32)
    logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    counted = targets != IGNORED
    expected = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    if label_smoothing:
        expected = (1 - label_smoothing) * expected + label_smoothing * logits.mean(axis=-1)
    return jnp.where(counted, jnp.log(jnp.exp(logits).sum(axis=-1)) - expected, 0.0), counted


def counted_positions(targets: Int[Array, "b t"], most: int) -> tuple[Int[Array, "b r"], Int[Array, "b r"]]:
    """The positions that predict a target that counts, in order, and these targets: ``answer_loss`` takes both.

    ``r`` is ``most``, or ``t - 1`` if that is less. A row with fewer is filled up with positions whose targets are
    ignored; of a row with more the last are left out.
    """
    following = targets[:, 1:]
    positions = jnp.argsort(following == IGNORED, axis=1, stable=True)[:, :most]
    return positions, jnp.take_along_axis(following, positions, axis=1)


def caption_loss(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], *, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean over the tokens that count, of the whole batch (``LlamaForCausalLM`` with labels)."""
    return _mean(*token_losses(logits, targets, label_smoothing=label_smoothing))


def answer_loss(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], *, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """``caption_loss`` where position ``i`` predicts target ``i``.

    So does a decoder that reads its targets one place later (``T5ForConditionalGeneration``).
    """
    return _mean(*_cross_entropies(logits, targets, label_smoothing))


def _mean(losses: Float[Array, "b t"], counted: Bool[Array, "b t"]) -> tuple[Float[Array, ""], dict[str, Array]]:
    num_tokens = counted.sum()
    loss = losses.sum() / jnp.maximum(num_tokens, 1)
    return loss, {"loss": loss, "num_tokens": num_tokens}


# --- BLIP-2 stage 1 --------------------------------------------------------------------------------------


def contrastive_targets(image_ids: Int[Array, "b ..."]) -> Float[Array, "b b"]:
    """Which text belongs to which picture, each row summing to 1: pairs that share a picture share the target.

    A picture may be told by several numbers, all of which must be equal.
    """
    rows = image_ids.shape[0]
    equal = (image_ids[:, None] == image_ids[None, :]).reshape(rows, rows, -1)
    same = equal.all(axis=-1).astype(jnp.float32)
    return same / same.sum(axis=1, keepdims=True)


def contrastive_loss(
    image_to_text: Float[Array, "b b"],
    text_to_image: Float[Array, "b b"],
    targets: Float[Array, "b b"],
    *,
    label_smoothing: float = 0.1,
) -> Float[Array, ""]:
    """ITC: mean of both directions' cross-entropies over the whole batch (BLIP-2, section 3.2).

    The similarities are divided by the temperature already. Rows are pictures in the first, texts in the second.
    """
    smoothed = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1]

    def one(similarity: Float[Array, "b b"]) -> Float[Array, ""]:
        return -(smoothed * jax.nn.log_softmax(similarity.astype(jnp.float32), axis=-1)).sum(axis=-1).mean()

    return (one(image_to_text) + one(text_to_image)) / 2


def negative_logits(similarity: Float[Array, "b b"], targets: Float[Array, "b b"]) -> Float[Array, "b b"]:
    """Log-weights of each row's negatives: its similarities, and as good as nothing for what belongs to it."""
    return jnp.where(targets > 0, -10000.0, jax.lax.stop_gradient(similarity).astype(jnp.float32))


def draw_negatives(
    key: PRNGKey, image_to_text: Float[Array, "b b"], text_to_image: Float[Array, "b b"], targets: Float[Array, "b b"]
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """(a hard negative picture for each text, a hard negative text for each picture), from the whole batch.

    Drawn by the contrastive distribution, as LAVIS draws from ``softmax(sim)``. The draw is the same however the
    batch is cut over devices.
    """
    for_texts, for_images = jax.random.split(key)
    images = jax.random.categorical(for_texts, negative_logits(text_to_image, targets))
    return images, jax.random.categorical(for_images, negative_logits(image_to_text, targets))


def matching_loss(logits: Float[Array, "b 2"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """ITM: cross-entropy of (no, yes)."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), labels[:, None], axis=-1)
    return -picked.mean()


def grouped_caption_loss(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], *, label_smoothing: float, groups: int
) -> Float[Array, ""]:
    """Mean over ``groups`` of consecutive rows of each one's mean over its tokens.

    One group is the mean over all tokens. As many as the original had processes is what its data parallel runs
    compute: each process means over its own tokens, and the means count alike.
    """
    losses, counted = token_losses(logits, targets, label_smoothing=label_smoothing)
    sums = losses.reshape(groups, -1).sum(axis=1)
    counts = counted.reshape(groups, -1).sum(axis=1)
    return (sums / jnp.maximum(counts, 1)).mean()
