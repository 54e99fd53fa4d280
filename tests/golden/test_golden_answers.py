"""Answers through ``mgpt4.load``: greedy ids and texts, stop sequences, whole chats.

The recorded pictures are normalised already, so reading a picture is the one step that is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from cases import Case, recorded
from claims import CHAT, GREEDY, STOP_TEST
from comparing import Compare
from conversion import Converted

import mgpt4_jax as mgpt4
from mgpt4_jax.api import Model
from mgpt4_jax.data.prompts import MARKED_IMAGE, Template
from mgpt4_jax.generate.answer import Generation

DECODING = {"temperature": 0.0, "repetition_penalty": 1.05}  # recorded so, with room for as many tokens as are recorded


@pytest.fixture(scope="module")
def model(converted: Callable[[Case], Converted]) -> Callable[[Case], Model]:
    def load(case: Case) -> Model:
        loaded = mgpt4.load(converted(case).model_dir, dtype="float32")
        loaded.answerer.read_pixels = list
        return loaded

    return cache(load)


@pytest.fixture(scope="module")
def greedy(model: Callable[[Case], Model]) -> Callable[[Case, str], list[Generation]]:
    """All recorded prompts in one batch."""

    def generate(case: Case, name: str) -> list[Generation]:
        options = case.config["generate"][name]
        sampling = {"max_new_tokens": options["max_new_tokens"]}
        if "repetition_penalty" in options:
            sampling["repetition_penalty"] = options["repetition_penalty"]
        if "min_length" in options:  # counts the dummy first token, too
            sampling["min_new_tokens"] = options["min_length"] - 1
        images = [[pixels] for pixels in case.pixels()]
        return model(case).generate(prompts=case.config["gen_prompts"], images=images, template="none", **sampling)

    return cache(generate)


def new_ids(recorded_ids: list[int], eos: int) -> list[int]:
    """Without the dummy first token of Hugging Face's generation from embeddings, and the padding behind the end."""
    ids = [int(token) for token in recorded_ids[1:]]
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *GREEDY))
def test_greedy(case: Case, quantity: str, greedy: Callable[..., list[Generation]], compare: Compare) -> None:
    name = quantity.removeprefix("config.generate.").removesuffix(".text").removeprefix("gen_")
    answers = greedy(case, name)
    if quantity.startswith("config."):
        compare.equal([answer.text for answer in answers], case.config["generate"][name]["text"])
    else:
        rows = case.outputs[quantity]
        compare.equal([answer.ids for answer in answers], [new_ids(row, case.config["eos"]) for row in rows])


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *STOP_TEST))
def test_stop_sequence(case: Case, quantity: str, model: Callable[[Case], Model], compare: Compare) -> None:
    """The first turn of the chat, with and without a stop sequence."""
    test, eos = case.config["stop_test"], case.config["eos"]
    prompt, images = case.config["chat_turns"][0]["prompt"], [case.pixels()[0]]
    sampling = {**DECODING, "max_new_tokens": len(test["ids_without_stop"]) - 1}
    requests = {"ids_with_stop": test["stop_ids"], "ids_without_stop": []}
    actual = {}
    for name, stop_ids in requests.items():
        [answer] = model(case).generate(
            prompts=[prompt], images=[images], template="none", stop_ids=stop_ids, **sampling
        )
        actual[name] = answer.ids
    compare.equal(actual, {name: new_ids(test[name], eos) for name in requests})


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *CHAT))
def test_chat(case: Case, quantity: str, model: Callable[[Case], Model], compare: Compare) -> None:
    """Every turn's context, ids and text; the chat is ours from the first word on."""
    turns, eos = case.config["chat_turns"], case.config["eos"]
    chat = model(case).chat()
    chat.add_image(case.pixels()[0])
    room = max(len(turn["ids"]) for turn in turns) - 1
    actual, expected = [], []
    for turn in turns:
        question = question_of(turn["prompt"], chat.template)
        answer = chat.answer(question, max_new_tokens=room, stop_ids=case.config["chat_stop_ids"], **DECODING)
        actual.append((answer.prompt_tokens, answer.ids, as_cut_by_the_original(answer.text)))
        ids = new_ids(turn["ids"], eos)
        if answer.finish_reason == "stop":
            # We stop where the text has ended; the original runs on, unless the ids are among its own stops.
            ids = ids[: len(answer.ids)]
        expected.append((turn["context_len"], ids, turn["text"]))
        chat.messages = (*chat.messages[:-1], ("assistant", turn["text"]))
    compare.equal(actual, expected)


def as_cut_by_the_original(text: str) -> str:
    """At Vicuna's marks, whatever the model: ours keeps LLaMA-2's "### Heading"."""
    return text.split("###")[0].split("Assistant:")[-1].strip()


def question_of(prompt: str, template: Template) -> str:
    """The user's last words in a recorded prompt."""
    text = prompt.removesuffix(template.user_end + template.cue).rpartition(template.user)[2]
    return text.removeprefix(MARKED_IMAGE).strip()
