"""Objectives: functions ``(params, batch, key) -> (loss, metrics)`` of the whole parameter tree.

What they do not say is which parameters are trained: that is the trainable tree that is differentiated.
``metrics["weight"]`` is what a batch counts in a mean over several, here its number of predicted tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mgpt4_jax.config import IGNORED, ModelConfig
from mgpt4_jax.data.images import MEAN, STD
from mgpt4_jax.losses import answer_loss, caption_loss, counted_positions
from mgpt4_jax.models import build
from mgpt4_jax.train_config import TrainConfig
from mgpt4_jax.typing import Array, DType, Float, Params, PRNGKey, UInt8

Batch = Mapping[str, Array]
"""Arrays of one batch: ``ids``, ``slots``, ``targets``, ``mask`` [b t] and ``pixels`` [b i H W 3] of bytes.

The pixels of a model that reads words alone have H = W = 0. For an InstructBLIP there are ``qformer_ids`` and
``qformer_mask`` [b q], too."""
Metrics = dict[str, Array]
Objective = Callable[[Params, Batch, PRNGKey | None], tuple[Array, Metrics]]


def normalised(pixels: UInt8[Array, "b i H W 3"]) -> Float[Array, "b i H W 3"]:
    """``data.images.normalise`` on the device: bytes cross the bus, a quarter of what floats would be."""
    return (pixels.astype(jnp.float32) / 255.0 - MEAN) / STD


def caption_objective(model: nn.Module, max_targets: int | None = None) -> Objective:
    """The answer's cross-entropy, mean over its tokens: ``align`` and ``finetune`` differ in their rows only.

    Matches MiniGPT-4 ``minigpt_base.py`` ``forward``. Without a key nothing is dropped out.

    Args:
      max_targets: most targets that count in a row; logits are computed for as many positions only. A row with more
        makes the loss NaN. None: logits are computed for all.
    """

    def objective(params: Params, batch: Batch, key: PRNGKey | None) -> tuple[Array, Metrics]:
        run = functools.partial(
            model.apply,
            {"params": params},
            batch["ids"],
            batch["slots"],
            normalised(batch["pixels"]) if batch["pixels"].size else None,
            batch["mask"],
            **instructions_of(batch),
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        if max_targets is None:
            loss, metrics = caption_loss(run(), batch["targets"])
        else:
            read, targets = counted_positions(batch["targets"], max_targets)
            loss, metrics = answer_loss(run(read=read), targets)
            is_all = metrics["num_tokens"] == (batch["targets"][:, 1:] != IGNORED).sum()
            loss = jnp.where(is_all, loss, jnp.nan)
        return loss, {"weight": metrics["num_tokens"].astype(jnp.float32)}

    return objective


def instructions_of(batch: Batch) -> dict[str, Array]:
    """What the Q-Former of an InstructBLIP reads beside the picture of each row."""
    if "qformer_ids" not in batch:
        return {}
    return {"text_ids": batch["qformer_ids"][:, None], "text_valid": batch["qformer_mask"][:, None]}


def training_model(config: TrainConfig, model: ModelConfig, trained: Iterable[str], dtype: DType) -> nn.Module:
    """The module that is trained. ``trained`` are parameter paths: a part without any stays in evaluation mode."""
    parts = {path.split("/")[0] for path in trained}
    changes: dict[str, Any] = {}
    for name in ("vit", "qformer", "llama", "opt", "t5"):
        part = getattr(model, name)
        if part is not None:
            changes[name] = dataclasses.replace(part, remat=config.remat)
    if model.qformer is not None and "qformer" not in parts:
        changes["qformer"] = dataclasses.replace(changes["qformer"], dropout=0.0)
    return build(dataclasses.replace(model, **changes), dtype)
