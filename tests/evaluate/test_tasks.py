"""Files of the benchmarks, and how answers are scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mgpt4_jax.errors import UserError
from mgpt4_jax.evaluate.tasks import (
    Item,
    prompt_of,
    read_captions,
    read_pairs,
    read_questions,
    result_names,
    score_answers,
    score_captions,
)

PICTURES = Path("pictures")


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_coco_captions(tmp_path: Path) -> None:
    file = write(
        tmp_path / "captions.json",
        {
            "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
            "annotations": [{"id": i, "image_id": 3, "caption": text} for i, text in enumerate(("one", "two"))],
        },
    )
    assert read_captions(file, PICTURES) == [
        Item(7, "pictures/b.jpg"),
        Item(3, "pictures/a.jpg", references=("one", "two")),
    ]


def test_lavis_captions(tmp_path: Path) -> None:
    line = {"image": "val2014/COCO_val2014_000000000042.jpg"}
    entries = [{**line, "caption": "one"}, {**line, "caption": ["two"]}, {"image": "b.jpg", "image_id": "x"}]
    first, second = read_captions(write(tmp_path / "list.json", entries), PICTURES)
    assert (first.id, first.references, first.image) == (42, ("one", "two"), f"pictures/{line['image']}")
    assert (second.id, second.references) == ("x", ())


def test_nocaps(tmp_path: Path) -> None:
    """The file of NoCaps says of each picture how far its things are from COCO's; scores are of each domain alone."""
    domains = ("in-domain", "near-domain", "out-domain", "in-domain")
    captions = ("a red dog", "two blue cats sit", "an axolotl swims here", "a green bus")
    images = [
        {"id": index, "open_images_id": f"0013{index}", "file_name": f"0013{index}.jpg", "domain": domain}
        for index, domain in enumerate(domains)
    ]
    notes = [{"id": index, "image_id": index // 2, "caption": captions[index // 2]} for index in range(8)]
    items = read_captions(write(tmp_path / "nocaps.json", {"images": images, "annotations": notes}), PICTURES)
    assert [item.kind for item in items] == list(domains)
    answers = {0: "a red dog", 1: "two blue cats sit", 2: "a car", 3: "green bus"}
    scored = score_captions(items, answers).whole
    inside = [items[0], items[3]]
    alone = score_captions([dataclasses.replace(item, kind=None) for item in inside], answers).whole
    for metric in ("CIDEr", "Bleu_4", "ROUGE_L"):
        assert scored[f"{metric}_in-domain"] == alone[metric]
    assert scored["ROUGE_L_near-domain"] == 1 and scored["ROUGE_L_out-domain"] < 0.3
    assert scored["CIDEr_near-domain"] == 0  # of one picture
    assert sum("domain" in name for name in scored) == 9
    unscored = read_captions(write(tmp_path / "test.json", {"images": images}), PICTURES)  # references are kept back
    assert score_captions(unscored, answers).whole == {}


def test_texts_to_be_found_are_cleaned(tmp_path: Path) -> None:
    entries = [{"image": "a.jpg", "caption": ["A dog, running!", "  THE *best*   dog\n"]}]
    assert read_pairs(write(tmp_path / "p.json", entries), PICTURES).texts == ["a dog, running", "the best dog"]


def test_vqa_questions(tmp_path: Path) -> None:
    questions = write(
        tmp_path / "q.json", {"questions": [{"question_id": 1, "image_id": 42, "question": "What is it?"}]}
    )
    answers = {"question_id": 1, "answer_type": "other", "answers": [{"answer": "cat", "answer_id": i} for i in (1, 2)]}
    annotations = write(tmp_path / "a.json", {"annotations": [answers]})
    [item] = read_questions(questions, annotations, PICTURES, "COCO_val2014_{:012d}.jpg")
    assert item == Item(1, "pictures/COCO_val2014_000000000042.jpg", "What is it?", ("cat", "cat"), "other")
    assert read_questions(questions, None, PICTURES, "{}.jpg")[0].references == ()


def test_gqa_and_lavis_questions(tmp_path: Path) -> None:
    gqa = write(tmp_path / "gqa.json", {"201": {"imageId": "n16", "question": "Is it red?", "answer": "yes"}})
    assert read_questions(gqa, None, PICTURES, "{}.jpg") == [Item("201", "pictures/n16.jpg", "Is it red?", ("yes",))]
    entry = {"question_id": 5, "image": "a.png", "question": "Who?", "answer": ["me", "me"]}
    lavis = write(tmp_path / "lavis.json", [entry])
    assert read_questions(lavis, None, PICTURES, "{}.jpg") == [Item(5, "pictures/a.png", "Who?", ("me", "me"))]


def test_results_are_called_as_the_benchmark_does(tmp_path: Path) -> None:
    gqa = write(tmp_path / "gqa.json", {"201": {"imageId": "n16", "question": "Is it red?", "answer": "yes"}})
    vqa = write(tmp_path / "vqa.json", {"questions": []})
    assert result_names("vqa", gqa) == ("questionId", "prediction")
    assert result_names("vqa", vqa) == result_names("vqa", write(tmp_path / "l.json", [])) == ("question_id", "answer")
    assert result_names("caption", tmp_path / "none.json") == ("image_id", "caption")


def test_test_pictures_of_a_split(tmp_path: Path) -> None:
    """Flickr30k and COCO as they are retrieved from: Karpathy's files."""
    flickr = [
        {"imgid": index, "filename": f"{index}.jpg", "split": split, "sentences": [{"raw": "A dog."}, {"raw": "One!"}]}
        for index, split in enumerate(("train", "test", "val"))
    ]
    file = write(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": flickr})
    assert read_captions(file, PICTURES) == [Item(1, "pictures/1.jpg", references=("A dog.", "One!"))]
    assert read_pairs(file, PICTURES).texts == ["a dog", "one"]
    coco = [flickr[1] | {"cocoid": 42, "filepath": "val2014"}]
    assert read_captions(write(file, {"images": coco}), PICTURES)[0].image == "pictures/val2014/1.jpg"
    assert read_captions(file, PICTURES)[0].id == 42
    with pytest.raises(UserError, match="holds nothing"):
        read_captions(write(file, {"images": flickr[:1]}), PICTURES)


def test_pairs(tmp_path: Path) -> None:
    file = write(tmp_path / "p.json", [{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": "z"}])
    pairs = read_pairs(file, PICTURES)
    assert (pairs.texts, pairs.texts_of, pairs.image_of) == (["x", "y", "z"], [[0, 1], [2]], [0, 0, 1])
    with pytest.raises(UserError, match=r"b\.jpg has no caption"):
        read_pairs(write(file, [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg"}]), PICTURES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "not valid JSON"),
        ([], "nothing to evaluate"),
        ("3", "'list' must be a list"),
        ([3], "'list' must be a list"),
        ([{"caption": "x"}], "lacks the text 'image'"),
        ([{"image": 3}], "lacks the text 'image'"),
        ([{"image": "a.jpg", "caption": 3}], "'caption' must be"),
        ({"images": [{"id": 1}]}, "lacks the text 'file_name'"),
        ({"images": [{"file_name": "a"}]}, "no usable 'id'"),
        ({"annotations": []}, "'images' must be a list"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2}, "image_id 1 stands twice"),
        ({"images": [], "annotations": [{"image_id": 9, "caption": "x"}]}, "image_id 9"),
    ],
)
def test_bad_caption_files_are_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_captions(write(tmp_path / "bad.json", values), PICTURES)
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("questions", "pattern", "message"),
    [
        ([{"question_id": 1, "image": "a"}], "{}.jpg", "lacks the text 'question'"),
        ([{"question_id": 1, "question": "x"}], "{}.jpg", "no usable 'image_id'"),
        ([{"question_id": 1, "question": "x", "image_id": "n"}], "{:012d}.jpg", "does not go into --image-name"),
        ([{"question_id": 2, "question": "x", "image": "a"}], "{}.jpg", "a.json: has no answers to question_id 2"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, questions: Any, pattern: str, message: str) -> None:
    annotations = write(tmp_path / "a.json", [{"question_id": 1, "answers": ["x"]}])
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "q.json", questions), annotations, PICTURES, pattern)


def test_prompts() -> None:
    item = Item(1, "a.jpg", "Why {x}?")
    assert prompt_of("vqa", item, "Question: {} Short answer:") == "Question: Why {x}? Short answer:"
    assert prompt_of("vqa", item, "[vqa]") == "[vqa] Why {x}?"
    assert prompt_of("caption", item, "a photo of") == "a photo of"


def test_scores_of_answers() -> None:
    people = [Item(1, "", references=("cat",) * 9 + ("dog",), kind="other"), Item(2, "", references=("no",) * 10)]
    scored = score_answers([*people, Item(3, "")], {1: "The cat.", 2: "no", 3: "?"})
    assert scored.whole == {"accuracy": 100, "accuracy_lavis": 100, "accuracy_other": 100}
    single = [Item(1, "", references=("yes",)), Item(2, "", references=("no",))]
    assert score_answers(single, {1: "Yes.", 2: "yes"}).whole == {"exact_match": 50}
    assert score_answers([Item(3, "")], {3: "x"}).whole == {}


def test_questions_in_words_and_their_kinds(tmp_path: Path) -> None:
    entries = [
        {"question_id": 0, "image": None, "question": "red?", "answer": "yes", "answer_type": "check"},
        {"question_id": 1, "image": "a.png", "question": "how many?", "answer": "two", "answer_type": "count"},
        {"question_id": 2, "image": "a.png", "question": "how many?", "answer": "one", "answer_type": "count"},
    ]
    items = read_questions(write(tmp_path / "q.json", entries), None, PICTURES, "{}.jpg")
    assert [item.image for item in items] == ["", "pictures/a.png", "pictures/a.png"]
    scored = score_answers(items, {0: "Yes.", 1: "2", 2: "two"})
    assert scored.whole == {
        "exact_match": pytest.approx(200 / 3),
        "exact_match_check": 100.0,
        "exact_match_count": 50.0,
    }


def test_names_that_a_caption_should_hold(tmp_path: Path) -> None:
    entries = [
        {"image": "a.png", "image_id": 0, "caption": "a red dog", "names": ["red dog", "cat"]},
        {"image": "b.png", "image_id": 1, "caption": "a cat", "names": ["cat"]},
    ]
    items = read_captions(write(tmp_path / "list.json", entries), PICTURES)
    scored = score_captions(items, {0: "the Red dog", 1: "a dog red"})
    assert scored.whole["named"] == pytest.approx(100 / 3)


def test_names_that_a_long_answer_should_hold(tmp_path: Path) -> None:
    entries = [{"question_id": 0, "image": None, "question": "what?", "answer": "a cat", "names": ["red dog", "cat"]}]
    scored = score_answers(read_questions(write(tmp_path / "q.json", entries), None, PICTURES, "{}"), {0: "a Cat, big"})
    assert scored.whole == {"exact_match": 0.0, "named": 50.0}
