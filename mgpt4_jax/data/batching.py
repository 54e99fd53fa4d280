"""Training sequences as MiniGPT-4 lays them out, and batches of one fixed shape.

Agrees with MiniGPT-4 ``minigpt_base.py`` (``preparing_embedding``, ``concat_emb_input_output``,
``tokenize_conversation``): beginning of sequence, the condition with its pictures, the answer, padding on the
right. Only the answer is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.prompts import IMAGE, Prompt, Template, build_prompt
from mgpt4_jax.data.text import Tokenizer
from mgpt4_jax.errors import UserError

MAX_CONTEXT_LENGTH = 3800


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One unpadded row. ``targets[t]`` is the token *at* position t: losses shift by one.

    Of an encoder and a decoder the targets are the decoder's, and have a length of their own.
    """

    ids: np.ndarray  # int32 [t]
    slots: np.ndarray  # int32 [t]; -1 for text
    mask: np.ndarray  # bool [t]; False where nothing may attend
    targets: np.ndarray  # int32 [t]; IGNORED where nothing is predicted
    qformer_ids: np.ndarray | None = None  # int32 [q], the instruction as an InstructBLIP's Q-Former reads it
    image_id: np.ndarray | None = None  # int32 [2], the same for rows that show the same picture

    def __len__(self) -> int:
        return max(len(self.ids), len(self.targets))


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one length."""

    ids: np.ndarray  # int32 [b t]
    slots: np.ndarray  # int32 [b t]
    mask: np.ndarray  # bool [b t]
    targets: np.ndarray  # int32 [b t]


def training_sequence(
    tokenizer: Tokenizer,
    condition: str | None,
    answer: str,
    *,
    end_symbol: str,
    max_text_length: int,
    tokens_per_image: int,
    num_images: int = 1,
    max_context_length: int = MAX_CONTEXT_LENGTH,
) -> TrainingSequence:
    """One pair of a condition and an answer.

    Args:
      condition: the wrapped instruction, with an ``<ImageHere>`` for each picture; None: the pictures alone
        (stage 1). Longer than ``max_context_length`` positions, it loses its end.
      answer: the text to predict, with ``end_symbol`` behind it. Longer than ``max_text_length`` tokens, it
        loses its end, the end symbol with it. A literal pad token in it is read but not predicted.
    """
    ids = tokenizer.encode(answer + end_symbol)[:max_text_length] if isinstance(answer, str) else None
    if ids is None:
        raise UserError(f"a caption must be text, got {type(answer).__name__}: {str(answer)[:60]!r}")
    tokens = np.array(ids, np.int32)
    targets = np.where(tokens == tokenizer.pad_id, IGNORED, tokens)
    head = _condition(tokenizer, condition, num_images, tokens_per_image, max_context_length)
    return _join(tokenizer, head, tokens, np.ones(len(tokens), bool), targets)


def conversation_sequence(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: Template,
    end_symbol: str,
    max_text_length: int,
    tokens_per_image: int,
    num_images: int = 1,
    max_context_length: int = MAX_CONTEXT_LENGTH,
) -> TrainingSequence:
    """Several questions and answers about the same pictures (MiniGPT-v2); every answer is predicted.

    The first question is the condition. The later ones follow as text that begins with the
    beginning-of-sequence *string*; all that follows the condition is cut at ``max_text_length`` tokens. A
    literal pad token is not attended to.
    """
    if not questions or len(questions) != len(answers):
        raise UserError(f"a conversation needs as many answers as questions, got {len(questions)} and {len(answers)}")
    wrapped = [wrap_instruction(template, question) for question in questions]
    ids: list[int] = []
    targets: list[int] = []
    for turn, answer in enumerate(answers):
        if turn:
            asked = tokenizer.encode(tokenizer.bos_token + wrapped[turn])
            ids += asked
            targets += [IGNORED] * len(asked)
        said = tokenizer.encode(answer + end_symbol)
        ids += said
        targets += said
    tokens = np.array(ids[:max_text_length], np.int32)
    head = _condition(tokenizer, wrapped[0], num_images, tokens_per_image, max_context_length)
    return _join(tokenizer, head, tokens, tokens != tokenizer.pad_id, np.array(targets[:max_text_length], np.int32))


def wrap_instruction(template: Template, instruction: str) -> str:
    """``instruction`` as training gives it to the model."""
    return template.training.replace("{}", instruction)


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest of ``buckets`` that holds ``length`` positions."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise UserError(f"a sequence has {length} tokens but the longest bucket is {max(buckets, default=0)}; add one")
    return min(fitting)


def pad_sequences(
    rows: Sequence[TrainingSequence], length: int, *, pad_id: int, batch_size: int | None = None
) -> Batch:
    """Pad on the right to ``[batch_size length]``; rows added to fill the batch predict nothing.

    Raises:
      UserError: a row is longer than ``length``, or there are more rows than ``batch_size``.
    """
    batch = _empty_batch(rows, length, pad_id, batch_size)
    for i, row in enumerate(rows):
        for field in ("ids", "slots", "mask", "targets"):
            values = getattr(row, field)
            getattr(batch, field)[i, : len(values)] = values
    return batch


def pad_prompts(prompts: Sequence[Prompt], length: int, *, pad_id: int, batch_size: int | None = None) -> Batch:
    """Pad prompts on the *left* to ``[batch_size length]``, so that all answers begin at the same position."""
    batch = _empty_batch(prompts, length, pad_id, batch_size)
    for i, prompt in enumerate(prompts):
        start = length - len(prompt)
        batch.ids[i, start:] = prompt.ids
        batch.slots[i, start:] = prompt.slots
        batch.mask[i, start:] = True
    return batch


def _condition(
    tokenizer: Tokenizer, text: str | None, num_images: int, tokens_per_image: int, max_length: int
) -> Prompt:
    """Everything before the answer but the beginning of sequence, cut on the right."""
    if text is None:
        text = IMAGE * num_images
    prompt = build_prompt(tokenizer, text, num_images=num_images, tokens_per_image=tokens_per_image, add_bos=False)
    return Prompt(prompt.ids[:max_length], prompt.slots[:max_length], num_images)


def _join(
    tokenizer: Tokenizer, head: Prompt, tokens: np.ndarray, mask: np.ndarray, targets: np.ndarray
) -> TrainingSequence:
    if not np.any(targets != IGNORED):
        raise UserError("a sample has nothing to predict: its answer is empty, or max_text_length is 0")
    before = 1 + len(head)
    return TrainingSequence(
        ids=np.concatenate([[tokenizer.bos_id], head.ids, tokens]).astype(np.int32),
        slots=np.concatenate([[-1], head.slots, np.full(len(tokens), -1)]).astype(np.int32),
        mask=np.concatenate([np.ones(before, bool), mask]),
        targets=np.concatenate([np.full(before, IGNORED), targets]).astype(np.int32),
    )


def _empty_batch(
    rows: Sequence[TrainingSequence] | Sequence[Prompt], length: int, pad_id: int, batch_size: int | None
) -> Batch:
    size = len(rows) if batch_size is None else batch_size
    longest = max(map(len, rows), default=0)
    if longest > length:
        raise UserError(f"a sequence has {longest} tokens, but the batch holds {length}; use a longer bucket")
    if len(rows) > size:
        raise UserError(f"{len(rows)} sequences do not fit a batch of {size}")
    shape = (size, length)
    return Batch(
        ids=np.full(shape, pad_id, np.int32),
        slots=np.full(shape, -1, np.int32),
        mask=np.zeros(shape, bool),
        targets=np.full(shape, IGNORED, np.int32),
    )
