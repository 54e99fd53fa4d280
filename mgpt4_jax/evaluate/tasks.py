"""Benchmarks in their own files: COCO and NoCaps captions, VQAv2, OK-VQA, GQA, and LAVIS's lists of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgpt4_jax.data.text import clean_caption
from mgpt4_jax.errors import UserError
from mgpt4_jax.evaluate.answers import exact_match, vqa_accuracy
from mgpt4_jax.evaluate.metrics import caption_scores

PROMPTS = {"caption": "a photo of", "vqa": "Question: {} Short answer:"}
DOMAIN_METRICS = ("CIDEr", "Bleu_4", "ROUGE_L")
RESULT_NAMES = {
    "caption": ("image_id", "caption"),
    "vqa": ("question_id", "answer"),
    "gqa": ("questionId", "prediction"),
}
"""What a result is called in the benchmark's own file: its id, and what was answered."""


@dataclass(frozen=True)
class Item:
    """One picture to caption, or one question. ``references`` are empty where the benchmark keeps them."""

    id: Any
    image: str  # empty of a question in words alone
    question: str = ""
    references: tuple[str, ...] = ()
    kind: str | None = None  # VQAv2's answer_type, NoCaps's domain
    names: tuple[str, ...] = ()  # what its caption, or a long answer, should name


@dataclass(frozen=True)
class Scored:
    """``whole`` by metric; ``each`` the number that the page shows and sorts by, named ``shown``."""

    whole: dict[str, float] = field(default_factory=dict)
    each: dict[Any, float] = field(default_factory=dict)
    shown: str = ""


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({str(error)[:80]})") from error


def read_captions(path: Path, images: Path) -> list[Item]:
    """Pictures to caption, of an annotation file of COCO or NoCaps, the test pictures of Karpathy's splits (Flickr30k,
    COCO), or a LAVIS list; pictures lie below ``images``.
    """
    values = read_json(path)
    if isinstance(values, dict):
        if is_split(values):
            return _checked(path, "image_id", _split_items(path, values["images"], images))
        known: dict[Any, list[str]] = {}
        for entry in _entries(path, "annotations", values.get("annotations", [])):
            identity = _get(path, "annotations", entry, "image_id")
            known.setdefault(identity, []).append(_text(path, "annotations", entry, "caption"))
        found = [
            Item(
                _get(path, "images", entry, "id"),
                str(images / _text(path, "images", entry, "file_name")),
                references=tuple(known.pop(entry["id"], ())),
                kind=_kind(entry, "domain"),
            )
            for entry in _entries(path, "images", values.get("images"))
        ]
        if known:
            raise UserError(f"{path}: annotations name the image_id {next(iter(known))!r}, which images do not have")
        return _checked(path, "image_id", found)
    merged: dict[Any, Item] = {}
    for entry in _entries(path, "list", values):
        image = _text(path, "list", entry, "image")
        identity = entry.get("image_id", entry.get("img_id", entry.get("id", _number_of(image))))
        texts = _texts(path, entry.get("caption", []), "caption")
        names = _texts(path, entry.get("names", []), "names")
        if identity in merged:  # one line for each caption
            texts = (*merged[identity].references, *texts)
        kind = _kind(entry, "domain")
        merged[identity] = Item(identity, str(images / image), references=texts, kind=kind, names=names)
    return _checked(path, "image_id", merged.values())


def is_split(values: Mapping[str, Any]) -> bool:
    """Whether this is one of Karpathy's files, ``dataset_flickr30k.json`` or ``dataset_coco.json``."""
    entries = values.get("images")
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], dict) and "sentences" in entries[0]


def _split_items(path: Path, values: Any, images: Path) -> list[Item]:
    found = []
    for entry in _entries(path, "images", values):
        if entry.get("split") == "test":
            folder, name = entry.get("filepath", ""), _text(path, "images", entry, "filename")
            sentences = _entries(path, "sentences", entry.get("sentences"))
            texts = tuple(_text(path, "sentences", sentence, "raw") for sentence in sentences)
            identity = _get(path, "images", entry, "cocoid" if "cocoid" in entry else "imgid")
            found.append(Item(identity, str(images / folder / name), references=texts))
    return found


def result_names(task: str, path: Path) -> tuple[str, str]:
    """How the results of this benchmark's file call an id and its answer."""
    values = read_json(path) if task == "vqa" else None
    return RESULT_NAMES["gqa" if isinstance(values, dict) and "questions" not in values else task]


def read_questions(path: Path, annotations: Path | None, images: Path, pattern: str) -> list[Item]:
    """Questions of VQAv2 and OK-VQA (answers in ``annotations``), of GQA, or of a LAVIS list.

    Args:
      pattern: the file of a picture by its ``image_id``, for example ``COCO_val2014_{:012d}.jpg``.
    """
    values = read_json(path)
    if isinstance(values, dict) and "questions" in values:
        entries = _entries(path, "questions", values["questions"])
    elif isinstance(values, dict):  # GQA: by question_id
        entries = [{**entry, "question_id": key} for key, entry in values.items() if isinstance(entry, dict)]
        entries = _entries(path, "questions", entries)
    else:
        entries = _entries(path, "list", values)
    answers = {} if annotations is None else _annotations(annotations)
    found = []
    for entry in entries:
        identity = _get(path, "questions", entry, "question_id")
        if "image" in entry:
            image = "" if entry["image"] is None else _text(path, "questions", entry, "image")
        else:
            name = "imageId" if "imageId" in entry else "image_id"
            image = _file_name(path, pattern, _get(path, "questions", entry, name))
        if annotations is not None and identity not in answers:
            raise UserError(f"{annotations}: has no answers to question_id {identity!r}")
        own = _texts(path, entry.get("answer", entry.get("answers", [])), "answer")
        known, kind = answers.get(identity, (own, _kind(entry, "answer_type")))
        question, names = _text(path, "questions", entry, "question"), _texts(path, entry.get("names", []), "names")
        found.append(Item(identity, str(images / image) if image else "", question, known, kind, names))
    return _checked(path, "question_id", found)


@dataclass(frozen=True)
class Pairs:
    """Pictures with their texts: of each picture the indices of its texts, of each text that of its picture."""

    images: list[str]
    texts: list[str]
    texts_of: list[list[int]]
    image_of: list[int]


def read_pairs(path: Path, images: Path) -> Pairs:
    """A LAVIS list of ``{"image", "caption": [...]}`` (Flickr30k, COCO), or what else ``read_captions`` reads.

    Texts are cleaned as captions are for training, as LAVIS's retrieval data sets clean them.
    """
    pairs = Pairs([], [], [], [])
    for index, item in enumerate(read_captions(path, images)):
        if not item.references:
            raise UserError(f"{path}: the picture {item.image} has no caption; every picture needs one to be found")
        pairs.images.append(item.image)
        pairs.texts_of.append(list(range(len(pairs.texts), len(pairs.texts) + len(item.references))))
        pairs.texts.extend(map(clean_caption, item.references))
        pairs.image_of.extend([index] * len(item.references))
    return pairs


def score_captions(items: Sequence[Item], answers: dict[Any, str]) -> Scored:
    """CIDEr-D, BLEU, ROUGE-L of pictures with references; ``named``: percent of all ``names`` that captions hold.

    Of NoCaps also for each domain, as if its pictures were all there are: CIDEr weighs words by their references alone.
    """
    known = {item.id: item.references for item in items if item.references}
    if not known:
        return Scored()
    scores = caption_scores({key: answers[key] for key in known}, known)
    whole = scores.whole | _named(items, answers)
    for kind in sorted({item.kind for item in items if item.kind and item.references}):
        some = [item.id for item in items if item.kind == kind and item.references]
        part = caption_scores({key: answers[key] for key in some}, {key: known[key] for key in some}).whole
        whole |= {f"{metric}_{kind}": part[metric] for metric in DOMAIN_METRICS}
    return Scored(whole, {key: each["CIDEr"] for key, each in scores.each.items()}, "CIDEr")


def score_answers(items: Sequence[Item], answers: dict[Any, str]) -> Scored:
    """Accuracy in percent: of people's answers by the VQA rule, of a single reference by an exact match.

    ``named`` as of captions, where answers have ``names``.
    """
    known = [item for item in items if item.references]
    if not known:
        return Scored()
    if all(len(item.references) == 1 for item in known):
        each = {item.id: 100 * exact_match(answers[item.id], item.references[0]) for item in known}
        whole = {"exact_match": _mean(each.values())} | _by_kind("exact_match", known, each) | _named(items, answers)
        return Scored(whole, each, "exact_match")
    each = {item.id: 100 * vqa_accuracy(answers[item.id], item.references) for item in known}
    lavis = [100 * vqa_accuracy(answers[item.id], item.references, "lavis") for item in known]
    whole = {"accuracy": _mean(each.values()), "accuracy_lavis": _mean(lavis)}
    return Scored(whole | _by_kind("accuracy", known, each), each, "accuracy")


def _named(items: Sequence[Item], answers: dict[Any, str]) -> dict[str, float]:
    named = [name.lower() in answers[item.id].lower() for item in items for name in item.names]
    return {"named": 100 * _mean(named)} if named else {}


def _by_kind(metric: str, items: Sequence[Item], each: Mapping[Any, float]) -> dict[str, float]:
    kinds = sorted({item.kind for item in items if item.kind})
    return {f"{metric}_{kind}": _mean([each[item.id] for item in items if item.kind == kind]) for kind in kinds}


SCORES: dict[str, Callable[[Sequence[Item], dict[Any, str]], Scored]] = {
    "caption": score_captions,
    "vqa": score_answers,
}


def prompt_of(task: str, item: Item, prompt: str) -> str:
    """The words that the model reads: ``{}`` in ``prompt`` is the question, which otherwise follows it."""
    if task == "caption":
        return prompt
    return prompt.replace("{}", item.question) if "{}" in prompt else f"{prompt} {item.question}".strip()


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- files --------------------------------------------------------------------------------------------------


def _annotations(path: Path) -> dict[Any, tuple[tuple[str, ...], str | None]]:
    values = read_json(path)
    values = values.get("annotations") if isinstance(values, dict) else values
    found = {}
    for entry in _entries(path, "annotations", values):
        given = entry.get("answers")
        if isinstance(given, list):
            given = [one.get("answer") if isinstance(one, dict) else one for one in given]
        identity = _get(path, "annotations", entry, "question_id")
        found[identity] = (_texts(path, given, "answers"), _kind(entry, "answer_type"))
    return found


def _entries(path: Path, key: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(entry, dict) for entry in values):
        raise UserError(f"{path}: {key!r} must be a list of objects")
    return values


def _get(path: Path, key: str, entry: dict[str, Any], name: str) -> Any:
    value = entry.get(name)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UserError(f"{path}: an entry of {key} has no usable {name!r}: {str(entry)[:80]}")
    return value


def _kind(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    return value if isinstance(value, str) else None


def _text(path: Path, key: str, entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise UserError(f"{path}: an entry of {key} lacks the text {name!r}: {str(entry)[:80]}")
    return value


def _texts(path: Path, value: Any, name: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise UserError(f"{path}: {name!r} must be a text or a list of texts, got {str(value)[:80]}")
    return tuple(values)


def _number_of(image: str) -> Any:
    """COCO's id of a file such as ``COCO_val2014_000000391895.jpg``; of other names the name."""
    last = Path(image).stem.split("_")[-1]
    return int(last) if last.isascii() and last.isdecimal() else last


def _file_name(path: Path, pattern: str, identity: Any) -> str:
    try:
        return pattern.format(identity)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: the image_id {identity!r} does not go into --image-name {pattern!r}") from error


def _checked(path: Path, name: str, items: Iterable[Item]) -> list[Item]:
    items = list(items)
    if not items:
        raise UserError(f"{path}: holds nothing to evaluate")
    seen: set[Any] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{path}: the {name} {item.id!r} stands twice; ids must differ")
        seen.add(item.id)
    return items
