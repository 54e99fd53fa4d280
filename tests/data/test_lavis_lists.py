"""LAVIS's annotation lists: captions, several of one picture, and people's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgpt4_jax.data.samples import Source, name_pictures
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import SourceConfig
from tests.data.making import make_data_set, make_pairs, write_lines


def open_list(folder: Path, objects: Any, images: str | None = "pictures") -> Source:
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "list.json").write_text(objects if isinstance(objects, str) else json.dumps(objects))
    return open_source(SourceConfig("lavis", str(folder / "list.json"), images=images and str(folder / images)))


def test_every_caption_of_a_picture_is_a_sample_and_knows_its_picture(tmp_path: Path) -> None:
    objects = [
        {"image": "a.jpg", "caption": ["a cat", "a tabby"], "image_id": "coco_1"},
        {"image": "b.jpg", "caption": "a dog"},
        {"image": "a.jpg", "caption": "an animal", "image_id": "coco_1"},
    ]
    source = open_list(tmp_path, objects)
    samples = [source[index] for index in range(len(source))]
    assert [sample.answer for sample in samples] == ["a cat", "a tabby", "a dog", "an animal"]
    assert [sample.image_id for sample in samples] == ["coco_1", "coco_1", "b.jpg", "coco_1"]
    assert samples[2].image == tmp_path / "pictures" / "b.jpg" and samples[2].instruction is None
    assert samples[3].name == f"{tmp_path / 'list.json'}: entry 2"
    beside = open_list(tmp_path, objects, images=None)
    assert beside[0].image == tmp_path / "a.jpg"
    assert beside.fingerprint() == source.fingerprint() != open_list(tmp_path, objects[:2]).fingerprint()


def test_every_answer_to_a_question_is_a_sample_so_that_the_common_one_weighs_more(tmp_path: Path) -> None:
    people = ["red", "red", "dark red", "red"]
    source = open_list(tmp_path, [{"image": "a.jpg", "question": "what colour?", "answer": people, "question_id": 7}])
    assert [source[index].answer for index in range(len(source))] == people
    assert {source[index].instruction for index in range(len(source))} == {"what colour?"}
    one = open_list(tmp_path, [{"image": "a.jpg", "question": "what colour?", "answer": "red"}])
    assert (len(one), one[0].answer) == (1, "red")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("a cat", r'entry 0: must be an object, as in \[\{"image"'),
        ({"caption": "a cat"}, "entry 0: \"image\" must be the file of a picture, got 'None'"),
        ({"image": "a.jpg"}, 'entry 0: needs "caption", or "question" and "answer"'),
        ({"image": "a.jpg", "question": "what?"}, 'entry 0: needs "caption", or "question" and "answer"'),
        ({"image": "a.jpg", "caption": []}, "entry 0: the caption must be text, got list"),
        ({"image": "a.jpg", "caption": ["", 3]}, "entry 0: the caption is empty"),
        ({"image": "http://a.b/c.jpg", "caption": "a cat"}, "http://a.b/c.jpg"),
    ],
)
def test_a_bad_object_is_a_bad_sample(entry: Any, says: str, tmp_path: Path) -> None:
    source = open_list(tmp_path, [entry, {"image": "b.jpg", "caption": "a dog"}])
    with pytest.raises(UserError, match=says) as error:
        source[0]
    assert "\n" not in str(error.value)
    assert source[len(source) - 1].answer == "a dog"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"list.json: is not valid JSON \(Expecting property"),
        ('{"annotations": []}', "list.json: must be a list like .*, not a dict"),
        ("[]", "list.json: holds no samples"),
    ],
)
def test_a_file_that_is_no_list_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        open_list(tmp_path, text)


def test_the_folder_of_the_pictures_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"elsewhere: is no folder; set images of .*list.json to the one"):
        open_list(tmp_path, [{"image": "a.jpg", "caption": "a cat"}], images="elsewhere")


def test_lines_may_name_their_pictures(tmp_path: Path) -> None:
    lines = [{"image": "a.jpg"}, {"image": "a.jpg", "caption": "a cat", "image_id": 5}]
    path = write_lines(tmp_path / "my.jsonl", lines)
    source = open_source(SourceConfig("jsonl", str(path)))
    assert source[1].image_id == 5
    plain = open_source(make_data_set("jsonl", tmp_path / "plain", make_pairs(2)))
    assert plain[0].image_id is None
    assert name_pictures([plain, source]) and not name_pictures([plain])  # the first line is bad: the next one tells
