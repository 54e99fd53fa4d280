"""Models that begin random: complete, of the scale that learns, told apart by their seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import LLAMA, MINIGPT4
from train.world import TOKENIZER

from mgpt4_jax.checkpoint import flatten, read_leaf, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.config import ModelConfig, model_config_to_dict
from mgpt4_jax.errors import UserError
from mgpt4_jax.initial import CROSSED, DEEP, PLACED, init_model, initial_params, spread
from mgpt4_jax.models import abstract_params


def test_every_parameter_is_drawn_for_its_width() -> None:
    leaves = flatten(initial_params(MINIGPT4, 0))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: leaf.shape for path, leaf in flatten(abstract_params(MINIGPT4)).items()
    }
    query = leaves["llama/layers/attn/query/kernel"]
    assert np.std(query) == pytest.approx(LLAMA.hidden_size**-0.5, rel=0.05)
    assert spread("qformer/layers/layer_0/cross_attn/query/kernel", (2, 32, 4, 8)) == CROSSED["query"] * 32**-0.5
    out = leaves["llama/layers/attn/out/kernel"]  # summed over heads and their width
    assert np.std(out) == pytest.approx(DEEP * (LLAMA.num_heads * LLAMA.head_dim) ** -0.5, rel=0.05)
    assert not np.any(leaves["projection/bias"]) and np.all(leaves["llama/norm/scale"] == 1)


def test_a_seed_is_a_model() -> None:
    first, second, other = (flatten(initial_params(MINIGPT4, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(leaf, second[path]) for path, leaf in first.items())
    assert not np.array_equal(first["projection/kernel"], other["projection/kernel"])


def test_places_are_as_loud_as_asked_for(tmp_path: Path) -> None:
    """Nothing else changes with them: the other numbers are drawn alike."""
    plain, louder = (flatten(initial_params(MINIGPT4, 0, places)) for places in (PLACED, 3.0))
    assert np.std(plain["vit/pos_embed"]) == pytest.approx(1, rel=0.1)
    np.testing.assert_allclose(louder["vit/pos_embed"], plain["vit/pos_embed"] * 3, rtol=1e-6)
    assert all(np.array_equal(leaf, louder[path]) for path, leaf in plain.items() if path != "vit/pos_embed")
    written = init_model(MINIGPT4, tmp_path / "model", places=3.0)
    assert np.array_equal(read_leaf(written, "vit/pos_embed"), louder["vit/pos_embed"])


@pytest.mark.parametrize("places", [-1.0, 0.0, float("nan"), float("inf")])
def test_places_that_cannot_be(places: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--places {places}: must be a positive number"):
        init_model(MINIGPT4, tmp_path / "model", places=places)
    assert not (tmp_path / "model").exists()


def test_the_command_writes_a_model_with_its_tokeniser(tmp_path: Path) -> None:
    config = {name: part for name, part in model_config_to_dict(ModelConfig("llama", llama=LLAMA)).items() if part}
    (tmp_path / "llm.yaml").write_text(yaml.safe_dump(config))
    options = ["--tokenizer", str(TOKENIZER), "--template", "vicuna_v0", "--seed", "5"]
    assert main(["init", "--config", str(tmp_path / "llm.yaml"), "--out", str(tmp_path / "model"), *options]) == 0
    manifest = read_manifest(tmp_path / "model")
    assert (manifest.config.llama, manifest.template) == (LLAMA, "vicuna_v0")
    drawn = flatten(initial_params(manifest.config, 5))
    assert np.array_equal(read_leaf(tmp_path / "model", "llama/norm/scale"), drawn["llama/norm/scale"])
    assert (tmp_path / "model" / "tokenizer" / "tokenizer.model").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama: {}", "names no architecture"),
        ("architecture: llama\nllama: {width: 3}", "unknown key model.llama.width"),
        ("architecture: parrot", "one of minigpt4"),
    ],
)
def test_a_bad_file_is_named(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["init", "--config", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "bad.yaml" in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()
