"""What a compiled step moves between devices: read from the program, nothing is run.

The weights of a layer may come together for its turn (fsdp), the activations of its own rows may be added up (tensor);
activations of the whole batch may not travel.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import LLAMA, MINIGPT4

from mgpt4_jax.checkpoint import flatten
from mgpt4_jax.models import abstract_params
from mgpt4_jax.optim import make_optimizer
from mgpt4_jax.sharding import batch_sharding, make_mesh, param_shardings
from mgpt4_jax.train.objectives import caption_objective, training_model
from mgpt4_jax.train.state import make_state, split, state_shardings, trainable_paths
from mgpt4_jax.train.step import make_train_step
from mgpt4_jax.train_config import DataConfig, OptimConfig, SourceConfig, TrainConfig

LENGTH = 29  # a length that no weight has: it tells activations
ROWS = 32
LLAMA = dataclasses.replace(LLAMA, num_kv_heads=8, num_heads=8, head_dim=8)
CONFIG = dataclasses.replace(MINIGPT4, llama=LLAMA)
LAYER_BYTES = 4 * (4 * LLAMA.hidden_size**2 + 3 * LLAMA.hidden_size * LLAMA.mlp_size)

_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+))\[([\d,]*)\]")


@dataclass(frozen=True)
class Moved:
    """One array that a device has from a collective operation."""

    kind: str
    shape: tuple[int, ...]
    num_bytes: int
    where: str  # the operation of the model

    @property
    def is_activation(self) -> bool:
        return LENGTH in self.shape or LENGTH - 1 in self.shape

    @property
    def is_in_llama_layers(self) -> bool:
        return "llama/while" in self.where


def moved(program: str) -> list[Moved]:
    found = []
    for line in program.splitlines():
        if (operation := _COLLECTIVE.search(line)) is None:
            continue
        where = re.search(r'op_name="([^"]*)"', line)
        for _, bits, sizes in _ARRAY.findall(operation[1]):
            shape = tuple(int(size) for size in sizes.split(",") if size)
            num_bytes = math.prod(shape) * int(bits or 8) // 8
            found.append(Moved(operation[2], shape, num_bytes, where[1] if where else ""))
    return found


def compiled_step(mesh_text: str, trainable: tuple[str, ...] = ("projection/*",)) -> str:
    """The step of a tiny run, from shapes alone."""
    mesh, optimizer = make_mesh(mesh_text), make_optimizer(OptimConfig())
    params = abstract_params(CONFIG)
    trained = trainable_paths(flatten(params), trainable)
    data = DataConfig((SourceConfig("jsonl", "x"),))
    module = training_model(TrainConfig("m", "r", data), CONFIG, trained, jnp.float32)

    def placed(shapes: Any, places: Any) -> Any:
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)

    trainable_params, frozen = split(params, trained)
    trainable_places, frozen_places = split(param_shardings(CONFIG, mesh), trained)
    state = jax.eval_shape(lambda leaves: make_state(leaves, optimizer, seed=0, with_average=False), trainable_params)
    state_places = state_shardings(trainable_places, optimizer, state, mesh)
    size, by_rows = CONFIG.vit.image_size, batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32) for name in ("ids", "slots", "targets")}
    batch |= {"mask": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)}
    batch |= {"pixels": jax.ShapeDtypeStruct((ROWS, 1, size, size, 3), jnp.uint8)}
    step = make_train_step(caption_objective(module), optimizer, state_places)
    arguments = (
        placed(state, state_places),
        placed(frozen, frozen_places),
        placed(batch, dict.fromkeys(batch, by_rows)),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    return step.lower(*arguments).compile().as_text()


@pytest.fixture(scope="module", params=["fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"])
def program(request: pytest.FixtureRequest) -> tuple[str, list[Moved]]:
    return request.param, moved(compiled_step(request.param))


def test_nothing_larger_than_a_layer_travels(program: tuple[str, list[Moved]]) -> None:
    """The activations of all rows are larger, and so are their logits."""
    assert ROWS * LENGTH * LLAMA.hidden_size * 4 > LAYER_BYTES
    mesh, found = program
    assert found
    for each in found:
        assert each.num_bytes <= LAYER_BYTES, (mesh, each)


def test_fsdp_brings_the_weights_of_a_layer_together_and_moves_no_activation() -> None:
    found = [each for each in moved(compiled_step("fsdp=8")) if each.is_in_llama_layers]
    assert not [each for each in found if each.is_activation]
    assert {each.kind for each in found} == {"all-gather"}
    assert sum(each.num_bytes for each in found) == 2 * LAYER_BYTES  # once forward, once backward


def test_tensor_adds_up_the_activations_of_its_own_rows_and_leaves_weights_where_they_are() -> None:
    """Megatron's two sums forward; backward one for each of the five matrices that read the layer's state."""
    found = [each for each in moved(compiled_step("data=2,tensor=4")) if each.is_in_llama_layers]
    state = ROWS // 2 * LENGTH * LLAMA.hidden_size * 4
    assert {each.kind for each in found} == {"all-reduce"}
    assert all(each.shape == (ROWS // 2, LENGTH, LLAMA.hidden_size) for each in found)
    assert sum(each.num_bytes for each in found) <= 7 * state


def test_trained_matrices_move_no_activation_either() -> None:
    found = [each for each in moved(compiled_step("fsdp=8", ("llama/layers/mlp/*",))) if each.is_in_llama_layers]
    assert found
    assert not [each for each in found if each.is_activation]
