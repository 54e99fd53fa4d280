from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.generate.decoder import pack_decoder, read_tree
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.sharding import make_mesh
from tests.tiny import MINIGPT4, random_params


def make_engine(config: ModelConfig, params: Any, mesh: str | None = None, **options: Any) -> Engine:
    devices = make_mesh(mesh)
    packed = pack_decoder(config.llama, read_tree(params["llama"]), jnp.float32, devices)
    return Engine(config, packed, devices, **options)


@pytest.fixture(scope="session")
def params() -> Any:
    return random_params(MINIGPT4, scale=0.2)


@pytest.fixture(scope="session")
def engine(params: Any) -> Engine:
    return make_engine(MINIGPT4, params, slots=8, max_length=128, eos_ids=(2,))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
