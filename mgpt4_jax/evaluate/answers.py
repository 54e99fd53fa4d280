"""Answers to questions about pictures against those of people: VQA accuracy and GQA's exact match.

Agrees with the official VQA evaluation, quirks included: a period is dropped unless a digit follows, and of a comma
between digits it follows that all punctuation of the answer vanishes instead of becoming a blank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Rule = Literal["official", "lavis"]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the original passes a flag where the count belongs
_DIGIT_COMMA = re.compile(r"\d,\d")

# What people write without its apostrophe: by the words as they should be; those left out are not mended.
_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
_TWICE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _APOSTROPHES}
    for word in _TWICE:  # with either apostrophe missing
        first, second, third = word.split("'")
        table |= {f"{first}{second}'{third}": word, f"{first}'{second}{third}": word}
    for short in ("yall'd've", "y'alld've", "y'all'dve"):
        table[short] = "y'all'd've"
    for short in ("ow's'at", "'ows'at", "'ow'sat"):
        table[short] = "'ow's'at"
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """A mark vanishes if it stands beside a blank (or if digits are joined by a comma), else it becomes a blank."""
    joined = bool(_DIGIT_COMMA.search(text))
    result = text
    for mark in PUNCTUATION:
        vanishes = joined or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def normalise_words(text: str) -> str:
    """Lower case, number words as digits, without articles, contractions with their apostrophe."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_answer(text: str) -> str:
    """Both, of a text without line breaks and tabs."""
    return normalise_words(strip_punctuation(_plain(text)))


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, references: Sequence[str], rule: Rule = "official") -> float:
    """From 0 to 1: for each person, a third for each of the *others* who gave this answer, at most 1; the mean.

    Args:
      references: the answers of (ten) people; each counts, equal ones too.
      rule: ``official`` normalises all texts, unless the people agree to the letter: then the letters decide.
        ``lavis``, by which BLIP-2 was measured, always normalises the answer, and of theirs the punctuation alone.
    """
    answer, known = _plain(answer), list(references)
    differ = len(set(known)) > 1
    if rule == "official":
        known = [_plain(text) for text in known]
        differ = len(set(known)) > 1
        if differ:
            answer, known = normalise_answer(answer), [normalise_answer(text) for text in known]
    else:
        answer = normalise_answer(answer)
        known = [strip_punctuation(text) for text in known] if differ else known
    matching = known.count(answer)
    shares = [min((matching - (text == answer)) / 3, 1.0) for text in known]
    return sum(shares) / len(shares) if shares else 0.0


def exact_match(answer: str, reference: str) -> float:
    """GQA: 1 if the texts are the same after the normalisation that LAVIS gives the answer, else 0."""
    return float(normalise_answer(answer) == normalise_answer(reference))
