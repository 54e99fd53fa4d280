"""Tokenisers of OPT and T5 as BLIP-2 reads them, behind the protocol of ``data/text.py``.

OPT's is GPT-2's byte-level BPE with ``</s>`` before a text; T5's is a unigram model with ``</s>`` behind it. Ids are
those of LAVIS, which takes the slow tokeniser of OPT and the fast one of T5; texts are cleaned as both do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mgpt4_jax.data.text import (
    JsonTokenizer,
    LlamaTokenizer,
    SpecialToken,
    SpecialTokens,
    TextBatch,
    Tokenizer,
    read_json,
    read_special_tokens,
    read_text,
    read_tokenizer_json,
)
from mgpt4_jax.errors import UserError

Side = Literal["left", "right"]

EXTRA_IDS = 100
"""T5's sentinels ``<extra_id_99>`` ... ``<extra_id_0>`` stand in this order behind its pieces."""

# What tokenisation blanks and English does not (transformers 4 ``clean_up_tokenization``).
_BLANKED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")


class FramedTokenizer:
    """A tokeniser with the tokens that its model expects around each text.

    ``encode`` gives the text alone, as the protocol has it; ``encode_whole`` and ``encode_batch`` what the model
    was trained on.
    """

    def __init__(self, inner: Tokenizer, *, before: Sequence[int] = (), behind: Sequence[int] = (), cleans: bool):
        self._inner, self._before, self._behind, self._cleans = inner, [*before], [*behind], cleans
        self.bos_id, self.eos_id, self.pad_id = inner.bos_id, inner.eos_id, inner.pad_id
        self.bos_token, self.eos_token, self.pad_token = inner.bos_token, inner.eos_token, inner.pad_token
        self.vocab_size, self.special_tokens = inner.vocab_size, inner.special_tokens
        self.hidden_ids, self.unstable_ids = inner.hidden_ids, inner.unstable_ids

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return self._inner.encode(text, add_bos=add_bos)

    def encode_whole(self, text: str, *, max_length: int | None = None, truncate: Side = "right") -> list[int]:
        """Ids of ``text`` and what stands around it; too long for ``max_length``, the text loses an end."""
        ids = self._inner.encode(text)
        if max_length is not None:
            room = max(max_length - len(self._before) - len(self._behind), 0)
            ids = ids[:room] if truncate == "right" else ids[max(len(ids) - room, 0) :]
        return [*self._before, *ids, *self._behind]

    def encode_batch(
        self, texts: Sequence[str], *, max_length: int | None = None, pad: Side = "right", truncate: Side = "right"
    ) -> TextBatch:
        """``encode_whole`` of each, padded on one side to the longest."""
        rows = [self.encode_whole(text, max_length=max_length, truncate=truncate) for text in texts]
        width = max((len(row) for row in rows), default=0)
        batch = TextBatch(np.full((len(rows), width), self.pad_id, np.int32), np.zeros((len(rows), width), bool))
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if pad == "right" else slice(width - len(row), width)
            batch.ids[index, place], batch.mask[index, place] = row, True
        return batch

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text = self._inner.decode(ids, skip_special)
        return clean_up(text) if self._cleans else text


def clean_up(text: str) -> str:
    """Without the blanks before punctuation and English endings that word pieces leave."""
    for blanked in _BLANKED[:4]:
        text = text.replace(blanked, blanked[1:])
    text = text.replace(" ' ", "'")
    for blanked in _BLANKED[4:]:
        text = text.replace(blanked, blanked[1:])
    return text


class _OptPieces(JsonTokenizer):
    """``vocab.json`` and ``merges.txt``, or ``tokenizer.json`` where they are not."""

    defaults: Mapping[str, str] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>") | {
        "pad_token": "<pad>"
    }

    def _open(self, directory: Path, roles: Mapping[str, SpecialToken], special: SpecialTokens) -> tokenizers.Tokenizer:
        words, merges = directory / "vocab.json", directory / "merges.txt"
        if words.is_file() and merges.is_file():
            found = _byte_level_bpe(words, merges, roles, special)
        else:
            found = read_tokenizer_json(directory / "tokenizer.json")
        found.add_special_tokens([token.content for token in (*roles.values(), *special.others)])
        return found


def _byte_level_bpe(
    words: Path, merges: Path, roles: Mapping[str, SpecialToken], special: SpecialTokens
) -> tokenizers.Tokenizer:
    vocabulary = {str(token): index for token, index in read_json(words).items()} | dict(special.added)
    lines = [line.rstrip("\r") for line in read_text(merges).split("\n")]
    lines = [line for line in lines if line and not line.startswith("#version")]
    if wrong := [line for line in lines if line.count(" ") != 1]:
        raise UserError(f"{merges}: {wrong[0][:60]!r} is no pair of pieces; copy it again")
    pairs = [(line[: line.index(" ")], line[line.index(" ") + 1 :]) for line in lines]
    unknown = roles["unk_token"].content
    try:
        bpe = models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown if unknown in vocabulary else None)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{words} and {merges.name} do not belong together ({error}); copy both again") from error
    found = tokenizers.Tokenizer(bpe)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found.decoder = decoders.ByteLevel()
    return found


# T5 has no beginning of a sequence: its decoder begins with the pad token.
_T5_ROLES = {"bos_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class _T5Json(JsonTokenizer):
    """``tokenizer.json``, which LAVIS reads."""

    defaults: Mapping[str, str] = _T5_ROLES

    def _open(self, directory: Path, roles: Mapping[str, SpecialToken], special: SpecialTokens) -> tokenizers.Tokenizer:
        found = read_tokenizer_json(directory / "tokenizer.json")
        extra = [token for token in found.get_vocab(with_added_tokens=True) if re.fullmatch(r"<extra_id_\d+>", token)]
        found.add_special_tokens([*(token.content for token in roles.values()), *extra])
        return found


class _T5Pieces(LlamaTokenizer):
    """``spiece.model`` alone."""

    file = "spiece.model"
    defaults: Mapping[str, str] = _T5_ROLES

    def _read_special_tokens(self, directory: Path) -> SpecialTokens:
        special = read_special_tokens(directory)
        count = read_json(directory / "tokenizer_config.json").get("extra_ids", EXTRA_IDS)
        last = self._pieces.get_piece_size() + int(count) - 1
        extra = {f"<extra_id_{index}>": last - index for index in range(int(count))}
        others = tuple(SpecialToken(token, lstrip=True, rstrip=True) for token in extra)
        return dataclasses.replace(special, others=(*special.others, *others), added={**special.added, **extra})


def load_opt_tokenizer(directory: str | Path) -> FramedTokenizer:
    """OPT's: ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``. ``</s>`` (id 2) stands before a text."""
    directory = _with_any(Path(directory), ("merges.txt", "tokenizer.json"), "OPT")
    inner = _OptPieces(directory, pad_token=None)
    return FramedTokenizer(inner, before=[inner.bos_id], cleans=_cleans(directory))


def load_t5_tokenizer(directory: str | Path) -> FramedTokenizer:
    """T5's: ``tokenizer.json`` or ``spiece.model``. ``</s>`` (id 1) stands behind a text."""
    directory = _with_any(Path(directory), ("tokenizer.json", "spiece.model"), "T5")
    is_json = (directory / "tokenizer.json").is_file()
    inner: Tokenizer = _T5Json(directory, pad_token=None) if is_json else _T5Pieces(directory, pad_token=None)
    return FramedTokenizer(inner, behind=[inner.eos_id], cleans=_cleans(directory))


def _with_any(directory: Path, names: tuple[str, ...], model: str) -> Path:
    if not any((directory / name).is_file() for name in names):
        raise UserError(f"{directory} has no {' or '.join(names)}; copy the tokenizer files of {model} there")
    return directory


def _cleans(directory: Path) -> bool:
    return bool(read_json(directory / "tokenizer_config.json").get("clean_up_tokenization_spaces", True))
