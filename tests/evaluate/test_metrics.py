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


@pytest.mark.parametrize("caption", ["", "   ", "...", "\n\t", "?!", "—"])
def test_captions_without_a_word(caption: str) -> None:
    scores = caption_scores({1: caption, 2: "a dog"}, {1: ["a cat"], 2: ["a dog"]})
    assert scores.each[1] == pytest.approx(dict.fromkeys(scores.each[1], 0.0), abs=1e-6)
    assert all(math.isfinite(value) for value in scores.whole.values())


def test_a_single_empty_caption() -> None:
    scores = caption_scores({1: ""}, {1: ["a cat"]}).whole
    assert scores == pytest.approx(dict.fromkeys(scores, 0.0), abs=1e-6)


def test_empty_references_do_no_harm() -> None:
    scores = caption_scores({1: "a cat", 2: "a dog"}, {1: ["", "a cat"], 2: ["..."]})
    assert scores.each[1]["ROUGE_L"] == 1 and scores.each[2]["ROUGE_L"] == 0
    assert all(math.isfinite(value) for each in scores.each.values() for value in each.values())


def test_an_empty_caption_is_not_an_empty_reference() -> None:
    """The public tools count a text without words as one empty word, which is found in another."""
    assert caption_scores({1: "", 2: "x"}, {1: [""], 2: ["x"]}).each[1]["ROUGE_L"] == 1


@pytest.mark.parametrize(
    "caption",
    ["一只猫 坐着", "кошка сидит на окне", "un café à zürich", "🐱 on a mat", "قطة على سجادة", "naïve art"],
)
def test_unicode_is_scored_as_any_word(caption: str) -> None:
    scores = caption_scores({1: caption, 2: "a dog"}, {1: [caption.upper()], 2: ["a bus"]})
    assert scores.each[1]["ROUGE_L"] == 1 and scores.each[1]["CIDEr"] > 0


def test_ids_of_any_kind_stay_apart() -> None:
    captions = {1: "a cat", "1": "a dog", "图": "a bus"}
    scores = caption_scores(captions, {1: ["a cat"], "1": ["a cat"], "图": ["a bus"]})
    assert list(scores.each) == [1, "1", "图"]
    assert scores.each[1]["ROUGE_L"] == scores.each["图"]["ROUGE_L"] == 1 > scores.each["1"]["ROUGE_L"]


def test_the_order_of_pictures_and_references_is_of_no_account() -> None:
    known = {1: ["a cat sits", "one cat"], 2: ["two dogs", "a pair of dogs"], 3: ["a bus"]}
    captions = {1: "a cat", 2: "two dogs run", 3: "a red bus"}
    first = caption_scores(captions, known)
    second = caption_scores(dict(reversed(captions.items())), {key: texts[::-1] for key, texts in known.items()})
    for key in captions:
        assert second.each[key] == pytest.approx(first.each[key], rel=1e-12)
    assert second.whole == pytest.approx(first.whole, rel=1e-12)


def test_the_same_reference_twice_changes_no_score() -> None:
    captions, known = {1: "a cat", 2: "a dog"}, {1: ["a cat sits"], 2: ["the dog"]}
    once, twice = caption_scores(captions, known), caption_scores(captions, {key: t * 2 for key, t in known.items()})
    assert twice.whole == pytest.approx(once.whole, rel=1e-9)


def test_words_said_again_are_counted_as_often_as_a_reference_has_them() -> None:
    scores = caption_scores({1: "the the the the the the the"}, {1: ["the cat is on the mat"]}).whole
    assert scores["Bleu_1"] == pytest.approx(2 / 7, abs=1e-6)


def test_a_short_caption_pays_for_its_length() -> None:
    scores = caption_scores({1: "a cat"}, {1: ["a cat sits on a mat"]}).whole
    assert scores["Bleu_1"] == pytest.approx(math.exp(1 - 6 / 2), rel=1e-6)
    assert scores["Bleu_3"] < 0.002  # it has no three words: next to nothing, as the tools have it


def test_of_two_lengths_as_close_the_shorter_counts() -> None:
    scores = caption_scores({1: "a cat sits there"}, {1: ["a cat sits", "a cat sits there now"]}).whole
    assert scores["Bleu_1"] == pytest.approx(1, abs=1e-6)


def test_a_very_long_caption() -> None:
    words = " ".join(f"word{index}" for index in range(1000))
    scores = caption_scores({1: words, 2: "a dog"}, {1: ["a cat"], 2: ["a dog"]})
    assert scores.each[1]["CIDEr"] == 0 and all(math.isfinite(value) for value in scores.whole.values())


def test_words_of_all_pictures_weigh_nothing() -> None:
    """Of two pictures with the same references no word tells them apart."""
    assert caption_scores({1: "a cat", 2: "a cat"}, {1: ["a cat"], 2: ["a cat"]}).whole["CIDEr"] == 0


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


@pytest.mark.parametrize("value", [0.0, 3.5, 700.0])
def test_perplexity_of_one_token(value: float) -> None:
    assert perplexity([value], [1]) == pytest.approx(math.exp(value))


def test_batches_without_a_token_do_not_count() -> None:
    assert perplexity([math.log(3), 50.0], [4, 0]) == pytest.approx(3)


def test_recall_of_one_picture_and_one_text() -> None:
    scores = recalls(np.array([[0.3]]), np.array([[0.3]]), [[0]], [0])
    assert set(scores.values()) == {100.0}
