"""BLIP-2 stage 2 on an encoder and decoder: the encoder reads picture and prompt, the decoder writes the answer.

Matches LAVIS ``Blip2T5.forward`` and ``Blip2T5Instruct.forward``. OPT and LLaMA, decoders alone, are trained by
``objectives.caption_objective``.
"""

from __future__ import annotations

import flax.linen as nn

from mgpt4_jax.losses import answer_loss
from mgpt4_jax.models.t5 import shift_right
from mgpt4_jax.train.objectives import Batch, Metrics, Objective, instructions_of, normalised
from mgpt4_jax.typing import Array, Params, PRNGKey


def prefix_objective(model: nn.Module) -> Objective:
    """The answer's cross-entropy, mean over its tokens; ``targets`` are the decoder's."""

    def objective(params: Params, batch: Batch, key: PRNGKey | None) -> tuple[Array, Metrics]:
        logits = model.apply(
            {"params": params},
            batch["ids"],
            batch["slots"],
            normalised(batch["pixels"]),
            batch["mask"],
            shift_right(batch["targets"], model.config.t5),
            **instructions_of(batch),
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        loss, metrics = answer_loss(logits, batch["targets"])
        return loss, {"weight": metrics["num_tokens"].astype(loss.dtype)}

    return objective
