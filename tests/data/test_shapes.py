"""The small world: what is drawn, what is said about it, and its files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mgpt4_jax.cli import main
from mgpt4_jax.data import shapes_words as words
from mgpt4_jax.data.prompts import VICUNA_V0
from mgpt4_jax.data.shapes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    Thing,
    different_scenes,
    draw_picture,
    draw_scene,
    every_word,
    part_of,
)
from mgpt4_jax.data.text import load_bert_tokenizer, load_llama_tokenizer

SIZES = ["--texts", "40", "--singles", "4", "--pairs", "6", "--curated", "6", "--test", "5", "--questions", "6"]
SCENE = (Thing("small", "red", "circle", "northwest"), Thing("big", "blue", "cross", "southeast"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "world"
    assert main(["data", "shapes", "--out", str(out), "--seed", "3", *SIZES]) == 0
    return out


def test_parts_of_the_world_share_no_scene() -> None:
    rng = np.random.default_rng(0)
    learnt = {draw_scene(rng) for _ in range(3000)}
    test, unseen = different_scenes(300, rng, "test"), different_scenes(300, rng, "unseen")
    assert not learnt & {*test, *unseen}
    assert len(set(test)) == len(set(unseen)) == 300
    shown = {(thing.colour, thing.shape) for scene in (*learnt, *test) for thing in scene}
    assert not shown & HELD_OUT
    assert len(shown) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    assert all(any((thing.colour, thing.shape) in HELD_OUT for thing in scene) for scene in unseen)
    assert {part_of(scene) for scene in test} == {"test"}


def test_things_of_a_scene_differ_in_colour_shape_and_place() -> None:
    rng = np.random.default_rng(1)
    drawn = [draw_scene(rng) for _ in range(300)]
    assert Counter(map(len, drawn)).keys() == {1, 2, 3}
    for scene in drawn:
        for name in ("colour", "shape", "place"):
            assert len({getattr(thing, name) for thing in scene}) == len(scene)


def test_a_picture_shows_the_colour_in_its_cell() -> None:
    for seed in range(10):
        pixels = np.asarray(draw_picture(SCENE, np.random.default_rng(seed))).astype(int)
        red = (pixels[..., 0] - pixels[..., 2]) > 100
        blue = (pixels[..., 2] - pixels[..., 0]) > 100
        assert red[:32, :32].any() and not red[32:].any() and not red[:, 32:].any()
        assert blue[32:, 32:].any() and not blue[:32].any() and not blue[:, :32].any()
        assert blue.sum() > red.sum()  # a big cross beside a small circle


def test_a_seed_is_a_picture() -> None:
    first, second, other = (draw_picture(SCENE, np.random.default_rng(seed)).tobytes() for seed in (4, 4, 5))
    assert first == second != other


@pytest.mark.parametrize("kind", words.ASKED)
def test_answers_are_true(kind: str) -> None:
    """Each answer is worked out again from the words of its question alone."""
    rng = np.random.default_rng(2)
    answers = Counter()
    for _ in range(200):
        scene = draw_scene(rng)
        question = words.ask(scene, rng, kind)
        asked = set(question.text.removesuffix("?").split())
        about = [t for t in scene if t.shape in asked or t.colour in asked]
        answers[question.answer] += 1
        if kind == "count":
            assert question.answer == words.NUMBERS[len(scene)]
        elif kind == "existence":
            there = any({thing.colour, thing.shape} <= asked for thing in scene)
            assert question.answer == ("yes" if there else "no")
        elif kind == "check":
            [thing] = [t for t in scene if t.shape in asked]
            said = question.text.split(f"{thing.shape} ")[1].removesuffix("?").removeprefix("in the ")
            holds = said in (thing.size, thing.colour, thing.place)
            assert question.answer == ("yes" if holds else "no")
        else:
            [thing] = about
            assert question.answer == getattr(thing, kind)
    if kind in ("existence", "check"):
        assert 0.35 < answers["yes"] / 200 < 0.65


def test_captions_and_descriptions_name_everything() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        scene = draw_scene(rng)
        for text in (words.caption(scene, rng), words.description(scene, rng)):
            assert all(thing.name in text and thing.place in text for thing in scene)
        told = words.scene_in_words(scene, rng).split(" ")
        assert {*told} == {thing.word for thing in scene} and len(told) <= words.MOST_WORDS


def test_facts_are_true() -> None:
    """Each is found among all that could be said of a thing, or is the count."""
    rng = np.random.default_rng(6)
    for _ in range(100):
        scene = draw_scene(rng)
        true = {f"there are {words.NUMBERS[len(scene)]} things" if len(scene) > 1 else "there is one thing"}
        for thing in scene:
            true |= {f"the colour of the {thing.shape} is {thing.colour}", f"the {thing.shape} is a {thing.size} thing"}
            true |= {f"the shape of the {thing.colour} thing is {thing.shape}"}
            true |= {f"the {thing.shape} is in the {thing.place}"}
        said = words.facts(scene, rng).removesuffix(".").split(". ")
        assert len(said) == words.FACTS and set(said) <= true


def test_chats_begin_as_the_chat_template_does() -> None:
    rng = np.random.default_rng(7)
    texts = [words.chat(draw_scene(rng), rng) for _ in range(40)]
    assert all(text.startswith(VICUNA_V0.system) and text.endswith("###") for text in texts)
    assert {text.count("###Human:") for text in texts} == {1, words.TURNS_IN_CHAT}


def _named(text: str) -> list[tuple[str, str]]:
    """The held-out pairs in a text, in any of the ways in which words are put: "is the star red?" is one."""
    forms = ("{0} {1}", "{0}-{1}", "the {1} {0}", "the {1} is {0}", "the {0} thing is {1}")
    return [pair for pair in HELD_OUT if any(form.format(*pair) in text for form in forms)]


def test_no_text_names_a_held_out_pair() -> None:
    rng = np.random.default_rng(4)
    writers = (words.statement, words.talk, words.told_facts, words.chat, words.caption, words.facts)
    for _ in range(400):
        scene = draw_scene(rng)
        texts = [*(write(scene, rng) for write in writers), *(words.ask(scene, rng, kind).text for kind in words.KINDS)]
        assert not [pair for text in texts for pair in _named(text)]


@pytest.mark.parametrize("kind", ["existence", "check"])
def test_of_unseen_scenes_unseen_pairs_are_denied_too(kind: str) -> None:
    rng = np.random.default_rng(8)
    asked = [words.ask(draw_scene(rng, "unseen"), rng, kind) for _ in range(800)]
    assert {question.answer for question in asked if _named(question.text)} == {"yes", "no"}


def test_the_files_of_a_world(world: Path) -> None:
    lines = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all((world / line["image"]).is_file() for line in lines)
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    assert [line["image"] for line in facts] == [line["image"] for line in lines]
    singles = [json.loads(line) for line in (world / "singles.jsonl").read_text().splitlines()]
    assert len(singles) == 4 and not any(" and " in line["caption"] or ";" in line["caption"] for line in singles)
    curated = [json.loads(line) for line in (world / "curated.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"image", "instruction", "answer"} for line in curated)
    for part in ("test", "unseen"):
        asked = json.loads((world / part / "questions.json").read_text())
        told = json.loads((world / part / "questions_in_words.json").read_text())
        assert Counter(entry["answer_type"] for entry in asked) == dict.fromkeys(words.ASKED, 6)
        assert [entry["answer"] for entry in asked] == [entry["answer"] for entry in told]
        assert len({entry["image"] for entry in asked}) == 5  # every scene
        assert all((world / part / "images" / entry["image"]).is_file() for entry in asked)
        captions = json.loads((world / part / "captions.json").read_text())
        described = json.loads((world / part / "captions_in_words.json").read_text())
        assert len(captions) == 5 and [one["names"] for one in described] == [one["names"] for one in captions]
        for entry in described:
            assert all(name in entry["answer"] for name in entry["names"]) and words.DESCRIBE[0] in entry["question"]
        names = {path.name for path in (world / part / "images").iterdir()}
        assert {path.name for path in (world / part / "blind").iterdir()} == names
        assert len({path.read_bytes() for path in (world / part / "blind").iterdir()}) == 1


def test_the_tokenisers_know_every_word(world: Path) -> None:
    pieces, word_pieces = load_llama_tokenizer(world / "tokenizer"), load_bert_tokenizer(world / "qformer_tokenizer")
    rng = np.random.default_rng(5)
    text = words.caption(draw_scene(rng), rng)
    assert pieces.decode(pieces.encode(text)) == text
    told = [pieces.encode(word) for word in every_word()]
    assert len({ids[-1] for ids in told}) == len(told) == 200 and {len(ids) for ids in told} == {2}  # a blank, a word
    assert "[UNK]" not in word_pieces.decode(word_pieces.encode(text), skip_special=False)


def test_the_same_seed_writes_the_same_world(world: Path, tmp_path: Path) -> None:
    assert main(["data", "shapes", "--out", str(tmp_path / "again"), "--seed", "3", *SIZES]) == 0
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert len(files) > 20
    assert all((world / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_more_of_one_part_changes_no_other(world: Path, tmp_path: Path) -> None:
    sizes = [*SIZES, "--pairs", "9", "--texts", "60"]
    assert main(["data", "shapes", "--out", str(tmp_path / "larger"), "--seed", "3", *sizes]) == 0
    for name in ("test/captions.json", "test/questions.json", "unseen/images/00004.png", "curated.jsonl"):
        assert (tmp_path / "larger" / name).read_bytes() == (world / name).read_bytes()


def test_a_world_is_never_written_over(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "shapes", "--out", str(world), *SIZES]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_world_that_was_stopped_half_way_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "world.partial" / "pairs").mkdir(parents=True)
    assert main(["data", "shapes", "--out", str(tmp_path / "world"), *SIZES]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--pairs", "0"], "--pairs 0: must be 1 or more"),
        (["--test", "7000"], "--test 7000: there are not many more different scenes; at most 5,000"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
    ],
)
def test_sizes_that_no_world_has(
    given: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "shapes", "--out", str(tmp_path / "world"), *given]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "world").exists()
