"""Pictures and captions as the original processors prepare them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cases import Case, recorded
from claims import CAPTIONS, EVALUATION_TRANSFORM, RESIZED, TRAINING_TRANSFORM
from comparing import PIXEL, Compare

from mgpt4_jax.data.images import crop_transform, eval_transform, load_image, resize
from mgpt4_jax.data.text import clean_caption

CAPTION_PROMPT = "a photo of "  # of LAVIS's caption fine-tuning


def image_of(case: Case, index: str) -> Path:
    return next(path for path in sorted(case.directory.glob(f"image_{index}.*")))


@pytest.mark.parametrize(("case", "quantity"), recorded("preprocess", *EVALUATION_TRANSFORM))
def test_evaluation_transform(case: Case, quantity: str, compare: Compare) -> None:
    index, size, rows = re.fullmatch(r"eval_(\d+)_(\d+)(?:_rows([\d_]+))?", quantity).groups()
    pixels = eval_transform(load_image(image_of(case, index)), int(size)).transpose(2, 0, 1)
    if rows:
        pixels = pixels[:, [int(row) for row in rows.split("_")]]
    compare.close(pixels, case.outputs[quantity], PIXEL)


@pytest.mark.parametrize(("case", "quantity"), recorded("preprocess", *RESIZED))
def test_resize_to_the_byte(case: Case, quantity: str, compare: Compare) -> None:
    index, size = re.fullmatch(r"resized_u8_(\d+)_(\d+)", quantity).groups()
    compare.equal(resize(load_image(image_of(case, index)), int(size)), case.outputs[quantity])


@pytest.mark.parametrize(("case", "quantity"), recorded("preprocess", *TRAINING_TRANSFORM))
def test_training_crop_and_mirror(case: Case, quantity: str, compare: Compare) -> None:
    index, expected = quantity.removeprefix("train_"), case.outputs[quantity]
    box, flip = case.outputs[f"train_box_{index}"], bool(case.outputs[f"train_flip_{index}"])
    pixels = crop_transform(load_image(image_of(case, index)), expected.shape[-1], tuple(box), flip)
    compare.close(pixels.transpose(2, 0, 1), expected, PIXEL)


@pytest.mark.parametrize(("case", "quantity"), recorded("preprocess", *CAPTIONS))
def test_captions(case: Case, quantity: str, compare: Compare) -> None:
    """``blip_caption``, and with a prompt and few words ``blip_caption_prompt_max4``."""
    name = quantity.removeprefix("captions.")
    limit = re.search(r"_max(\d+)", name)
    options = {"max_words": int(limit[1])} if limit else {}
    if "_prompt" in name:
        options["prompt"] = CAPTION_PROMPT
    compare.equal([clean_caption(text, **options) for text in case.captions["inputs"]], case.captions[name])
