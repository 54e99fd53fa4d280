"""MiniGPT-v2 with LoRA: logits, loss, the gradients of adapters and projection, and the file that training saves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case, recorded
from claims import ADAPTED, ADAPTED_FILE
from comparing import LOSS, Compare
from conversion import Converted

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.convert.export import export
from mgpt4_jax.convert.readers import open_source
from mgpt4_jax.data.batching import pad_sequences, training_sequence, wrap_instruction
from mgpt4_jax.data.prompts import TEMPLATES
from mgpt4_jax.data.text import load_llama_tokenizer
from mgpt4_jax.losses import caption_loss
from mgpt4_jax.models import build
from mgpt4_jax.train.state import join, split, trainable_paths


def trained_paths(converted: Converted) -> set[str]:
    return trainable_paths(flatten(converted.params), ("projection/*",))


@pytest.fixture(scope="module")
def results(converted: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    """Loss, logits and gradients of the one batch of a case."""

    def run(case: Case) -> dict[str, Any]:
        config, model = case.config, build(converted(case).config)
        tokenizer = load_llama_tokenizer(converted(case).model_dir / "tokenizer")
        template = next(t for t in TEMPLATES.values() if t.training == config["prompt_template"])
        rows = [
            training_sequence(
                tokenizer,
                wrap_instruction(template, instruction),
                answer,
                tokens_per_image=converted(case).config.tokens_per_image,
                end_symbol=config["end_sym"],
                max_text_length=config["max_txt_len"],
            )
            for instruction, answer in zip(config["instr"], config["answers"], strict=True)
        ]
        batch = pad_sequences(rows, case.outputs["logits"].shape[1], pad_id=tokenizer.pad_id)
        trainable, frozen = split(converted(case).params, trained_paths(converted(case)))

        def loss_of(trainable: Any) -> Any:
            variables = {"params": join(trainable, frozen)}
            logits = model.apply(variables, batch.ids, batch.slots, case.pixels()[:, None], batch.mask)
            return caption_loss(logits, batch.targets)[0], logits

        (loss, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(trainable)
        return {"mask": batch.mask, "loss": loss, "logits": np.asarray(logits), "grads": gradients}

    return cache(run)


@pytest.mark.parametrize(("case", "quantity"), recorded("minigptv2_lora", *ADAPTED))
def test_recorded(
    case: Case, quantity: str, results: Callable[..., Any], converted: Callable[..., Converted], compare: Compare
) -> None:
    found = results(case)
    if quantity == "loss":
        compare.close(found["loss"], case.outputs["loss"], LOSS)
    elif quantity == "logits":
        compare.close(found["logits"][found["mask"]], case.outputs["logits"][found["mask"]])
    else:
        ours, theirs = converted(case).to_source(found["grads"]), case.tensors("grads")
        assert set(ours) == set(theirs), "what is trained differs"
        compare.gradients(ours, theirs)


@pytest.mark.parametrize(("case", "quantity"), recorded("minigptv2_lora", *ADAPTED_FILE))
def test_trained_file(
    case: Case, quantity: str, converted: Callable[..., Converted], compare: Compare, tmp_path: Path
) -> None:
    """What we train has the original's names, and what we export has its tensors, to the bit."""
    expected = case.config[quantity.removeprefix("config.")]
    if quantity == "config.trainable":
        trainable, _ = split(converted(case).params, trained_paths(converted(case)))
        compare.equal(set(converted(case).to_source(trainable)), set(expected))
        return
    [file] = export(converted(case).model_dir, format="minigpt4", out=tmp_path / "trained.pth")
    ours, theirs = open_source(file), open_source(case.weights["projection"])
    compare.equal(set(ours.tensors()), set(expected))
    assert all(ours.read(key).tobytes() == theirs.read(key).tobytes() for key in expected)
