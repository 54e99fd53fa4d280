"""Beams over a language model: requests in, the best answers of each out.

Requests are searched in programs of their own: a prompt is read once, its cache is repeated for the beams, and the
whole search runs on the device. There is one program for each count of rows (a power of two), length of prompts and of
answers, count of pictures (``requests.length_buckets``) and number of beams.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam import BeamParams, Hypotheses, Rules, beam_search, stack_beam_params
from mgpt4_jax.generate.requests import FinishReason, Intake, Prompts, Request
from mgpt4_jax.typing import Array, Bool, Int, Params


@dataclass(frozen=True)
class Hypothesis:
    """One of the best answers; ``ids`` hold the token or sequence that stopped it, too."""

    ids: list[int]
    score: float
    finish_reason: FinishReason


class BeamEngine:
    """Searches with the language model of ``engine``, and within its limits."""

    def __init__(self, engine: Intake):
        self.engine = engine
        self._search = jax.jit(partial(_search, engine), static_argnames=("num_beams", "room", "rules"))

    def rows(self, num_beams: int) -> int:
        """Requests that are searched together: their beams fill the engine's slots, as far as they fit."""
        return 1 << (max(self.engine.slots // num_beams, 1).bit_length() - 1)

    def num_compiled(self) -> int:
        return self._search._cache_size()

    def check(self, request: Request) -> None:
        """Raises ``UserError`` for a request that cannot be searched."""
        self.engine.check(request)
        beams, vocab = request.sampling.num_beams, self.engine.vocab_size
        if beams >= vocab:
            raise UserError(f"num_beams {beams} must be less than the {vocab} tokens of the vocabulary")

    def run(
        self,
        requests: Sequence[Request],
        stop_texts: Int[np.ndarray, "s v"] | None = None,
        *,
        rules: Rules = "transformers-4",
        seen: Bool[np.ndarray, "b v"] | None = None,
    ) -> list[list[Hypothesis]]:
        """The best answers of each request, best first: as many as its ``num_return_sequences``.

        Args:
          requests: with one ``num_beams``; up to ``rows`` of them share a program.
          stop_texts: of ``stop_texts.stop_table``; they stop every request.
          rules: what is counted. With transformers-4 a dummy first token is, and penalised if it comes again.
          seen: what the repetition penalty weighs from the start, if not what ``rules`` say.
        """
        beams = requests[0].sampling.num_beams
        size, found = self.rows(beams), []
        for start in range(0, len(requests), size):
            group = requests[start : start + size]
            weighed = self._seen(len(group), rules) if seen is None else seen[start : start + size]
            found += self._run(list(group), weighed, stop_texts, rules)
        return found

    def _seen(self, rows: int, rules: Rules) -> Bool[np.ndarray, "b v"]:
        tokens = np.arange(self.engine.vocab_size)
        is_dummy = tokens == self.engine.bos_id if rules == "transformers-4" else tokens < 0
        return np.broadcast_to(is_dummy, (rows, len(tokens)))

    def _run(
        self,
        requests: list[Request],
        seen: Bool[np.ndarray, "b v"],
        stop_texts: Int[np.ndarray, "s v"] | None,
        rules: Rules,
    ) -> list[list[Hypothesis]]:
        for request in requests:
            self.check(request)
        spare = (1 << (len(requests) - 1).bit_length()) - len(requests)
        filled = requests + requests[:1] * spare
        sampling = [request.sampling for request in requests]
        sampling += [dataclasses.replace(sampling[0], max_new_tokens=0)] * spare
        found = self._search(
            self.engine.params,
            self.engine.stack_prompts(filled),
            np.concatenate([seen, seen[:1].repeat(spare, axis=0)]),
            stack_beam_params(sampling, prefix_length=1 if rules == "transformers-4" else 0),
            self.engine.stack_stops(filled),
            stop_texts,
            num_beams=sampling[0].num_beams,
            room=self.engine.room_behind(filled),
            rules=rules,
        )
        return hypotheses_of(found, [request.sampling.num_return_sequences for request in requests])


def hypotheses_of(found: Hypotheses, counts: Sequence[int]) -> list[list[Hypothesis]]:
    """On the host: the best of the first rows, so many of each."""
    rows = zip(*jax.device_get(found), strict=True)
    return [
        [
            Hypothesis(ids[:length].tolist(), float(score), "stop" if stopped else "length")
            for ids, length, score, stopped in itertools.islice(zip(*row, strict=True), count)
            if score > -np.inf
        ]
        for row, count in zip(rows, counts, strict=False)
    ]


def _search(
    engine: Intake,
    params: Params,
    prompts: Prompts,
    seen: Bool[Array, "b v"],
    beam_params: BeamParams,
    stops: Int[Array, "b k w"],
    stop_texts: Int[Array, "s v"] | None,
    *,
    num_beams: int,
    room: int,
    rules: Rules,
) -> Hypotheses:
    """The program: prompts are read, and searched behind their own last tokens."""
    begun = engine.begin(params, prompts, num_beams, room)
    return beam_search(
        begun.step,
        begun.cache,
        begun.logits,
        beam_params,
        stops,
        num_beams=num_beams,
        room=room,
        rules=rules,
        seen=seen,
        stop_texts=stop_texts,
        row_axis=begun.row_axis,
    )
