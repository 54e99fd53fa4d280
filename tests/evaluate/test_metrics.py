"""Metrics of captions, recall and perplexity: against the public tools' values, and where they are easily wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mgpt4_jax.errors import UserError
from mgpt4_jax.evaluate.metrics import caption_scores, perplexity, recalls, token_scores, tokenize

STORED = json.loads((Path(__file__).parent / "data" / "captions.json").read_text())["cases"]


@pytest.mark.parametrize("name", STORED)
def test_scores_are_those_of_the_coco_caption_tools(name: str) -> None:
    case = STORED[name]
    found = token_scores(
        {key: picture["caption"].split() for key, picture in case["pictures"].items()},
        {key: [text.split() for text in picture["references"]] for key, picture in case["pictures"].items()},
    )
    assert found.whole == pytest.approx(case["whole"], rel=1e-9, abs=1e-9)
    for key, scores in case["each"].items():
        assert found.each[key] == pytest.approx(scores, rel=1e-9, abs=1e-9), key


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, riding a wave.", "a man riding a wave"),
        ("", ""),
        ("  \t\n ", ""),
        ("...!?;:,-", ""),
        ("The dog's ball isn't red", "the dog 's ball is n't red"),
        ("The dog’s ball isn’t red", "the dog 's ball is n't red"),
        ("They can't; I cannot", "they ca n't i can not"),
        ("a t-shirt -- black-and-white", "a t-shirt black-and-white"),
        ("at 10:30 o'clock, 1,000 people", "at 10:30 o'clock 1,000 people"),
        ("It is 3.5 m.", "it is 3.5 m"),
        ("a sign (blue)", "a sign -lrb- blue -rrb-"),
        ('"STOP" sign', "stop sign"),
        ("“stop” — now…", "stop now"),
        ("the U.S. flag", "the u.s. flag"),
        ("Mr. Smith's dogs'", "mr. smith 's dogs"),
        ("un café à Zürich", "un café à zürich"),
        ("一只猫 🐱", "一只猫 🐱"),
        ("salt & pepper", "salt & pepper"),
        ("$5 50%", "$ 5 50 %"),
        ("two\nlines\tof   words", "two lines of words"),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens.split()


def test_one_picture_has_no_cider() -> None:
    scores = caption_scores({1: "a cat"}, {1: ["a cat"]}).whole
    assert scores["CIDEr"] == 0 and scores["Bleu_2"] == pytest.approx(1, abs=1e-6) and scores["ROUGE_L"] == 1


def test_an_empty_caption_scores_nothing_and_hurts_nobody() -> None:
    scores = caption_scores({1: "", 2: "a dog runs fast"}, {1: ["a cat"], 2: ["a dog runs fast", "dog"]})
    assert scores.each[1] == pytest.approx(dict.fromkeys(scores.each[1], 0.0), abs=1e-6)
    assert scores.each[2]["Bleu_4"] == pytest.approx(1, abs=1e-6) and scores.each[2]["CIDEr"] > 0
    assert not any(math.isnan(value) for value in scores.whole.values())


def test_only_pictures_with_a_caption_count() -> None:
    known = {1: ["a cat sits"], 2: ["a dog runs"], 3: ["a bus"]}
    captions = {1: "a cat", 2: "a dog runs"}
    assert caption_scores(captions, known).whole == caption_scores(captions, {1: known[1], 2: known[2]}).whole


@pytest.mark.parametrize("known", [{1: ["a cat"]}, {1: ["a cat"], "car 7": []}])
def test_a_caption_without_reference_is_named(known: dict[object, list[str]]) -> None:
    with pytest.raises(UserError, match="'car 7'"):
        caption_scores({1: "a cat", "car 7": "a car"}, known)


def test_nothing_to_score() -> None:
    with pytest.raises(UserError, match="no caption"):
        caption_scores({}, {1: ["a"]})


def test_scores_do_not_depend_on_case_or_punctuation() -> None:
    known = {1: ["a cat sits on a mat"], 2: ["two dogs"]}
    plain = caption_scores({1: "a cat sits", 2: "dogs"}, known)
    assert caption_scores({1: "  A cat, sits!! ", 2: "DOGS."}, known) == plain


def test_recall_by_hand() -> None:
    to_text = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.6]])
    to_image = np.array([[0.9, 0.8], [0.7, 0.1], [0.3, 0.6]])
    scores = recalls(to_text, to_image, [[0, 1], [2]], [0, 0, 1])
    assert scores["txt_r1"] == 50 and scores["txt_r5"] == 100  # text 2 is the last of picture 1
    assert scores["img_r1"] == 100
    assert scores["txt_r_mean"] == scores["agg_metrics"] == pytest.approx((50 + 100 + 100) / 3)
    assert scores["r_mean"] == pytest.approx((scores["txt_r_mean"] + scores["img_r_mean"]) / 2)


def test_of_equal_scores_the_last_comes_first() -> None:
    equal = np.full((2, 2), -100.0)
    assert recalls(equal, equal, [[0], [1]], [0, 1])["txt_r1"] == 50
    assert recalls(equal[:1], equal[:, :1], [[0]], [0, 0])["txt_r1"] == 0


def test_perplexity_weighs_tokens() -> None:
    assert perplexity([math.log(2), math.log(8)], [2, 1]) == pytest.approx(2 * 4 ** (1 / 3))
    with pytest.raises(UserError, match="no token"):
        perplexity([1.0], [0.0])
