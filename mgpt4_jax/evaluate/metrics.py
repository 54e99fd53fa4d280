"""Captions against references (CIDEr-D, BLEU, ROUGE-L), recall of retrieval, perplexity: numbers from words and arrays.

CIDEr-D, BLEU and ROUGE-L agree with the public COCO caption tools on text that is tokenised. The tools tokenise with
a Java program; ``tokenize`` follows its rules for what captions hold: lower case, clitics apart ("do n't", "dog 's"),
brackets named, punctuation dropped. It differs in rare matters: of abbreviations it knows single letters ("u.s.") and
a few titles only, it leaves a slash within a word, and keeps e-mail and web addresses in pieces.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgpt4_jax.errors import UserError

MAX_NGRAM = 4
SIGMA = 6.0  # of CIDEr-D's penalty for another length, in bigrams
BETA = 1.2  # of ROUGE-L: how much recall counts beside precision
TINY, SMALL = 1e-15, 1e-9  # of BLEU, so that nothing is divided by zero

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": " ... ", "–": " -- ", "—": " -- "})
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_JOINED = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
}
_TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}"  # u.s.
    r"|(?:mr|mrs|ms|dr|jr|sr|vs)\.(?=\s|$)"
    r"|\d+(?:[.,:/]\d+)+"  # 3.5, 10:30, 1,000, 1/2
    r"|n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)"
    r"|\w+(?:['&/-]\w+)*"
    r"|\.{2,}|-{2,}|\S"
)

NGram = tuple[str, ...]


def tokenize(text: str) -> list[str]:
    """Lower-case tokens of a caption without punctuation."""
    tokens = _TOKEN.findall(_CLITIC.sub(r" \1", text.lower().translate(_QUOTES)))
    kept = [_BRACKETS.get(token, token) for token in tokens if token != '"' and token not in PUNCTUATION]
    kept = [token for token in kept if set(token) not in ({"."}, {"-"})]
    return " ".join(_JOINED.get(token, token) for token in kept).split()


@dataclass(frozen=True)
class CaptionScores:
    """``whole`` by the name of the metric; ``each`` the same for a picture (BLEU: of its one sentence)."""

    whole: dict[str, float]
    each: dict[Hashable, dict[str, float]]


def caption_scores(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> CaptionScores:
    """CIDEr, BLEU-1..4 and ROUGE-L of one caption for each picture.

    Only pictures with a candidate are scored, as the COCO tools do. CIDEr weighs words by how many of these pictures'
    references have them, so it is 0 for one picture.

    Raises:
      UserError: nothing to score; a candidate without references.
    """
    if not candidates:
        raise UserError("there is no caption to score")
    for identity in candidates:
        if not references.get(identity):
            raise UserError(f"image_id {identity!r}: has a caption, and no reference to score it by")
    words = {identity: tokenize(text) for identity, text in candidates.items()}
    known = {identity: [tokenize(text) for text in references[identity]] for identity in candidates}
    return token_scores(words, known)


def token_scores(
    candidates: Mapping[Any, Sequence[str]], references: Mapping[Any, Sequence[Sequence[str]]]
) -> CaptionScores:
    """As ``caption_scores``, of tokens."""
    ids = list(candidates)
    bleu, bleus = _bleu([candidates[i] for i in ids], [references[i] for i in ids])
    cider = _cider([candidates[i] for i in ids], [references[i] for i in ids])
    rouge = [_rouge(candidates[i], references[i]) for i in ids]
    whole = {"CIDEr": float(np.mean(cider)), **bleu, "ROUGE_L": float(np.mean(rouge))}
    each = {
        identity: {"CIDEr": float(cider[index]), **bleus[index], "ROUGE_L": rouge[index]}
        for index, identity in enumerate(ids)
    }
    return CaptionScores(whole, each)


def _ngrams(words: Sequence[str]) -> Counter[NGram]:
    return Counter(
        tuple(words[start : start + size]) for size in range(1, MAX_NGRAM + 1) for start in range(len(words) - size + 1)
    )


# --- BLEU ---------------------------------------------------------------------------------------------------


def _bleu(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Of the corpus and of each sentence; the reference of the closest length counts, the shorter of two."""
    counts = [_bleu_counts(*pair) for pair in zip(candidates, references, strict=True)]
    correct, guessed = (sum(np.array([count[part] for count in counts])) for part in (0, 1))
    whole = _bleu_of(correct, guessed, sum(count[2] for count in counts), sum(count[3] for count in counts))
    return whole, [_bleu_of(*count) for count in counts]


def _bleu_counts(words: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(right n-grams, n-grams, length, length of the reference) of one sentence."""
    most: Counter[NGram] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    correct = np.zeros(MAX_NGRAM)
    for ngram, count in (_ngrams(words) & most).items():
        correct[len(ngram) - 1] += count
    guessed = np.maximum(len(words) - np.arange(MAX_NGRAM), 0)
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return correct, guessed, len(words), closest


def _bleu_of(correct: np.ndarray, guessed: np.ndarray, length: int, reference: int) -> dict[str, float]:
    product = 1.0
    scores: dict[str, float] = {}
    ratio = (length + TINY) / (reference + SMALL)
    penalty = math.exp(1 - 1 / ratio) if 1 / ratio < 700 and ratio < 1 else float(ratio >= 1)
    for index in range(MAX_NGRAM):
        product *= (correct[index] + TINY) / (guessed[index] + SMALL)
        scores[f"Bleu_{index + 1}"] = float(product ** (1 / (index + 1)) * penalty)
    return scores


# --- CIDEr-D ------------------------------------------------------------------------------------------------


def _cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    known = [[_ngrams(reference) for reference in group] for group in references]
    found_in: Counter[NGram] = Counter()  # in how many pictures' references
    for group in known:
        found_in.update(set().union(*group))
    log_pictures = math.log(len(candidates))

    def weigh(counts: Counter[NGram]) -> Counter[NGram]:
        return Counter({ngram: n * (log_pictures - math.log(max(found_in[ngram], 1))) for ngram, n in counts.items()})

    scores: list[float] = []
    for words, group in zip(candidates, known, strict=True):
        mine = _Vector(weigh(_ngrams(words)), len(words))
        sums = sum(
            _similarity(mine, _Vector(weigh(counts), len(reference)))
            for counts, reference in zip(group, references[len(scores)], strict=True)
        )
        scores.append(10 * sums / len(group))
    return scores


class _Vector:
    """Weights of n-grams, the norm for each size, and the length as the original counts it: in bigrams."""

    def __init__(self, weights: Counter[NGram], num_words: int) -> None:
        self.weights, self.length = weights, max(num_words - 1, 0)
        squares = np.zeros(MAX_NGRAM)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        self.norms = np.sqrt(squares)


def _similarity(mine: _Vector, other: _Vector) -> float:
    """The mean over n-gram sizes of the cosine, with counts clipped, times the penalty for the length."""
    products = np.zeros(MAX_NGRAM)
    for ngram, weight in mine.weights.items():
        theirs = other.weights[ngram]
        products[len(ngram) - 1] += min(weight, theirs) * theirs
    norms = mine.norms * other.norms
    cosines = products / np.where(norms > 0, norms, 1)
    return float(np.mean(cosines)) * math.exp(-((mine.length - other.length) ** 2) / (2 * SIGMA**2))


# --- ROUGE-L ------------------------------------------------------------------------------------------------


def _rouge(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F of the best precision and the best recall, which need not be of the same reference. No words: one empty."""
    words = list(words) or [""]
    common = [(_longest_common(words, list(reference) or [""]), len(reference) or 1) for reference in references]
    precision = max(count / len(words) for count, _ in common)
    recall = max(count / length for count, length in common)
    if not (precision and recall):
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        corner = 0
        for index, other in enumerate(second, 1):
            corner, row[index] = row[index], corner + 1 if word == other else max(row[index], row[index - 1])
    return row[-1]


# --- retrieval and perplexity -------------------------------------------------------------------------------


def recalls(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    texts_of: Sequence[Sequence[int]],
    image_of: Sequence[int],
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, by LAVIS's names: ``txt_*`` finds texts for pictures, ``img_*`` pictures.

    Args:
      image_to_text: scores ``[images texts]``.
      text_to_image: scores ``[texts images]``.
      texts_of: of each picture the indices of its texts; the best of them counts.
      image_of: of each text the index of its picture.

    Of equal scores the later index comes first, as in the original (an ascending order, reversed).
    """
    texts = np.array([rank[list(own)].min() for rank, own in zip(_ranks(image_to_text), texts_of, strict=True)])
    images = np.array([rank[own] for rank, own in zip(_ranks(text_to_image), image_of, strict=True)])
    scores: dict[str, float] = {}
    for name, ranks in (("txt", texts), ("img", images)):
        at = {f"{name}_r{k}": 100.0 * int((ranks < k).sum()) / len(ranks) for k in (1, 5, 10)}
        scores |= at | {f"{name}_r_mean": sum(at.values()) / 3}
    mean = (scores["txt_r_mean"] + scores["img_r_mean"]) / 2
    return {**scores, "r_mean": mean, "agg_metrics": scores["txt_r_mean"]}


def _ranks(scores: np.ndarray) -> np.ndarray:
    """The place of each column in its row, from 0."""
    order = np.argsort(scores, axis=1, kind="stable")[:, ::-1]
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None], axis=1)
    return ranks


def perplexity(losses: Sequence[float], weights: Sequence[float]) -> float:
    """exp of the mean loss of a token, from means of batches and how many tokens each had."""
    total = float(np.sum(weights))
    if not total > 0:
        raise UserError("there is no token to predict, so no perplexity")
    return float(np.exp(np.dot(np.asarray(losses, np.float64), np.asarray(weights, np.float64)) / total))
