"""Three optimiser steps of MiniGPT-4's stage 1, through the program's own train step, and the file that it saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case, recorded
from claims import SAVED, TRAINED, TRAJECTORY
from comparing import LOSS, Compare, Tolerance
from conversion import Converted, convert_case
from training import STAGE1, unnormalised

from mgpt4_jax.checkpoint import flatten, write_trained_model
from mgpt4_jax.convert.export import export
from mgpt4_jax.convert.readers import open_source
from mgpt4_jax.data.batching import pad_sequences, training_sequence
from mgpt4_jax.data.text import load_llama_tokenizer
from mgpt4_jax.optim import is_decayed, learning_rate, make_optimizer
from mgpt4_jax.sharding import make_mesh, param_shardings
from mgpt4_jax.train.objectives import caption_objective, training_model
from mgpt4_jax.train.state import TrainState, make_state, split, state_shardings, trainable_paths
from mgpt4_jax.train.step import gradient, make_train_step
from mgpt4_jax.train_config import DataConfig, OptimConfig, SourceConfig, TrainConfig

PARAMETER = Tolerance(rtol=1e-4, atol=1e-5)


def run(converted: Converted) -> dict[str, Any]:
    """Every quantity by its recorded name."""
    case = converted.case
    said = case.config["schedule"]
    optim = OptimConfig(
        peak_lr=said["init_lr"],
        min_lr=said["min_lr"],
        warmup_lr=said["warmup_start_lr"],
        warmup_steps=said["warmup_steps"],
        weight_decay=case.config["weight_decay"],
        beta1=case.config["betas"][0],
        beta2=case.config["betas"][1],
        eps=case.config["eps"],
    )
    trained = trainable_paths(flatten(converted.params), ("projection/*",))
    leaves, frozen = split(converted.params, trained)
    optimizer = make_optimizer(optim)
    config = TrainConfig("model", "run", DataConfig((SourceConfig("jsonl", "data"),)), optim=optim)
    objective = caption_objective(training_model(config, converted.config, trained, np.float32))

    def init(leaves: Any) -> TrainState:
        return make_state(leaves, optimizer, seed=0, with_average=False)

    mesh = make_mesh()
    places, _ = split(param_shardings(converted.config, mesh), trained)
    state = init(leaves)
    step = make_train_step(objective, optimizer, state_shardings(places, optimizer, jax.eval_shape(init, leaves), mesh))
    differentiate = jax.jit(lambda trainable, batch: gradient(objective, trainable, frozen, batch, state_key, 1))
    state_key = jax.random.key(0)
    decays = {name: is_decayed(f"projection/{leaf}", "minigpt4") for name, leaf in _NAMES.items()}
    found: dict[str, Any] = {
        "config.decay": [name for name, decayed in decays.items() if decayed],
        "config.no_decay": [name for name, decayed in decays.items() if not decayed],
    }
    count = sum(key.startswith("lr_") for key in case.outputs)
    for number in range(count + 1):
        batch = make_batch(converted, min(number, count - 1))
        gradients, means = differentiate(state.trainable, batch)
        found[f"loss_{number}"] = means["loss"]
        if number < count:
            rate = learning_rate(optim, number, epochs=said["max_epoch"], steps_per_epoch=said["iters_per_epoch"])
            assert rate == pytest.approx(float(case.outputs[f"lr_{number}"]), abs=1e-12)
            state, _ = step(state, frozen, batch, np.float32(rate))
            for name, values in converted.to_source(gradients).items():
                found[f"step{number + 1}_grad_{name}"] = values
            for name, values in converted.to_source(state.trainable).items():
                found[f"step{number + 1}_{name}"] = values
    return found | {"trained": state.trainable}


_NAMES = {"llama_proj.weight": "kernel", "llama_proj.bias": "bias"}


def make_batch(converted: Converted, number: int) -> dict[str, np.ndarray]:
    case, tokenizer = converted.case, load_llama_tokenizer(converted.model_dir / "tokenizer")
    rows = [
        training_sequence(tokenizer, None, answer, tokens_per_image=converted.config.tokens_per_image, **STAGE1)
        for answer in case.config["answers"]
    ]
    batch = pad_sequences(rows, max(map(len, rows)), pad_id=tokenizer.pad_id)
    names = sorted(name for name in case.inputs if name.startswith("image"))
    pixels = unnormalised(case.pixels(names[min(number, len(names) - 1)]))
    return {**vars(batch), "pixels": pixels[:, None]}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Converted]:
    """The case's model with the projection that the recorded steps began with."""

    def convert_start(case: Case) -> Converted:
        begun = next(path for path in case.files_of_roles["projection"] if not is_end(case, path))
        return convert_case(case, tmp_path_factory.mktemp(str(case)) / "model", projection=begun)

    return cache(convert_start)


def is_end(case: Case, path: Path) -> bool:
    """Whether a file holds the parameters after the last step: told by its values, not by its name."""
    last = sum(key.startswith("lr_") for key in case.outputs)
    source = open_source(path)
    return all(np.array_equal(source.read(name), case.outputs[f"step{last}_{name}"]) for name in _NAMES)


@pytest.fixture(scope="module")
def results(start: Callable[[Case], Converted]) -> Callable[[Case], dict[str, Any]]:
    return cache(lambda case: run(start(case)))


@pytest.mark.parametrize(("case", "quantity"), recorded("adamw_minigpt4", *TRAJECTORY))
def test_trajectory(case: Case, quantity: str, results: Any, compare: Compare) -> None:
    actual = results(case)[quantity]
    if quantity.startswith("config."):
        compare.equal(sorted(actual), sorted(case.config[quantity.removeprefix("config.")]))
    elif "_grad_" in quantity:
        compare.gradients({quantity: actual}, {quantity: case.outputs[quantity]})
    else:
        compare.close(actual, case.outputs[quantity], LOSS if quantity.startswith("loss") else PARAMETER)


@pytest.mark.parametrize(("case", "quantity"), recorded("adamw_minigpt4", *SAVED))
def test_the_saved_file(
    case: Case, quantity: str, results: Any, start: Callable[[Case], Converted], compare: Compare, tmp_path: Path
) -> None:
    """What is exported after the last step is what the original saved then, but for a buffer that it computes anew."""
    begun = start(case)
    trained = flatten(results(case)["trained"])
    write_trained_model(tmp_path / "model", begun.model_dir, trained, begun.config, "vicuna_v0")
    export(tmp_path / "model", format="minigpt4", out=tmp_path / "saved.pth")
    ours = open_source(tmp_path / "saved.pth")
    expected = case.config[quantity.removeprefix("config.")]
    compare.equal(sorted(ours.tensors()), sorted(key for key in expected if not key.endswith(".position_ids")))
    saved = open_source(next(path for path in case.files_of_roles["projection"] if is_end(case, path)))
    for key in ours.tensors():
        compare.close(ours.read(key), saved.read(key), PARAMETER)


@pytest.mark.parametrize(("case", "quantity"), recorded("minigpt4", *TRAINED))
def test_what_is_trained_by_default(
    case: Case, quantity: str, converted: Callable[[Case], Converted], compare: Compare
) -> None:
    patterns = TrainConfig("model", "run", DataConfig((SourceConfig("jsonl", "data"),))).trainable
    leaves, _ = split(converted(case).params, trainable_paths(flatten(converted(case).params), patterns))
    compare.equal(sorted(converted(case).to_source(leaves)), sorted(case.config["trainable"]))
