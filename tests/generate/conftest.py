from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.sharding import make_mesh
from tests.tiny import MINIGPT4, random_params


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
