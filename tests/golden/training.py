"""Training batches of the recorded MiniGPT-4 cases, and one compiled program for all of a case."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from cases import Case
from conversion import Converted

from mgpt4_jax.data.batching import (
    Batch,
    TrainingSequence,
    conversation_sequence,
    pad_sequences,
    training_sequence,
    wrap_instruction,
)
from mgpt4_jax.data.images import MEAN, STD
from mgpt4_jax.data.prompts import TEMPLATES
from mgpt4_jax.data.text import Tokenizer, load_llama_tokenizer
from mgpt4_jax.losses import caption_loss, token_losses
from mgpt4_jax.models import build
from mgpt4_jax.typing import Array

STAGE1 = {"end_symbol": "\n", "max_text_length": 32}  # class defaults of the original
STAGE2_TEXT_LENGTH = 160


def sequences(case: Case, name: str, tokenizer: Tokenizer, tokens_per_image: int) -> list[TrainingSequence]:
    """The rows of the batch ``name``; the recorded configuration says what stands in them."""
    config, answers = case.config, case.config["answers"]
    options = {"tokens_per_image": tokens_per_image}
    conditions: list[str | None] = [None] * len(answers)
    if "conv_q" in config:
        template = next(t for t in TEMPLATES.values() if t.training == config["prompt_template"])
        options |= {"end_symbol": config["end_sym"], "max_text_length": config["max_txt_len"]}
        if name == "conv":
            turns = [[text.split(config["connect_sym"]) for text in config[key]] for key in ("conv_q", "conv_a")]
            return [
                conversation_sequence(tokenizer, *turn, template=template, **options)
                for turn in zip(*turns, strict=True)
            ]
        conditions = [wrap_instruction(template, text) for text in config[name]]
        options |= {"num_images": 0} if name == "nlp" else {}
    elif name in ("stage2", "instr"):
        options |= {"end_symbol": config["end_sym_stage2"], "max_text_length": STAGE2_TEXT_LENGTH}
        conditions = config["instr"] if name == "instr" else [config["stage2_prompt"]] * len(answers)
    else:
        limit = re.search(r"_trunc(\d+)", name)
        options |= STAGE1 | ({"max_text_length": int(limit[1])} if limit else {})
        if not limit and "noprompt" not in name:
            conditions = [config["stage1_prompt"]] * len(answers)
    return [
        training_sequence(tokenizer, condition, answer, **options)
        for condition, answer in zip(conditions, answers, strict=True)
    ]


@dataclass(frozen=True)
class Program:
    """Loss, logits and the projection's gradient of batches of one padded length."""

    converted: Converted
    tokenizer: Tokenizer
    length: int

    @classmethod
    def of(cls, converted: Converted) -> Program:
        lengths = [value.shape[1] for key, value in converted.case.outputs.items() if key.endswith("_targets")]
        return cls(converted, load_llama_tokenizer(converted.model_dir / "tokenizer"), max(lengths))

    def batch(self, rows: list[TrainingSequence]) -> Batch:
        return pad_sequences(rows, self.length, pad_id=self.tokenizer.pad_id)

    def run(self, batch: Batch) -> dict[str, Any]:
        params = dict(self.converted.params)
        projection, pixels = params.pop("projection"), self.converted.case.pixels()[:, None]
        (_, found), gradient = self._step(projection, params, vars(batch), pixels)
        return {name: np.asarray(value) for name, value in found.items()} | {"projection": gradient}

    def __post_init__(self) -> None:
        model = build(self.converted.config)

        def loss(projection: Any, frozen: Any, batch: dict[str, Array], pixels: Array) -> Any:
            variables = {"params": {**frozen, "projection": projection}}
            images, embeds, logits = model.apply(variables, batch, pixels, method=forward)
            total, _ = caption_loss(logits, batch["targets"])
            per_token, _ = token_losses(logits, batch["targets"])
            found = {"img_embeds": images, "inputs_embeds": embeds, "logits": logits, "loss": total}
            return total, found | {"token_losses": per_token}

        object.__setattr__(self, "_step", jax.jit(jax.value_and_grad(loss, has_aux=True)))


def unnormalised(pixels: np.ndarray) -> np.ndarray:
    """What the step normalises to ``pixels``: it is given bytes, and recorded pictures are normalised already."""
    return (pixels * STD + MEAN) * np.float32(255)


def forward(model: nn.Module, batch: dict[str, Array], pixels: Array) -> tuple[Array, Array, Array]:
    images = model.encode_image(pixels[:, 0])
    embeds = model.embed(batch["ids"], batch["slots"], images)
    return images, embeds, model.llama(embeds, batch["mask"])
