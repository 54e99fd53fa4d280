from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgpt4_jax.api import Model, load
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.convert.convert import convert
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.sharding import make_mesh
from tests.tiny import MINIGPT4, random_params

GOLDEN = Path(__file__).parent.parent / "golden" / "data"


def make_engine(config: ModelConfig, params: Any, mesh: str | None = None, **options: Any) -> Engine:
    return Engine(config, params, make_mesh(mesh), **options)


@pytest.fixture(scope="session")
def params() -> Any:
    return random_params(MINIGPT4, scale=0.2)


@pytest.fixture(scope="session")
def engine(params: Any) -> Engine:
    return make_engine(MINIGPT4, params, slots=8, max_length=128, eos_ids=(2,))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded tiny MiniGPT-4 (Vicuna), converted from the files that users hold."""
    case, out = GOLDEN / "minigpt4_vicuna", tmp_path_factory.mktemp("model") / "minigpt4"
    convert(
        vit=case / "eva_vit_g.pth",
        qformer=case / "blip2_pretrained_flant5xxl.pth",
        llm=case / "llm",
        projection=case / "pretrained_minigpt4.pth",
        overrides={"vit": {"num_heads": 4, "num_layers": 3}, "qformer": {"num_heads": 4}},
        out=out,
    )
    return out


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Model:
    loaded = load(model_dir, slots=4, max_length=256)
    assert isinstance(loaded, Model)
    return loaded


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Three small pictures of plain colours."""
    paths = [tmp_path / f"{name}.png" for name in ("red", "green", "blue")]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return paths
