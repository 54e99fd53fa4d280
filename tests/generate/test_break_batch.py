"""JSONL batches under attack: files that are no files, torn outputs, ids that JSON cannot hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mgpt4_jax.api import Model
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.batch import check_files, run_file

GOOD = '{"id": 1, "prompt": "a", "max_new_tokens": 1}\n'


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in.jsonl").write_text(GOOD)
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.mark.parametrize("content", ['{"a": 1}', "one line", '{"identity": 1}', "\x00"])
def test_one_line_of_somebody_else_is_not_a_torn_answer(model: Model, files: tuple[Path, Path], content: str) -> None:
    files[1].write_text(content)
    with pytest.raises(UserError, match="out.jsonl:1: is not an answer"):
        run_file(model.answerer, *files)
    assert files[1].read_text() == content


@pytest.mark.parametrize("torn", ['{"i', '{"id": 1, "text": "a'])
def test_a_torn_first_answer_is_written_again(model: Model, files: tuple[Path, Path], torn: str) -> None:
    files[1].write_text(torn)
    assert run_file(model.answerer, *files).answered == 1
    assert [json.loads(line)["id"] for line in files[1].read_text().splitlines()] == [1]


def test_places_are_checked_before_a_model_is_loaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        check_files(tmp_path / "pipe", files[1])
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            check_files(files[0], target)
    with pytest.raises(UserError, match="there is no directory"):
        check_files(files[0], tmp_path / "no" / "out.jsonl")
    os.link(files[0], files[1])
    with pytest.raises(UserError, match="would overwrite the input"):
        check_files(*files)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": NaN, "prompt": "a"}', "not finite"),
        ('{"id": 1e999, "prompt": "a"}', "not finite"),
        ('{"id": [[Infinity]], "prompt": "a"}', "not finite"),
        ('{"id": 2, "prompt": "a", "image": "http://x.y/z.png"}', "http:// addresses are not read"),
        ('{"id": 2, "prompt": "a", "image": "file:///etc/hosts"}', "file:// addresses are not read"),
        ("[" * 900 + "]" * 900, "must be an object"),
    ],
)
def test_lines_that_cannot_be_asked(model: Model, files: tuple[Path, Path], line: str, message: str) -> None:
    files[0].write_text(line + "\n" + GOOD)
    run_file(model.answerer, *files)
    bad, good = [json.loads(text, parse_constant=_refuse) for text in files[1].read_text().splitlines()]
    assert message in bad["error"] and good["error"] is None


def test_a_byte_order_mark_and_windows_line_ends(model: Model, files: tuple[Path, Path]) -> None:
    files[0].write_bytes(b"\xef\xbb\xbf" + GOOD.encode().replace(b"\n", b"\r\n"))
    assert run_file(model.answerer, *files).answered == 1


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
