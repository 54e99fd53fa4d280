"""Losses against PyTorch's cross-entropy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from mgpt4_jax.losses import IGNORED, answer_loss, caption_loss, counted_positions, token_losses


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 11, 17)).astype(np.float32) * 3
    targets = rng.integers(0, 17, (3, 11))
    targets[:, :4] = IGNORED
    targets[1, 7:] = IGNORED
    return logits, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_equal_torch(batch, smoothing):
    logits, targets = batch
    (loss, metrics), gradient = jax.value_and_grad(
        lambda x: caption_loss(x, targets, label_smoothing=smoothing), has_aux=True
    )(logits)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, 17), torch.tensor(targets[:, 1:]).reshape(-1), label_smoothing=smoothing
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)
    assert metrics["num_tokens"] == (targets[:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_answer_is_predicted_where_it_stands(batch, smoothing):
    logits, targets = batch
    (loss, metrics), gradient = jax.value_and_grad(
        lambda x: answer_loss(x, targets, label_smoothing=smoothing), has_aux=True
    )(logits)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, 17), torch.tensor(targets).reshape(-1), label_smoothing=smoothing
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)
    assert metrics["num_tokens"] == (targets != IGNORED).sum()


def test_the_positions_that_count_give_the_same_loss(batch):
    logits, targets = batch
    positions, read = counted_positions(targets, 7)  # the fullest row has seven
    assert positions.shape == read.shape == (3, 7)
    np.testing.assert_array_equal(positions[0], np.arange(3, 10))
    np.testing.assert_array_equal(read[1], [*targets[1, 4:7], *[IGNORED] * 4])

    def loss(logits):
        return answer_loss(np.take_along_axis(logits, positions[..., None], axis=1), read)[0]

    expected, metrics = caption_loss(logits, targets)
    assert metrics["num_tokens"] == (np.asarray(read) != IGNORED).sum()
    np.testing.assert_allclose(loss(logits), expected, rtol=1e-6)
    assert counted_positions(targets, 100)[0].shape == (3, 10)


def test_ignored_positions_are_zero_and_a_batch_without_targets_is_finite(batch):
    logits, targets = batch
    losses, counted = token_losses(logits, targets)
    assert losses.shape == counted.shape == (3, 10)
    assert np.all(np.asarray(losses)[~np.asarray(counted)] == 0)
    loss, metrics = caption_loss(logits, np.full_like(targets, IGNORED))
    assert loss == 0 and metrics["num_tokens"] == 0
