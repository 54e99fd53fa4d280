"""BLIP-2 on FlanT5 in training: what the encoder receives, its states, logits, loss, gradients of what is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, recorded
from claims import ON_T5, TRAINED
from comparing import Compare
from conversion import Converted
from generative import compare_recorded, compare_trained, loss_and_gradients

from mgpt4_jax.data.blip2_rows import pad_prefix_sequences, t5_sequence
from mgpt4_jax.data.text_lm import load_t5_tokenizer
from mgpt4_jax.losses import answer_loss
from mgpt4_jax.models import Blip2T5
from mgpt4_jax.models.t5 import shift_right


@pytest.fixture(scope="module")
def results(converted: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    """Everything about the one batch of a case."""

    def run(case: Case) -> dict[str, Any]:
        made = converted(case)
        tokenizer, count = load_t5_tokenizer(made.model_dir / "tokenizer"), made.config.tokens_per_image
        pairs = zip(case.inputs["text_input"], case.inputs["text_output"], strict=True)
        limit = case.config["max_txt_len"]
        rows = [
            t5_sequence(tokenizer, str(asked), str(said), tokens_per_image=count, max_text_length=limit)
            for asked, said in pairs
        ]
        lengths = max(map(len, rows)), max(len(row.targets) for row in rows)
        batch = pad_prefix_sequences(rows, *lengths, pad_id=tokenizer.pad_id)
        model = Blip2T5(made.config)

        def loss_of(params: Any) -> tuple[Any, Any]:
            bound = model.bind({"params": params})
            embeds = bound.read(batch.ids, batch.slots, jnp.asarray(case.pixels())[:, None])
            encoded = bound.language.encode(embeds, batch.mask)
            decoder_ids = shift_right(batch.targets, made.config.t5)
            logits = bound.language.decode(decoder_ids, encoded, batch.mask, batch.decoder_mask)
            found = {"inputs_embeds": embeds, "encoder_last": encoded, "logits": logits}
            return answer_loss(logits, batch.targets)[0], found

        loss, found, gradients = loss_and_gradients(made, loss_of)
        named = {"attention_mask": batch.mask, "decoder_attention_mask": batch.decoder_mask, "targets": batch.targets}
        text = {"input_ids": batch.ids[:, count:], "input_mask": batch.mask[:, count:]}
        return {**found, **named, **text, "loss": loss, "grads": gradients}

    return cache(run)


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_t5", *ON_T5))
def test_recorded(
    case: Case, quantity: str, results: Callable[..., Any], converted: Callable[..., Converted], compare: Compare
) -> None:
    compare_recorded(case, quantity, quantity, results(case), converted(case), compare)


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_t5", *TRAINED))
def test_what_is_trained(case: Case, quantity: str, converted: Callable[..., Converted], compare: Compare) -> None:
    compare_trained(case, converted(case), compare)


def test_both_sides_are_padded_in_the_recorded_batch() -> None:
    for parameter in recorded("blip2_t5", "attention_mask", "decoder_attention_mask"):
        case, quantity = parameter.values
        assert np.ptp(case.outputs[quantity].sum(axis=1)) > 0
