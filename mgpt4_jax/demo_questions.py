"""What `make demo` asks about the small world, what it looks for there, and what counts as right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgpt4_jax.data.shapes_words import DESCRIBE
from mgpt4_jax.demo_page import Answer, Query
from mgpt4_jax.evaluate.answers import exact_match
from mgpt4_jax.train.run_log import read_log

OF_EACH_KIND = 2
Entry = Mapping[str, Any]
"""One of ``questions.json`` or ``captions.json``, as ``data/shapes_files.py`` writes them."""


def choose_questions(questions: Sequence[Entry], captions: Sequence[Entry]) -> list[Entry]:
    """Two of each kind and two descriptions, of different pictures where there are enough."""
    kinds: dict[str, list[Entry]] = {}
    for question in questions:
        kinds.setdefault(question["answer_type"], []).append(question)
    chosen, place = [], 0
    for own in kinds.values():
        chosen += [own[(place + step) % len(own)] for step in range(OF_EACH_KIND)]
        place += OF_EACH_KIND
    pictures = [captions[(place + step) % len(captions)] for step in range(OF_EACH_KIND)]
    return chosen + [{"image": one["image"], "question": DESCRIBE[0], "names": one["names"]} for one in pictures]


def judge(folder: Path, question: Entry, text: str) -> Answer:
    """A short answer is compared to the letter, a description must name all that there is."""
    path = folder / "images" / question["image"]
    if "names" in question:
        is_right, truth = all(name in text for name in question["names"]), ", ".join(question["names"])
    else:
        truth = question["answer"]
        is_right = exact_match(text, truth) == 1
    return Answer(path, question["question"], text, truth, is_right)


def choose_queries(captions: Sequence[Entry]) -> list[tuple[str, frozenset[str]]]:
    """Words, and the names of the pictures that they fit: two captions of one picture each, and one thing by its name.

    The captions are of the first pictures of two and of three things, the thing is that which most pictures show.
    """
    chosen = []
    for count in (2, 3):
        own = next(one for one in captions if len(one["names"]) == count)
        chosen.append((own["caption"][0], frozenset([own["image"]])))
    names = [name for one in captions for name in one["names"]]
    most = max(names, key=names.count)
    chosen.append((f"a {most}", frozenset(one["image"] for one in captions if most in one["names"])))
    return chosen


def read_hits(printed: str, text: str, right: frozenset[str]) -> Query:
    """What ``mgpt4 search`` printed: a line a picture, of the match, the similarity and the path."""
    lines = [line.split(maxsplit=2) for line in printed.splitlines() if line.strip()]
    hits = [(Path(path), float(match), float(similarity)) for match, similarity, path in lines]
    return Query(text, hits, right)


def steps_done(log: Path) -> int:
    """How far the ``log.jsonl`` of a run goes; 0 before it is there."""
    if not log.is_file():
        return 0
    return max((record["step"] for record in read_log(log)), default=0)
