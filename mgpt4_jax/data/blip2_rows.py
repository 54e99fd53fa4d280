"""Rows of BLIP-2 stage 2: the picture's tokens first, then the text that OPT or the encoder of T5 reads.

Agrees with LAVIS ``blip2_opt.py`` and ``blip2_t5.py`` (``forward``, ``generate``, ``predict_answers``), and with
``blip2_vicuna_instruct.py`` and ``blip2_t5_instruct.py`` (``forward``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mgpt4_jax.config import IGNORED
from mgpt4_jax.data.batching import Batch, TrainingSequence
from mgpt4_jax.data.text import TextBatch, Tokenizer
from mgpt4_jax.data.text_lm import FramedTokenizer, Side
from mgpt4_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class PrefixSequence:
    """One unpadded row of an encoder and a decoder."""

    ids: np.ndarray  # int32 [s], what the encoder reads
    slots: np.ndarray  # int32 [s]; -1 for text
    targets: np.ndarray  # int32 [t], what the decoder writes, the end of the sequence too; IGNORED: not predicted

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """Rows of one length on each side. The decoder reads ``models.t5.shift_right(targets)``."""

    ids: np.ndarray  # int32 [b s]
    slots: np.ndarray  # int32 [b s]
    mask: np.ndarray  # bool [b s]; False where nothing may attend
    targets: np.ndarray  # int32 [b t]; IGNORED where nothing is predicted
    decoder_mask: np.ndarray  # bool [b t]


def opt_sequence(
    tokenizer: FramedTokenizer,
    text: str,
    *,
    tokens_per_image: int,
    prompt: str = "",
    end_symbol: str = "\n",
    max_text_length: int = 32,
) -> TrainingSequence:
    """The picture, ``</s>``, the text with its end symbol; all of the text is predicted, ``</s>`` too.

    Args:
      text: the whole of it, its prompt included.
      prompt: what ``text`` begins with and is not predicted, nor is ``</s>`` then.
      max_text_length: tokens with ``</s>``; a longer text loses its end, the end symbol with it.

    Raises:
      UserError: with a ``prompt`` as long as that nothing is left to predict.
    """
    ids = np.array(tokenizer.encode_whole(text + end_symbol, max_length=max_text_length), np.int32)
    targets = np.where(ids == tokenizer.pad_id, IGNORED, ids)
    if prompt:
        targets[: len(tokenizer.encode_whole(prompt))] = IGNORED
        if (targets == IGNORED).all():
            raise UserError(f"the prompt {prompt[:60]!r} leaves nothing of {max_text_length} tokens to predict")
    picture = np.arange(tokens_per_image, dtype=np.int32)
    nothing = np.full(tokens_per_image, IGNORED, np.int32)
    ids, slots = _behind_picture(ids, picture)
    return TrainingSequence(ids, slots, np.ones(len(ids), bool), np.concatenate([nothing, targets]))


def t5_sequence(
    tokenizer: FramedTokenizer,
    prompt: str,
    answer: str,
    *,
    tokens_per_image: int,
    max_text_length: int = 32,
    max_prompt_length: int | None = None,
) -> PrefixSequence:
    """The encoder reads the picture and the prompt, the decoder writes the answer; both end with ``</s>``.

    Either loses its end beyond ``max_text_length`` tokens, but not its ``</s>``. With ``max_prompt_length`` that is the
    prompt's, which then loses its beginning (InstructBLIP).
    """
    side: Side = "right" if max_prompt_length is None else "left"
    asked = tokenizer.encode_whole(prompt, max_length=max_prompt_length or max_text_length, truncate=side)
    said = np.array(tokenizer.encode_whole(answer, max_length=max_text_length), np.int32)
    ids, slots = _behind_picture(np.array(asked, np.int32), np.arange(tokens_per_image, dtype=np.int32))
    return PrefixSequence(ids, slots, np.where(said == tokenizer.pad_id, IGNORED, said))


def instruct_sequence(
    tokenizer: Tokenizer,
    instruction: str,
    answer: str,
    *,
    tokens_per_image: int,
    end_symbol: str = "</s>",
    max_prompt_length: int = 128,
    max_text_length: int = 256,
) -> TrainingSequence:
    """InstructBLIP on a LLaMA: the picture, the instruction behind a beginning of sequence, the answer to be predicted.

    Agrees with LAVIS ``blip2_vicuna_instruct.py`` (``forward``, ``concat_text_input_output``). The instruction loses
    its beginning and the answer its end, the end symbol with it; both lengths count a beginning of sequence, though the
    answer's is not read. A literal pad token in the answer is read but not predicted.
    """
    asked = tokenizer.encode(instruction)
    asked = [tokenizer.bos_id, *asked[max(len(asked) - (max_prompt_length - 1), 0) :]]
    said = tokenizer.encode(answer + end_symbol)[: max_text_length - 1]
    if not said:
        raise UserError(f"max_text_length {max_text_length} leaves nothing to predict")
    unsaid = {tokenizer.pad_id} - {tokenizer.eos_id}  # a tokeniser without a pad token pads with the end of sequence
    nothing = [IGNORED] * (tokens_per_image + len(asked))
    ids, slots = _behind_picture(np.array([*asked, *said], np.int32), np.arange(tokens_per_image, dtype=np.int32))
    targets = np.array([*nothing, *(IGNORED if token in unsaid else token for token in said)], np.int32)
    return TrainingSequence(ids, slots, np.ones(len(ids), bool), targets)


def _behind_picture(text: np.ndarray, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, slots) of ``[picture ; text]``."""
    ids = np.concatenate([np.zeros_like(picture), text])
    return ids, np.concatenate([picture, np.full(len(text), -1, np.int32)])


def pad_prefix_sequences(
    rows: Sequence[PrefixSequence], length: int, answer_length: int, *, pad_id: int, batch_size: int | None = None
) -> PrefixBatch:
    """Pad on the right to ``[batch_size length]`` and ``[batch_size answer_length]``; added rows predict nothing.

    Raises:
      UserError: a row is longer than that, or there are more rows than ``batch_size``.
    """
    count = len(rows) if batch_size is None else batch_size
    longest = max((len(row) for row in rows), default=0), max((len(row.targets) for row in rows), default=0)
    if len(rows) > count or longest[0] > length or longest[1] > answer_length:
        raise UserError(
            f"{len(rows)} rows of up to {longest[0]} and {longest[1]} tokens do not fit [{count}, {length}] and "
            f"[{count}, {answer_length}]; raise the batch size or the lengths"
        )
    batch = PrefixBatch(
        np.full((count, length), pad_id, np.int32),
        np.full((count, length), -1, np.int32),
        np.zeros((count, length), bool),
        np.full((count, answer_length), IGNORED, np.int32),
        np.zeros((count, answer_length), bool),
    )
    batch.mask[:, 0] = True  # a row that only fills must have something to attend to
    for index, row in enumerate(rows):
        batch.ids[index, : len(row)], batch.slots[index, : len(row)] = row.ids, row.slots
        batch.mask[index, : len(row)] = True
        batch.targets[index, : len(row.targets)] = row.targets
        batch.decoder_mask[index, : len(row.targets)] = True
    return batch


def behind_pictures(text: TextBatch, tokens_per_image: int) -> Batch:
    """Prompts: ``[picture ; text]``, wherever ``text`` is padded; nothing is predicted.

    LAVIS pads questions to OPT on the left, so that the padding stands between the picture and the words, and those
    to T5 on the right.
    """
    shape = (len(text.ids), tokens_per_image)
    picture = np.broadcast_to(np.arange(tokens_per_image, dtype=np.int32), shape)
    ids = np.concatenate([np.zeros(shape, np.int32), text.ids], axis=1)
    slots = np.concatenate([picture, np.full(text.ids.shape, -1, np.int32)], axis=1)
    mask = np.concatenate([np.ones(shape, bool), text.mask], axis=1)
    return Batch(ids, slots, mask, np.full(ids.shape, IGNORED, np.int32))
