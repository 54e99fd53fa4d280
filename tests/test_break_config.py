"""Configurations that no model has: each is refused by one line that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgpt4_jax.checkpoint import read_manifest
from mgpt4_jax.config import ModelConfig, VitConfig, model_config_to_dict, replace_fields
from mgpt4_jax.convert.hf_config import llama_config
from mgpt4_jax.errors import UserError

CONFIG = ModelConfig("encoder", VitConfig())


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 0),
        ("num_layers", 10_000_000),
        ("num_layers", "3"),
        ("num_layers", 3.0),
        ("num_heads", True),
        ("image_size", -14),
        ("image_size", None),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", "1e-6"),
        ("remat", 1),
    ],
)
def test_a_field_of_a_wrong_type_or_size(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"vit.{field} must be .*, got"):
        replace_fields(CONFIG, {"vit": {field: value}})


def test_an_unknown_architecture() -> None:
    with pytest.raises(UserError, match="model.architecture must be one of minigpt4"):
        replace_fields(CONFIG, {"architecture": "gpt"})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_attention_heads": "4"},
        {"hidden_size": None},
        {"hidden_size": [48]},
        {"max_position_embeddings": 10**12},
        {"rms_norm_eps": "1e-6"},
        {"tie_word_embeddings": "yes"},
        {"rope_scaling": "x"},
        {"rope_scaling": {"rope_type": "linear", "factor": "a"}},
    ],
)
def test_config_json_of_a_language_model(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="^models/llm/config.json: "):
        llama_config({"model_type": "llama", **fields}, Path("models/llm"))


@pytest.mark.parametrize(
    "changes",
    [
        {"config": []},
        {"config": model_config_to_dict(CONFIG) | {"patches_per_token": "4"}},
        {"template": 3},
        {"num_parameters": "many"},
        {"dtypes": ["vit/cls_token"]},
        {"dtypes": {"../../secret": "float32"}},
        {"dtypes": {"vit/cls_token": "object"}},
        {"sources": 5},
        {"sources": [{"role": "vit"}]},
    ],
)
def test_an_edited_model_json(tmp_path: Path, changes: dict[str, Any]) -> None:
    values = {
        "format_version": 1,
        "config": model_config_to_dict(CONFIG),
        "template": "none",
        "num_parameters": 1,
        "sources": [],
        "dtypes": {},
    }
    (tmp_path / "model.json").write_text(json.dumps(values))
    assert read_manifest(tmp_path).config == CONFIG
    (tmp_path / "model.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match="model.json: "):
        read_manifest(tmp_path)


def test_a_model_json_that_is_too_deep_or_no_text(tmp_path: Path) -> None:
    for content in (b"[" * 100_000, b"\xff\xfe", b"null"):
        (tmp_path / "model.json").write_bytes(content)
        with pytest.raises(UserError, match="model.json: damaged"):
            read_manifest(tmp_path)
