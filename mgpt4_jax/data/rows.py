"""From a picture's words to one row of a batch: what is read of them, and what is to be predicted.

A builder holds the directory of its tokeniser and not the tokeniser, which cannot be sent to a worker process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import TrainingSequence, training_sequence, wrap_instruction
from mgpt4_jax.data.prompts import IMAGE, MARKED_IMAGE, Template
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.text import BertTokenizer, Tokenizer, clean_caption, load_bert_tokenizer, load_llama_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import TextConfig

BUCKET_STEP = 32


Extras = dict[str, tuple[tuple[int, ...], str]]
"""Fields of a batch, with the shape of one row and the dtype."""


class Rows(Protocol):
    """Turns samples into sequences; sent to worker processes."""

    @property
    def text(self) -> TextConfig: ...

    @property
    def tokenizer(self) -> Tokenizer | BertTokenizer: ...

    @property
    def pad_id(self) -> int:
        """What a row is padded with."""
        ...

    @property
    def extras(self) -> Extras:
        """What a batch holds besides the fields that all have; told without the tokeniser."""
        ...

    def draw_instruction(self, rng: np.random.Generator) -> str | None:
        """The one instruction of a batch; None: it has none."""
        ...

    def row(self, sample: Sample, drawn: str | None = None) -> TrainingSequence:
        """The sequence of ``sample``; a bad one raises ``UserError``."""
        ...

    def filling_row(self) -> TrainingSequence:
        """A row that only fills a batch: it predicts nothing, and has a position to attend to."""
        ...

    def facts(self) -> list[Any]:
        """What decides the rows besides ``text``, as JSON: part of a run's fingerprint."""
        ...


@dataclass(frozen=True)
class RowBuilder:
    """Sequences of the language model: the picture, what is asked of it, the answer.

    Args:
      tokenizer_dir: as ``load_llama_tokenizer`` reads it.
      objective: ``align``: the picture alone stands before the caption. ``finetune``: an instruction does, in the
        template.
      clean_captions: as BLIP-2's caption processor; never an answer to an instruction of the sample's own.
    """

    tokenizer_dir: str | Path
    text: TextConfig
    template: Template
    tokens_per_image: int
    objective: Literal["align", "finetune"] = "align"
    clean_captions: bool = False

    def __post_init__(self) -> None:
        if self.objective == "finetune" and self.template.images_first:
            raise UserError(
                f"the template {self.template.name!r} puts pictures before the text, which training does not; "
                "set text.template to another one"
            )

    @property
    def tokenizer(self) -> Tokenizer:
        return _load_tokenizer(str(self.tokenizer_dir))

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def extras(self) -> Extras:
        return {}

    def facts(self) -> list[Any]:
        return [self.template.training, self.objective, self.clean_captions, self.tokens_per_image]

    def filling_row(self) -> TrainingSequence:
        """It begins as every row does."""
        return lone_row(self.tokenizer.bos_id)

    def draw_instruction(self, rng: np.random.Generator) -> str | None:
        """The one instruction of a batch, as MiniGPT-4's ``random.choice`` draws it; None: it has none."""
        choices = self.text.instructions
        return choices[int(rng.integers(len(choices)))] if choices else None

    def row(self, sample: Sample, drawn: str | None = None) -> TrainingSequence:
        """The sequence of ``sample``; its own instruction wins over the ``drawn`` one.

        A caption over ``max_text_length`` tokens loses its end, the end symbol with it, as the originals have it.

        Raises:
          UserError: the sample has nothing to predict, is not text, is longer than ``text.max_length``, or its
            instruction shows more pictures than there are.
        """
        row = training_sequence(
            self.tokenizer,
            self._condition(sample, drawn),
            words_of(sample, self.clean_captions),
            end_symbol=self.text.end_symbol,
            max_text_length=self.text.max_text_length,
            tokens_per_image=self.tokens_per_image,
            num_images=0 if sample.image is None else 1,
        )
        if len(row) > self.text.max_length:
            raise UserError(f"the sample takes {len(row)} positions, over text.max_length = {self.text.max_length}")
        return row

    def _condition(self, sample: Sample, drawn: str | None) -> str | None:
        """What stands before the answer, in the template; None: the picture alone."""
        if self.objective == "align":
            return None
        instruction = drawn if sample.instruction is None else sample.instruction
        if instruction is None:
            return None
        if sample.image is None and sample.instruction is None:
            instruction = instruction.replace(MARKED_IMAGE, "").replace(IMAGE, "").strip()
        elif sample.image is not None and IMAGE not in instruction:
            instruction = f"{MARKED_IMAGE} {instruction}"
        return wrap_instruction(self.template, instruction)


def buckets_of(text: TextConfig) -> tuple[int, ...]:
    """The lengths that rows are padded to, ascending: the configured ones, or multiples of 32 up to the longest row."""
    if text.buckets:
        return tuple(sorted(set(text.buckets)))
    return (*range(BUCKET_STEP, text.max_length, BUCKET_STEP), text.max_length)


@dataclass(frozen=True)
class PairBuilder:
    """Captions as the Q-Former reads them beside a picture: ``[CLS] caption [SEP]`` (LAVIS ``Blip2Qformer``).

    Args:
      tokenizer_dir: as ``load_bert_tokenizer`` reads it.
      clean_captions: as BLIP-2's caption processor.
      names_pictures: rows say which picture they show, as several captions of one do in retrieval.
    """

    tokenizer_dir: str | Path
    text: TextConfig
    clean_captions: bool = True
    names_pictures: bool = False

    @property
    def tokenizer(self) -> BertTokenizer:
        return _load_bert(str(self.tokenizer_dir))

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def extras(self) -> Extras:
        return {"image_ids": ((2,), "int32")} if self.names_pictures else {}

    def facts(self) -> list[Any]:
        return ["pairs", self.clean_captions, *(["image_id"] if self.names_pictures else [])]

    def filling_row(self) -> TrainingSequence:
        number = np.zeros(2, np.int32) if self.names_pictures else None
        return dataclasses.replace(lone_row(self.tokenizer.cls_id), image_id=number)

    def draw_instruction(self, rng: np.random.Generator) -> str | None:
        return None

    def row(self, sample: Sample, drawn: str | None = None) -> TrainingSequence:
        """The caption, which loses its end beyond ``max_text_length`` tokens; its pieces are all predicted."""
        if sample.image is None:
            raise UserError("there is no picture, and a pair is a picture and its caption")
        words = words_of(sample, self.clean_captions)
        ids = np.array(self.tokenizer.encode(words, max_length=self.text.max_text_length), np.int32)
        targets = np.concatenate([[IGNORED], ids[1:]]).astype(np.int32)
        row = TrainingSequence(ids, np.full(len(ids), -1, np.int32), np.ones(len(ids), bool), targets)
        return dataclasses.replace(row, image_id=picture_number(sample)) if self.names_pictures else row


def picture_number(sample: Sample) -> np.ndarray:
    """64 bits (int32 [2]) that tell its picture from others; a sample that names none has one of its own."""
    identity = sample.image_id
    if identity is not None and type(identity) not in (str, int):
        raise UserError(f"image_id must be text or a whole number, got {str(identity)[:60]!r}")
    text = f"sample {sample.name}" if identity is None else f"picture {identity}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.frombuffer(digest, "<i4").astype(np.int32)


def words_of(sample: Sample, clean: bool) -> str:
    """The answer as it is trained on: cleaned if asked to, but for an answer to an instruction of the sample's own."""
    answer = sample.answer
    if not isinstance(answer, str):
        raise UserError(f"a caption must be text, got {type(answer).__name__}: {str(answer)[:60]!r}")
    words = clean_caption(answer) if clean and sample.instruction is None else answer
    if not words.strip():
        raise UserError("the caption is empty" + (" once it is cleaned" if answer.strip() else ""))
    return words


def lone_row(first_id: int) -> TrainingSequence:
    """One position that attends to itself, so that nothing turns into NaN, and predicts nothing."""
    return TrainingSequence(
        ids=np.array([first_id], np.int32),
        slots=np.array([-1], np.int32),
        mask=np.array([True]),
        targets=np.array([IGNORED], np.int32),
    )


@functools.cache
def _load_bert(directory: str) -> BertTokenizer:
    return load_bert_tokenizer(directory)


@functools.cache
def _load_tokenizer(directory: str) -> Tokenizer:
    return load_llama_tokenizer(directory)
