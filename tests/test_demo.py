"""Pieces of `make demo`: its page, what it asks and counts as right, and how it ends when something is amiss."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgpt4_jax import demo
from mgpt4_jax.data import shapes_words
from mgpt4_jax.data.shapes_files import Sizes, write_world
from mgpt4_jax.demo_page import Answer, Findings, Query, flatten, pivot, render_page, write_page
from mgpt4_jax.demo_questions import DESCRIBE, choose_queries, choose_questions, judge, read_hits, steps_done
from mgpt4_jax.errors import UserError

HOSTILE = '<script>alert(1)</script><img src=https://example.org/x.png> "&'


class Page(HTMLParser):
    """The classes of cards, every attribute, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cards: list[set[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        classes = set((dict(attrs).get("class") or "").split())
        if "card" in classes:
            self.cards.append(classes - {"card"})

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.new("RGB", (4, 4), "red").save(path)
    row = {"component": "vit", "max_abs": 1e-6, "max_rel": 2e-7, "passed": True}
    return Findings(
        [Answer(paths[0], HOSTILE, HOSTILE, "red", False), Answer(paths[1], "what colour?", "red", "red", True)],
        [Query("a big star", [(path, 0.5, 0.25) for path in paths], frozenset(["1.png"]))],
        {"small": {"passed": False, "rows": [row, row | {"component": "llama", "passed": False}]}},
        {
            "before": {"exact_match": 12.4, "exact_match_colour": 10.0, "items": 70},
            "after": {"exact_match": 71.6, "exact_match_colour": 80.0, "items": 70},
        },
        paths[0],
        stopped_at=102,
        steps=200,
        among=60,
        seconds=99.6,
        commands=["mgpt4 inspect 'a <b>'"],
    )


def test_the_page_is_one_file_in_which_words_are_text(found: Findings, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", found)
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "a" not in page.tags
    assert page.text.count(HOSTILE) == 2
    assert "mgpt4 inspect 'a <b>'" in page.text
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert not [name for name, _ in page.attributes if name in ("href", "srcset") or name.startswith("on")]
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_the_page_marks_what_is_right_and_what_is_wrong(found: Findings) -> None:
    page = Page(render_page(found))
    answers, hits = page.cards[:2], page.cards[2:]
    assert answers == [{"wrong"}, {"right"}]
    assert hits == [{"wrong"}, {"right"}, set()]  # the first should have been right, the third need not be
    assert page.text.count("right: red") == 1
    for number in ("1 of 2", "0 of 1", "12% → 72%", "100 seconds", "at step 102", "up to step 200", "70 short"):
        assert number in page.text, number
    assert "small: failed, 2 comparisons, largest relative error 2.0e-07" in page.text
    better = replace(found.queries[0], right=frozenset(["0.png", "1.png"]))
    page = Page(render_page(replace(found, queries=[better])))
    assert "1 of 1" in page.text and "2 pictures are right" in page.text
    assert page.cards[2:] == [{"right"}, {"right"}, set()]


def test_the_page_has_a_row_a_kind_and_a_column_an_evaluation(found: Findings) -> None:
    text = render_page(found)
    assert '<tr><td>colour</td><td class="number">10%</td><td class="number">80%</td></tr>' in text
    assert '<tr class="all"><td>all</td><td class="number">12%</td><td class="number">72%</td></tr>' in text


def test_figures_are_shown_where_there_are_some(found: Findings) -> None:
    assert "shipped weights reach" not in render_page(found)
    figures = {"test/itc": 98.254, "test/finetune/exact_match": 88.5, "test/finetune/exact_match_size": 90}
    manifest = {"figures": figures, "seed": 3, "command": "make <tiny>", "seconds": {"llm": 61.0, "vision": 59.0}}
    page = Page(render_page(replace(found, manifest=manifest)))
    assert "made by `make <tiny>`; seed 3; its steps took 2 minutes together. All are" in page.text
    assert "test · finetune" in page.text and "98.25" in page.text


def test_figures_of_equal_columns_share_a_table() -> None:
    figures = {"a": {"x": 1.0, "exact_match_y": 2}, "b/x": [1.5, 2.5], "b/exact_match_y": "-", "c": 0.123456}
    assert pivot(dict(flatten(figures))) == [
        (["", "x", "y"], [["a", "1", "2"], ["b", "1.5, 2.5", "-"]]),
        (["", "c"], [["", "0.1235"]]),
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "world"
    write_world(out, seed=5, sizes=Sizes(texts=200, singles=4, pairs=4, curated=4, test=40, questions=20))
    return out / "test"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_questions_of_each_kind_about_different_pictures(world: Path) -> None:
    chosen = choose_questions(read(world / "questions.json"), read(world / "captions.json"))
    kinds = [one.get("answer_type", "describe") for one in chosen]
    assert kinds == [kind for kind in shapes_words.KINDS for _ in range(2)]
    assert len({one["image"] for one in chosen}) == len(chosen) == 16
    assert all((world / "images" / one["image"]).is_file() for one in chosen)
    assert [one["question"] for one in chosen[-2:]] == [DESCRIBE[0]] * 2


def test_answers_are_compared_and_descriptions_must_name_all(world: Path) -> None:
    asked = {"image": "00000.png", "question": "what colour?", "answer": "red"}
    assert [judge(world, asked, text).is_right for text in ("red", " Red.", "red star", "")] == [
        True,
        True,
        False,
        False,
    ]
    described = {"image": "00001.png", "question": DESCRIBE[0], "names": ["big red star", "small blue cross"]}
    right = judge(world, described, "a small blue cross and the big red star.")
    assert right.is_right and right.image == world / "images" / "00001.png"
    assert not judge(world, described, "a small blue star and the big red star.").is_right


def test_queries_fit_the_pictures_that_they_name(world: Path) -> None:
    captions = read(world / "captions.json")
    names = {one["image"]: one["names"] for one in captions}
    (two, only), (three, other), (thing, some) = choose_queries(captions)
    assert [len(names[image]) for image in (*only, *other)] == [2, 3]
    assert all(name in two for name in names[next(iter(only))])
    assert all(name in three for name in names[next(iter(other))])
    assert some == {image for image, own in names.items() if thing.removeprefix("a ") in own}
    assert len(some) > 1


def test_hits_are_read_from_what_search_prints() -> None:
    query = read_hits("0.666   0.748  /a folder/0.png\n0.028  -0.612  1.png\n", "a star", frozenset(["1.png"]))
    assert query.hits == [(Path("/a folder/0.png"), 0.666, 0.748), (Path("1.png"), 0.028, -0.612)]


def test_steps_are_counted_in_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert steps_done(log) == 0
    log.write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
    assert steps_done(log) == 10


def test_missing_weights_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert demo.main(["--weights", str(tmp_path / "tiny"), "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "eva_vit_g.pth: is missing" in line
    assert not out.exists()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    for name in demo.SHIPPED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_weights_must_be_those_of_their_manifest(weights: Path) -> None:
    assert demo.read_manifest(weights) == {}
    files = {name: {"sha256": hashlib.sha256(name.encode()).hexdigest()} for name in demo.SHIPPED}
    manifest = {"files": files, "figures": {"test/r1": 9.0}}
    (weights / "manifest.json").write_text(json.dumps(manifest))
    assert demo.read_manifest(weights) == manifest
    (weights / "llm" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: is not the file"):
        demo.read_manifest(weights)
    (weights / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: is no manifest"):
        demo.read_manifest(weights)


def test_only_a_demo_of_its_own_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo.make_room(out)
    (out / "page.html").touch()
    demo.make_room(out)
    assert [path.name for path in out.iterdir()] == [demo.MARK]
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="photos: exists and is not of an earlier demo"):
        demo.make_room(tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        demo.make_room(tmp_path / "file")


def test_a_step_that_fails_ends_the_demo(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--weights", str(weights), "--out", str(tmp_path / "out")]) == 1  # its files are words
    written = capsys.readouterr()
    assert "$ mgpt4 inspect tiny/eva_vit_g.pth" in written.out
    assert written.err.splitlines()[-1].startswith("error: the demo ends here: `mgpt4 inspect` ended with")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a shell script in the place of the training; it is given what to do, and its log is given back."""

    def put(script: str) -> Path:
        program, log = tmp_path / "trainer", tmp_path / "log.jsonl"
        program.write_text(f"#!/bin/sh\nlog={log}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return log

    return put


def test_a_run_is_stopped_in_its_middle(weights: Path, tmp_path: Path, trainer: Callable[[str], Path]) -> None:
    shown = demo.Demo(weights, tmp_path / "out")
    log = trainer(
        "trap 'exit 143' TERM\nfor step in 1 2 3 4 5 6 7 8 9; do echo '{\"step\": '$step'}' >> $log; sleep 0.1; done\n"
        "while :; do sleep 0.1; done"
    )
    shown.run_apart(["train", "--run", tmp_path / "run"], log, stop_at=3)
    assert steps_done(log) >= 3
    assert shown.commands[-1].startswith("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 mgpt4 train --run ")
    trainer('test "$JAX_NUM_CPU_DEVICES" = 4')
    shown.run_apart(["train"], log)


@pytest.mark.parametrize(("stop_at", "code"), [(None, 2), (5, 0)])
def test_a_run_that_ends_otherwise_ends_the_demo(
    stop_at: int | None, code: int, weights: Path, tmp_path: Path, trainer: Callable[[str], Path]
) -> None:
    log = trainer(f"exit {code}")
    with pytest.raises(UserError, match=f"`mgpt4 train` ended with {code}"):
        demo.Demo(weights, tmp_path / "out").run_apart(["train"], log, stop_at)
