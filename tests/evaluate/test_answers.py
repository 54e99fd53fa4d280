"""VQA accuracy by the official rule, case by case."""

from __future__ import annotations

import pytest

from mgpt4_jax.evaluate.answers import exact_match, normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Red Car.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("its", "its"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("1,000 a-b", "1000 ab"),  # a comma between digits: every mark vanishes
        ("a-b", "b"),  # here it became a blank, and "a" an article
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("3.5", "3.5"),
        ("10 p.m.", "10 pm"),
        ("v2.", "v2"),
        ("yes\n", "yes"),
        ("yes\tno", "yes no"),
        ("what?", "what"),
        ("", ""),
        ("the", ""),
        ("Café!", "café"),
        (".5", ".5"),
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(("matching", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_ten_subsets(matching: int, accuracy: float) -> None:
    known = ["red"] * matching + [f"colour {index}" for index in range(10 - matching)]
    assert vqa_accuracy("red", known) == pytest.approx(accuracy)
    assert vqa_accuracy("red", known, "lavis") == pytest.approx(accuracy)


def test_people_who_agree_are_taken_by_the_letter() -> None:
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes.", ["yes"] * 10, "lavis") == 1
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy(" yes\n", ["yes "] * 10) == 1


def test_people_are_normalised_too() -> None:
    known = ["Two", "2", "two", "the two", *["3"] * 6]
    assert vqa_accuracy("two", known) == 1
    assert vqa_accuracy("2", known, "lavis") == pytest.approx(0.3)  # LAVIS leaves their words


def test_other_numbers_of_people() -> None:
    assert vqa_accuracy("a", ["a"]) == 0  # nobody else said so
    assert vqa_accuracy("cat", []) == 0
    assert vqa_accuracy("cat", ["cat", "dog", "cow"]) == pytest.approx((0 + 1 / 3 + 1 / 3) / 3)


def test_exact_match() -> None:
    assert exact_match("The dog.", "dog") == 1
    assert exact_match("dogs", "dog") == 0
