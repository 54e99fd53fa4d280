"""Captions that the Q-Former writes itself: text that follows the queries' keys and values (BLIP-2 stage 1).

Agrees with LAVIS ``Blip2Qformer.generate``, whose own repetition of the queries fails with more than one beam on the
version of transformers that it asks for. A caption begins with ``[DEC]`` and ends with ``[SEP]``.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.text import BertTokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam import BeamParams, Hypotheses, beam_search, stack_beam_params
from mgpt4_jax.generate.beam_engine import Hypothesis, hypotheses_of
from mgpt4_jax.generate.requests import STOP_SHAPE, bucket, length_buckets
from mgpt4_jax.generate.sampling import SamplingParams, pack_stops
from mgpt4_jax.models import build
from mgpt4_jax.models.masks import decode_mask
from mgpt4_jax.models.qformer import QformerCache
from mgpt4_jax.typing import Array, DType, Float, Int, Params

DEFAULTS = SamplingParams(max_new_tokens=29, min_new_tokens=9, num_beams=3)
"""LAVIS's: at most 30 and at least 10 tokens with [DEC]."""

ROWS = 16  # beams in one program


class Captioner:
    """Writes captions with the parameters of a ``blip2`` model that has its language head."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: BertTokenizer, dtype: DType = jnp.float32):
        if not config.qformer.with_lm_head:
            raise UserError("this model has no language head (Qformer.cls); convert a stage-1 checkpoint that has one")
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.lengths = length_buckets(config.qformer.max_positions - 1)
        search = partial(_search, build(config, dtype), tokenizer.dec_id)
        self._search = jax.jit(search, static_argnames=("num_beams", "room"))

    def captions(self, pixels: Float[np.ndarray, "b H W 3"], params: SamplingParams) -> list[list[Hypothesis]]:
        """The best captions of each picture, best first: as many as ``num_return_sequences``."""
        self._check(params)
        size, found = 1 << (max(ROWS // params.num_beams, 1).bit_length() - 1), []
        for start in range(0, len(pixels), size):
            found += self._run(pixels[start : start + size], params)
        return found

    def num_compiled(self) -> int:
        return self._search._cache_size()

    def _check(self, params: SamplingParams) -> None:
        if params.temperature > 0:
            raise UserError("captions of the Q-Former are not drawn: leave temperature out")
        if params.stop:
            raise UserError("captions of the Q-Former end with [SEP]: leave stop out, or give stop_ids")
        if params.max_new_tokens > self.lengths[-1]:
            raise UserError(f"max_new_tokens {params.max_new_tokens}: the Q-Former has {self.lengths[-1]} positions")
        if params.num_beams >= (vocab := self.config.qformer.vocab_size):
            raise UserError(f"num_beams {params.num_beams} must be less than the {vocab} tokens of the vocabulary")

    def _run(self, pixels: Float[np.ndarray, "b H W 3"], params: SamplingParams) -> list[list[Hypothesis]]:
        count = len(pixels)
        spare = (1 << (count - 1).bit_length()) - count
        rows = [params] * count + [dataclasses.replace(params, max_new_tokens=0)] * spare
        found = self._search(
            self.params,
            np.concatenate([pixels, pixels[:1].repeat(spare, axis=0)]),
            stack_beam_params(rows, prefix_length=1),
            pack_stops([((self.tokenizer.sep_id,), *params.stop_ids)] * len(rows), *STOP_SHAPE),
            num_beams=params.num_beams,
            room=bucket(self.lengths, params.max_new_tokens),
        )
        return hypotheses_of(found, [params.num_return_sequences] * count)


def _search(
    model: nn.Module,
    dec_id: int,
    params: Params,
    pixels: Float[Array, "b H W 3"],
    beam_params: BeamParams,
    stops: Int[Array, "b k w"],
    *,
    num_beams: int,
    room: int,
) -> Hypotheses:
    """The program: pictures are looked at, and their captions searched behind [DEC]."""
    q, capacity = model.config.qformer.num_queries, 1 + room
    apply = partial(model.apply, {"params": params})
    cache = apply(pixels, room=capacity, method="image_features").cache
    vocab = model.config.qformer.vocab_size

    def step(tokens: Int[Array, " r"], index: Int[Array, ""], cache: QformerCache) -> tuple[Array, QformerCache]:
        return apply(tokens, q + 1 + index, q + capacity, cache, method=_next_logits)

    logits, cache = step(jnp.full(len(pixels), dec_id), jnp.int32(-1), cache)
    return beam_search(
        step,
        cache,
        logits,
        beam_params,
        stops,
        num_beams=num_beams,
        room=room,
        seen=jnp.broadcast_to(jnp.arange(vocab) == dec_id, logits.shape),
        row_axis=QformerCache(layers=1, tail=0),  # type: ignore[arg-type]  # in place of the arrays
    )


def _next_logits(
    model: Any, tokens: Int[Array, " b"], position: Int[Array, ""], capacity: int, cache: QformerCache
) -> tuple[Float[Array, "b v"], QformerCache]:
    """Logits after one more token each, which the cache gets at ``position``."""
    mask = decode_mask(position[None, None], capacity)
    out = model.qformer(text_ids=tokens[:, None], mask=mask, cache=cache, start=position)
    return model.qformer.lm_logits(out.text)[:, 0], out.cache
