"""JSONL batches: order, error lines, resuming, and files that are not ours."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from mgpt4_jax.api import Model
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.batch import Summary, run_file
from mgpt4_jax.generate.sampling import sampling_params


@pytest.fixture
def files(tmp_path: Path, pictures: list[Path]) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model: Model, files: tuple[Path, Path], lines: list[Any] | None = None) -> Summary:
    if lines is not None:
        write(files[0], lines)
    return run_file(model.answerer, *files, defaults=sampling_params({"max_new_tokens": 5}))


def questions(count: int) -> list[dict]:
    """Answers of very different lengths, so that they end out of order."""
    kinds = [{}, {"image": "red.png"}, {"image": ["blue.png", "red.png"]}]
    return [
        {"id": i, "prompt": f"Question {i}?", "max_new_tokens": 1 + (7 * i) % 13, **kinds[i % 3]} for i in range(count)
    ]


def test_answers_keep_the_order_and_equal_single_ones(model: Model, files: tuple[Path, Path]) -> None:
    lines = questions(11)
    summary = run(model, files, lines)
    answers = read(files[1])
    assert [answer["id"] for answer in answers] == list(range(11))
    assert (summary.answered, summary.failed, summary.skipped) == (11, 0, 0)
    folder = files[0].parent
    for line, answer in zip(lines, answers, strict=True):
        images = line.get("image")
        images = [folder / name for name in images] if isinstance(images, list) else images and folder / images
        [alone] = model.generate(images=[images], prompts=[line["prompt"]], max_new_tokens=line["max_new_tokens"])
        assert (answer["text"], answer["finish_reason"]) == (alone.text, alone.finish_reason)
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (alone.prompt_tokens, alone.new_tokens)
        assert answer["error"] is None


BAD_LINES = [
    ("not json", "not valid JSON"),
    ("[1, 2]", "must be an object"),
    ("[" * 5000 + "]" * 5000, "not valid JSON"),
    ({"prompt": "no id"}, 'no "id"'),
    ({"id": "x"}, 'no "prompt"'),
    ({"id": "x", "prompt": ["a"]}, "must be text"),
    ({"id": "x", "prompt": "a", "image": 5}, '"image"'),
    ({"id": "x", "prompt": "a", "image": [""]}, '"image"'),
    ({"id": "x", "prompt": "a", "image": "gone.png"}, "gone.png"),
    ({"id": "x", "prompt": "a", "image": "in.jsonl"}, "in.jsonl"),
    ({"id": "x", "prompt": "a", "image": "data:image/png;base64,AAAA"}, "data URI"),
    ({"id": "x", "prompt": "a", "image": "https://example.com/a.png"}, "https"),
    ({"id": "x", "prompt": "a", "images": "red.png"}, "unknown key 'images'"),
    ({"id": "x", "prompt": "a", "temperature": -0.5}, "temperature"),
    ('{"id": "x", "prompt": "a", "temperature": NaN}', "temperature"),
    ({"id": "x", "prompt": "a", "top_p": 0}, "top_p"),
    ({"id": "x", "prompt": "a", "top_p": 2}, "top_p"),
    ({"id": "x", "prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ({"id": "x", "prompt": "a", "max_new_tokens": 1000000000}, "max_new_tokens"),
    ({"id": "x", "prompt": "a", "num_beams": 4, "num_return_sequences": 5}, "more than num_beams"),
    ({"id": "x", "prompt": "a", "num_beams": 1000}, "num_beams"),
    ({"id": "x", "prompt": ""}, "empty"),
    ({"id": "x", "prompt": "see <ImageHere>"}, "no picture"),
    ({"id": "x", "prompt": "<ImageHere> <ImageHere>", "image": "red.png"}, "2 <ImageHere>"),
    ({"id": "x", "prompt": "word " * 1000}, "exceed the context"),
    ('{"id": "x", "prompt": "\\ud800"}', "surrogate"),
    ({"id": "x", "prompt": "a", "image": ["red.png"] * 17}, "17 pictures"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_becomes_an_error_line(model: Model, files: tuple[Path, Path], line: Any, message: str) -> None:
    summary = run(model, files, [{"id": 1, "prompt": "Before?"}, line, {"id": 2, "prompt": "After?"}])
    before, bad, after = read(files[1])
    assert (before["finish_reason"], after["finish_reason"]) == ("length", "length")
    assert bad["finish_reason"] == "error" and message in bad["error"] and "\n" not in bad["error"]
    assert bad["text"] == "" and bad["new_tokens"] == 0
    assert (summary.answered, summary.failed) == (2, 1)


def test_a_line_that_is_not_utf8(model: Model, files: tuple[Path, Path]) -> None:
    files[0].write_bytes(b'{"id": 1, "prompt": "caf\xe9"}\n\n{"id": 2, "prompt": "ok"}')
    run(model, files)
    bad, good = read(files[1])
    assert "UTF-8" in bad["error"] and bad["line"] == 1
    assert good["finish_reason"] == "length"


def test_a_second_run_goes_on_behind_the_answers(model: Model, files: tuple[Path, Path]) -> None:
    lines = [*questions(6), "bad", {"id": {"any": ["json"]}, "prompt": "Hm?"}, {"id": None, "prompt": "?"}]
    run(model, files, lines)
    whole = files[1].read_bytes()
    summary = run(model, files)
    assert files[1].read_bytes() == whole
    assert (summary.answered, summary.failed, summary.skipped) == (0, 2, 9)
    kept = whole.splitlines(keepends=True)
    for torn in (b"", b'{"id": 3, "te', b'{"id": 3, "text": "a", "finish_reason": "stop"}'):
        files[1].write_bytes(b"".join(kept[:3]) + torn)
        assert run(model, files).skipped == 3
        assert files[1].read_bytes() == whole


def test_an_interrupted_run_leaves_whole_lines(model: Model, files: tuple[Path, Path]) -> None:
    write(files[0], questions(9))

    def interrupt(done: int, total: int) -> None:
        assert total == 9
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(model.answerer, *files, report=interrupt)
    assert [answer["id"] for answer in read(files[1])] == [0, 1, 2, 3]
    assert run(model, files).skipped == 4
    assert [answer["id"] for answer in read(files[1])] == list(range(9))


@pytest.mark.parametrize("content", ["hello\n", '{"id": 1}\n', "[]\n", '\x00\x01\n{"a": 2}\n'])
def test_an_output_that_is_not_ours_is_left_alone(model: Model, files: tuple[Path, Path], content: str) -> None:
    files[1].write_text(content)
    with pytest.raises(UserError, match="out.jsonl:1: is not an answer"):
        run(model, files, questions(1))
    assert files[1].read_text() == content


def test_ids_that_stand_twice_are_refused(model: Model, files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"in.jsonl:3: the id \"a\" stands on line 1"):
        run(model, files, [{"id": "a", "prompt": "x"}, {"id": 1, "prompt": "x"}, {"id": "a", "prompt": "y"}])
    assert not files[1].exists()
    assert run(model, files, [{"id": 1, "prompt": "x"}, {"id": "1", "prompt": "x"}]).answered == 2


def test_files_that_cannot_be_used(model: Model, files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        run(model, files)
    write(files[0], questions(1))
    with pytest.raises(UserError, match="overwrite the input"):
        run(model, (files[0], files[0]))
    with pytest.raises(UserError, match="cannot be written"):
        run(model, (files[0], tmp_path / "no" / "out.jsonl"))
    with files[1].open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            run(model, files)
    assert run(model, files).answered == 1


def test_an_empty_input_gives_an_empty_output(model: Model, files: tuple[Path, Path]) -> None:
    assert run(model, files, []).answered == 0
    assert files[1].read_bytes() == b""
