"""Beams of the original programs: ids and texts, through ``mgpt4.load`` where it serves the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from cases import Case, recorded
from claims import ANSWERS, BEAMS, QFORMER_CAPTIONS
from comparing import Compare
from conversion import Converted
from test_golden_answers import new_ids

import mgpt4_jax as mgpt4
from mgpt4_jax.api import Model
from mgpt4_jax.data.prompts import Prompt
from mgpt4_jax.data.text import load_bert_tokenizer
from mgpt4_jax.generate.answer import Generation, Question
from mgpt4_jax.generate.captions import Captioner
from mgpt4_jax.generate.sampling import SamplingParams, sampling_params

CAPTION_IDS = "caption_ids_beam"  # with the number of beams behind it
MAX_LENGTH, MIN_LENGTH = 12, 4  # of recorded captions, by the case's README; some may be as long as they are wide
PROMPT = "a photo of"  # of captions that were recorded with one
OPTIONS = ("num_beams", "length_penalty", "early_stopping", "repetition_penalty", "max_new_tokens")


@pytest.fixture(scope="module")
def model(converted: Callable[[Case], Converted]) -> Callable[[Case], Model]:
    def load(case: Case) -> Model:
        loaded = mgpt4.load(converted(case).model_dir, dtype="float32", slots=16)
        loaded.answerer.read_pixels = list  # the recorded pictures are normalised already
        return loaded

    return cache(load)


@pytest.fixture(scope="module")
def answers(model: Callable[[Case], Model]) -> Callable[[Case, str], list[Generation]]:
    """All recorded prompts in one batch."""

    def generate(case: Case, name: str) -> list[Generation]:
        recorded_options = case.config["generate"][name]
        options = {key: recorded_options[key] for key in OPTIONS if key in recorded_options}
        if "min_length" in recorded_options:  # counts the dummy first token, too
            options["min_new_tokens"] = recorded_options["min_length"] - 1
        images = [[pixels] for pixels in case.pixels()]
        return model(case).generate(prompts=case.config["gen_prompts"], images=images, template="none", **options)

    return cache(generate)


@pytest.fixture(scope="module")
def captioner(converted: Callable[[Case], Converted]) -> Callable[[Case], Captioner]:
    def load(case: Case) -> Captioner:
        made = converted(case)
        tokenizer = load_bert_tokenizer(made.model_dir / "qformer_tokenizer")
        return Captioner(made.config, made.params, tokenizer)

    return cache(load)


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_stage1", *QFORMER_CAPTIONS))
def test_qformer_captions(case: Case, quantity: str, captioner: Callable[[Case], Captioner], compare: Compare) -> None:
    """``[DEC]`` counts towards the least and the greatest length."""
    made, rows = captioner(case), case.outputs[quantity]
    all_end = (rows == made.tokenizer.sep_id).any(axis=1).all()
    params = SamplingParams(
        max_new_tokens=(MAX_LENGTH if all_end else rows.shape[1]) - 1,
        min_new_tokens=MIN_LENGTH - 1,
        num_beams=int(quantity.removeprefix(CAPTION_IDS)),
    )
    found = made.captions(case.pixels(), params)
    compare.equal([best.ids for best, *_ in found], [new_ids(row, made.tokenizer.sep_id) for row in rows])


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *BEAMS))
def test_minigpt4(case: Case, quantity: str, answers: Callable[..., list[Generation]], compare: Compare) -> None:
    name = quantity.removeprefix("config.generate.").removesuffix(".text").removeprefix("gen_")
    found = answers(case, name)
    if quantity.startswith("config."):
        compare.equal([answer.text for answer in found], case.config["generate"][name]["text"])
    else:
        rows = case.outputs[quantity]
        compare.equal([answer.ids for answer in found], [new_ids(row, case.config["eos"]) for row in rows])


@pytest.fixture(scope="module")
def on_language_models(model: Callable[[Case], Model]) -> Callable[[Case, str], list[Generation]]:
    """BLIP-2 on OPT or T5: captions of the first pictures, or answers to the recorded questions about them."""

    def run(case: Case, name: str) -> list[Generation]:
        options = case.config["generate_kwargs"][name]
        sampling = {key: options[key] for key in OPTIONS if key in options}
        sampling.setdefault("max_new_tokens", options.get("max_length", 0) - 1)  # the first token counts
        sampling["min_new_tokens"] = max(options.get("min_length", 0) - 1, 0)
        if name == "vqa":
            return answer_questions(case, model(case), sampling)
        images = [[pixels] for pixels in case.pixels()[: len(case.outputs[f"gen_{name}"])]]
        prompts = [PROMPT if "_prompt" in name else ""] * len(images)
        return model(case).generate(prompts=prompts, images=images, **sampling)

    return cache(run)


def answer_questions(case: Case, model: Model, sampling: dict[str, Any]) -> list[Generation]:
    """Their ids were recorded, not their words."""
    answerer, picture = model.answerer, np.arange(model.config.tokens_per_image)
    question = Question("", sampling=sampling_params(sampling))
    prepared = []
    for row, (ids, mask) in enumerate(zip(case.outputs["vqa_input_ids"], case.outputs["vqa_input_mask"], strict=True)):
        asked = ids[mask > 0]
        prompt = Prompt(np.r_[0 * picture, asked], np.r_[picture, np.full(len(asked), -1)], 1)
        prepared.append(answerer.prepare_prompt(prompt, case.pixels()[row : row + 1], question))
    answers = dict(answerer.answers(prepared))
    return [answers[row] for row in range(len(prepared))]


@pytest.mark.parametrize(("case", "quantity"), recorded("blip2_opt", *ANSWERS) + recorded("blip2_t5", *ANSWERS))
def test_blip2(
    case: Case, quantity: str, model: Callable[[Case], Model], on_language_models: Callable[..., Any], compare: Compare
) -> None:
    """The first recorded token is OPT's dummy or T5's start."""
    [end] = model(case).answerer.engine.eos_ids
    found = on_language_models(case, quantity.removeprefix("gen_").removesuffix("_ids"))
    compare.equal([answer.ids for answer in found], [new_ids(row, end) for row in case.outputs[quantity]])
