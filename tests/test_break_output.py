"""A directory that is written: what it may replace, and what another run or a user keeps beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpt4_jax.checkpoint import new_directory
from mgpt4_jax.errors import UserError


def earlier(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    with new_directory(out) as partial:
        (partial / "model.json").write_text("1")
    return out


def test_only_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    for name, make in {"photos": lambda p: p.mkdir(), "notes": lambda p: p.write_text("x")}.items():
        out = tmp_path / name
        make(out)
        with pytest.raises(UserError, match=f"{name}: is no earlier result"), new_directory(out, overwrite=True):
            raise AssertionError
        assert out.exists()


def test_neighbours_stay(tmp_path: Path) -> None:
    """A copy that the user named model.old is not ours to remove."""
    out = earlier(tmp_path)
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "model.json").write_text("mine")
    with new_directory(out, overwrite=True) as partial:
        (partial / "model.json").write_text("2")
    assert (out / "model.json").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old"]
    assert (tmp_path / "model.old" / "model.json").read_text() == "mine"


def test_two_runs_do_not_write_one_directory(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as first:
        (first / "model.json").write_text("1")
        with pytest.raises(UserError, match="another run is writing it"), new_directory(tmp_path / "model"):
            raise AssertionError
    assert (tmp_path / "model" / "model.json").read_text() == "1"


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "model.partial" / "params").mkdir(parents=True)
    (tmp_path / "model.partial" / "params" / "left").write_text("x")
    assert [path.name for path in earlier(tmp_path).iterdir()] == ["model.json"]


def test_a_parent_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"), new_directory(tmp_path / "file" / "model"):
        raise AssertionError
