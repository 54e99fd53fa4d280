"""Beams of the original programs: ids and texts, through ``mgpt4.load`` where it serves the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from cases import Case, recorded
from claims import BEAMS, QFORMER_CAPTIONS
from comparing import Compare
from conversion import Converted
from test_golden_answers import new_ids

import mgpt4_jax as mgpt4
from mgpt4_jax.api import Model
from mgpt4_jax.data.text import load_bert_tokenizer
from mgpt4_jax.generate.answer import Generation
from mgpt4_jax.generate.captions import Captioner
from mgpt4_jax.generate.sampling import SamplingParams

CAPTION_IDS = "caption_ids_beam"  # with the number of beams behind it
MAX_LENGTH, MIN_LENGTH = 12, 4  # of recorded captions, by the case's README; some may be as long as they are wide
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
