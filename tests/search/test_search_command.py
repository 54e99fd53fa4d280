"""``mgpt4 search``: what it prints, writes and returns."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpt4_jax.checkpoint import ModelManifest
from mgpt4_jax.cli import main
from tests.tiny import MINIGPT4


def test_add_find_by_words_and_by_a_picture(
    retrieval_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["search", str(retrieval_dir), "--index", str(tmp_path / "index")]
    (folder / "bad\x1b.png").write_bytes(b"no picture")
    assert main([*start, "--add", str(folder)]) == 1  # as a bad picture is no success
    said = capsys.readouterr()
    assert "bad: bad\\u{1b}.png: not a picture" in said.err and "20 new, 1 bad; 20 pictures in" in said.err
    (folder / "bad\x1b.png").unlink()
    page = tmp_path / "found.html"
    assert main([*start, "--add", str(folder), "a red bicycle", "-k", "3", "--page", str(page)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 3 and all(Path(line.split(maxsplit=2)[2]).is_file() for line in lines)
    assert lines == sorted(lines, reverse=True) and "20 unchanged" in said.err
    assert "a red bicycle" in page.read_text() and page.read_text().count("<img") == 3
    picture = folder / "b/05.JPG"
    assert main([*start, "--image", str(picture), "-k", "2"]) == 0
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first == ["1.000", str(picture)]
    assert main([*start, "--remove", str(folder)]) == 0
    assert ": 20 removed" in capsys.readouterr().err


WRONG = [
    (["--add", "F"], 'no such folder'),
    ([], "nothing to do: give words, --image FILE or --add FOLDER"),
    (["two", "--image", "a.png"], "give words or --image, not both"),
    (["--add", "F", "--page", "x.html"], "--page shows what was found"),
    (["two", "-k", "0"], "-k must be at least 1"),
    (["two"], "no index there; make one with --add FOLDER"),
    (["two", "three"], "unrecognized arguments: three"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_errors_are_one_line(
    words: list[str], message: str, retrieval_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "F") if word == "F" else word for word in words]
    assert main(["search", str(retrieval_dir), "--index", str(tmp_path / "index"), *words]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and said.err.startswith("error: ") and not said.out
    assert not (tmp_path / "x.html").exists()


def test_a_model_that_answers_does_not_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ModelManifest(MINIGPT4, "vicuna_v0", 0, {}).write(tmp_path)
    assert main(["search", str(tmp_path), "--index", str(tmp_path / "index"), "--add", str(tmp_path)]) == 2
    assert "a minigpt4 model does not search" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and 'search models/blip2 --index photos.index "a red bicycle"' in said
