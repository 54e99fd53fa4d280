"""A search of ``transformers`` 5 and one of ours, side by side: ids, scores, order, and why each answer ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mgpt4_jax.generate.beam_engine import Hypothesis

BEAMS, NEW = 5, 12
GAP = 2e-5  # between what is kept and what is dropped; float32 sums differ by some 1e-6


def their_beams(
    model: Any, options: dict[str, Any], ends: Sequence[int], inputs: dict[str, torch.Tensor], before: int
) -> list[list[Hypothesis]]:
    """The answers of transformers, ``before`` of whose ids stand before the first new one.

    Fails where a choice between two continuations was a matter of rounding.
    """
    found = model.generate(
        **inputs,
        **options,
        eos_token_id=list(ends),
        max_new_tokens=NEW,
        num_beams=BEAMS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = torch.stack(found.scores).numpy()
    assert_no_ties(scores.reshape(len(scores), -1, BEAMS, scores.shape[-1]), ends)
    answers = []
    for ids, score in zip(found.sequences[:, before:].tolist(), found.sequences_scores.tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        answers.append(Hypothesis(ids[:end], score, "stop" if ids[end - 1] in ends else "length"))
    count = options.get("num_return_sequences", 1)
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def assert_no_ties(steps: np.ndarray, ends: Sequence[int]) -> None:
    """Replays a search from its log-probabilities [t b n v]: what is kept is better than what is dropped."""
    running, vocab = np.full(steps.shape[1:3], -1e9), steps.shape[-1]
    running[:, 0] = 0
    for logs in steps.astype(np.float64):
        for row, totals in enumerate((running[:, :, None] + logs).reshape(len(running), -1)):
            order = np.argsort(-totals)
            going = order[~np.isin(order % vocab, ends)]
            for kept in (order, going):
                assert totals[kept[BEAMS - 1]] - totals[kept[BEAMS]] > GAP
            running[row] = totals[going[:BEAMS]]


def assert_same(ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]], tolerance: float = 1e-5) -> None:
    assert [[(h.ids, h.finish_reason) for h in row] for row in ours] == [
        [(h.ids, h.finish_reason) for h in row] for row in theirs
    ]
    for our_row, their_row in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            [h.score for h in our_row], [h.score for h in their_row], rtol=tolerance, atol=tolerance
        )
