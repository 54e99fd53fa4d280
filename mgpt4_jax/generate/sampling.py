"""Choosing the next token: pure functions of float32 logits with parameters per row.

Every parameter is an array of the batch, so that changing one compiles nothing and each row has its own.
The order of Hugging Face's logits processors is kept: repetition penalty, minimum of new tokens,
temperature, top-k, top-p. The random key of a row is its seed folded with the number of tokens that it
has generated: a result depends neither on the row's place nor on its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgpt4_jax.errors import UserError
from mgpt4_jax.typing import Array, Bool, Float, Int

MAX_NEW_TOKENS = 100_000
MAX_STOPS = 8  # texts, or sequences of ids, of one request
STOP_WIDTH = 16  # tokens in one sequence
MAX_BEAMS = 32
EARLY_STOPPING = (False, True, "never")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Build it with ``sampling_params``, which checks every value."""

    max_new_tokens: int = 300
    min_new_tokens: int = 0
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off; sees generated tokens only, never the prompt
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    stop_ids: tuple[tuple[int, ...], ...] = ()  # sequences of token ids that end the answer
    num_beams: int = 1  # over 1: beam search, see ``generate/beam.py``
    num_return_sequences: int = 1  # of the beams: the best one and others
    length_penalty: float = 1.0  # of beams: over 0 prefers long answers, below 0 short ones
    early_stopping: bool | str = False
    """Of beams, once there are as many answers: True stops; False stops when no beginning scores better as it is;
    "never", when none could."""

    def with_stops(self, sequences: tuple[tuple[int, ...], ...]) -> SamplingParams:
        return dataclasses.replace(self, stop_ids=sequences)


PARAMETER_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def sampling_params(values: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
    """Checked parameters; a name or value that makes no sense raises ``UserError`` with one line."""
    if unknown := sorted(set(values) - set(PARAMETER_NAMES)):
        raise UserError(f"unknown parameter {unknown[0]!r}; known: {', '.join(PARAMETER_NAMES)}")
    checked = {name: _CHECKS[name](name, value) for name, value in values.items()}
    params = dataclasses.replace(defaults or SamplingParams(), **checked)
    if params.min_new_tokens > params.max_new_tokens:
        raise UserError(f"min_new_tokens {params.min_new_tokens} is more than max_new_tokens {params.max_new_tokens}")
    if params.num_return_sequences > params.num_beams:
        raise UserError(f"num_return_sequences {params.num_return_sequences} is more than num_beams {params.num_beams}")
    if params.num_beams > 1 and params.temperature > 0:
        raise UserError(
            f"num_beams {params.num_beams} searches and draws nothing: set temperature to 0, or num_beams to 1"
        )
    return params


def _integer(low: int, high: int) -> Any:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise UserError(f"{name} must be a whole number from {low} to {high}, got {_show(value)}")
        return int(value)

    return check


def _number(low: float, high: float, *, above: bool = False) -> Any:
    def check(name: str, value: Any) -> float:
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise UserError(f"{name} must be a number {bounds}, got {_show(value)}")
        return float(value)

    return check


def _early_stopping(name: str, value: Any) -> bool | str:
    if isinstance(value, (bool, str)) and value in EARLY_STOPPING:
        return value
    raise UserError(f'{name} must be true, false or "never", got {_show(value)}')


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item for item in items):
        raise UserError(f"{name} must be a text or a list of texts that are not empty, got {_show(value)}")
    return _few(name, tuple(items))


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    items = [value] if isinstance(value, int) else value
    if not isinstance(items, (list, tuple)):
        raise UserError(f"{name} must be a list of token ids or of lists of them, got {_show(value)}")
    sequences = [(item,) if isinstance(item, int) else item for item in items]
    for sequence in sequences:
        is_list = isinstance(sequence, (list, tuple)) and 0 < len(sequence) <= STOP_WIDTH
        if not is_list or not all(type(i) is int and 0 <= i < 2**31 for i in sequence):
            raise UserError(f"{name} must be a list of token ids or of lists of them, got {_show(value)}")
    return _few(name, tuple(tuple(sequence) for sequence in sequences))


def _few(name: str, items: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(items) > MAX_STOPS:
        raise UserError(f"{name} has {len(items)} entries; at most {MAX_STOPS} are allowed")
    return items


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_CHECKS: dict[str, Any] = {
    "max_new_tokens": _integer(1, MAX_NEW_TOKENS),
    "min_new_tokens": _integer(0, MAX_NEW_TOKENS),
    "temperature": _number(0.0, 100.0),
    "top_k": _integer(0, 2**31 - 1),
    "top_p": _number(0.0, 1.0, above=True),
    "repetition_penalty": _number(0.0, 100.0, above=True),
    "seed": _integer(0, 2**32 - 1),
    "stop": _strings,
    "stop_ids": _sequences,
    "num_beams": _integer(1, MAX_BEAMS),
    "num_return_sequences": _integer(1, MAX_BEAMS),
    "length_penalty": _number(-100.0, 100.0),
    "early_stopping": _early_stopping,
}


class Sampling(NamedTuple):
    """The parameters of ``SamplingParams`` that the device needs, one entry a row."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]
    min_new_tokens: Int[Array, " b"]
    max_new_tokens: Int[Array, " b"]
    seed: Int[Array, " b"]


_FIELD_DTYPES = {"temperature": np.float32, "top_p": np.float32, "repetition_penalty": np.float32, "seed": np.uint32}


def stack_sampling(rows: list[SamplingParams]) -> Sampling:
    """Host arrays of several rows."""
    columns = {
        name: np.array([getattr(row, name) for row in rows], _FIELD_DTYPES.get(name, np.int32))
        for name in Sampling._fields
    }
    return Sampling(**columns)


def next_tokens(
    logits: Float[Array, "b v"],
    seen: Bool[Array, "b v"],
    generated: Int[Array, " b"],
    stops: Int[Array, "b k w"],
    sampling: Sampling,
) -> Int[Array, " b"]:
    """The next token of each row: the largest score where ``temperature`` is 0, else one drawn.

    ``seen`` marks the tokens that the repetition penalty weighs, ``generated`` counts the new tokens so
    far, and ``stops`` holds the stop sequences (see ``ends_with_stop``).
    """
    scores = penalize_repetition(logits, seen, sampling.repetition_penalty)
    scores = forbid_stops(scores, stops, generated < sampling.min_new_tokens)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def draw(scores: Array) -> Array:
        scaled = scores / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        kept = filter_top(scaled, sampling.top_k, sampling.top_p)
        return jnp.where(sampling.temperature > 0, draw_tokens(kept, sampling.seed, generated), greedy)

    # Drawing costs more than the rest of this function: skipped while every row is greedy.
    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda _: greedy, scores)


def penalize_repetition(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: Float[Array, " b"]
) -> Float[Array, "b v"]:
    """Scores of seen tokens are divided by ``penalty`` where positive, multiplied where negative (CTRL)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid_stops(
    logits: Float[Array, "b v"], stops: Int[Array, "b k w"], rows: Bool[Array, " b"]
) -> Float[Array, "b v"]:
    """Minus infinity for the tokens that end an answer alone, in the marked ``rows``."""
    last = stops[:, :, -1]
    alone = (last >= 0) if stops.shape[2] == 1 else (last >= 0) & (stops[:, :, -2] < 0)
    blocked = jnp.where(alone & rows[:, None], last, logits.shape[1])  # out of range: dropped
    index = jnp.arange(logits.shape[0])[:, None]
    return logits.at[index, blocked].set(-jnp.inf, mode="drop")


def filter_top(logits: Float[Array, "b v"], top_k: Int[Array, " b"], top_p: Float[Array, " b"]) -> Float[Array, "b v"]:
    """Minus infinity outside the ``top_k`` largest and the smallest set whose probability reaches ``top_p``.

    The set is cut at a value, so tokens that tie with the last one kept are kept; one is always kept. The
    value is bisected, which on a CPU is 20 (1 row) to 80 times (8 rows) faster than sorting 32000 tokens.
    """
    order = _order(logits)
    count = jnp.where(top_k > 0, top_k, logits.shape[1])
    kth = _bisect(lambda cut: jnp.sum(order >= cut, axis=-1) >= count, len(count))
    weights = jax.nn.softmax(jnp.where(order >= kth, logits, -jnp.inf), axis=-1)
    nucleus = _bisect(lambda cut: jnp.sum(jnp.where(order >= cut, weights, 0), axis=-1) >= top_p, len(top_p))
    nucleus = jnp.where(top_p[:, None] < 1, nucleus, kth)  # rounding must not cut what is switched off
    return jnp.where(order >= jnp.maximum(kth, nucleus), logits, -jnp.inf)


def _order(x: Float[Array, "b v"]) -> Int[Array, "b v"]:
    """Integers that are ordered as the numbers are."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # -0 becomes 0
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _bisect(holds: Callable[[Int[Array, "b 1"]], Bool[Array, " b"]], rows: int) -> Int[Array, "b 1"]:
    """The largest integer of each row for which ``holds``, which is true up to some value and false beyond."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        enough = holds(middle)[:, None]
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    ends = jnp.full((rows, 1), limits.min), jnp.full((rows, 1), limits.max)
    return jax.lax.fori_loop(0, 32, halve, ends)[0]


def draw_tokens(logits: Float[Array, "b v"], seeds: Int[Array, " b"], generated: Int[Array, " b"]) -> Int[Array, " b"]:
    """One token a row, by the row's own key."""

    def draw(row: Array, seed: Array, count: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), count), row)

    return jax.vmap(draw)(logits, seeds, generated).astype(jnp.int32)


def ends_with_stop(recent: Int[Array, "b w"], stops: Int[Array, "b k w"]) -> Bool[Array, " b"]:
    """Whether the last tokens of a row equal one of its stop sequences.

    Sequences are padded on the left with -1, which matches anything; a row of -1 alone is no stop. ::

        recent 5 9, stops [[-1 9] [-1 -1]]: True     recent 9 5, same stops: False
    """
    matches = jnp.all((stops < 0) | (stops == recent[:, None, :]), axis=-1)
    return jnp.any(matches & (stops[:, :, -1] >= 0), axis=-1)


def pack_stops(rows: list[tuple[tuple[int, ...], ...]], count: int, width: int) -> Int[np.ndarray, "b k w"]:
    """Stop sequences of several rows as one array, padded with -1 (on the left within a sequence)."""
    packed = np.full((len(rows), count, width), -1, np.int32)
    for row, sequences in enumerate(rows):
        for index, sequence in enumerate(sequences):
            packed[row, index, width - len(sequence) :] = sequence
    return packed
