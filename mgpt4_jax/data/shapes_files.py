"""The small world as files: what `mgpt4 data shapes` writes, in the formats that data sets and tokenisers have.

    tokenizer/, qformer_tokenizer/   SentencePiece as LLaMA's, word pieces as BERT's
    statements.jsonl, talks.jsonl,
    told_facts.jsonl, chats.jsonl    texts for the language model
    singles.jsonl, singles/          pictures of one thing with a caption: the vision tower begins with them
    pairs.jsonl, pairs/              pictures with a caption: the Q-Former's and the projection's
    facts.jsonl                      the same pictures with a caption of single facts
    curated.jsonl, curated/          pictures with an instruction and its answer: fine-tuning
    test/, unseen/                   pictures never seen, of seen pairs of attributes and of unseen ones:
                                     captions.json and pairs_N.json (lists as LAVIS's), questions.json (as VQAv2's);
                                     questions_in_words.json and captions_in_words.json ask the language model
                                     alone, blind/ are the same pictures for one who sees nothing: the mean of those
                                     in pairs/

No scene to measure on is one to learn from. A seed is a world, to the byte.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image

from mgpt4_jax.data import shapes_words as words
from mgpt4_jax.data.shapes import Part, Scene, different_scenes, draw_picture, draw_scene, every_word
from mgpt4_jax.errors import UserError

VOCABULARY = 768
AMONG = 100
"""Pairs of a file for retrieval: a picture is looked for among so many."""
MOST_TESTS = 5_000
"""Scenes to measure on are all different, and a tenth of all seen pairs' scenes is some 6,800."""
_MARKS = ("<Img>", "</Img>", "###")
_WORDS = re.compile(r"[a-z]+|[^a-z\s]")
_PARTS = ("texts", "pairs", "curated", "test", "unseen", "singles", "facts")
_TESTS: tuple[Part, ...] = ("test", "unseen")
_TEXTS = {"statements": words.statement, "talks": words.talk, "told_facts": words.told_facts, "chats": words.chat}
_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Sizes:
    """How many there are of each.

    Args:
      texts: of each kind for the language model.
      singles: pictures of one thing with a caption.
      pairs: pictures of one to three things with a caption.
      curated: pictures with an instruction and its answer.
      test: scenes to measure on, and as many again of unseen pairs of attributes.
      questions: of each kind, asked about the scenes to measure on.
    """

    texts: int = 60_000
    singles: int = 6_000
    pairs: int = 12_000
    curated: int = 6_000
    test: int = 500
    questions: int = 250

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise UserError(f"--{name} {size}: must be 1 or more")
        if self.test > MOST_TESTS:
            raise UserError(f"--test {self.test}: there are not many more different scenes; at most {MOST_TESTS:,}")


def train_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """``tokenizer.model`` and its ``tokenizer_config.json``, as LLaMA has them: BPE, bytes for what it never saw."""
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[*_MARKS, *every_word()],
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | roles, indent=1) + "\n")


def train_word_pieces(path: Path, texts: Iterable[str]) -> None:
    """``vocab.txt`` as BERT has it: the words of ``texts`` and what stands between them."""
    found: set[str] = set()
    for text in texts:
        found.update(_WORDS.findall(text.lower()))
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{piece}\n" for piece in (*_PIECES, *sorted(found))))


def write_world(
    out: Path, *, seed: int = 0, sizes: Sizes = Sizes(), report: Callable[[int, int], None] | None = None
) -> None:
    """Write everything below ``out``, an empty folder or none yet; see the head of this file."""
    out.mkdir(parents=True, exist_ok=True)
    # Numbers of their own for each part: more of one changes none of the others.
    draws = {name: np.random.default_rng((seed, number)) for number, name in enumerate(_PARTS)}
    _write_texts(out, sizes.texts, draws["texts"])
    paint = _Painter(out, sizes.singles + sizes.pairs + sizes.curated + 2 * sizes.test, report)
    rng = draws["singles"]
    singles = paint("singles", (draw_scene(rng, most=1) for _ in range(sizes.singles)), rng)
    _write_lines(out / "singles.jsonl", (_captioned(path, words.caption(scene, rng)) for path, scene in singles))
    rng = draws["pairs"]
    painted = paint("pairs", (draw_scene(rng) for _ in range(sizes.pairs)), rng)
    pairs = [(path, scene, words.caption(scene, rng)) for path, scene in painted]
    _write_lines(out / "pairs.jsonl", (_captioned(path, text) for path, _, text in pairs))
    rng = draws["facts"]
    _write_lines(out / "facts.jsonl", (_captioned(path, words.facts(scene, rng)) for path, scene, _ in pairs))
    rng = draws["curated"]
    curated = paint("curated", (draw_scene(rng) for _ in range(sizes.curated)), rng)
    _write_lines(out / "curated.jsonl", (_curated(path, scene, rng) for path, scene in curated))
    blind = mean_picture(sorted((out / "pairs").iterdir()))
    for part in _TESTS:
        rng = draws[part]
        chosen = list(paint(f"{part}/images", different_scenes(sizes.test, rng, part), rng))
        _write_tests(out / part, chosen, sizes.questions, rng)
        _write_blind(out / part, blind)


def _write_texts(out: Path, count: int, rng: np.random.Generator) -> None:
    """What the language model reads, and the tokenisers, which are made of a part of it."""
    texts = {kind: [write(draw_scene(rng), rng) for _ in range(count)] for kind, write in _TEXTS.items()}
    some = [*texts["statements"][:2500], *texts["talks"][:2500]]  # with every word that there is
    train_tokenizer(out / "tokenizer", some)
    train_word_pieces(out / "qformer_tokenizer" / "vocab.txt", some)
    for kind, written in texts.items():
        _write_lines(out / f"{kind}.jsonl", (_captioned(None, text) for text in written))


class _Painter:
    """Draws scenes below ``out``, and tells how far it is of ``total``."""

    def __init__(self, out: Path, total: int, report: Callable[[int, int], None] | None) -> None:
        self._out, self._total, self._report, self._done = out, total, report, 0

    def __call__(self, folder: str, chosen: Iterable[Scene], rng: np.random.Generator) -> Iterator[tuple[str, Scene]]:
        """(path of the picture from ``out``, scene) of each."""
        (self._out / folder).mkdir(parents=True)
        for number, scene in enumerate(chosen):
            path = f"{folder}/{number:05d}.png"
            draw_picture(scene, rng).save(self._out / path)
            self._done += 1
            if self._report is not None:
                self._report(self._done, self._total)
            yield path, scene


def mean_picture(paths: Sequence[Path]) -> Image.Image:
    """What all pictures have in common: to be shown it is to see nothing."""
    total = sum(np.asarray(Image.open(path), np.float64) for path in paths)
    return Image.fromarray(np.round(total / len(paths)).astype(np.uint8))


def _write_blind(folder: Path, picture: Image.Image) -> None:
    """``blind/`` beside ``images/``: the same names, and one picture under all of them."""
    (folder / "blind").mkdir()
    for path in (folder / "images").iterdir():
        picture.save(folder / "blind" / path.name)


def _captioned(path: str | None, text: str) -> dict[str, Any]:
    return {"image": path, "caption": text}


def _curated(path: str, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """A third is described at length, the rest is asked about."""
    question = words.ask(scene, rng, "describe" if rng.random() < 1 / 3 else None)
    return {"image": path, "instruction": question.text, "answer": question.answer}


def _write_tests(folder: Path, painted: Sequence[tuple[str, Scene]], questions: int, rng: np.random.Generator) -> None:
    """Files as the benchmarks have them, of the pictures of ``folder``; ``names`` are what a caption should name."""
    names = [Path(path).name for path, _ in painted]
    scenes = [scene for _, scene in painted]
    captions = [
        {"image": name, "image_id": number, "caption": [words.caption(scene, rng)], "names": [t.name for t in scene]}
        for number, (name, scene) in enumerate(zip(names, scenes, strict=True))
    ]
    (folder / "captions.json").write_text(json.dumps(captions, indent=0))
    for start in range(0, len(captions), AMONG):
        (folder / f"pairs_{start // AMONG}.json").write_text(json.dumps(captions[start : start + AMONG], indent=0))
    seen: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for turn, kind in enumerate(words.ASKED):
        for number in range(turn * questions, (turn + 1) * questions):  # where the last kind ended: all are asked about
            scene, name = scenes[number % len(scenes)], names[number % len(scenes)]
            question = words.ask(scene, rng, kind)
            asked = {"question_id": len(seen), "answer": question.answer, "answer_type": kind}
            seen.append(asked | {"image": name, "question": question.text})
            told.append(asked | {"image": None, "question": words.asked_in_words(scene, rng, question)})
    (folder / "questions.json").write_text(json.dumps(seen, indent=0))
    (folder / "questions_in_words.json").write_text(json.dumps(told, indent=0))
    described = [_described_in_words(caption, scene, rng) for caption, scene in zip(captions, scenes, strict=True)]
    (folder / "captions_in_words.json").write_text(json.dumps(described, indent=0))


def _described_in_words(caption: dict[str, Any], scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """What ``captions.json`` measures, asked of the language model alone."""
    asked = words.Question("describe", words.DESCRIBE[0], words.description(scene, rng))
    question = words.asked_in_words(scene, rng, asked)
    number, names = caption["image_id"], caption["names"]
    return {"question_id": number, "image": None, "question": question, "answer": asked.answer, "names": names}


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
