"""Builders of BLIP-2 stage 2's and InstructBLIP's rows: a picture and a text, as a language model learns to write it.

What stands before the answer is the sample's own ``instruction``, else the one drawn for the batch, else nothing. A
drawn one with ``{}`` is a template, and a sample's own goes into it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import TrainingSequence
from mgpt4_jax.data.blip2_rows import instruct_sequence, opt_sequence, t5_sequence
from mgpt4_jax.data.rows import Extras, lone_row, words_of
from mgpt4_jax.data.samples import Sample
from mgpt4_jax.data.text import BertTokenizer, Tokenizer, load_bert_tokenizer, load_llama_tokenizer
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

    @property
    def extras(self) -> Extras:
        return {}

    def facts(self) -> list[Any]:
        return ["t5" if self.is_t5 else "opt", self.clean_captions, self.tokens_per_image]

    def filling_row(self) -> TrainingSequence:
        return lone_row(self.tokenizer.eos_id)

    def draw_instruction(self, rng: np.random.Generator) -> str | None:
        return draw_one(self.text.instructions, rng)

    def row(self, sample: Sample, drawn: str | None = None) -> TrainingSequence:
        """A bad sample raises ``UserError``: no picture, no words, or nothing left to predict."""
        prompt, answer = prompt_of(sample, drawn), words_of(sample, self.clean_captions)
        options = {"tokens_per_image": self.tokens_per_image, "max_text_length": self.text.max_text_length}
        if not self.is_t5:
            text = answer if not prompt else prompt + answer if prompt[-1].isspace() else f"{prompt} {answer}"
            asked = prompt.rstrip(" ")  # OPT's pieces begin with the blank: this is how the whole text begins
            return opt_sequence(self.tokenizer, text, prompt=asked, end_symbol=self.text.end_symbol, **options)
        row = t5_sequence(self.tokenizer, prompt, answer, **options)
        if not np.any(row.targets != IGNORED):
            raise UserError("the answer has nothing to predict")
        return TrainingSequence(row.ids, row.slots, np.ones(len(row.ids), bool), row.targets)


@dataclass(frozen=True)
class InstructRows:
    """Rows for an InstructBLIP on a LLaMA or on T5, whose Q-Former reads the instruction, too.

    Args:
      tokenizer_dir: of the language model.
      qformer_tokenizer_dir: as ``load_bert_tokenizer`` reads it.
    """

    tokenizer_dir: str | Path
    qformer_tokenizer_dir: str | Path
    text: TextConfig
    tokens_per_image: int
    is_t5: bool
    clean_captions: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        return _load(str(self.tokenizer_dir), True) if self.is_t5 else _load_llama(str(self.tokenizer_dir))

    @property
    def qformer_tokenizer(self) -> BertTokenizer:
        return _load_bert(str(self.qformer_tokenizer_dir))

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def extras(self) -> Extras:
        shape = (self.text.max_prompt_length,)
        return {"qformer_ids": (shape, "int32"), "qformer_mask": (shape, "bool")}

    def facts(self) -> list[Any]:
        return ["instruct", "t5" if self.is_t5 else "llama", self.clean_captions, self.tokens_per_image]

    def filling_row(self) -> TrainingSequence:
        return dataclasses.replace(lone_row(self.tokenizer.eos_id), qformer_ids=self._read(""))

    def draw_instruction(self, rng: np.random.Generator) -> str | None:
        return draw_one(self.text.instructions, rng)

    def row(self, sample: Sample, drawn: str | None = None) -> TrainingSequence:
        """A bad sample raises ``UserError``: no picture, no words, or nothing left to predict."""
        prompt, answer = prompt_of(sample, drawn), words_of(sample, self.clean_captions)
        limits = {
            "tokens_per_image": self.tokens_per_image,
            "max_text_length": self.text.max_text_length,
            "max_prompt_length": self.text.max_prompt_length,
        }
        if not self.is_t5:
            row = instruct_sequence(self.tokenizer, prompt, answer, end_symbol=self.text.end_symbol, **limits)
            return dataclasses.replace(row, qformer_ids=self._read(prompt))
        assert isinstance(self.tokenizer, FramedTokenizer)
        found = t5_sequence(self.tokenizer, prompt, answer, **limits)
        return TrainingSequence(
            found.ids, found.slots, np.ones(len(found.ids), bool), found.targets, self._read(prompt)
        )

    def _read(self, instruction: str) -> np.ndarray:
        limit = self.text.max_prompt_length
        return np.array(self.qformer_tokenizer.encode(instruction, max_length=limit, truncate="left"), np.int32)


def draw_one(choices: Sequence[str], rng: np.random.Generator) -> str | None:
    """One of ``choices``; None: there are none."""
    return choices[int(rng.integers(len(choices)))] if choices else None


def prompt_of(sample: Sample, drawn: str | None) -> str:
    """What the picture of ``sample`` is asked; refuses one without a picture."""
    if sample.image is None:
        raise UserError("there is no picture, and BLIP-2 describes one")
    own = sample.instruction
    if drawn is None or "{}" not in drawn:
        return own or drawn or ""
    if own is None:
        raise UserError(f"has no instruction that would go into {drawn[:60]!r} of text.instructions")
    return drawn.replace("{}", own)


@functools.cache
def _load_llama(directory: str) -> Tokenizer:
    return load_llama_tokenizer(directory, pad_token=None)


@functools.cache
def _load_bert(directory: str) -> BertTokenizer:
    return load_bert_tokenizer(directory)


@functools.cache
def _load(directory: str, is_t5: bool) -> FramedTokenizer:
    return load_t5_tokenizer(directory) if is_t5 else load_opt_tokenizer(directory)
