"""Captions of the same few pictures during training: what the model says now.

Words come from the parameters as they lie, cut over the mesh, by whole forward passes: neither a second copy of the
weights, packed for decoding, nor a cache of keys. That is slow for an answer and right for four short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.loading import TrainBatch
from mgpt4_jax.data.rows import RowBuilder
from mgpt4_jax.data.text import Tokenizer
from mgpt4_jax.distributed import agree_max
from mgpt4_jax.sharding import process_rows, put_batch
from mgpt4_jax.train.objectives import normalised
from mgpt4_jax.train.setup import Data, Plan
from mgpt4_jax.train.state import join
from mgpt4_jax.train.trackers import Caption
from mgpt4_jax.typing import Array, Bool, Float, Int, Params

Stops = tuple[tuple[int, ...], ...]
"""Sequences of ids that end an answer."""


def greedy_captions(
    apply_logits: Callable[[Int[Array, "b t"], Bool[Array, "b t"]], Float[Array, "b t v"]],
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    lengths: Int[Array, " b"],
    *,
    max_new: int,
    stops: Stops,
) -> Int[Array, "b n"]:
    """The most probable next tokens of each row, up to ``max_new`` (n) of them; -1 after the row's end.

    A row ends with one of ``stops``, which is kept, and stays ended.

    Args:
      apply_logits: the model, for ids and the positions that hold a token.
      ids: prompts, padded on the right, with room for ``max_new`` more.
      mask: the prompts' positions that are attended to.
      lengths: positions of each prompt.
    """
    b, t = ids.shape
    places = jnp.arange(t)

    def going(carry: tuple[Array, ...]) -> Array:
        count, _, _, done, _ = carry
        return (count < max_new) & ~jnp.all(done)

    def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        count, ids, mask, done, said = carry
        last = (lengths + count - 1)[:, None, None]  # the same for all: a row that ended does not come back
        logits = jnp.take_along_axis(apply_logits(ids, mask), last, axis=1)[:, 0]
        tokens = jnp.argmax(logits, axis=-1).astype(ids.dtype)
        here = (places == (lengths + count)[:, None]) & ~done[:, None]
        ids, mask = jnp.where(here, tokens[:, None], ids), mask | here
        said = said.at[:, count].set(jnp.where(done, -1, tokens))
        return count + 1, ids, mask, done | _ends(said, count, stops), said

    start = (jnp.int32(0), ids, mask, jnp.zeros(b, bool), jnp.full((b, max_new), -1, ids.dtype))
    return jax.lax.while_loop(going, body, start)[-1]


def _ends(said: Int[Array, "b n"], count: Int[Array, ""], stops: Stops) -> Bool[Array, " b"]:
    """Whether what was said up to and with position ``count`` ends with one of ``stops``."""
    found = jnp.zeros(said.shape[0], bool)
    for stop in stops:
        places = count - len(stop) + 1 + jnp.arange(len(stop))
        words = said[:, jnp.maximum(places, 0)]
        found |= (places[0] >= 0) & jnp.all(words == jnp.array(stop, said.dtype), axis=1)
    return found


@dataclass(frozen=True)
class _Rows:
    """The rows of this process, and the whole batch on its devices."""

    names: list[str]
    references: list[str]
    arrays: dict[str, jax.Array]
    here: slice  # of the whole batch


class SampleCaptions:
    """Captions the first pictures of the validation set (without one, of the first batch).

    All processes must take part; each gets the captions of its own rows.
    """

    def __init__(self, plan: Plan, data: Data, module: nn.Module):
        self._plan, self._data = plan, data
        self._max_new = plan.config.text.max_text_length
        assert isinstance(data.rows, RowBuilder)  # of the stages that tell
        self._stops = stop_sequences(data.rows.tokenizer, plan.config.text.end_symbol)
        self._rows: _Rows | None = None
        program = caption_program(module, max_new=self._max_new, stops=self._stops)
        self._program = jax.jit(program, out_shardings=NamedSharding(plan.mesh, P()))

    def write(self, trainable: Params, frozen: Params) -> list[Caption]:
        """What the model with these parameters says."""
        if self._rows is None:
            self._rows = self._prepare()
        rows = self._rows
        said = np.asarray(self._program(trainable, frozen, rows.arrays))[rows.here]
        texts = [self._text(ids) for ids in said]
        captions = map(Caption, rows.names, rows.references, texts)
        return [caption for caption in captions if caption.name][: self._plan.config.log.samples]

    def _text(self, ids: np.ndarray) -> str:
        """The words before the end symbol, however it was spelt."""
        text = self._data.rows.tokenizer.decode([int(token) for token in ids if token >= 0])
        end = self._plan.config.text.end_symbol
        return (text.split(end)[0] if end else text).strip()

    def _prepare(self) -> _Rows:
        batch = self._first_batch()
        mesh = self._plan.mesh
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        parts = process_rows(mesh, shards)
        parts_here = parts.stop - parts.start
        each = min(-(-self._plan.config.log.samples // parts_here), len(batch.names) // parts_here)
        count = each * parts_here
        starts = prompt_lengths(batch.targets[:count], batch.mask[:count])
        room = agree_max(int(starts.max())) + self._max_new
        tokenizer = self._data.rows.tokenizer
        arrays = prompts(batch, starts, room, pad_id=tokenizer.pad_id)
        return _Rows(
            names=batch.names[:count],
            references=[self._text(row[row != IGNORED]) for row in batch.targets[:count]],
            arrays=put_batch(mesh, arrays),
            here=slice(parts.start * each, parts.stop * each),
        )

    def _first_batch(self) -> TrainBatch:
        loader, validation = self._data.loader, self._data.validation
        with loader.validation_batches(validation, limit=1) if validation else loader.batches(0) as batches:
            return next(iter(batches))


def caption_program(module: nn.Module, *, max_new: int, stops: Stops) -> Callable[[Params, Params, Any], Array]:
    """``(trainable, frozen, batch) -> new ids``; pictures are encoded once."""

    def program(trainable: Params, frozen: Params, batch: Any) -> Array:
        params = {"params": join(trainable, frozen)}
        rows, count = batch["pixels"].shape[:2]
        pixels = normalised(batch["pixels"]).reshape(rows * count, *batch["pixels"].shape[2:])
        images = module.apply(params, pixels, method="encode_image")
        images = images.reshape(rows, count * images.shape[1], -1)

        def apply_logits(ids: Array, mask: Array) -> Array:
            def read(model: Any) -> Array:
                return model.llama(model.embed(ids, batch["slots"], images), mask)

            return module.apply(params, method=read)

        return greedy_captions(
            apply_logits, batch["ids"], batch["mask"], batch["lengths"], max_new=max_new, stops=stops
        )

    return program


def prompt_lengths(targets: Int[np.ndarray, "b t"], mask: Bool[np.ndarray, "b t"]) -> Int[np.ndarray, " b"]:
    """How many positions stand before what a row is to predict; all of them where that is nothing."""
    is_target = targets != IGNORED
    return np.where(is_target.any(axis=1), is_target.argmax(axis=1), mask.sum(axis=1)).astype(np.int32)


def prompts(batch: TrainBatch, lengths: Int[np.ndarray, " b"], room: int, *, pad_id: int) -> dict[str, np.ndarray]:
    """The first rows of ``batch`` without their answers, as arrays of ``room`` positions."""
    count = len(lengths)
    arrays = {
        "ids": np.full((count, room), pad_id, np.int32),
        "slots": np.full((count, room), -1, np.int32),
        "mask": np.zeros((count, room), bool),
    }
    for row, length in enumerate(lengths):
        for name, array in arrays.items():
            array[row, :length] = getattr(batch, name)[row, :length]
    return arrays | {"lengths": lengths, "pixels": batch.pixels[:count]}


def stop_sequences(tokenizer: Tokenizer, end_symbol: str) -> Stops:
    """The end of sequence, and the end symbol as it is spelt behind a word."""
    word = tokenizer.encode("a")
    ended = tokenizer.encode(f"a{end_symbol}")
    end: Sequence[int] = ended[len(word) :] if ended[: len(word)] == word else ()
    return ((tokenizer.eos_id,), *([tuple(end)] if end else []))
