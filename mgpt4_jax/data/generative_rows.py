"""Builders of BLIP-2 stage 2's rows: pairs of a picture and a text, as OPT or T5 learn to write it.

What stands before the answer is the sample's own ``instruction``, else the one drawn for the batch, else nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import TrainingSequence
from mgpt4_jax.data.blip2_rows import opt_sequence, t5_sequence
from mgpt4_jax.data.rows import lone_row, words_of
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.text_lm import FramedTokenizer, load_opt_tokenizer, load_t5_tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import TextConfig


@dataclass(frozen=True)
class GenerativeRows:
    """Rows for ``opt`` (``[picture ; </s> prompt answer]``) or ``t5`` (the picture and the prompt, then the answer).

    A row for T5 has targets of a length of its own: they are the decoder's, at the places that they are written at.

    Args:
      tokenizer_dir: as ``load_opt_tokenizer`` or ``load_t5_tokenizer`` reads it.
      clean_captions: as BLIP-2's caption processor; never an answer to an instruction of the sample's own.
    """

    tokenizer_dir: str | Path
    text: TextConfig
    tokens_per_image: int
    is_t5: bool
    clean_captions: bool = False

    @property
    def tokenizer(self) -> FramedTokenizer:
        return _load(str(self.tokenizer_dir), self.is_t5)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def facts(self) -> list[Any]:
        return ["t5" if self.is_t5 else "opt", self.clean_captions, self.tokens_per_image]

    def filling_row(self) -> TrainingSequence:
        return lone_row(self.tokenizer.eos_id)

    def draw_instruction(self, rng: np.random.Generator) -> str | None:
        choices = self.text.instructions
        return choices[int(rng.integers(len(choices)))] if choices else None

    def row(self, sample: Sample, drawn: str | None = None) -> TrainingSequence:
        """A bad sample raises ``UserError``: no picture, no words, or nothing left to predict."""
        if sample.image is None:
            raise UserError("there is no picture, and BLIP-2 describes one")
        prompt, answer = sample.instruction or drawn or "", words_of(sample, self.clean_captions)
        options = {"tokens_per_image": self.tokens_per_image, "max_text_length": self.text.max_text_length}
        if not self.is_t5:
            return opt_sequence(
                self.tokenizer, prompt + answer, prompt=prompt, end_symbol=self.text.end_symbol, **options
            )
        row = t5_sequence(self.tokenizer, prompt, answer, **options)
        if not np.any(row.targets != IGNORED):
            raise UserError("the answer has nothing to predict")
        return TrainingSequence(row.ids, row.slots, np.ones(len(row.ids), bool), row.targets)


@functools.cache
def _load(directory: str, is_t5: bool) -> FramedTokenizer:
    return load_t5_tokenizer(directory) if is_t5 else load_opt_tokenizer(directory)
