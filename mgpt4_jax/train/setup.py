"""Everything that a run needs before its first step: mesh, data, parameters on their devices, compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mgpt4_jax.checkpoint import ModelManifest, flatten, load_params, nest, read_manifest
from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.loading import Loader, TrainBatch
from mgpt4_jax.data.rows import PairBuilder, Rows, buckets_of
from mgpt4_jax.data.samples import name_pictures
from mgpt4_jax.data.sources import Source, open_source
from mgpt4_jax.errors import UserError
from mgpt4_jax.memory import bytes_per_device, free_memory, readable
from mgpt4_jax.models import abstract_params, init_adapters
from mgpt4_jax.optim import make_optimizer
from mgpt4_jax.progress import progress
from mgpt4_jax.sharding import batch_sharding, param_shardings, process_rows
from mgpt4_jax.train.flops import count_flops
from mgpt4_jax.train.objectives import training_model
from mgpt4_jax.train.stages import STAGES
from mgpt4_jax.train.state import TrainState, make_state, split, state_shardings, trainable_paths
from mgpt4_jax.train.step import make_evaluation, make_train_step
from mgpt4_jax.train_config import TrainConfig
from mgpt4_jax.typing import Params

FIELDS = ("ids", "slots", "targets", "mask", "pixels", "qformer_ids", "qformer_mask", "image_ids")
"""Arrays of a batch that go to the devices, those of them that it has."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """Sources are open; ``rows`` makes sequences of their samples."""

    loader: Loader
    rows: Rows
    validation: tuple[Source, ...]
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What will be trained, and how it lies on the devices: nothing is loaded yet."""

    config: TrainConfig
    manifest: ModelManifest
    model: ModelConfig  # with the adapters of this run
    mesh: Mesh
    dtype: Any
    trained: frozenset[str]
    optimizer: optax.GradientTransformation
    abstract: TrainState  # shapes and shardings of the state
    shardings: Mapping[str, Any]  # path -> sharding, of every parameter

    @property
    def state_shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def make_plan(config: TrainConfig, mesh: Mesh) -> Plan:
    """Refuses what does not fit together, before anything large is read."""
    manifest = read_manifest(config.model)
    kind, wanted = manifest.config.architecture, STAGES[config.objective].architectures
    if kind not in wanted:
        names = " or ".join(wanted)
        raise UserError(f"{config.model}: objective {config.objective!r} trains a {names} model, not {kind}")
    model = _with_adapters(config, manifest.config)
    _check_parts(config, mesh)
    _check_length(config, model)
    paths = flatten(abstract_params(model))
    trained = trainable_paths(paths, config.trainable)
    shardings = param_shardings(model, mesh)
    optimizer = make_optimizer(config.optim)
    trainable, _ = split(abstract_params(model), trained)
    shapes = jax.eval_shape(lambda leaves: _make_state(config, leaves, optimizer), trainable)
    placed = state_shardings(split(shardings, trained)[0], optimizer, shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, placed
    )
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    return Plan(
        config, manifest, model, mesh, jnp.dtype(dtype), frozenset(trained), optimizer, abstract, flatten(shardings)
    )


def _check_parts(config: TrainConfig, mesh: Mesh) -> None:
    """Every part of an accumulated batch is shared out as the batch itself is."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    part = config.batch_size // config.accumulation
    if config.accumulation > 1 and part % shards:
        raise UserError(
            f"accumulation {config.accumulation} cuts batch_size {config.batch_size} into parts of {part}, which "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} cannot share out evenly; lower it, or take a "
            f"batch_size of {max(part // shards, 1) * shards * config.accumulation}"
        )


def _check_length(config: TrainConfig, model: ModelConfig) -> None:
    """T5 alone counts no positions."""
    longest, part = buckets_of(config.text)[-1], model.language_model or model.qformer
    most = getattr(part, "max_positions", longest)
    if longest > most:
        key = "text.buckets" if config.text.buckets else "text.max_length"
        raise UserError(f"{key}: rows of {longest} are longer than the {most} positions of {config.model}; lower it")


def _with_adapters(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """The model with the adapters of this run, beside those that it has."""
    if config.lora is None:
        return model
    if model.llama is None:
        raise UserError(f"{config.model}: has no language model that `lora` could adapt; leave it out")
    if model.llama.lora not in (None, config.lora):
        raise UserError(f"{config.model}: has adapters already ({model.llama.lora}); leave `lora` out to train those")
    return dataclasses.replace(model, llama=dataclasses.replace(model.llama, lora=config.lora))


def _make_state(config: TrainConfig, trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return make_state(trainable, optimizer, seed=config.seed, with_average=config.optim.ema_decay > 0)


def _weights(plan: Plan) -> tuple[dict[tuple[str, bool], list[int]], int]:
    """([parameters, bytes on one device] of each part, by whether they are trained; bytes of the optimiser there)."""
    parts: dict[tuple[str, bool], list[int]] = {}
    for path, leaf in flatten(abstract_params(plan.model)).items():
        is_trained = path in plan.trained
        dtype = jnp.float32 if is_trained else plan.dtype
        part = parts.setdefault((path.split("/")[0], is_trained), [0, 0])
        part[0] += leaf.size
        part[1] += bytes_per_device(leaf.shape, dtype, plan.shardings[path])
    moments = jax.tree.leaves((plan.abstract.optimizer, plan.abstract.average))
    return parts, sum(bytes_per_device(leaf.shape, leaf.dtype, leaf.sharding) for leaf in moments)


def weight_table(plan: Plan) -> str:
    """A line for each part of the model: parameters, and bytes on one device."""
    parts, moments = _weights(plan)
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
    lines = [f"parameters, and what they take on each of {plan.mesh.size} devices ({mesh}):"]
    for (part, is_trained), (count, size) in parts.items():
        kind = "trained, float32" if is_trained else f"frozen, {plan.dtype.name}"
        lines.append(f"  {part:<12} {count:>15,}  {readable(size):>9}  {kind}")
    return "\n".join([*lines, f"  {'optimiser':<12} {'':>15}  {readable(moments):>9}  moments of what is trained"])


def open_data(plan: Plan, say: Say) -> Data:
    config = plan.config
    with progress("indexing data") as report:
        train = [open_source(source, report) for source in config.data.train]
        validation = tuple(open_source(source, report) for source in config.data.validation)
    for source in (*train, *validation):
        say(f"{source.name}: {len(source):,} samples")
    rows = STAGES[config.objective].rows(config, plan.manifest)
    if isinstance(rows, PairBuilder) and name_pictures([*train, *validation]):
        rows = dataclasses.replace(rows, names_pictures=True)
        say("pairs that share an image_id belong together: their targets are shared, and they are no negatives")
    loader = Loader(
        train,
        rows,
        config.data,
        batch_size=config.batch_size,
        image_size=plan.model.image_size,
        seed=config.seed,
        rows_of_process=process_rows(plan.mesh, config.batch_size),
    )
    return Data(loader, rows, validation, buckets_of(config.text))


def load_state(plan: Plan) -> tuple[TrainState, Params]:
    """(the state before the first step, frozen parameters), read part by part onto their devices.

    Raises:
      UserError: they do not fit there; nothing was read.
    """
    _check_room(plan)
    adapters = {path for path in plan.trained if path not in plan.manifest.dtypes}
    params = load_params(plan.config.model, lambda path: jnp.float32 if path in plan.trained else plan.dtype, plan.mesh)
    leaves = flatten(params) | _new_adapters(plan, adapters)
    trainable, frozen = split(nest(leaves), set(plan.trained))
    make = jax.jit(
        lambda leaves: _make_state(plan.config, leaves, plan.optimizer),
        out_shardings=plan.state_shardings,
        donate_argnums=0,  # what is trained lies there once
    )
    return make(trainable), frozen


def _check_room(plan: Plan) -> None:
    parts, moments = _weights(plan)
    held = moments + sum(size for _, size in parts.values())
    devices = plan.mesh.local_devices
    free = free_memory(devices[0], len(devices))
    if free is not None and held > free:
        raise UserError(
            f"{plan.config.model}: its parameters and the optimiser take {readable(held)} on each device, where "
            f"{readable(free)} are free; cut it over more devices with --mesh fsdp=N, or train less of it"
        )


def _new_adapters(plan: Plan, paths: set[str]) -> dict[str, jax.Array]:
    """The adapters that the model does not have yet, as their module begins them."""
    if not paths:
        return {}
    places = nest({path: plan.shardings[path] for path in paths})
    draw = jax.jit(functools.partial(init_adapters, plan.model), out_shardings=places)
    return flatten(draw(jax.random.key(plan.config.seed)))


class Programs:
    """The compiled programs of a run: one train step and one evaluation for each length of rows."""

    def __init__(self, plan: Plan, rows: Rows, frozen: Params, say: Say):
        config = plan.config
        module = training_model(config, plan.model, plan.trained, plan.dtype)
        objective = STAGES[config.objective].objective(module, rows)
        self.module, self._plan, self._say = module, plan, say
        self._extras = rows.extras
        self._frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), frozen)
        self._step = make_train_step(
            objective,
            plan.optimizer,
            plan.state_shardings,
            accumulation=config.accumulation,
            ema_decay=config.optim.ema_decay,
        )
        self._evaluate = make_evaluation(objective)
        self._steps: dict[int, Any] = {}
        self._evaluations: dict[int, Any] = {}
        self.flops: dict[int, float] = {}

    def step(self, length: int) -> Any:
        """The compiled step for rows of ``length`` positions; the first asked for is checked against the memory."""
        if length not in self._steps:
            start = time.monotonic()
            arguments = (self._plan.abstract, self._frozen, self.abstract_batch(length), self._rate())
            self.flops[length] = count_flops(self._step, *arguments)
            compiled = self._step.lower(*arguments).compile()
            self._check_memory(compiled, length, time.monotonic() - start)
            self._steps[length] = compiled
        return self._steps[length]

    def evaluation(self, length: int) -> Any:
        if length not in self._evaluations:
            arguments = (self._plan.abstract.trainable, self._frozen, self.abstract_batch(length))
            self._evaluations[length] = self._evaluate.lower(*arguments).compile()
        return self._evaluations[length]

    def abstract_batch(self, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        b, size = self._plan.config.batch_size, self._plan.model.image_size
        place = batch_sharding(self._plan.mesh)
        text = dict.fromkeys(("ids", "slots", "targets"), jnp.int32) | {"mask": jnp.bool_}
        arrays = {name: jax.ShapeDtypeStruct((b, length), dtype, sharding=place) for name, dtype in text.items()}
        arrays["pixels"] = jax.ShapeDtypeStruct((b, 1, size, size, 3), jnp.uint8, sharding=place)
        for name, (shape, dtype) in self._extras.items():
            arrays[name] = jax.ShapeDtypeStruct((b, *shape), jnp.dtype(dtype), sharding=place)
        return arrays

    def _rate(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.float32)

    def _check_memory(self, compiled: Any, length: int, seconds: float) -> None:
        """Say what the step takes, and refuse it if that is more than the device has left."""
        memory = compiled.memory_analysis()
        work = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        devices = self._plan.mesh.local_devices
        free = free_memory(devices[0], len(devices))
        room = "" if free is None else f" of {readable(free)} free"
        held = readable(memory.argument_size_in_bytes)
        text = (
            f"the step for rows of {length} takes {readable(work)}{room} on each device, beside {held} that it is given"
        )
        self._say(f"{text} (compiled in {seconds:.0f} s, {_flops(self.flops[length])})")
        if free is not None and work > free:
            raise UserError(
                f"{text}: it does not fit; raise accumulation (now {self._plan.config.accumulation}), set remat: true, "
                "lower batch_size, or cut the model over more devices with --mesh fsdp=N"
            )


def _flops(count: float) -> str:
    return f"{count / 1e12:.1f} TFLOP" if count > 5e10 else f"{count / 1e9:.3g} GFLOP"


def device_arrays(batch: TrainBatch) -> dict[str, np.ndarray]:
    return {name: array for name in FIELDS if (array := getattr(batch, name)) is not None}
