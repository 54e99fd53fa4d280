"""Texts that stop an answer, as a table that a device can follow token by token.

A text may be spelled by tokens in many ways, begin within one and end within another. The table knows, for
each beginning of a stop text that an answer may end with, what every token makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mgpt4_jax.data.text import Tokenizer
from mgpt4_jax.typing import Int

STOPPED = -1  # an entry of the table: the text now contains a stop
START = 0  # a row: nothing is said yet, and a blank at the beginning will not be shown
WITHIN = 1  # a row: the answer ends with the beginning of no stop
_SMALLEST = 16  # rows of a table, which are padded to a power of two


class TokenTexts:
    """What each token adds to an answer: at its beginning, and behind other words.

    A token that holds a part of a character only counts as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        anchor = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isalpha())
        before = tokenizer.decode([anchor])
        ids = range(tokenizer.vocab_size)
        self.hidden = sorted(index for index in tokenizer.hidden_ids if index in ids)
        self.first = ["" if index in tokenizer.hidden_ids else tokenizer.decode([index]) for index in ids]
        self.later = [
            "" if index in tokenizer.hidden_ids else tokenizer.decode([anchor, index]).removeprefix(before)
            for index in ids
        ]


def stop_table(texts: TokenTexts, stops: Sequence[str], vocab_size: int) -> Int[np.ndarray, "s v"]:
    """For each row (``START``, ``WITHIN``, and the proper beginnings of ``stops``) the row behind each token.

    ``vocab_size`` is the model's; ids that the tokeniser lacks say nothing.
    """
    begun = ["", *sorted({stop[:size] for stop in stops for size in range(1, len(stop))})]
    rows = {text: row for row, text in enumerate(begun, WITHIN)}
    letters = sorted(set("".join(stops)))
    moves = np.array([[_move(rows, stops, text + letter) for letter in letters] for text in begun], np.int16)
    count = 1 << (max(len(rows) + 1, _SMALLEST) - 1).bit_length()
    table = np.full((count, vocab_size), WITHIN, np.int16)
    table[: len(rows) + 1] = np.arange(len(rows) + 1)[:, None]
    later = min(len(texts.later), vocab_size)
    table[WITHIN : len(rows) + 1, :later] = _follow(texts.later[:later], letters, moves)
    table[START, :later] = _follow(texts.first[:later], letters, moves)[0]
    table[START, [index for index in texts.hidden if index < later]] = START
    return table


def _move(rows: dict[str, int], stops: Sequence[str], text: str) -> int:
    """The row of the longest end of ``text`` that begins a stop."""
    if any(stop in text for stop in stops):
        return STOPPED
    return next(rows[text[at:]] for at in range(len(text) + 1) if text[at:] in rows)


def _follow(texts: Sequence[str], letters: Sequence[str], moves: Int[np.ndarray, "s c"]) -> Int[np.ndarray, "s v"]:
    """Where each row of ``moves`` (the first is ``WITHIN``) is led by each text, a letter of all texts at a time."""
    codes = {letter: code for code, letter in enumerate(letters)}
    other = len(letters)
    moves = np.concatenate([moves, np.full((len(moves), 1), WITHIN, np.int16)], axis=1)  # a letter of no stop
    longest = max(map(len, texts), default=0)
    spelled = np.full((len(texts), longest), -1, np.int16)
    for index, text in enumerate(texts):
        spelled[index, : len(text)] = [codes.get(letter, other) for letter in text]
    rows = np.broadcast_to(np.arange(WITHIN, WITHIN + len(moves), dtype=np.int16)[:, None], (len(moves), len(texts)))
    for place in range(longest):
        code = spelled[:, place]
        on = (rows != STOPPED) & (code >= 0)
        rows = np.where(on, moves[rows - WITHIN, code], rows)  # entries that are not on are read, and dropped
    return rows
