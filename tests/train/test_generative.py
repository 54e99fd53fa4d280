"""BLIP-2 stage 2 from the command line, on OPT and on FlanT5: it learns, and the language model stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from train.world import config_of, write_pictures

from mgpt4_jax.checkpoint import read_leaf, read_manifest
from mgpt4_jax.cli import main
from mgpt4_jax.train.run_log import read_losses

TRAINED = ["projection/*", "qformer/*", "ln_vision/*"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "train", 24)


@pytest.mark.parametrize("kind", ["blip2_opt", "blip2_t5"])
def test_it_learns_beside_a_frozen_language_model(kind: str, pictures: Path, tmp_path: Path) -> None:
    from cases import Case
    from conversion import convert_case

    case = Case(Path(__file__).parent.parent / "golden" / "data" / kind)
    model, run = convert_case(case, tmp_path / "model").model_dir, tmp_path / "run"
    config = config_of(
        model,
        run,
        pictures,
        pictures,
        objective="generative",
        trainable=TRAINED,
        steps_per_epoch=12,
        text={"max_text_length": 24, "buckets": [48], "max_length": 48, "instructions": ["a "]},
        log={"validate_every": 0},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    losses = list(read_losses(run / "log.jsonl").values())
    assert len(losses) == 12 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    manifest = read_manifest(run / "model")
    assert {path.split("/")[0] for path in manifest.trained} == {"projection", "qformer", "ln_vision"}
    path = "projection/kernel"
    assert np.any(read_leaf(run / "model", path) != read_leaf(model, path))
    validation = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation if line["kind"] == "validation"] == [12]
