"""The engine: a fixed set of row slots on the device, filled again as answers end.

``run`` prefills waiting requests in groups of one padded length, inserts each into a free slot, and
decodes all slots together, a chunk of steps at a time. Every program has a fixed shape out of a small
set of buckets and takes texts, pictures and sampling parameters as arrays, so nothing is compiled for a
new request; ``buckets`` lists the programs. A row never sees another one: its result is that of a run alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgpt4_jax.config import LlamaConfig, ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.decoder import Cache, Read, decode_step, next_logits, numbers, pack_decoder, prefill, read_tree
from mgpt4_jax.generate.requests import (
    MAX_IMAGES,
    STOP_SHAPE,
    Begun,
    FinishReason,
    Intake,
    Prompts,
    Request,
    Update,
    bucket,
)
from mgpt4_jax.generate.sampling import Sampling, SamplingParams, ends_with_stop, next_tokens, stack_sampling
from mgpt4_jax.models.layers import embed_with_images
from mgpt4_jax.models.lora import merging
from mgpt4_jax.sharding import BATCH, make_mesh
from mgpt4_jax.typing import Array, Bool, DType, Float, Int, Params

CHUNK = 32  # most decode steps between two looks of the host


class Rows(NamedTuple):
    """What the device knows of each slot."""

    token: Int[Array, " b"]  # the last one, not in the cache yet
    position: Int[Array, " b"]  # where it belongs
    generated: Int[Array, " b"]
    done: Bool[Array, " b"]
    stopped: Bool[Array, " b"]
    seen: Bool[Array, "b v"]
    recent: Int[Array, "b w"]
    stops: Int[Array, "b k w"]
    sampling: Sampling


class State(NamedTuple):
    rows: Rows
    caches: list[Cache]


@dataclass(frozen=True)
class _Answering:
    index: int
    request: Request


class Engine(Intake):
    """Runs requests with the language model of ``params``, the tree of a model or a function that reads it.

    ``slots`` (a power of two) rows are decoded together; a prompt and its answer fit in ``max_length``. LoRA
    adapters are merged into their matrices as these are read.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params | Read,
        mesh: Mesh | None = None,
        *,
        dtype: DType = jnp.float32,
        slots: int = 8,
        max_length: int | None = None,
        eos_ids: tuple[int, ...] = (2,),
        bos_id: int = 1,
    ):
        if config.llama is None:
            raise UserError(f"a model of architecture {config.architecture} has no language model to answer with")
        limit = config.llama.max_positions
        super().__init__(config, dtype, slots, min(max_length or limit, limit), eos_ids, bos_id)
        mesh = mesh or make_mesh()
        read = params if callable(params) else read_tree(params["llama"])
        self.mesh = mesh
        self.params = pack_decoder(config.llama, merging(config.llama.lora, read), dtype, mesh)
        llama, place = config.llama, partial(_place, mesh)
        self._empty = jax.jit(partial(_empty, llama, dtype, place), static_argnums=(0, 1))
        self._grow = jax.jit(partial(_grow, place), static_argnums=1)
        self._prefill = jax.jit(partial(prefill_prompts, llama))
        self._first = jax.jit(partial(_first, bos_id))
        self._insert = jax.jit(partial(_insert, place), donate_argnums=0)
        self._decode = jax.jit(partial(_decode, llama, place), donate_argnums=1)

    # -- shapes ---------------------------------------------------------------------------------

    def buckets(self) -> list[tuple[str | int, ...]]:
        """Every program that can be compiled: its name and sizes."""
        slots, lengths = _powers(self.slots), self.lengths
        images = _powers(MAX_IMAGES) if self.config.vit else [0]
        fitting = [(t, s) for s in lengths for t in lengths if t <= s]
        programs: list[tuple[str | int, ...]] = [("empty", b, s) for b in slots for s in lengths]
        programs += [("grow", b, t, s) for b in slots for t, s in fitting if t < s]
        programs += [("prefill", r, t, i) for r in slots for t in lengths for i in images]
        programs += [("first", r) for r in slots]
        programs += [("insert", r, t, b, s) for b in slots for r in _powers(b) for t, s in fitting]
        programs += [("decode", b, s) for b in slots for s in lengths]
        return programs

    def num_compiled(self) -> int:
        """Programs that exist now."""
        programs = (self._empty, self._grow, self._prefill, self._first, self._insert, self._decode)
        return sum(program._cache_size() for program in programs)

    def _room(self, request: Request) -> int:
        return bucket(self.lengths, len(request.ids) + request.sampling.max_new_tokens)

    # -- running --------------------------------------------------------------------------------

    def run(self, requests: Iterable[Request], *, chunk: int = 16) -> Iterator[Update]:
        """Answer ``requests``, which are taken as slots become free; updates come as they are made.

        ``chunk`` (up to ``CHUNK``) steps are decoded between two updates.
        """
        waiting: Iterator[tuple[int, Request]] = enumerate(requests)
        first = list(itertools.islice(waiting, self.slots))
        if not first:
            return
        slots = 1 << (len(first) - 1).bit_length()
        waiting = itertools.chain(first, waiting)
        answering: dict[int, _Answering] = {}
        cancelled = np.zeros(slots, bool)  # by the host; forgotten when the slot is filled again
        room, state = 0, None
        while True:
            arrivals = list(itertools.islice(waiting, slots - len(answering)))
            for _, request in arrivals:
                self.check(request)
            needed = max([room, *(self._room(request) for _, request in arrivals)])
            if state is None:
                state = self._empty(slots, needed)
            elif needed > room:
                state = self._grow(state, needed)
            room = needed
            free = [slot for slot in range(slots) if slot not in answering]
            placed = {slot: _Answering(index, request) for slot, (index, request) in zip(free, arrivals, strict=False)}
            answering |= placed
            cancelled[list(placed)] = False
            for group in self._groups(placed):
                state, emitted = self._start(state, group, [placed[slot].request for slot in group])
                yield from self._settle(answering, cancelled, group, emitted)
            if not answering:
                return
            state, emitted = self._decode(self.params, state, np.int32(min(chunk, CHUNK)), cancelled)
            yield from self._settle(answering, cancelled, range(slots), emitted)

    def _groups(self, placed: dict[int, _Answering]) -> list[list[int]]:
        """Slots to prefill together: one padded length and count of pictures, a power of two of rows."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for slot, answer in placed.items():
            shape = (bucket(self.lengths, len(answer.request.ids)), self.image_bucket(answer.request))
            shapes.setdefault(shape, []).append(slot)
        groups = []
        for slots in shapes.values():
            while slots:
                size = 1 << (len(slots).bit_length() - 1)
                groups.append(slots[:size])
                slots = slots[size:]
        return groups

    def _start(self, state: State, targets: list[int], requests: list[Request]) -> tuple[State, Any]:
        """Prefill requests of one shape, choose their first tokens and put them into the slots ``targets``."""
        prompts = self.stack_prompts(requests)
        caches, logits = self._prefill(self.params, prompts)
        sampling = stack_sampling([request.sampling for request in requests])
        rows, emitted = self._first(logits, prompts.lengths, self.stack_stops(requests), sampling)
        return self._insert(state, caches, rows, np.array(targets, np.int32)), emitted

    def begin(self, params: Params, prompts: Prompts, num_beams: int, room: int) -> Begun:
        config = self.config.llama
        caches, logits = prefill_prompts(config, params, prompts)
        starts = jnp.repeat(prompts.lengths, num_beams)

        def step(tokens: Int[Array, " r"], index: Int[Array, ""], caches: list[Cache]) -> tuple[Array, list[Cache]]:
            embeds = numbers(params["embedding"][tokens])
            x, caches = decode_step(config, params, embeds, starts + index, place_caches(self.mesh, caches))
            return next_logits(params, x), caches

        return Begun(step, grow_caches(caches, prompts.ids.shape[1] + room), logits)

    def _settle(
        self, answering: dict[int, _Answering], cancelled: np.ndarray, slots: Iterable[int], emitted: Any
    ) -> Iterator[Update]:
        """Hand out new tokens (-1: none) of ``slots``; rows that ended, by the host's word too, leave ``answering``."""
        for slot, tokens, done, stopped in zip(slots, *jax.device_get(emitted), strict=True):
            ids = [int(token) for token in tokens if token >= 0]
            if not ids:
                continue
            answer = answering[slot]
            reason: FinishReason | None = None
            if answer.request.watch is not None and answer.request.watch(ids):
                reason, cancelled[slot] = "stop", True
            elif done:
                reason = "stop" if stopped else "length"
            if reason is not None:
                del answering[slot]
            yield Update(answer.index, ids, reason)


# -- the programs -----------------------------------------------------------------------------------


def _place(mesh: Mesh, state: State) -> State:
    """Pin the shardings: rows everywhere, caches as ``place_caches`` has them."""
    rows = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), state.rows)
    return State(rows, place_caches(mesh, state.caches))


def place_caches(mesh: Mesh, caches: list[Cache]) -> list[Cache]:
    """Pin caches, cut by heads and, where it divides, by rows."""
    b, k, _, _ = caches[0][0].shape
    batch = BATCH[0] if b % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads = "tensor" if k % mesh.shape["tensor"] == 0 else None
    sharding = NamedSharding(mesh, P(batch, heads, None, None))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), caches)


def grow_caches(caches: list[Cache], room: int) -> list[Cache]:
    """Caches with ``room`` positions, those behind the old ones empty."""
    more = room - caches[0][0].shape[-1]
    pad = lambda x, *widths: jnp.pad(x, ((0, 0), (0, 0), *widths))  # noqa: E731
    return [(pad(keys, (0, 0), (0, more)), pad(values, (0, more), (0, 0))) for keys, values in caches]


def _empty(config: LlamaConfig, dtype: DType, place: Any, slots: int, room: int) -> State:
    zeros = jnp.zeros(slots, jnp.int32)
    rows = Rows(
        token=zeros,
        position=zeros,
        generated=zeros,
        done=jnp.ones(slots, bool),
        stopped=jnp.zeros(slots, bool),
        seen=jnp.zeros((slots, config.vocab_size), bool),
        recent=jnp.full((slots, STOP_SHAPE[1]), -1),
        stops=jnp.full((slots, *STOP_SHAPE), -1),
        sampling=jax.tree.map(jnp.asarray, stack_sampling([SamplingParams()] * slots)),
    )
    keys = jnp.zeros((slots, config.num_kv_heads, config.head_dim, room), dtype)
    caches = [(keys, jnp.swapaxes(keys, 2, 3)) for _ in range(config.num_layers)]
    return place(State(rows, caches))


def _grow(place: Any, state: State, room: int) -> State:
    return place(State(state.rows, grow_caches(state.caches, room)))


def prefill_prompts(config: LlamaConfig, params: Params, prompts: Prompts) -> tuple[list[Cache], Float[Array, "b v"]]:
    """Keys and values of prompts, and the logits after their last tokens."""
    embeds = numbers(params["embedding"][prompts.ids])
    if prompts.images is not None:
        embeds = embed_with_images(embeds, prompts.slots, prompts.images)
    x, caches = prefill(config, params, embeds)
    return caches, next_logits(params, x[jnp.arange(len(prompts.lengths)), prompts.lengths - 1])


def _first(
    bos_id: int,
    logits: Float[Array, "b v"],
    lengths: Int[Array, " b"],
    stops: Int[Array, "b k w"],
    sampling: Sampling,
) -> tuple[Rows, Any]:
    """Rows of prefilled prompts with their first tokens.

    The repetition penalty starts from the dummy first token alone, as Hugging Face's does when it
    generates from embeddings.
    """
    zeros = jnp.zeros_like(lengths)
    rows = Rows(
        token=zeros,
        position=lengths - 1,
        generated=zeros,
        done=zeros > 0,
        stopped=zeros > 0,
        seen=jnp.broadcast_to(jnp.arange(logits.shape[1]) == bos_id, logits.shape),
        recent=jnp.full((len(zeros), STOP_SHAPE[1]), -1),
        stops=stops,
        sampling=sampling,
    )
    rows, tokens = _advance(rows, logits)
    return rows, (tokens[:, None], rows.done, rows.stopped)


def _insert(place: Any, state: State, caches: list[Cache], rows: Rows, targets: Int[Array, " r"]) -> State:
    """Put prefilled rows into the slots ``targets``."""
    t = caches[0][0].shape[-1]
    merged = [
        (old[0].at[targets, :, :, :t].set(new[0]), old[1].at[targets, :, :t].set(new[1]))
        for old, new in zip(state.caches, caches, strict=True)
    ]
    return place(State(jax.tree.map(lambda old, new: old.at[targets].set(new), state.rows, rows), merged))


def _decode(
    config: LlamaConfig, place: Any, params: Params, state: State, limit: Int[Array, ""], cancelled: Bool[Array, " b"]
) -> tuple[State, Any]:
    """Up to ``limit`` steps of all rows that are not done; tokens come as [b chunk], -1 where there is none."""
    room = state.caches[0][0].shape[-1]
    rows = state.rows._replace(done=state.rows.done | cancelled)

    def going(carry: tuple[Array, State, Array]) -> Array:
        step, (rows, _), _ = carry
        return (step < limit) & ~jnp.all(rows.done)

    def body(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, (rows, caches), emitted = carry
        positions = jnp.where(rows.done, room, rows.position)  # a row that is done writes nothing
        x, caches = decode_step(config, params, numbers(params["embedding"][rows.token]), positions, caches)
        rows, tokens = _advance(rows, next_logits(params, x))
        return step + 1, place(State(rows, caches)), emitted.at[:, step].set(tokens)

    emitted = jnp.full((rows.done.shape[0], CHUNK), -1)
    _, state, emitted = jax.lax.while_loop(going, body, (jnp.int32(0), place(State(rows, state.caches)), emitted))
    return state, (emitted, state.rows.done, state.rows.stopped)


def _advance(rows: Rows, logits: Float[Array, "b v"]) -> tuple[Rows, Int[Array, " b"]]:
    """Choose and record the next token of each row that is not done; -1 is emitted for the others."""
    active = ~rows.done
    chosen = next_tokens(logits, rows.seen, rows.generated, rows.stops, rows.sampling)
    token = jnp.where(active, chosen, rows.token)
    generated = rows.generated + active
    shifted = jnp.concatenate([rows.recent[:, 1:], token[:, None]], axis=1)
    recent = jnp.where(active[:, None], shifted, rows.recent)
    stops_here = ends_with_stop(recent, rows.stops) & (generated > rows.sampling.min_new_tokens)
    stopped = rows.stopped | active & stops_here
    index = jnp.arange(token.shape[0])
    rows = rows._replace(
        token=token,
        position=rows.position + active,
        generated=generated,
        stopped=stopped,
        done=rows.done | stopped | (generated >= rows.sampling.max_new_tokens),
        seen=rows.seen.at[index, token].max(active),
        recent=recent,
    )
    return rows, jnp.where(active, token, -1)


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length())]
