"""Beams through ``load``, JSONL and chat: mixed with other questions, with stop texts, with the next best answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgpt4_jax.api import Model
from mgpt4_jax.data.prompts import get_template
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.answer import Generation
from mgpt4_jax.generate.batch import run_file

PROMPTS = ["What is this?", "Say something.", "Why does it look like that, and who put it there?"]
BEAMS: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def free(model: Model) -> list[Generation]:
    """Answers that nothing stops."""
    return model.generate(prompts=PROMPTS, template="none", **BEAMS, num_return_sequences=3)


def test_the_best_answers_come_best_first(model: Model, free: list[Generation]) -> None:
    for prompt, answer in zip(PROMPTS, free, strict=True):
        every = [answer, *answer.others]
        assert len(every) == 3 and len({tuple(one.ids) for one in every}) == 3
        assert [one.score for one in every] == sorted((one.score for one in every), reverse=True)
        assert all(one.others == () and one.prompt_tokens == answer.prompt_tokens for one in answer.others)
        assert all(one.new_tokens == len(one.ids) <= 9 for one in every)
        [alone] = model.generate(prompts=[prompt], template="none", **BEAMS)
        assert (alone.ids, alone.text, alone.others) == (answer.ids, answer.text, ())


def test_a_stop_text_ends_a_beam_where_it_is_complete(model: Model, free: list[Generation]) -> None:
    """The text that was best before contains it no longer, and nothing that follows it is said or scored."""
    text = next(answer.text for answer in free if len(answer.text) > 5)
    stop = text[2:4]
    found = model.generate(prompts=PROMPTS, template="none", stop=stop, **BEAMS, num_return_sequences=3)
    every = [one for answer in found for one in (answer, *answer.others)]
    assert all(stop not in one.text for one in every)
    stopped = [one for one in every if stop in model.tokenizer.decode(one.ids)]
    assert stopped and all(one.finish_reason == "stop" for one in stopped)
    for one in stopped:  # not one token behind the one that completes it
        assert stop not in model.tokenizer.decode(one.ids[:-1])


def test_a_stop_sequence_ends_a_beam(model: Model, free: list[Generation]) -> None:
    sequence = free[0].ids[2:4]
    [answer] = model.generate(
        prompts=PROMPTS[:1], template="none", stop_ids=[sequence], **BEAMS, num_return_sequences=3, length_penalty=-2.0
    )
    every = [answer, *answer.others]
    assert any(one.ids[-2:] == sequence for one in every)
    for one in every:
        places = [at for at in range(len(one.ids)) if one.ids[at : at + 2] == sequence]
        assert places in ([], [len(one.ids) - 2])


def test_beams_and_other_questions_in_one_file(model: Model, free: list[Generation], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": index, "prompt": PROMPTS[index % 3], "max_new_tokens": 9} for index in range(9)]
    for line in lines[2:5]:
        line |= {"num_beams": 3, "num_return_sequences": 2}
    lines[7] |= {"num_beams": 2, "stop": "a"}
    source.write_text("\n".join(map(json.dumps, lines)))
    summary = run_file(model.answerer, source, target, template=get_template("none"))
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert summary.answered == 9 and [record["id"] for record in records] == list(range(9))
    greedy = model.generate(prompts=PROMPTS, template="none", max_new_tokens=9)
    for index, record in enumerate(records):
        if index in (2, 3, 4):
            best = free[index % 3]
            assert record["text"] == best.text and record["score"] == pytest.approx(best.score, rel=1e-5)
            assert [other["text"] for other in record["others"]] == [best.others[0].text]
        elif index != 7:
            assert record["text"] == greedy[index % 3].text and "score" not in record
    assert "score" in records[7] and "others" not in records[7]


def test_a_stream_of_beams_is_the_whole_answer(model: Model, free: list[Generation]) -> None:
    assert list(model.stream(PROMPTS[0], template="none", **BEAMS)) == [free[0].text]


def test_a_chat_with_beams_remembers_the_best_answer(model: Model) -> None:
    chat = model.chat()
    with pytest.raises(UserError, match="set temperature to 0"):
        chat.ask("Hm?", num_beams=3)
    options = {"temperature": 0.0, "repetition_penalty": 1.05, **BEAMS}
    text = "".join(chat.stream("Hm?", **options))
    assert chat.messages[-1] == ("assistant", text)
    again = model.chat()
    assert again.ask("Hm?", **options) == text
