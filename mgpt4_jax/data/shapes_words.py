"""What is said about a scene of ``data/shapes.py``: captions, questions with their answers, and texts to learn from.

Every text is drawn from a few wordings. An answer is a word or two, so that it can be compared to the letter; only
"describe" is answered at length, and is measured by the names of the things in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mgpt4_jax.data.batching import wrap_instruction
from mgpt4_jax.data.prompts import IMAGE, MARKED_IMAGE, VICUNA_V0, Message, chat_prompt, format_prompt
from mgpt4_jax.data.shapes import COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, Thing, part_of

NUMBERS = ("no", "one", "two", "three")
DESCRIBE = (
    "describe the picture in detail.",
    "describe this image.",
    "what do you see in the picture?",
    "please tell me what is in this picture.",
)
TURNS = 6  # questions of a text to learn from
TURNS_IN_CHAT = 4  # whose template begins with a long sentence
FACTS = 3  # of a caption in facts
MOST_WORDS = 8  # that stand for a picture


class Question(NamedTuple):
    """``kind`` is one of ``KINDS``."""

    kind: str
    text: str
    answer: str


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# --- statements ---------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """All that there is to say, in one sentence; the things in any order."""
    before = pick(rng, (" in the", ""))
    parts = [f"a {thing.name},{before} {thing.place}" for thing in _shuffled(scene, rng)]
    start = pick(rng, ("", "", "a picture of ", "there is ", "this picture shows "))
    return start + pick(rng, (" and ", "; ")).join(parts)


def description(scene: Scene, rng: np.random.Generator) -> str:
    """The long answer: how many things there are, then each with its place."""
    things = (f"a {thing.name}, in the {thing.place}." for thing in _shuffled(scene, rng))
    return " ".join([f"{_count_of(scene)} in the picture.", *things])


def _count_of(scene: Scene) -> str:
    return "there is one thing" if len(scene) == 1 else f"there are {NUMBERS[len(scene)]} things"


def scene_in_words(scene: Scene, rng: np.random.Generator) -> str:
    """What a text says in the place of the picture: the word of each thing, once or several times, in any order.

    To look an attribute up is then to find one word and to read it, as it will be to find one query of the Q-Former. A
    language that spreads a thing over several words is read by their neighbourhood, which the queries never learnt.
    Several queries see the same thing, so that to count is to count what differs.
    """
    again = int(rng.integers(MOST_WORDS - len(scene) + 1))
    things = (*scene, *(scene[index] for index in rng.integers(len(scene), size=again)))
    return " ".join(thing.word for thing in _shuffled(things, rng))


def _shuffled(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    return [scene[index] for index in rng.permutation(len(scene))]


# --- questions ----------------------------------------------------------------------------------------------


def _unnamed(scene: Scene) -> frozenset[tuple[str, str]]:
    """Pairs of colour and shape that no question about a scene names: unseen ones, unless it shows one itself."""
    return frozenset() if part_of(scene) == "unseen" else HELD_OUT


def _colour(scene: Scene, rng: np.random.Generator) -> Question:
    thing = scene[int(rng.integers(len(scene)))]
    text = pick(rng, (f"what colour is the {thing.shape}?", f"which colour does the {thing.shape} have?"))
    return Question("colour", text, thing.colour)


def _shape(scene: Scene, rng: np.random.Generator) -> Question:
    thing = scene[int(rng.integers(len(scene)))]
    text = pick(rng, (f"what shape is the {thing.colour} thing?", f"which shape does the {thing.colour} thing have?"))
    return Question("shape", text, thing.shape)


def _size(scene: Scene, rng: np.random.Generator) -> Question:
    thing = scene[int(rng.integers(len(scene)))]
    text = pick(rng, (f"how big is the {thing.shape}?", f"is the {thing.shape} small or big?"))
    return Question("size", text, thing.size)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    text = pick(rng, ("how many things are there?", "how many things do you see?"))
    return Question("count", text, NUMBERS[len(scene)])


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    """As often yes as no; what is not there has often the colour or the shape of what is."""
    thing = scene[int(rng.integers(len(scene)))]
    colour, shape, answer = thing.colour, thing.shape, "yes"
    if rng.random() < 0.5:
        there, answer = {(thing.colour, thing.shape) for thing in scene}, "no"
        while (colour, shape) in there | _unnamed(scene):
            colour = thing.colour if rng.random() < 0.4 else pick(rng, list(COLOURS))
            shape = thing.shape if rng.random() < 0.4 else pick(rng, SHAPES)
    which = f"a {colour} {shape}"
    return Question("existence", pick(rng, (f"is there {which}?", f"do you see {which}?")), answer)


def _place(scene: Scene, rng: np.random.Generator) -> Question:
    thing = scene[int(rng.integers(len(scene)))]
    text = pick(rng, (f"where is the {thing.shape}?", f"where do you see the {thing.shape}?"))
    return Question("place", text, thing.place)


def _check(scene: Scene, rng: np.random.Generator) -> Question:
    """Is a thing of this colour, of this size, in this place?"""
    thing = scene[int(rng.integers(len(scene)))]
    true, options, form = [
        (thing.colour, list(COLOURS), "is the {} {}?"),
        (thing.size, list(SIZES), "is the {} {}?"),
        (thing.place, list(PLACES), "is the {} in the {}?"),
    ][int(rng.integers(3))]
    said, answer = true, "yes"
    if rng.random() < 0.5:
        said, answer = pick(rng, [option for option in options if option != true]), "no"
        if (said, thing.shape) in _unnamed(scene):
            said, answer = true, "yes"
    return Question("check", form.format(thing.shape, said), answer)


ASKED: dict[str, Callable[[Scene, np.random.Generator], Question]] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "existence": _existence,
    "place": _place,
    "check": _check,
}
KINDS = (*ASKED, "describe")


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
    """A question of a kind, else of any with a short answer."""
    if kind == "describe":
        return Question("describe", pick(rng, DESCRIBE), description(scene, rng))
    return ASKED[kind or pick(rng, list(ASKED))](scene, rng)


# --- texts --------------------------------------------------------------------------------------------------


def short_talk(scene: Scene, rng: np.random.Generator, count: int) -> str:
    """Questions and answers without any template."""
    asked = [ask(scene, rng) for _ in range(count)]
    return " ".join(f"{question.text} {question.answer}." for question in asked)


def statement(scene: Scene, rng: np.random.Generator) -> str:
    """A short text: the scene in words where a picture will be, and then what follows from them.

    A caption behind the picture, or a description that was asked for, are what the rows of the first stages read. Short
    questions without a template are from what is learnt soonest where to look for what was said.
    """
    kind = rng.random()
    if kind < 0.55:
        return f"{scene_in_words(scene, rng)}\n{short_talk(scene, rng, 5)}"
    if kind < 0.8:
        return f"{scene_in_words(scene, rng)} {caption(scene, rng)}\n"
    return _talk_in_training(scene, rng, [ask(scene, rng, "describe")])


def talk(scene: Scene, rng: np.random.Generator) -> str:
    """A text of several questions, as the training template has it or, one in four, as a chat has it."""
    asked = [ask(scene, rng) for _ in range(TURNS)]
    if rng.random() < 0.75:
        return _talk_in_training(scene, rng, asked)
    return _talk_in_chat(scene, rng, asked)


def chat(scene: Scene, rng: np.random.Generator) -> str:
    """A chat: one in four asks for one long description, the others ask short questions."""
    is_long = rng.random() < 0.25
    asked = [ask(scene, rng, "describe")] if is_long else [ask(scene, rng) for _ in range(TURNS_IN_CHAT)]
    return _talk_in_chat(scene, rng, asked)


def told_facts(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in words where a picture will be, and facts of it, as the rows of captions have them."""
    return f"{scene_in_words(scene, rng)} {facts(scene, rng)}\n"


def facts(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in single facts: each looks up one thing by one attribute, as the questions will, but asks nothing."""
    return " ".join(_fact(scene, rng) for _ in range(FACTS))


def _fact(scene: Scene, rng: np.random.Generator) -> str:
    thing = scene[int(rng.integers(len(scene)))]
    return pick(
        rng,
        (
            f"the colour of the {thing.shape} is {thing.colour}.",
            f"the shape of the {thing.colour} thing is {thing.shape}.",
            f"the {thing.shape} is a {thing.size} thing.",
            f"the {thing.shape} is in the {thing.place}.",
            f"{_count_of(scene)}.",
        ),
    )


def _talk_in_chat(scene: Scene, rng: np.random.Generator, asked: Sequence[Question]) -> str:
    messages: list[Message] = []
    for turn, question in enumerate(asked):
        messages.append(("user", question.text if turn else f"{MARKED_IMAGE} {question.text}"))
        messages.append(("assistant", f" {question.answer}"))
    return _shown(chat_prompt(VICUNA_V0, messages), scene_in_words(scene, rng))


def _talk_in_training(scene: Scene, rng: np.random.Generator, asked: Sequence[Question]) -> str:
    texts = [f"{MARKED_IMAGE} {asked[0].text}", *(question.text for question in asked[1:])]
    turns = [
        f"{wrap_instruction(VICUNA_V0, text)} {question.answer}" for text, question in zip(texts, asked, strict=True)
    ]
    return _shown("".join(turns) + VICUNA_V0.end_symbol, scene_in_words(scene, rng))


def asked_in_words(scene: Scene, rng: np.random.Generator, question: Question) -> str:
    """A whole prompt of ``question`` with the scene in words: how well can the language model answer at all?"""
    prompt = format_prompt(VICUNA_V0, question.text, 1)
    return _shown(prompt, scene_in_words(scene, rng))


def _shown(text: str, words: str) -> str:
    """With blanks around the words: pictures stand between stretches of text that are read by themselves."""
    return text.replace(IMAGE, f" {words} ")
