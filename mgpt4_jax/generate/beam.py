"""Beam search on the device: one compiled loop for every model that can take a step.

The ``num_beams`` likeliest beginnings of each row grow by a token at a time; one that completes a stop becomes a
hypothesis, scored by the sum of its log-probabilities over its length to the power of ``length_penalty``. The
search of a row ends when ``num_beams`` hypotheses are there and, as ``early_stopping`` has it, none can be bettered.

The programs that published models are used with differ in what they count; ``Rules`` names them:

| | ``transformers-4`` (``BeamSearchScorer``: LAVIS, MiniGPT-4) | ``transformers-5`` |
|---|---|---|
| length of a hypothesis | prefix and new tokens, without the stop that ended it | new tokens, with the stop |
| could an open beginning better the worst? | by the best candidate, stops too | by the best that goes on |
| at the longest answer | the stops of the ``n`` best, and the ``n`` best that go on | the ``n`` best |

The prefix is what stands before the first new token: the one dummy token that transformers 4 puts there when it
generates from embeddings, the start token of a decoder or of the Q-Former, or a prompt given as ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.generate.sampling import EARLY_STOPPING, SamplingParams, forbid_stops, penalize_repetition
from mgpt4_jax.generate.stop_texts import STOPPED, WITHIN
from mgpt4_jax.typing import Array, Bool, Float, Int

Rules = Literal["transformers-4", "transformers-5"]

Step = Callable[[Int[Array, " r"], Int[Array, ""], Any], tuple[Float[Array, "r v"], Any]]
"""``step(tokens, index, cache) -> (logits, cache)`` of all beams of all rows: ``tokens`` are the new tokens number
``index`` (the first is 0), of which the cache knows nothing yet."""

NOTHING = -jnp.inf  # the score of a place that holds no beginning, or no hypothesis


class BeamParams(NamedTuple):
    """The parameters of a search, one entry a row; a row of no new tokens is left out."""

    length_penalty: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]
    early_stopping: Int[Array, " b"]  # place in ``EARLY_STOPPING``
    min_new_tokens: Int[Array, " b"]
    max_new_tokens: Int[Array, " b"]
    prefix_length: Int[Array, " b"]  # at least 1 with transformers-4, 0 with transformers-5


class Hypotheses(NamedTuple):
    """The best answers of each row, best first. A place without one has the score minus infinity."""

    ids: Int[Array, "b n t"]  # with the stop that ended it; -1 behind the end
    lengths: Int[Array, "b n"]
    scores: Float[Array, "b n"]
    stopped: Bool[Array, "b n"]  # else it is as long as it may be


class _Beginnings(NamedTuple):
    """What may still grow: the ``n`` likeliest of each row, best first."""

    ids: Int[Array, "b n t"]  # behind as many -1 as the longest stop sequence has tokens
    scores: Float[Array, "b n"]  # sums of log-probabilities
    seen: Bool[Array, "b n v"]  # tokens that the repetition penalty weighs
    text: Int[Array, "b n"]  # row of the table of stop texts


class _Search(NamedTuple):
    step: Int[Array, ""]  # new tokens of each beginning
    beginnings: _Beginnings
    parents: Int[Array, "b n"]  # the beam that each beginning grew from
    found: Hypotheses
    done: Bool[Array, " b"]


class _Choice(NamedTuple):
    """Some continuations: a score, the beam that grows, and the token that it grows by."""

    scores: Float[Array, "b n"]
    beams: Int[Array, "b n"]
    tokens: Int[Array, "b n"]


def stack_beam_params(rows: list[SamplingParams], prefix_length: int) -> BeamParams:
    """Host arrays of several rows."""
    columns = {name: np.array([getattr(row, name) for row in rows], dtype) for name, dtype in _COLUMNS.items()}
    early = np.array([EARLY_STOPPING.index(row.early_stopping) for row in rows], np.int32)
    return BeamParams(**columns, early_stopping=early, prefix_length=np.full(len(rows), prefix_length, np.int32))


_COLUMNS = {
    "length_penalty": np.float32,
    "repetition_penalty": np.float32,
    "min_new_tokens": np.int32,
    "max_new_tokens": np.int32,
}


def beam_search(
    step: Step,
    cache: Any,
    first_logits: Float[Array, "b v"],
    params: BeamParams,
    stops: Int[Array, "b k w"],
    *,
    num_beams: int,
    room: int,
    rules: Rules = "transformers-4",
    seen: Bool[Array, "b v"] | None = None,
    stop_texts: Int[Array, "s v"] | None = None,
    row_axis: Any = 0,
) -> Hypotheses:
    """The ``num_beams`` best answers of each row; to be traced into a program with the model's ``step``.

    Args:
      cache: of the prompts, one entry a row along ``row_axis`` (a number, or a tree of them that ``cache`` begins
        like); it is repeated for the beams. What is the same for all beams of a row need not be in it.
      first_logits: after the prompts.
      stops: end-of-sequence ids and stop sequences (``sampling.pack_stops``). Those of one token are forbidden,
        the others overlooked, among the first ``min_new_tokens``.
      room: the largest ``max_new_tokens``. A smaller one of a row is kept, too.
      seen: what the repetition penalty weighs from the start; nothing if None.
      stop_texts: the table of ``stop_texts.stop_table``; a beginning whose text contains a stop ends there.
    """
    b, v = first_logits.shape
    width = stops.shape[2]
    search = _Search(
        step=jnp.int32(0),
        beginnings=_Beginnings(
            ids=jnp.full((b, num_beams, width + room), -1, jnp.int32),
            scores=jnp.full((b, num_beams), NOTHING).at[:, 0].set(0.0),
            seen=jnp.zeros((b, num_beams, v), bool) if seen is None else jnp.repeat(seen[:, None], num_beams, axis=1),
            text=jnp.zeros((b, num_beams), jnp.int32),
        ),
        parents=jnp.zeros((b, num_beams), jnp.int32),
        found=Hypotheses(
            ids=jnp.full((b, num_beams, width + room), -1, jnp.int32),
            lengths=jnp.zeros((b, num_beams), jnp.int32),
            scores=jnp.full((b, num_beams), NOTHING),
            stopped=jnp.zeros((b, num_beams), bool),
        ),
        done=jnp.asarray(params.max_new_tokens) < 1,
    )
    params, stops, stop_texts = jax.tree.map(jnp.asarray, (params, stops, stop_texts))
    advance = partial(_advance, params, stops, stop_texts, rules)
    axes = jax.tree.broadcast(row_axis, cache)
    cache = jax.tree.map(lambda leaf, axis: jnp.repeat(leaf, num_beams, axis=axis), cache, axes)

    def going(carry: tuple[_Search, Any]) -> Array:
        search, _ = carry
        return (search.step < room) & ~jnp.all(search.done)

    def body(carry: tuple[_Search, Any]) -> tuple[_Search, Any]:
        search, cache = carry
        cache = jax.tree.map(partial(_gather_rows, search.parents), cache, axes)
        newest = jax.lax.dynamic_index_in_dim(search.beginnings.ids, width + search.step - 1, axis=2, keepdims=False)
        logits, cache = step(newest.reshape(-1), search.step - 1, cache)
        return advance(search, logits.reshape(b, num_beams, v)), cache

    search = advance(search, jnp.repeat(first_logits[:, None], num_beams, axis=1))
    search, _ = jax.lax.while_loop(going, body, (search, cache))
    return search.found._replace(ids=search.found.ids[:, :, width:])


def _gather_rows(parents: Int[Array, "b n"], leaf: Array, axis: int) -> Array:
    """Beam ``j`` of each row becomes what beam ``parents[row, j]`` was; rows stay apart, so that they may be cut."""
    split = leaf.reshape(*leaf.shape[:axis], *parents.shape, *leaf.shape[axis + 1 :])
    take = jax.vmap(partial(jnp.take, axis=axis), in_axes=(axis, 0), out_axes=axis)
    return take(split, parents).reshape(leaf.shape)


def _advance(
    params: BeamParams,
    stops: Int[Array, "b k w"],
    stop_texts: Int[Array, "s v"] | None,
    rules: Rules,
    search: _Search,
    logits: Float[Array, "b n v"],
) -> _Search:
    """All beginnings one token longer; those that end are hypotheses."""
    beginnings, done, count = search.beginnings, search.done, search.step + 1
    n = logits.shape[1]
    scores = beginnings.scores[:, :, None] + _log_probabilities(params, stops, search, logits)
    ends, texts = _endings(params, stops, stop_texts, search, logits.shape[2])
    best, growing = _best(scores, n), _best(jnp.where(ends, NOTHING, scores), n)
    is_end = _of(best, ends)
    is_last = (count >= params.max_new_tokens)[:, None]
    counts_stop = rules == "transformers-5"

    def add(found: Hypotheses, choice: _Choice, where: Bool[Array, "b n"], stopped: Bool[Array, "b n"]) -> Hypotheses:
        length = params.prefix_length[:, None] + count - (0 if counts_stop else stopped)
        new = Hypotheses(
            ids=_extend(beginnings.ids, choice, stops.shape[2] + search.step),
            lengths=jnp.full_like(choice.tokens, count),
            scores=jnp.where(where, choice.scores / _weight(length, params.length_penalty[:, None]), NOTHING),
            stopped=stopped,
        )
        return _keep_best(found, new)

    ended = is_end | is_last if counts_stop else is_end
    found = add(search.found, best, ended & ~done[:, None], is_end)
    done |= _is_settled(params, found, (growing if counts_stop else best).scores[:, 0], count)
    done |= growing.scores[:, 0] == NOTHING
    if not counts_stop:
        found = add(found, growing, is_last & ~done[:, None], jnp.zeros_like(is_end))
    rows = jnp.arange(len(done))[:, None]
    return _Search(
        step=count,
        beginnings=_Beginnings(
            ids=_extend(beginnings.ids, growing, stops.shape[2] + search.step),
            scores=growing.scores,
            seen=beginnings.seen[rows, growing.beams].at[rows, jnp.arange(n), growing.tokens].set(True),
            text=_of(growing, texts),
        ),
        parents=growing.beams,
        found=found,
        done=done | is_last[:, 0],
    )


def _log_probabilities(
    params: BeamParams, stops: Int[Array, "b k w"], search: _Search, logits: Float[Array, "b n v"]
) -> Float[Array, "b n v"]:
    """Of the next tokens: penalised, and without stops while the answer is too short, in Hugging Face's order.

    That penalises the log-probabilities of beams, but the logits of greedy decoding, which one beam is.
    """
    b, n, v = logits.shape

    def flat(x: Array) -> Array:
        return jnp.repeat(x, n, axis=0)

    scores = logits.astype(jnp.float32).reshape(-1, v)
    if n > 1:
        scores = jax.nn.log_softmax(scores, axis=-1)
    scores = penalize_repetition(scores, search.beginnings.seen.reshape(-1, v), flat(params.repetition_penalty))
    scores = forbid_stops(scores, flat(stops), flat(search.step < params.min_new_tokens))
    if n == 1:
        scores = jax.nn.log_softmax(scores, axis=-1)
    return scores.reshape(b, n, v)


def _endings(
    params: BeamParams,
    stops: Int[Array, "b k w"],
    stop_texts: Int[Array, "s v"] | None,
    search: _Search,
    v: int,
) -> tuple[Bool[Array, "b n v"], Int[Array, "b n v"]]:
    """Which token would complete a stop of which beginning, and where it would leave it in the table of texts."""
    beginnings, width = search.beginnings, stops.shape[2]
    b, n = beginnings.scores.shape
    is_long_enough = (search.step >= params.min_new_tokens)[:, None, None]
    tail = jax.lax.dynamic_slice_in_dim(beginnings.ids, search.step + 1, width - 1, axis=2)
    before, last = stops[:, None, :, :-1], stops[:, None, :, -1]
    matches = jnp.all((before < 0) | (before == tail[:, :, None]), axis=-1) & (last >= 0) & is_long_enough
    index = jnp.arange(b)[:, None, None], jnp.arange(n)[:, None], jnp.where(matches, last, v)  # out of range: dropped
    ends = jnp.zeros((b, n, v), bool).at[index].set(True, mode="drop")
    if stop_texts is None:
        return ends, jnp.zeros((b, n, v), jnp.int32)
    texts = stop_texts[beginnings.text].astype(jnp.int32)
    is_stop = (texts == STOPPED) & is_long_enough
    # A text that begins within the least number of tokens stops nothing, not even with its end behind them.
    return ends | is_stop, jnp.where(is_long_enough, texts, WITHIN)


def _best(scores: Float[Array, "b n v"], count: int) -> _Choice:
    b, _, v = scores.shape
    top, index = jax.lax.top_k(scores.reshape(b, -1), count)
    return _Choice(top, index // v, index % v)


def _of(choice: _Choice, table: Array) -> Array:
    """[b n] entries of ``table`` [b n v] at the chosen beams and tokens."""
    return table[jnp.arange(len(table))[:, None], choice.beams, choice.tokens]


def _extend(ids: Int[Array, "b n t"], choice: _Choice, at: Int[Array, ""]) -> Int[Array, "b n t"]:
    grown = ids[jnp.arange(len(ids))[:, None], choice.beams]
    return jax.lax.dynamic_update_index_in_dim(grown, choice.tokens, at, axis=2)


def _keep_best(found: Hypotheses, new: Hypotheses) -> Hypotheses:
    """As many as ``found`` has places, best first."""
    both = Hypotheses(*(jnp.concatenate(pair, axis=1) for pair in zip(found, new, strict=True)))
    _, index = jax.lax.top_k(both.scores, found.scores.shape[1])
    rows = jnp.arange(len(index))[:, None]
    return Hypotheses(*(field[rows, index] for field in both))


def _weight(length: Array, penalty: Array) -> Array:
    return jnp.power(length.astype(jnp.float32), penalty)


def _is_settled(
    params: BeamParams, found: Hypotheses, best: Float[Array, " b"], count: Int[Array, ""]
) -> Bool[Array, " b"]:
    """Rows that have all their hypotheses, and need or can find no better ones.

    A single beam is greedy decoding: it ends at its first stop.
    """
    worst = found.scores[:, -1]
    if found.scores.shape[1] == 1:
        return worst > NOTHING
    looks_ahead = (params.early_stopping == EARLY_STOPPING.index("never")) & (params.length_penalty > 0)
    length = params.prefix_length + jnp.where(looks_ahead, params.max_new_tokens, count)
    is_hopeless = worst >= best / _weight(length, params.length_penalty)
    return (worst > NOTHING) & ((params.early_stopping == EARLY_STOPPING.index(True)) | is_hopeless)
