"""From a picture's words to one row of a batch: what the language model reads, and what it is to predict."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import TrainingSequence, training_sequence, wrap_instruction
from mgpt4_jax.data.prompts import IMAGE, MARKED_IMAGE, Template
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.text import Tokenizer, clean_caption, load_llama_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import TextConfig

BUCKET_STEP = 32


@dataclass(frozen=True)
class RowBuilder:
    """Turns samples into training sequences.

    It holds the tokeniser's directory and not the tokeniser, which cannot be sent to a worker process.

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
        answer = sample.answer
        if self.clean_captions and sample.instruction is None and isinstance(answer, str):
            answer = clean_caption(answer)
        if isinstance(answer, str) and not answer.strip():
            raise UserError("the caption is empty" + (" once it is cleaned" if sample.answer.strip() else ""))
        row = training_sequence(
            self.tokenizer,
            self._condition(sample, drawn),
            answer,
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


def filling_row(tokenizer: Tokenizer) -> TrainingSequence:
    """A row that only fills a batch: it predicts nothing.

    It begins as every row does, so that each of its positions has one to attend to and none turns into NaN.
    """
    return TrainingSequence(
        ids=np.array([tokenizer.bos_id], np.int32),
        slots=np.array([-1], np.int32),
        mask=np.array([True]),
        targets=np.array([IGNORED], np.int32),
    )


@functools.cache
def _load_tokenizer(directory: str) -> Tokenizer:
    return load_llama_tokenizer(directory)
