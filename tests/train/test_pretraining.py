"""Q-Former pre-training: the same on any mesh, and hard negatives from the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QFORMER, VIT, random_params

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.losses import contrastive_loss, contrastive_targets, draw_negatives, matching_loss
from mgpt4_jax.models import abstract_params, build
from mgpt4_jax.sharding import make_mesh, param_shardings, put_batch
from mgpt4_jax.train.pretraining import pretrain
from mgpt4_jax.train.state import join, split, trainable_paths

CONFIG = ModelConfig(
    "blip2",
    dataclasses.replace(VIT, num_layers=1),
    dataclasses.replace(QFORMER, num_layers=2, with_text=True, with_lm_head=True),
    projection_size=16,
)
TRAINED = ("ln_vision/*", "qformer/*", "vision_proj/*", "text_proj/*", "itm_head/*", "temp")
BATCH, LENGTH = 16, 8


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, BATCH)[:, None]
    ids = np.where(mask, rng.integers(1, 50, (BATCH, LENGTH)), 0).astype(np.int32)
    pixels = rng.integers(0, 256, (BATCH, 1, 28, 28, 3), np.uint8)
    return {"ids": ids, "mask": mask, "pixels": pixels}


def run(mesh_text: str | None) -> tuple[Any, dict[str, np.ndarray], Any]:
    """(losses and draws, gradients, negatives) on a mesh, with dropout."""
    mesh, model = make_mesh(mesh_text), build(CONFIG)
    trained = trainable_paths(flatten(abstract_params(CONFIG)), TRAINED)
    params = jax.device_put(random_params(CONFIG, scale=0.3), param_shardings(CONFIG, mesh))
    trainable, frozen = split(params, trained)

    def loss(trainable: Any, frozen: Any, batch: Any) -> Any:
        found = model.apply(
            {"params": join(trainable, frozen)},
            batch,
            jax.random.key(3),
            dec_id=59,
            pad_id=0,
            deterministic=False,
            method=pretrain,
            rngs={"dropout": jax.random.key(4)},
        )
        return found.contrast + found.matching + found.captioning, found

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(trainable, frozen, put_batch(mesh, make_batch()))
    return jax.device_get(found), {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}, trained


@pytest.fixture(scope="module")
def alone() -> tuple[Any, dict[str, np.ndarray], Any]:
    return run(None)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=2,tensor=2,data=2"])
def test_sharded_equals_one_device(mesh: str, alone: Any) -> None:
    found, gradients, _ = run(mesh)
    np.testing.assert_array_equal(found.negatives.images, alone[0].negatives.images)
    np.testing.assert_array_equal(found.negatives.texts, alone[0].negatives.texts)
    for name in ("contrast", "matching", "captioning"):
        assert getattr(found, name) == pytest.approx(getattr(alone[0], name), rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in alone[1].values())
    for path, leaf in gradients.items():
        np.testing.assert_allclose(leaf, alone[1][path], rtol=1e-4, atol=1e-5 * largest, err_msg=path)


def test_every_trained_parameter_learns_and_the_negatives_are_others(alone: Any) -> None:
    found, gradients, trained = alone
    assert set(gradients) == trained
    assert [path for path, leaf in gradients.items() if not np.any(leaf)] == []
    own = np.arange(BATCH)
    assert np.all(found.negatives.images != own) and np.all(found.negatives.texts != own)
    assert len(set(found.negatives.images.tolist())) > 2  # not always the same one


def test_hard_negatives_are_drawn_by_the_contrastive_distribution() -> None:
    similarity = jnp.array([[9.0, 2.0, 2.0 + np.log(3.0)], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    draw = jax.jit(jax.vmap(lambda key: draw_negatives(key, similarity, similarity, jnp.eye(3))[1][0]))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert np.mean(drawn == 0) == 0
    assert np.mean(drawn == 2) == pytest.approx(0.75, abs=0.03)


def test_pairs_that_share_a_picture_share_the_target() -> None:
    targets, even = contrastive_targets(jnp.array([3, 7, 7])), jnp.zeros((3, 3))
    np.testing.assert_allclose(targets, [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    draws = [draw_negatives(jax.random.key(seed), even, even, targets) for seed in range(20)]
    assert all(images[1] == 0 and images[2] == 0 for images, _ in draws)


def test_losses_by_hand() -> None:
    """Two pairs, logits 1 and 0: cross-entropies with the target smoothed by 0.1 over both."""
    logits = jnp.eye(2)
    entropy = np.log(1 + np.e) - 0.95
    assert contrastive_loss(logits, logits, jnp.eye(2)) == pytest.approx(entropy, rel=1e-6)
    assert matching_loss(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])) == pytest.approx(
        np.log(1 + np.e) - 0.5, rel=1e-6
    )
