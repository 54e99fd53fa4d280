"""The train step: sharded = unsharded, parts = whole, nothing frozen is differentiated, a NaN changes nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import LLAMA, MINIGPT4, QFORMER, VIT, random_params

from mgpt4_jax.checkpoint import flatten, nest
from mgpt4_jax.config import IGNORED, LoraConfig, ModelConfig
from mgpt4_jax.models import build
from mgpt4_jax.optim import make_optimizer
from mgpt4_jax.sharding import batch_sharding, make_mesh, param_shardings, put_batch
from mgpt4_jax.train.flops import count_flops
from mgpt4_jax.train.objectives import Objective, caption_objective, normalised, training_model
from mgpt4_jax.train.state import TrainState, join, make_state, split, state_shardings, trainable_paths
from mgpt4_jax.train.step import gradient, make_train_step
from mgpt4_jax.train_config import DataConfig, OptimConfig, SourceConfig, TrainConfig
from mgpt4_jax.typing import Params

BATCH, LENGTH, STEPS, RATE = 16, 24, 5, 1e-2
OPTIM = OptimConfig(clip_norm=1.0, ema_decay=0.9)


def make_batch(
    seed: int = 0, config: ModelConfig = MINIGPT4, rows: int = BATCH, length: int = LENGTH
) -> dict[str, Any]:
    """Rows of unequal lengths: [BOS][picture][caption], padded on the right."""
    rng = np.random.default_rng(seed)
    q, size = config.tokens_per_image, config.vit.image_size
    ids = rng.integers(3, config.llama.vocab_size, (rows, length)).astype(np.int32)
    slots = np.full((rows, length), -1, np.int32)
    slots[:, 1 : 1 + q] = np.arange(q)
    lengths = rng.integers(q + 3, length + 1, rows)
    mask = np.arange(length) < lengths[:, None]
    targets = np.where(mask & (np.arange(length) > q), ids, IGNORED).astype(np.int32)
    pixels = rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8)
    return {"ids": ids, "slots": slots, "mask": mask, "targets": targets, "pixels": pixels}


@dataclasses.dataclass(frozen=True)
class Made:
    """What runs of one kind share, compiled once: all but the state, which their steps donate."""

    mesh: Mesh
    module: nn.Module
    objective: Objective
    frozen: Params
    begin: Callable[[], TrainState]
    step: Any


@functools.cache
def make(mesh: str | None, trainable: tuple[str, ...], config: ModelConfig, optim: OptimConfig) -> Made:
    device_mesh, params = make_mesh(mesh), random_params(config)
    trained = trainable_paths(flatten(params), trainable)
    optimizer = make_optimizer(optim)
    data = DataConfig((SourceConfig("jsonl", "x"),))
    module = training_model(TrainConfig("m", "r", data), config, trained, jnp.float32)
    leaves, frozen = split(params, trained)
    places, frozen_places = split(param_shardings(config, device_mesh), trained)

    def init(leaves: Any) -> TrainState:
        return make_state(leaves, optimizer, seed=3, with_average=optim.ema_decay > 0)

    placed = state_shardings(places, optimizer, jax.eval_shape(init, leaves), device_mesh)
    begin = functools.partial(jax.jit(init, out_shardings=placed), leaves)
    objective = caption_objective(module)
    step = make_train_step(objective, optimizer, placed, ema_decay=optim.ema_decay)
    return Made(device_mesh, module, objective, jax.device_put(frozen, frozen_places), begin, step)


class Run:
    """A tiny run on a mesh: its state, its frozen parameters, its step."""

    def __init__(
        self,
        mesh: str | None = None,
        *,
        trainable: tuple[str, ...] = ("projection/*",),
        config: ModelConfig = MINIGPT4,
        optim: OptimConfig = OPTIM,
    ):
        made = make(mesh, trainable, config, optim)
        self.mesh, self.module, self.objective = made.mesh, made.module, made.objective
        self.frozen, self.step, self.state = made.frozen, made.step, made.begin()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_batch(self.mesh, dict(batch))

    def steps(self, count: int = STEPS) -> tuple[list[float], dict[str, np.ndarray]]:
        """Losses, and the trained parameters, moments and average at the end."""
        losses = []
        for number in range(count):
            self.state, metrics = self.step(self.state, self.frozen, self.put(make_batch(number)), np.float32(RATE))
            losses.append(float(metrics["loss"]))
        return losses, {path: np.asarray(leaf) for path, leaf in flatten(self.state._replace(key=0)).items()}


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, np.ndarray]]:
    return Run(trainable=("projection/*", "qformer/query_tokens", "llama/layers/attn/*")).steps()


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=4,data=2", "fsdp=2,tensor=2,data=2"])
def test_sharded_equals_unsharded(mesh: str, alone: tuple[list[float], dict[str, np.ndarray]]) -> None:
    """Parts of the picture side and of the language model are trained too, so that cut parameters are updated."""
    run = Run(mesh, trainable=("projection/*", "qformer/query_tokens", "llama/layers/attn/*"))
    losses, leaves = run.steps()
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5, atol=1e-5)
    assert losses[-1] < losses[0]
    for path, leaf in leaves.items():
        # Adam divides by the root of the second moment: where a gradient is rounding noise, its sign is drawn anew.
        # Such entries may differ by what steps could move them, and must be few.
        close = np.isclose(leaf, alone[1][path], rtol=1e-5, atol=1e-5)
        assert close.mean() > 0.995, path
        assert np.abs(leaf - alone[1][path]).max() <= 2 * STEPS * RATE, path


def test_the_mesh_really_cuts_what_is_trained_and_what_is_frozen() -> None:
    run = Run("fsdp=2,tensor=2,data=2", trainable=("llama/layers/attn/*",))
    query = run.state.trainable["llama"]["layers"]["attn"]["query"]["kernel"]
    assert query.sharding.shard_shape(query.shape) == (2, 32, 2, 16)  # of (2, 64, 4, 16)
    moments = run.state.optimizer[1].mu["llama"]["layers"]["attn"]["query"]["kernel"]
    assert moments.sharding == query.sharding
    gate = run.frozen["llama"]["layers"]["mlp"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 32, 64)  # of (2, 64, 128)
    assert run.put(make_batch())["ids"].sharding == batch_sharding(run.mesh)


def batch_gradient(mesh: str | None, accumulation: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradient and means of one batch, in so many parts."""
    run, key = Run(mesh), jax.random.key(0)
    take = jax.jit(lambda *arguments: gradient(run.objective, *arguments, key, accumulation))
    found, means = take(run.state.trainable, run.frozen, run.put(make_batch(7)))
    return flatten(found), jax.device_get(means)


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Any], dict[str, Any]]:
    return batch_gradient(None, 1)


@pytest.mark.parametrize("mesh", [None, "data=4"])
def test_accumulation_equals_the_whole_batch(mesh: str | None, whole: tuple[dict[str, Any], dict[str, Any]]) -> None:
    gradients, means = batch_gradient(mesh, 4)
    assert float(means["loss"]) == pytest.approx(float(whole[1]["loss"]), rel=1e-6)
    assert means["weight"] == whole[1]["weight"] == (make_batch(7)["targets"][:, 1:] != IGNORED).sum()
    for path, leaf in whole[0].items():
        np.testing.assert_allclose(gradients[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


def test_logits_of_the_answer_alone_give_the_same_loss_and_gradient() -> None:
    run, batch = Run(), make_batch(3)
    most = int((batch["targets"] != IGNORED).sum(axis=1).max())
    found = {}

    def loss(max_targets: int | None, trainable: Params) -> Any:
        return caption_objective(run.module, max_targets)(join(trainable, run.frozen), batch, None)[0]

    for max_targets in (None, most):
        differentiate = jax.value_and_grad(functools.partial(loss, max_targets))
        found[max_targets] = jax.jit(differentiate)(run.state.trainable)
    np.testing.assert_allclose(found[most][0], found[None][0], rtol=1e-6)
    for path, leaf in flatten(found[None][1]).items():
        np.testing.assert_allclose(flatten(found[most][1])[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    assert np.isnan(
        jax.jit(functools.partial(loss, most - 1))(run.state.trainable)
    )  # a row has more: no target is left out in silence


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    run = Run()
    frozen = flatten(run.frozen)
    frozen["llama/norm/scale"] = jnp.full_like(frozen["llama/norm/scale"], jnp.nan)
    before = jax.tree.map(np.asarray, run.state._replace(key=0))
    state, metrics = run.step(run.state, nest(frozen), run.put(make_batch()), np.float32(RATE))
    assert not metrics["is_finite"]
    for path, leaf in flatten(state._replace(key=0, step=0)).items():
        np.testing.assert_array_equal(leaf, flatten(before._replace(step=0))[path], err_msg=path)
    assert state.step == 1


def test_the_state_is_donated() -> None:
    run = Run()
    kernel = run.state.trainable["projection"]["kernel"]
    run.step(run.state, run.frozen, run.put(make_batch()), np.float32(RATE))
    assert kernel.is_deleted()


def test_the_average_follows() -> None:
    run = Run()
    before = np.asarray(run.state.trainable["projection"]["kernel"])
    run.steps(1)
    after = np.asarray(run.state.trainable["projection"]["kernel"])
    np.testing.assert_allclose(run.state.average["projection"]["kernel"], 0.9 * before + 0.1 * after, rtol=1e-6)


def step_and_forward_flops(config: ModelConfig, rows: int, length: int) -> tuple[float, float, float, float]:
    """FLOPs of the step and of the forwards of picture side and language model: counted; and of the compiled step."""
    run = Run(config=config)
    batch = run.put(make_batch(config=config, rows=rows, length=length))
    arguments = (run.state, run.frozen, batch, np.float32(RATE))
    model, params = build(config), join(run.state.trainable, run.frozen)
    pixels = normalised(batch["pixels"])[:, 0]
    encode = lambda params: model.apply({"params": params}, pixels, method="encode_image")  # noqa: E731
    embeds = jnp.zeros((rows, length, config.llama.hidden_size))
    read = lambda params: model.apply({"params": params}, embeds, method=lambda m, x: m.llama(x))  # noqa: E731
    compiled = run.step.lower(*arguments).compile().cost_analysis()["flops"]
    return count_flops(run.step, *arguments), count_flops(encode, params), count_flops(read, params), compiled


def test_frozen_matrices_have_no_weight_gradient() -> None:
    """Forward and the gradient of activations: at most 2.1 times the language model's forward, where weight gradients
    would make it 3. One layer, since XLA counts the body of a loop once; wide, so that products are what counts."""
    llama = dataclasses.replace(
        LLAMA, num_layers=1, hidden_size=256, mlp_size=1024, num_heads=4, head_dim=64, num_kv_heads=4
    )
    config = ModelConfig("minigpt4", dataclasses.replace(VIT, num_layers=1), QFORMER, llama)
    step, encode, read, compiled = step_and_forward_flops(config, 4, 64)
    assert 1.9 * read < step - encode < 2.1 * read
    assert compiled - encode < 2.1 * read
    trained = Run(config=config, trainable=("llama/*",))
    batch = trained.put(make_batch(config=config, rows=4, length=64))
    whole = count_flops(trained.step, trained.state, trained.frozen, batch, np.float32(RATE))
    assert whole - encode > 2.6 * read  # the same count sees them where they are wanted


def test_parts_that_are_not_trained_stay_in_evaluation_mode() -> None:
    data = DataConfig((SourceConfig("jsonl", "x"),))
    config = TrainConfig("m", "r", data, remat=True)
    frozen = training_model(config, MINIGPT4, {"projection/kernel"}, jnp.float32).config
    trained = training_model(config, MINIGPT4, {"qformer/query_tokens"}, jnp.float32).config
    assert frozen.qformer.dropout == 0.0 and trained.qformer.dropout == MINIGPT4.qformer.dropout > 0
    assert frozen.vit.remat and frozen.qformer.remat and frozen.llama.remat


def test_dropout_draws_anew_each_step_and_alike_after_a_restart() -> None:
    config = dataclasses.replace(MINIGPT4, llama=dataclasses.replace(LLAMA, lora=LoraConfig(rank=2, dropout=0.5)))
    losses = [Run(config=config, trainable=()).steps(3)[0] for _ in range(2)]
    assert losses[0] == losses[1]
    run = Run(config=config, trainable=())
    batch = run.put(make_batch())
    found = []
    for _ in range(2):
        run.state, metrics = run.step(run.state, run.frozen, batch, np.float32(0.0))
        found.append(float(metrics["loss"]))
    assert found[0] != found[1]  # the same batch and the same weights: only the draw differs


def test_remat_changes_no_number() -> None:
    plain = Run().steps(2)
    config = dataclasses.replace(
        MINIGPT4,
        vit=dataclasses.replace(VIT, remat=True),
        qformer=dataclasses.replace(QFORMER, remat=True),
        llama=dataclasses.replace(LLAMA, remat=True),
    )
    np.testing.assert_allclose(Run(config=config).steps(2)[0], plain[0], rtol=1e-6)
