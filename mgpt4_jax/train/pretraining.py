"""Q-Former pre-training, BLIP-2 stage 1: contrast (ITC), matching (ITM) and captioning (ITG) of the same pairs.

Agrees with LAVIS ``Blip2Qformer.forward``. Features, similarities and negatives are those of the whole batch: under a
mesh the arrays are global, so nothing is gathered by hand.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mgpt4_jax.config import IGNORED
from mgpt4_jax.losses import (
    contrastive_loss,
    contrastive_targets,
    draw_negatives,
    grouped_caption_loss,
    matching_loss,
)
from mgpt4_jax.train.objectives import Batch, Metrics, Objective, normalised
from mgpt4_jax.typing import Array, Float, Int, Params, PRNGKey

LABEL_SMOOTHING = 0.1  # of contrast and captioning


class Negatives(NamedTuple):
    """For each text a picture that does not belong to it, for each picture such a text."""

    images: Int[Array, " b"]
    texts: Int[Array, " b"]


class Pretraining(NamedTuple):
    """The three losses, and what the negatives were drawn from."""

    contrast: Float[Array, ""]
    matching: Float[Array, ""]
    captioning: Float[Array, ""]
    image_to_text: Float[Array, "b b"]
    text_to_image: Float[Array, "b b"]
    negatives: Negatives
    match_logits: Float[Array, "c 2"]  # pairs, then pictures' negatives, then texts'


def pretraining_objective(model: nn.Module, *, dec_id: int, pad_id: int, groups: int = 1) -> Objective:
    """The sum of the three losses, equally weighted.

    The batch holds ``ids`` and ``mask`` [b t] of ``[CLS] caption [SEP]``, ``pixels`` [b 1 H W 3] and, where several
    texts share a picture (retrieval fine-tuning), ``image_ids`` [b 2].

    Args:
      dec_id: the id that takes the place of [CLS] when a caption is written.
      pad_id: what captions are padded with, which is not predicted.
      groups: as in ``losses.grouped_caption_loss``.
    """

    def objective(params: Params, batch: Batch, key: PRNGKey | None) -> tuple[Array, Metrics]:
        drawn = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        found = model.apply(
            {"params": params},
            batch,
            drawn,
            dec_id=dec_id,
            pad_id=pad_id,
            groups=groups,
            deterministic=key is None,
            method=pretrain,
            rngs=None if key is None else {"dropout": key},
        )
        loss = found.contrast + found.matching + found.captioning
        rows = jnp.float32(batch["ids"].shape[0])
        parts = {"loss_itc": found.contrast, "loss_itm": found.matching, "loss_itg": found.captioning}
        return loss, {"weight": rows, **parts}

    return objective


def pretrain(
    model: nn.Module,
    batch: Batch,
    key: PRNGKey,
    *,
    dec_id: int,
    pad_id: int,
    groups: int = 1,
    deterministic: bool = True,
    negatives: Negatives | None = None,
) -> Pretraining:
    """All three losses of one batch, as a method of ``Blip2``; ``negatives`` takes the place of the draw."""
    ids, valid = batch["ids"], batch["mask"]
    image = model.image_features(normalised(batch["pixels"])[:, 0], room=ids.shape[1], deterministic=deterministic)
    text = model.text_features(ids, valid, deterministic=deterministic)[:, 0]
    to_text, to_image = similarities(model, image.embeds, text)
    targets = contrastive_targets(batch["image_ids"]) if "image_ids" in batch else jnp.eye(ids.shape[0])
    if negatives is None:
        negatives = Negatives(*draw_negatives(key, to_text, to_image, targets))
    logits, labels = match(model, image.tokens, ids, valid, negatives, deterministic)
    captions = ids.at[:, 0].set(dec_id)
    predicted = jnp.where(ids == pad_id, IGNORED, captions)
    words = model.caption_logits(image.cache, captions, valid, deterministic=deterministic)
    return Pretraining(
        contrastive_loss(to_text, to_image, targets, label_smoothing=LABEL_SMOOTHING),
        matching_loss(logits, labels),
        grouped_caption_loss(words, predicted, label_smoothing=LABEL_SMOOTHING, groups=groups),
        to_text,
        to_image,
        negatives,
        logits,
    )


def similarities(
    model: nn.Module, images: Float[Array, "b q c"], texts: Float[Array, "b c"]
) -> tuple[Float[Array, "b b"], Float[Array, "b b"]]:
    """Picture-to-text and text-to-picture, over the temperature; the second operand of each has no gradient.

    So it is in the original, where features of other processes come without one: its own come so too.
    """
    stop = jax.lax.stop_gradient
    return (
        model.similarity(images, stop(texts)) / model.temp,
        model.similarity(stop(images), texts).T / model.temp,
    )


def match(
    model: nn.Module,
    tokens: Float[Array, "b p e"],
    ids: Int[Array, "b t"],
    valid: Array,
    negatives: Negatives,
    deterministic: bool,
) -> tuple[Float[Array, "c 2"], Int[Array, " c"]]:
    """Logits and labels of 3b pairs: the true ones, (negative picture, text), (picture, negative text)."""
    own = jnp.arange(ids.shape[0])
    images = jnp.concatenate([own, negatives.images, own])
    texts = jnp.concatenate([own, own, negatives.texts])
    logits = model.match_logits(tokens[images], ids[texts], valid[texts], deterministic=deterministic)
    return logits, (jnp.arange(len(images)) < ids.shape[0]).astype(jnp.int32)
