"""A language model from words alone, from the command line; many devices give what one gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from train.world import tiny_model, write_tiny_model

from mgpt4_jax.checkpoint import read_leaf
from mgpt4_jax.cli import main
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.train.run_log import read_losses

TEXT = {"end_symbol": "", "max_text_length": 31, "buckets": [32], "max_length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig("llama", llama=tiny_model().llama)
    return write_tiny_model(tmp_path_factory.mktemp("language") / "model", config)


def run(model: Path, folder: Path, lines: list[dict], mesh: str) -> tuple[int, Path]:
    folder.mkdir()
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": str(model),
        "run": str(folder / "run"),
        "objective": "language",
        "trainable": ["llama/*"],
        "data": {"train": [{"kind": "jsonl", "path": str(folder / "text.jsonl")}]},
        "text": TEXT,
        "optim": {"peak_lr": 3e-3, "schedule": "constant", "warmup_steps": 0},
        "epochs": 1,
        "steps_per_epoch": 12,
        "batch_size": 8,
        "mesh": mesh,
        "log": {"sample_every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return main(["train", "--config", str(folder / "config.yaml")]), folder / "run"


def test_it_learns_and_devices_change_nothing(model: Path, tmp_path: Path) -> None:
    lines = [{"image": None, "caption": f"the {word} sat on the {word}"} for word in ("cat", "dog", "bird", "fish")]
    losses = []
    for mesh in ("data=1", "data=2,fsdp=2,tensor=2"):
        code, folder = run(model, tmp_path / mesh[:8], lines, mesh)
        assert code == 0
        losses.append(np.array([*read_losses(folder / "log.jsonl").values()]))
    assert losses[0][-1] < losses[0][0] - 1.0
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)  # Adam follows rounding, step by step
    assert np.any(read_leaf(folder / "model", "llama/norm/scale") != read_leaf(model, "llama/norm/scale"))


def test_a_picture_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(model, tmp_path / "run", [{"image": "a.png", "caption": "a cat"}] * 8, "data=1")
    assert code != 0
    assert "reads no pictures" in capsys.readouterr().err
