"""OPT and T5, with BLIP-2's pictures before their words: every answer is searched, by one beam (greedily) or more.

Agrees with ``Blip2OPT`` and ``Blip2T5`` of LAVIS. A prompt is padded at its end; what the decoder begins with, OPT's
dummy token or T5's start token, counts as one token of the answer and is penalised if it comes again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam_engine import BeamEngine
from mgpt4_jax.generate.requests import Begun, Intake, Prompts, Request, Update, bucket
from mgpt4_jax.models import build, opt, t5
from mgpt4_jax.typing import Array, Bool, DType, Float, Int, Params

MAX_LENGTH = 2048  # of prompts with their answers, for T5, which has no limit of its own


class LanguageEngine(Intake):
    """Runs requests with the OPT or T5 of ``params``, the tree of a model, as ``Engine`` does for LLaMA.

    ``slots`` (a power of two) is how many beams are searched together.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        dtype: DType = jnp.float32,
        slots: int = 8,
        max_length: int | None = None,
        eos_ids: tuple[int, ...],
        bos_id: int,
    ):
        if config.opt is None and config.t5 is None:
            raise UserError(f"a model of architecture {config.architecture} has neither OPT nor T5")
        limit = MAX_LENGTH if config.opt is None else config.opt.max_positions
        super().__init__(config, dtype, slots, min(max_length or limit, limit), eos_ids, bos_id)
        self.params = {name: leaves for name, leaves in params.items() if name in ("opt", "t5")}
        self._greedy = BeamEngine(self)

    def check(self, request: Request) -> None:
        if request.sampling.temperature > 0:
            raise UserError(f"a model of architecture {self.config.architecture} draws nothing: set temperature to 0")
        super().check(request)

    def run(self, requests: Iterable[Request], *, chunk: int = 0) -> Iterator[Update]:
        """Greedy answers, each whole as soon as those that are decoded together with it have ended.

        ``chunk`` is that of ``Engine.run``; there is nothing between two updates here.
        """
        del chunk
        numbered = enumerate(requests)
        while group := list(itertools.islice(numbered, self._greedy.rows(1))):
            for (index, request), [best] in zip(group, self._greedy.run([one for _, one in group]), strict=True):
                stops = request.watch is not None and request.watch(best.ids)
                yield Update(index, best.ids, "stop" if stops else best.finish_reason)

    def stack_prompts(self, requests: list[Request]) -> Prompts:
        prompts, limit = super().stack_prompts(requests), self._longest_prompt(requests)
        return prompts._replace(ids=prompts.ids[:, :limit], slots=prompts.slots[:, :limit])

    def room_behind(self, requests: list[Request]) -> int:
        room, width = super().room_behind(requests), bucket(self.lengths, max(len(one.ids) for one in requests))
        return min(room, self.max_length - min(width, self._longest_prompt(requests)))

    def _longest_prompt(self, requests: list[Request]) -> int:
        """What the longest answer leaves: padding must not take positions that OPT has not."""
        return self.max_length - max(request.sampling.max_new_tokens for request in requests)

    def begin(self, params: Params, prompts: Prompts, num_beams: int, room: int) -> Begun:
        module = build(self.config, self.dtype)
        embeds = module.apply({"params": params}, prompts.ids, prompts.slots, prompts.images, method="embed")
        valid = jnp.arange(prompts.ids.shape[1])[None] < prompts.lengths[:, None]
        begin = self._begin_opt if self.config.opt is not None else self._begin_t5
        return begin(params, embeds, valid, num_beams, room)

    def _begin_opt(
        self, params: Params, embeds: Float[Array, "b t d"], valid: Bool[Array, "b t"], num_beams: int, room: int
    ) -> Begun:
        del num_beams
        config = self.config.opt
        logits, cache = opt.prefill(params["opt"], config, embeds, valid, embeds.shape[1] + room)

        def step(tokens: Int[Array, " r"], index: Int[Array, ""], cache: opt.OptCache) -> tuple[Array, opt.OptCache]:
            return opt.decode_step(params["opt"], config, tokens, index, cache)

        return Begun(step, cache, logits, row_axis=1)

    def _begin_t5(
        self, params: Params, embeds: Float[Array, "b t d"], valid: Bool[Array, "b t"], num_beams: int, room: int
    ) -> Begun:
        """What the encoder said is the same for all beams of a row: it is repeated once, and not moved again."""
        config = self.config.t5
        logits, cache = t5.prefill(params["t5"], config, embeds, valid, 1 + room)
        said = (cache.cross_keys, cache.cross_values, cache.cross_valid)
        keys, values, is_said = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=1), said)
        whole = dataclasses.replace(cache, cross_keys=keys, cross_values=values, cross_valid=is_said)

        def step(tokens: Int[Array, " r"], index: Int[Array, ""], own: Any) -> tuple[Array, Any]:
            cache = dataclasses.replace(whole, keys=own[0], values=own[1])
            logits, cache = t5.decode_step(params["t5"], config, tokens, index, cache)
            return logits, (cache.keys, cache.values)

        return Begun(step, (cache.keys, cache.values), logits, row_axis=1)
