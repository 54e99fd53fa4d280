"""One evaluation: a directory that a second run goes on in, with results in the benchmark's format, scores and a page.

``settings.json`` says what was evaluated and how; another evaluation is refused in the same directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.data.prompts import Template
from mgpt4_jax.errors import UserError
from mgpt4_jax.evaluate.metrics import recalls
from mgpt4_jax.evaluate.page import Example, Table, spread, write_examples
from mgpt4_jax.evaluate.retrieval import Retriever, best_pairs, match_in_parts, rerank
from mgpt4_jax.evaluate.tasks import RESULT_NAMES, SCORES, Item, Pairs, Scored, prompt_of
from mgpt4_jax.generate.answer import Answerer
from mgpt4_jax.generate.batch import run_file
from mgpt4_jax.generate.sampling import SamplingParams
from mgpt4_jax.progress import Report

TITLES = {"caption": "Captions", "vqa": "Answers", "retrieval": "Retrieval"}
NOTE = "Examples from the worst to the best: picture, answer, references."
RETRIEVAL_NOTE = (
    "Pictures from the worst to the best: the three texts that came first, ✓ if they are the picture's own, with their "
    "score (similarity, weighed, and matching logit, added); then its own texts."
)


def open_directory(out: Path, settings: Mapping[str, Any]) -> None:
    """Make ``out``, or see that it holds the same evaluation.

    Raises:
      UserError: it holds another one, or cannot be written.
    """
    text = json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n"
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_file(path, text)
        before = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: is broken; choose another --out") from error
    now = json.loads(text)
    if before != now:
        names = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
        raise UserError(f"{out}: holds an evaluation with another {min(names)}; choose another --out")


def write_file(path: Path, text: str) -> None:
    """Appears under its name when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def write_json(path: Path, values: Any) -> None:
    write_file(path, json.dumps(values, ensure_ascii=True, indent=1) + "\n")


def run_answers(
    answerer: Answerer,
    task: str,
    items: Sequence[Item],
    out: Path,
    *,
    prompt: str,
    sampling: SamplingParams,
    template: Template | None = None,
    names: tuple[str, str] | None = None,
    examples: int = 24,
    report: Report | None = None,
) -> tuple[dict[str, float], int]:
    """Caption or answer every item that has no answer in ``out`` yet, and score all.

    Writes ``answers.jsonl`` (as it goes), ``results.json`` in the benchmark's format, ``scores.json``, ``page.html``.

    Args:
      names: of ``tasks.result_names``, where they are not those of the task.

    Returns:
      The scores, and how many items failed: their answer counts as empty.
    """
    lines = [json.dumps(_asked(item, prompt_of(task, item, prompt))) for item in items]
    questions, answered = out / "questions.jsonl", out / "answers.jsonl"
    write_file(questions, "\n".join(lines) + "\n")
    summary = run_file(answerer, questions, answered, defaults=sampling, template=template, report=report)
    records = [json.loads(line) for line in answered.read_bytes().splitlines()]  # a text may hold U+2028
    answers = {record["id"]: record["text"] for record in records}
    identity, answer = names or RESULT_NAMES[task]
    write_json(out / "results.json", [{identity: item.id, answer: answers[item.id]} for item in items])
    scored = SCORES[task](items, answers)
    counts = {"items": len(items), "failed": summary.failed}
    write_json(out / "scores.json", {**scored.whole, **counts})
    shown = _answer_examples(items, answers, scored, examples)
    write_examples(out / "page.html", TITLES[task], list({**scored.whole, **counts}.items()), shown, NOTE)
    return scored.whole, summary.failed


def _asked(item: Item, prompt: str) -> dict[str, Any]:
    image = {"image": str(Path(item.image).absolute())} if item.image else {}
    return {"id": item.id, **image, "prompt": prompt}


def _answer_examples(items: Sequence[Item], answers: Mapping[Any, str], scored: Scored, limit: int) -> list[Example]:
    """From the worst to the best."""
    ordered = sorted(items, key=lambda item: scored.each.get(item.id, 0.0))
    chosen = [ordered[index] for index in spread(len(ordered), limit)]
    return [
        Example(
            str(item.id),
            item.image,
            item.question,
            [answers[item.id]],
            item.references,
            f"{scored.shown} {scored.each[item.id]:.3g}" if item.id in scored.each else "no reference",
        )
        for item in chosen
    ]


def run_retrieval(
    retriever: Retriever,
    pairs: Pairs,
    out: Path,
    *,
    k: int = 128,
    weight: float = 1.0,
    examples: int = 24,
    report: Report | None = None,
) -> dict[str, float]:
    """Find texts by pictures and pictures by texts; ``itc_*`` are the recalls before the best are matched.

    Writes ``recalls.json`` (as LAVIS's ``evaluate.txt``), ``scores.json`` and ``page.html``; ``matched/`` holds the
    logits of pairs that a second run need not match again, not even for another ``weight`` of the similarity.
    """
    features = retriever.features(pairs.images, pairs.texts, report)
    similarity = features.similarity
    chosen = best_pairs(similarity, k)
    logits = match_in_parts(retriever, features, chosen, out / "matched", report)
    to_text, to_image = rerank(similarity, chosen, logits, k, weight)
    found = recalls(to_text, to_image, pairs.texts_of, pairs.image_of)
    first = recalls(similarity, similarity.T, pairs.texts_of, pairs.image_of)
    scores = {**found, **{f"itc_{name}": value for name, value in first.items()}}
    counts = {"images": len(pairs.images), "texts": len(pairs.texts)}
    write_json(out / "recalls.json", found)
    write_json(out / "scores.json", {**scores, **counts, "similarity_weight": weight})
    shown = _retrieval_examples(pairs, to_text, examples)
    write_examples(out / "page.html", TITLES["retrieval"], _recall_table(scores), shown, RETRIEVAL_NOTE)
    return scores


def _recall_table(scores: Mapping[str, float]) -> Table:
    """What a person compares, side by side: both directions, before and after matching, in percent."""
    rows: list[list[str | float]] = [["", "R@1", "R@5", "R@10", "mean"]]
    for what, name in (("texts of a picture", "txt"), ("pictures of a text", "img")):
        for how, prefix in (("by contrast", "itc_"), ("matched again", "")):
            rows.append([f"{what}, {how}", *(scores[f"{prefix}{name}_{end}"] for end in ("r1", "r5", "r10", "r_mean"))])
    return rows


def _retrieval_examples(pairs: Pairs, to_text: np.ndarray, limit: int) -> list[Example]:
    """Pictures with the texts that were found first, from the worst: those whose own text came late, or just so."""
    lead = [_lead(scores, own) for scores, own in zip(to_text, pairs.texts_of, strict=True)]
    ordered, shown = np.argsort(lead, kind="stable"), []
    for index in ordered[spread(len(ordered), limit)]:
        own = set(pairs.texts_of[index])
        best = np.argsort(to_text[index], kind="stable")[::-1][:3]
        texts = [f"{'✓' if text in own else '✗'} {to_text[index, text]:.3f} {pairs.texts[text]}" for text in best]
        wrong = [place for place, text in enumerate(best) if text not in own]
        right = "wrong" if 0 in wrong else "right"
        path, references = pairs.images[index], [pairs.texts[text] for text in pairs.texts_of[index]]
        shown.append(Example(Path(path).name, path, "", texts, references, right, wrong))
    return shown


def _lead(scores: np.ndarray, own: Sequence[int]) -> float:
    """By how much the best of a picture's own texts scores above the best of the others."""
    others = np.delete(scores, own)
    return float(scores[list(own)].max() - others.max()) if len(others) else 0.0
