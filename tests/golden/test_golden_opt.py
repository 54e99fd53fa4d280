"""BLIP-2 on OPT in training: what the language model receives, logits, losses, gradients of what is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, recorded
from claims import ON_OPT, TRAINED
from comparing import Compare
from conversion import Converted
from generative import compare_recorded, compare_trained, loss_and_gradients

from mgpt4_jax.data.batching import pad_sequences
from mgpt4_jax.data.blip2_rows import opt_sequence
from mgpt4_jax.data.text_lm import load_opt_tokenizer
from mgpt4_jax.losses import caption_loss
from mgpt4_jax.models import Blip2Opt


@pytest.fixture(scope="module")
def results(converted: Callable[[Case], Converted]) -> Callable[[Case, str], dict[str, Any]]:
    """Everything about one batch of a case: "prompt" or "noprompt"."""

    def run(case: Case, name: str) -> dict[str, Any]:
        made = converted(case)
        tokenizer, count = load_opt_tokenizer(made.model_dir / "tokenizer"), made.config.tokens_per_image
        texts, prompt = [str(text) for text in case.inputs[f"texts_{name}"]], prompt_of(case, name, tokenizer)
        limit = case.config["max_txt_len"]
        rows = [
            opt_sequence(tokenizer, text, prompt=prompt, tokens_per_image=count, max_text_length=limit)
            for text in texts
        ]
        batch = pad_sequences(rows, max(map(len, rows)), pad_id=tokenizer.pad_id)
        model = Blip2Opt(made.config)

        def loss_of(params: Any) -> tuple[Any, Any]:
            bound = model.bind({"params": params})
            embeds = bound.read(batch.ids, batch.slots, jnp.asarray(case.pixels())[:, None])
            logits = bound.language(embeds, batch.mask)
            return caption_loss(logits, batch.targets)[0], {"inputs_embeds": embeds, "logits": logits}

        loss, found, gradients = loss_and_gradients(made, loss_of)
        ids = batch.ids[:, count:]
        named = {"attention_mask": batch.mask, "targets": batch.targets, "input_ids": ids}
        return {**found, **named, "loss": loss, "grads": gradients}

    return cache(run)


def prompt_of(case: Case, name: str, tokenizer: Any) -> str:
    """The words that all texts begin with, as many as the recorded count of tokens; "" if only ``</s>`` is counted.

    Without a prompt the count is 1, and ``</s>`` is predicted all the same.
    """
    count = int(case.outputs[f"{name}_prompt_length"][0])
    words = str(case.inputs[f"texts_{name}"][0]).split(" ")
    prompts = (" ".join(words[:end]) for end in range(len(words)))
    return next(prompt for prompt in prompts if len(tokenizer.encode_whole(prompt)) == count)


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_opt", *ON_OPT))
def test_recorded(
    case: Case, quantity: str, results: Callable[..., Any], converted: Callable[..., Converted], compare: Compare
) -> None:
    if quantity.startswith("grads_"):
        name, field = quantity.removeprefix("grads_"), "grads"
    else:
        name, field = quantity.split("_", 1)
    compare_recorded(case, quantity, field, results(case, name), converted(case), compare)


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_opt", *TRAINED))
def test_what_is_trained(case: Case, quantity: str, converted: Callable[..., Converted], compare: Compare) -> None:
    compare_trained(case, converted(case), compare)


def test_padding_is_where_the_original_has_it() -> None:
    """Rows of different lengths are what the recorded batches are for."""
    for parameter in recorded("blip2_opt", "*prompt_attention_mask"):
        case, quantity = parameter.values
        assert np.ptp(case.outputs[quantity].sum(axis=1)) > 0
