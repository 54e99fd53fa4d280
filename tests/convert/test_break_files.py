"""Hostile and damaged files: bounded memory, one line, and nothing on the screen that they choose."""

from __future__ import annotations

import io
import json
import resource
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from mgpt4_jax.convert.convert import convert
from mgpt4_jax.convert.inspect import inspect
from mgpt4_jax.convert.readers import open_source
from mgpt4_jax.errors import UserError

LLM = Path(__file__).parent.parent / "golden" / "data" / "minigpt4_vicuna" / "llm"


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LLM, tmp_path / "llm"))


@pytest.mark.parametrize("offsets", [[0, "x"], [0, None], [0], "04", [0, [4]]])
def test_offsets_that_are_no_numbers(tmp_path: Path, offsets: Any) -> None:
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": good, "b": good | {"data_offsets": offsets}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(UserError, match="header is damaged|safetensors refuses it"):
        inspect(tmp_path / "a.safetensors")


def test_a_header_that_is_too_deep(tmp_path: Path) -> None:
    header = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="header is damaged"):
        inspect(tmp_path / "a.safetensors")


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    size, before = 2 << 30, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size) + b'{"a"')
        file.truncate(size + 8)  # sparse: takes no room on the disk
    with pytest.raises(UserError, match="header claims 2147483648 bytes"):
        inspect(tmp_path / "a.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("shard", [5, ["a"], {}, None, "..", "", "../../x", "/etc/hosts"])
def test_an_index_that_names_no_file_beside_it(llm: Path, shard: Any) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": shard}}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the directory|is missing"):
        open_source(llm)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_too_deep(llm: Path, name: str) -> None:
    (llm / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"{name}: is not valid JSON"):
        open_source(llm)


def test_names_cannot_style_or_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "[" / "nope] :smile:.safetensors"
    path.parent.mkdir()
    save_file({"[/red]": np.zeros(1, np.float32), "\x1b]0;title\x07": np.zeros(1, np.float32)}, path)
    text = io.StringIO()
    Console(file=text, width=200, soft_wrap=True, emoji=False).print(inspect(path))
    assert "[/red]" in text.getvalue() and "[/nope] :smile:" in text.getvalue()
    assert "\x1b" not in text.getvalue() and "\\x1b]0;title\\x07" in text.getvalue()


@pytest.mark.parametrize("content", [b"", b"junk", b"<html>", b"half"])
def test_a_damaged_tokenizer_is_told_when_converting(tmp_path: Path, llm: Path, content: bytes) -> None:
    file = llm / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:3000] if content == b"half" else content)
    with pytest.raises(UserError, match="tokenizer.model is not a SentencePiece model"):
        convert(llm=llm, out=tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_weights_given_as_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        convert(llm=LLM, tokenizer=LLM / "model.safetensors", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_files_to_convert_are_not_overwritten(llm: Path) -> None:
    (llm / "model.json").write_text("{}")
    before = sorted(path.name for path in llm.iterdir())
    for out in (llm, llm.parent):
        with pytest.raises(UserError, match="one of the files to convert"):
            convert(llm=llm, out=out, overwrite=True)
    assert sorted(path.name for path in llm.iterdir()) == before


@pytest.mark.parametrize("size", [0, -14, 10**12])
def test_an_image_size_that_is_none(tmp_path: Path, size: int) -> None:
    vit = LLM.parent / "eva_vit_g.pth"
    with pytest.raises(UserError, match="vit.image_size must be a whole number"):
        convert(vit=vit, out=tmp_path / "model", image_size=size, overrides={"vit": {"num_heads": 4}})
