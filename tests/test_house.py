"""The packaging and the make targets: what is installed, and that what is documented exists."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import subprocess
from pathlib import Path

import pytest

import mgpt4_jax

ROOT = Path(__file__).parent.parent
TARGETS = {"help", "test", "demo", "lint", "prove", "fmt", "bench", "learn", "tiny", "clean"}


def test_only_our_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py")["packages"]()
    folders = {
        path.parent for top in ("mgpt4_jax", "convert", "configs", "launch") for path in Path(top).rglob("__init__.py")
    }
    expected = {".".join(folder.parts) for folder in folders}
    assert set(names) == {name if name.startswith("mgpt4_jax") else f"mgpt4_jax.{name}" for name in expected}
    assert len(names) == len(set(names))


def test_the_installed_metadata() -> None:
    metadata = importlib.metadata.metadata("mgpt4-jax")
    assert metadata["Version"] == mgpt4_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    (script,) = importlib.metadata.distribution("mgpt4-jax").entry_points
    assert (script.name, script.value) == ("mgpt4", "mgpt4_jax.cli:main")


def test_convert_is_imported_by_its_installed_name() -> None:
    convert = importlib.import_module("mgpt4_jax.convert")
    assert Path(convert.__file__ or "").parent == ROOT / "convert"


def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^ +make (\w+)", listed, re.MULTILINE)) == TARGETS
    assert TARGETS >= {"help", "test", "demo", "lint", "fmt", "bench", "clean"}


@pytest.mark.parametrize("page", sorted(path.name for path in ROOT.glob("*.md")))
def test_pages_name_only_make_targets_that_exist(page: str) -> None:
    written = re.findall(r"(?:^    |`|\$ )make (\w+)", (ROOT / page).read_text(), re.MULTILINE)
    assert set(written) <= TARGETS


def test_pins_are_exact_and_cover_the_dependencies() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {re.match(r"[\w.-]+", line)[0].lower() for line in lines if "==" in line}
    assert len(lines) == sum("==" in line.split(";")[0] for line in lines)
    requires = importlib.metadata.requires("mgpt4-jax") or []
    needed = [line for line in requires if "extra" not in line or re.search(r"extra == .(convert|test|dev).", line)]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in needed}
    assert names - {"mgpt4-jax"} <= pinned
