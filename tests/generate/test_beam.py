"""The search itself against one written with lists, on a small recurrent network: every rule, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgpt4_jax.generate.beam import BeamParams, Hypotheses, beam_search, stack_beam_params
from mgpt4_jax.generate.sampling import SamplingParams, pack_stops
from mgpt4_jax.generate.stop_texts import START, STOPPED, TokenTexts, stop_table

VOCAB, WIDTH, BEAMS, ROOM = 13, 8, 4, 9
EOS, FIRST = 2, 1
GAP = 1e-4  # between what is kept and what is dropped, so that rounding decides nothing
RULES = ("transformers-4", "transformers-5")


@dataclass(frozen=True)
class Network:
    """Logits of the next token from a state that each token moves."""

    inner: np.ndarray
    words: np.ndarray
    outer: np.ndarray

    def logits(self, state: Any) -> Any:
        return state @ self.outer

    def move(self, state: Any, tokens: Any, tanh: Any) -> Any:
        return tanh(state @ self.inner + self.words[tokens])


@pytest.fixture(scope="module")
def network() -> Network:
    rng = np.random.default_rng(3)
    shapes = ((WIDTH, WIDTH), (VOCAB, WIDTH), (WIDTH, VOCAB))
    return Network(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def search(
    network: Network, states: np.ndarray, rows: list[SamplingParams], rules: Any, beams: int = BEAMS, **options: Any
) -> Hypotheses:
    """All rows in one program; the state is the cache, transposed, so that its rows lie along axis 1."""
    stops = pack_stops([((EOS,), *row.stop_ids) for row in rows], 4, 3)
    params = stack_beam_params(rows, prefix_length=1 if rules == "transformers-4" else 0)

    @jax.jit
    def run(states: Any, params: BeamParams, stops: Any) -> Hypotheses:
        def step(tokens: Any, index: Any, cache: Any) -> Any:
            moved = jax.tree.map(jnp.asarray, network)
            state = moved.move(cache["state"].T, tokens, jnp.tanh)
            return moved.logits(state), {"state": state.T, "count": cache["count"] + 1}

        cache = {"state": states.T, "count": jnp.zeros(len(states))}
        return beam_search(
            step,
            cache,
            states @ jnp.asarray(network.outer),
            params,
            stops,
            num_beams=beams,
            room=ROOM,
            rules=rules,
            seen=jnp.broadcast_to(jnp.arange(VOCAB) == FIRST, (len(states), VOCAB)),
            row_axis={"state": 1, "count": 0},
            **options,
        )

    return jax.device_get(run(states, params, stops))


jax.tree_util.register_dataclass(Network, ["inner", "words", "outer"], [])


@dataclass
class Slow:
    """The same with lists: one row, all continuations sorted. ``gaps`` are the distances that decided something."""

    network: Network
    state: np.ndarray
    params: SamplingParams
    rules: str
    beams: int = BEAMS
    ends_text: Callable[[tuple[int, ...]], bool] = lambda ids: False
    gaps: list[float] = field(default_factory=list)

    def run(self) -> list[tuple[float, tuple[int, ...], bool]]:
        params, n = self.params, self.beams
        beginnings: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        found: list[tuple[float, tuple[int, ...], bool]] = []
        for count in range(1, params.max_new_tokens + 1):
            grown = sorted(itertools.chain(*(self.continue_(*beginning) for beginning in beginnings)), reverse=True)
            best = grown[:n]
            growing = [(score, ids) for score, ids in grown if not self.is_end(ids)][:n]
            self.note([score for score, _ in grown[: 3 * n]])
            is_last = count == params.max_new_tokens
            for score, ids in best:
                if self.is_end(ids) or (is_last and self.rules == "transformers-5"):
                    found.append(self.hypothesis(score, ids, self.is_end(ids)))
            found = self.cut(found)
            top = (best if self.rules == "transformers-4" else growing)[0][0]
            if self.is_settled(found, top, count):
                return found
            if is_last and self.rules == "transformers-4":
                found = self.cut(found + [self.hypothesis(score, ids, False) for score, ids in growing])
            beginnings = growing
        return found

    def continue_(self, score: float, ids: tuple[int, ...]) -> list[tuple[float, tuple[int, ...]]]:
        state = self.state.astype(np.float64)
        for token in ids:
            state = self.network.move(state, token, np.tanh)
        logs = self.network.logits(state)
        if self.beams > 1:
            logs = logs - np.log(np.exp(logs).sum())
        for token in {FIRST, *ids}:
            logs[token] *= self.params.repetition_penalty ** (1 if logs[token] < 0 else -1)
        if len(ids) < self.params.min_new_tokens:
            logs[[EOS, *(stop[0] for stop in self.params.stop_ids if len(stop) == 1)]] = -np.inf
        return [(score + log, (*ids, token)) for token, log in enumerate(logs) if log > -np.inf]

    def is_end(self, ids: tuple[int, ...]) -> bool:
        stops = ((EOS,), *self.params.stop_ids)
        is_stop = any(ids[-len(stop) :] == stop for stop in stops) or self.ends_text(ids)
        return is_stop and len(ids) > self.params.min_new_tokens

    def hypothesis(self, score: float, ids: tuple[int, ...], stopped: bool) -> tuple[float, tuple[int, ...], bool]:
        length = len(ids) + (1 - stopped if self.rules == "transformers-4" else 0)
        return score / length**self.params.length_penalty, ids, stopped

    def cut(self, found: list[Any]) -> list[Any]:
        found = sorted(found, reverse=True)
        self.note([score for score, _, _ in found])
        return found[: self.beams]

    def is_settled(self, found: list[Any], top: float, count: int) -> bool:
        if len(found) < self.beams:
            return False
        if self.params.early_stopping is True or self.beams == 1:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            count = self.params.max_new_tokens
        attainable = top / (count + (self.rules == "transformers-4")) ** self.params.length_penalty
        self.note([found[-1][0], attainable])
        return found[-1][0] >= attainable

    def note(self, scores: list[float]) -> None:
        self.gaps += [abs(a - b) for a, b in itertools.pairwise(scores)]


def random_rows(count: int) -> tuple[np.ndarray, list[SamplingParams]]:
    """Starts, and parameters that differ in every way from row to row."""
    rng = np.random.default_rng(5)
    choices = itertools.cycle(itertools.product((0.0, 1.0, -1.0, 2.0, 0.6), (False, True, "never")))
    rows = []
    for penalty, early in itertools.islice(choices, count):
        rows.append(
            SamplingParams(
                max_new_tokens=int(rng.integers(3, ROOM + 1)),
                min_new_tokens=int(rng.integers(0, 4)),
                repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
                stop_ids=(((7,), (4, 9), (3, 5, 8))[: rng.integers(0, 4)]),
                num_beams=BEAMS,
                length_penalty=penalty,
                early_stopping=early,
            )
        )
    return rng.normal(size=(count, WIDTH)).astype(np.float32) * 2, rows


def assert_equal(found: Hypotheses, row: int, slow: Slow, expected: list[Any]) -> None:
    assert min(slow.gaps) > GAP, f"row {row} is tied: choose another seed"
    lengths = [len(ids) for _, ids, _ in expected]
    assert found.lengths[row].tolist() == lengths
    assert [tuple(ids[:size]) for ids, size in zip(found.ids[row].tolist(), lengths, strict=True)] == [
        ids for _, ids, _ in expected
    ]
    assert all((ids[size:] == -1).all() for ids, size in zip(found.ids[row], lengths, strict=True))
    assert found.stopped[row].tolist() == [stopped for _, _, stopped in expected]
    np.testing.assert_allclose(found.scores[row], [score for score, _, _ in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", RULES)
def test_rows_of_all_kinds(network: Network, rules: str) -> None:
    states, rows = random_rows(60)
    found = search(network, states, rows, rules)
    ends = []
    compared = 0
    for row, params in enumerate(rows):
        slow = Slow(network, states[row], params, rules)
        expected = slow.run()
        if min(slow.gaps) > GAP:
            assert_equal(found, row, slow, expected)
            compared += 1
            ends += [(len(ids), stopped) for _, ids, stopped in expected]
    assert compared > 40
    assert len(set(ends)) > 10, "the rows do not differ enough to tell the rules apart"


@pytest.mark.parametrize("rules", RULES)
def test_a_search_goes_on_as_long_as_it_may_find_better(network: Network, rules: str) -> None:
    """Many stops: all hypotheses are there early, and whether to go on is decided by what could come."""
    rng = np.random.default_rng(11)
    states = np.tile(rng.normal(size=(150, WIDTH)).astype(np.float32) * 2, (2, 1))
    rows = [
        SamplingParams(
            max_new_tokens=ROOM,
            stop_ids=((7,), (8,), (9,)),
            num_beams=BEAMS,
            length_penalty=penalty,
            early_stopping=early,
        )
        for penalty, early in ((1.0, False), (0.6, "never"))
        for _ in range(150)
    ]
    found = search(network, states, rows, rules)
    compared = 0
    for row, params in enumerate(rows):
        slow = Slow(network, states[row], params, rules)
        expected = slow.run()
        if min(slow.gaps) > GAP:
            assert_equal(found, row, slow, expected)
            compared += 1
    assert compared > 200


def test_the_rules_differ(network: Network) -> None:
    states, rows = random_rows(60)
    old, new = (search(network, states, rows, rules) for rules in RULES)
    assert not np.array_equal(old.lengths, new.lengths)


@pytest.mark.parametrize("rules", RULES)
def test_one_beam_is_greedy(network: Network, rules: str) -> None:
    states, rows = random_rows(30)
    found = search(network, states, rows, rules, beams=1)
    for row, params in enumerate(rows):
        slow = Slow(network, states[row], params, rules, beams=1)
        ids: tuple[int, ...] = ()
        while len(ids) < params.max_new_tokens and not slow.is_end(ids):
            ids = max(slow.continue_(0.0, ids))[1]
        assert tuple(found.ids[row, 0, : found.lengths[row, 0]].tolist()) == ids
        assert found.stopped[row, 0] == slow.is_end(ids)


def test_a_row_finds_what_it_finds_alone(network: Network) -> None:
    states, rows = random_rows(6)
    together = search(network, states, rows, "transformers-4")
    for row in range(len(rows)):
        alone = search(network, states[row : row + 1], rows[row : row + 1], "transformers-4")
        np.testing.assert_array_equal(together.ids[row], alone.ids[0])
        np.testing.assert_array_equal(together.lengths[row], alone.lengths[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-6)


def test_a_row_of_no_new_tokens_finds_nothing(network: Network) -> None:
    states, rows = random_rows(3)
    found = search(network, states, [rows[0], SamplingParams(max_new_tokens=0), rows[2]], "transformers-4")
    assert (found.scores[1] == -np.inf).all() and (found.ids[1] == -1).all()
    assert (found.scores[[0, 2]] > -np.inf).all()


# --- texts that stop -----------------------------------------------------------------------------------------


class Words:
    """A tokeniser of a few pieces; a blank at the very beginning is not shown, and <s>, </s> are hidden."""

    pieces = (" ", "<s>", "</s>", "a", "b", " ab", "##", "#", " b#", "ab#", "\n", "bb", "##a")
    vocab_size, hidden_ids, unstable_ids = len(pieces), frozenset({1, 2}), frozenset()

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids if i not in self.hidden_ids).removeprefix(" ")


STOPS = ("###", "ba", " a", "b\na")


def said(ids: tuple[int, ...], minimum: int) -> str:
    """The text in which a stop counts: behind the least number of tokens."""
    words = Words()
    return words.decode(ids).removeprefix(words.decode(ids[:minimum])) if minimum else words.decode(ids)


@pytest.mark.parametrize("rules", RULES)
def test_texts_stop_a_beam_wherever_tokens_end(network: Network, rules: str) -> None:
    states, rows = random_rows(60)
    found = search(network, states, rows, rules, stop_texts=stop_table(TokenTexts(Words()), STOPS, VOCAB))
    stopped_by_text = compared = 0
    for row, params in enumerate(rows):

        def ends(ids: tuple[int, ...], minimum: int = params.min_new_tokens) -> bool:
            return any(stop in said(ids, minimum) for stop in STOPS)

        slow = Slow(network, states[row], params, rules, ends_text=ends)
        expected = slow.run()
        if min(slow.gaps) > GAP:
            assert_equal(found, row, slow, expected)
            compared += 1
            stopped_by_text += sum(ends(ids) for _, ids, _ in expected)
    assert compared > 40 and stopped_by_text > 20


def test_the_table_follows_every_text(network: Network) -> None:
    """Random texts, token by token, against looking for the stops in what was said."""
    table, words = stop_table(TokenTexts(Words()), STOPS, VOCAB + 3), Words()
    assert table.shape[0] & (table.shape[0] - 1) == 0
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(500):
        row, ids = START, []
        for token in rng.integers(0, VOCAB + 3, 12):
            row = int(table[row, token])
            ids += [int(token)] * int(token < VOCAB)
            assert (row == STOPPED) == any(stop in words.decode(ids) for stop in STOPS), words.decode(ids)
            if row == STOPPED:
                stopped += 1
                break
    assert 50 < stopped < 500


def test_a_search_that_can_go_nowhere_ends(network: Network) -> None:
    """Every token stops: the best become hypotheses, and nothing goes on."""
    states, rows = random_rows(4)
    rows = [SamplingParams(max_new_tokens=ROOM, num_beams=BEAMS) for _ in rows]
    table = np.full((2, VOCAB), STOPPED, np.int16)
    found = search(network, states, rows, "transformers-4", stop_texts=table)
    assert (found.lengths == 1).all() and found.stopped.all()
    best = np.argsort(-states @ network.outer, axis=1)[:, :BEAMS]
    np.testing.assert_array_equal(found.ids[:, :, 0], best)
