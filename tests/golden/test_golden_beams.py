"""Beams of the original programs: ids and texts, through ``mgpt4.load`` where it serves the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from cases import Case, recorded
from claims import BEAMS
from comparing import Compare
from conversion import Converted
from test_golden_answers import new_ids

import mgpt4_jax as mgpt4
from mgpt4_jax.api import Model
from mgpt4_jax.generate.answer import Generation


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
        options = dict(case.config["generate"][name])
        options.pop("text")
        if "min_length" in options:  # counts the dummy first token, too
            options["min_new_tokens"] = options.pop("min_length") - 1
        images = [[pixels] for pixels in case.pixels()]
        return model(case).generate(prompts=case.config["gen_prompts"], images=images, template="none", **options)

    return cache(generate)


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *BEAMS))
def test_minigpt4(case: Case, quantity: str, answers: Callable[..., list[Generation]], compare: Compare) -> None:
    name = quantity.removeprefix("config.generate.").removesuffix(".text").removeprefix("gen_")
    found = answers(case, name)
    if quantity.startswith("config."):
        compare.equal([answer.text for answer in found], case.config["generate"][name]["text"])
    else:
        rows = case.outputs[quantity]
        compare.equal([answer.ids for answer in found], [new_ids(row, case.config["eos"]) for row in rows])
