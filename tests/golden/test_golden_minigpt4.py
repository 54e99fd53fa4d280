"""MiniGPT-4 and MiniGPT-v2 in training: what the language model receives, logits, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from cases import Case, recorded
from claims import TRAINING, TRAINING_FIELDS
from comparing import LOSS, Compare
from conversion import Converted
from training import Program, sequences


@pytest.fixture(scope="module")
def program(converted: Callable[[Case], Converted]) -> Callable[[Case], Program]:
    return cache(lambda case: Program.of(converted(case)))


@pytest.fixture(scope="module")
def results(program: Callable[[Case], Program]) -> Callable[[Case, str], dict[str, Any]]:
    """Everything about one batch of a case, on one compiled program a case."""

    def run(case: Case, name: str) -> dict[str, Any]:
        compiled = program(case)
        batch = compiled.batch(sequences(case, name, compiled.tokenizer, compiled.converted.config.tokens_per_image))
        return {"batch": batch, **compiled.run(batch)}

    return cache(run)


def split(quantity: str) -> tuple[str, str]:
    """ "stage2_grad_llama_proj.bias" -> ("stage2", "grad_llama_proj.bias")."""
    field = max((field for field in TRAINING_FIELDS if quantity.endswith(f"_{field}")), key=len)
    return quantity.removesuffix(f"_{field}"), field


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *TRAINING) + recorded("minigptv2", *TRAINING))
def test_recorded(
    case: Case, quantity: str, results: Callable[..., Any], converted: Callable[..., Converted], compare: Compare
) -> None:
    expected = case.outputs[quantity]
    if quantity == "img_embeds":
        name = next(key for key in case.outputs if key.endswith("_targets")).removesuffix("_targets")
        compare.close(results(case, name)["img_embeds"], expected)
        return
    name, field = split(quantity)
    found = results(case, name)
    batch, width = found["batch"], case.outputs[f"{name}_targets"].shape[1]
    assert not batch.mask[:, width:].any(), "a row is longer than the original's"
    if field == "attention_mask":
        compare.equal(batch.mask[:, :width], expected.astype(bool))
    elif field == "targets":
        compare.equal(batch.targets[:, :width], expected)
    elif field in ("inputs_embeds", "logits"):  # padding is never read: there, any value will do
        attended = batch.mask[:, :width]
        compare.close(found[field][:, :width][attended], expected[attended])
    elif field == "loss":
        compare.close(found["loss"], expected, LOSS)
    elif field == "loss_reduction_none":  # the mean over all positions of the batch, ignored ones too
        compare.close(found["token_losses"].sum(axis=1) / (width - 1), expected, LOSS)
    else:
        gradients = converted(case).to_source({"projection": found["projection"]})
        key = field.removeprefix("grad_")
        compare.gradients({key: gradients[key]}, {key: expected})
