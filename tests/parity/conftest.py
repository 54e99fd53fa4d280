"""Tiny random models of ``transformers``, saved to disk and sent through the real converter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from mgpt4_jax.checkpoint import flatten, load_params, read_manifest
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.convert.convert import convert


@dataclass(frozen=True)
class Converted:
    """A PyTorch model, its directory, and what the converter made of it."""

    torch: Any
    source: Path
    model_dir: Path
    config: ModelConfig
    params: dict[str, Any]


def _randomize(model: torch.nn.Module) -> None:
    """Every parameter takes part: biases are not zero, norm scales not one. Only EVA's key bias is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter += 1
            if name.endswith("qkv.bias"):
                parameter.view(3, -1)[1] = 0


def _convert_model(model: Any, folder: Path) -> Converted:
    model.save_pretrained(folder / "source")
    convert(from_dir=folder / "source", out=folder / "model")
    manifest = read_manifest(folder / "model")
    return Converted(model, folder / "source", folder / "model", manifest.config, load_params(folder / "model"))


@pytest.fixture(scope="session")
def convert_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Converted]:
    """``convert_model(transformers model) -> Converted``, with random parameters and in evaluation mode."""

    def run(model: Any) -> Converted:
        _randomize(model)
        return _convert_model(model.eval(), tmp_path_factory.mktemp("parity"))

    return run


@pytest.fixture
def gradients(tmp_path: Path) -> Callable[[Any], dict[str, np.ndarray]]:
    """``gradients(model)``: the ``.grad`` of its parameters, sent through the converter as if they were weights.

    Transforms only move values, so gradients move the same way; a parameter without gradient counts as zero.
    """

    def run(model: Any) -> dict[str, np.ndarray]:
        originals = {name: parameter.data for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            if name.endswith("qkv.bias"):  # a key bias has no place in our tree
                parameter.data.view(3, -1)[1] = 0
        params = _convert_model(model, tmp_path).params
        for name, parameter in model.named_parameters():
            parameter.data, parameter.grad = originals[name], None
        return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    return run


@pytest.fixture
def assert_gradients() -> Callable[..., None]:
    """Leaf by leaf, within 1e-4 of the largest entry (or of 1); ``without`` names paths that are not compared."""

    def run(ours: Any, theirs: dict[str, np.ndarray], without: tuple[str, ...] = ()) -> None:
        ours = flatten(jax.tree.map(np.asarray, ours))
        assert set(ours) <= set(theirs)
        for path, leaf in ours.items():
            if path not in without:
                scale = max(1.0, np.abs(theirs[path]).max())
                np.testing.assert_allclose(leaf, theirs[path], rtol=1e-4, atol=1e-4 * scale, err_msg=path)

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
