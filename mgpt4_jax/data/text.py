"""Tokenisers behind one small protocol, the streaming detokeniser, and the cleaning of captions.

The LLaMA tokeniser is the *slow* one that MiniGPT-4 was trained with (transformers 4.30): SentencePiece
on every stretch of text between special tokens, each with its own dummy prefix space. It is built on
``sentencepiece`` itself, because transformers 5 rebuilt its class on another library, which gives other ids
after a special token (``<s>[INST]``) and other text for broken UTF-8: a trained projection would meet
words that it never saw.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mgpt4_jax.errors import UserError

PAD_TOKEN = "$$"  # an ordinary piece of LLaMA's vocabulary, which MiniGPT-4 pads with

_LLAMA_FILES = ("tokenizer.model", "tokenizer.json")
_BERT_FILES = ("vocab.txt", "tokenizer.json")
_WORD_FILES = (*_LLAMA_FILES, *_BERT_FILES, "vocab.json", "merges.txt", "spiece.model")  # those of text_lm.py too
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer(Protocol):
    """What the language model's side needs of a tokeniser."""

    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int  # ids run below it; the model's table may have more rows
    bos_token: str
    eos_token: str
    pad_token: str
    special_tokens: tuple[str, ...]  # strings that `encode` takes for single tokens wherever they stand
    hidden_ids: frozenset[int]  # ids that `decode` skips: special tokens and the pad token
    unstable_ids: frozenset[int]  # tokens whose text the next token may change, beyond unfinished UTF-8

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Ids of ``text``; a beginning-of-sequence id only if asked for."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; ids beyond the vocabulary have none."""
        ...


@dataclass(frozen=True)
class SpecialToken:
    """A string that is one token. ``lstrip``/``rstrip``: it swallows the blanks before/after it."""

    content: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """What the small JSON files beside a vocabulary say."""

    roles: Mapping[str, SpecialToken]  # e.g. "bos_token"
    others: tuple[SpecialToken, ...]
    added: Mapping[str, int]  # content -> id, for tokens outside of the vocabulary file


class LlamaTokenizer:
    """``tokenizer.model`` read as transformers 4.30's slow ``LlamaTokenizer`` reads it.

    Args:
      directory: holds ``tokenizer.model`` and, if it has them, ``tokenizer_config.json``,
        ``special_tokens_map.json`` and ``added_tokens.json``, which are honoured.
      pad_token: looked up as an ordinary piece. Where the vocabulary lacks it (or for ``None``), the
        directory's own pad token is taken, else the end of sequence.
    """

    unstable_ids: frozenset[int] = frozenset()
    file = "tokenizer.model"
    defaults: Mapping[str, str] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

    def __init__(self, directory: Path, pad_token: str | None = PAD_TOKEN) -> None:
        path = directory / self.file
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is not a SentencePiece model; copy it again from the language model") from error
        special = self._read_special_tokens(directory)
        tokens = {role: SpecialToken(token) for role, token in self.defaults.items()} | dict(special.roles)
        every = {token.content: token for token in (*tokens.values(), *special.others)}
        self._added = dict(special.added)
        for content in every:
            if content not in self._added and self._piece_id(content) is None:
                self._added[content] = max([self._pieces.get_piece_size() - 1, *self._added.values()]) + 1
        # An added token that no role names swallows the blanks around it, as does one given as a bare string.
        self._split_tokens = {name: SpecialToken(name, True, True) for name in self._added} | every
        self._split = _splitter(self._split_tokens)
        self._names = {index: name for name, index in self._added.items()}

        self.special_tokens = tuple(self._split_tokens)
        self.bos_token, self.eos_token = tokens["bos_token"].content, tokens["eos_token"].content
        self.pad_token = _choose_pad(pad_token, tokens, self._find)
        self.bos_id, self.eos_id, self.pad_id = map(self._id, (self.bos_token, self.eos_token, self.pad_token))
        self.hidden_ids = frozenset(map(self._id, (*every, self.pad_token)))
        self.vocab_size = max([self._pieces.get_piece_size() - 1, *self._added.values()]) + 1

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        require_encodable(text)
        ids = [self.bos_id] if add_bos else []
        parts = self._split.split(text) if self._split else [text]
        for i in range(1, len(parts), 2):
            token = self._split_tokens[parts[i]]
            if token.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
            if token.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
        for i, part in enumerate(parts):
            ids += [self._id(part)] if i % 2 else self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        parts: list[str | list[int]] = []
        for index in map(int, ids):
            hidden = index in self.hidden_ids
            if not 0 <= index < self.vocab_size or (hidden and skip_special):
                continue
            if hidden or index in self._names:
                parts.append(self._names.get(index) or self._pieces.id_to_piece(index))
            elif index >= self._pieces.get_piece_size():
                continue
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(index)
            else:
                parts.append([index])
        return " ".join(part if isinstance(part, str) else self._pieces.decode(part) for part in parts)

    def _read_special_tokens(self, directory: Path) -> SpecialTokens:
        return read_special_tokens(directory)

    def _piece_id(self, content: str) -> int | None:
        index = self._pieces.piece_to_id(content)
        return index if self._pieces.id_to_piece(index) == content else None

    def _find(self, content: str) -> int | None:
        return self._added[content] if content in self._added else self._piece_id(content)

    def _id(self, content: str) -> int:
        index = self._find(content)
        assert index is not None, content  # every special token was given an id
        return index


class JsonTokenizer:
    """A directory that has only ``tokenizer.json`` (LLaMA-3): the ``tokenizers`` library reads it."""

    defaults: Mapping[str, str] = {}

    def __init__(self, directory: Path, pad_token: str | None = PAD_TOKEN) -> None:
        special = read_special_tokens(directory)
        roles = {role: SpecialToken(token) for role, token in self.defaults.items()} | dict(special.roles)
        self._tokenizer = self._open(directory, roles, special)
        for role in ("bos_token", "eos_token"):
            if role not in roles or self._tokenizer.token_to_id(roles[role].content) is None:
                raise UserError(
                    f"{directory / 'tokenizer_config.json'} names no {role} that the vocabulary beside it knows; add it"
                )
        self.bos_token, self.eos_token = roles["bos_token"].content, roles["eos_token"].content
        self.pad_token = _choose_pad(pad_token, roles, self._tokenizer.token_to_id)
        find = self._tokenizer.token_to_id
        self.bos_id, self.eos_id, self.pad_id = map(find, (self.bos_token, self.eos_token, self.pad_token))
        special_tokens = {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_tokens, self.hidden_ids = tuple(special_tokens.values()), frozenset(special_tokens)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        # This library judges a run of byte tokens as a whole: valid bytes turn into U+FFFD when a bad one follows.
        self.unstable_ids = frozenset(
            index for name, index in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", name)
        )

    def _open(self, directory: Path, roles: Mapping[str, SpecialToken], special: SpecialTokens) -> tokenizers.Tokenizer:
        return read_tokenizer_json(directory / "tokenizer.json")

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        require_encodable(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [index for index in map(int, ids) if 0 <= index < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special)


def load_llama_tokenizer(directory: str | Path, *, pad_token: str | None = PAD_TOKEN) -> Tokenizer:
    """The language model's tokeniser: ``tokenizer.model`` if there is one, else ``tokenizer.json``.

    ``pad_token=None`` keeps the directory's own (InstructBLIP); the default is MiniGPT-4's ``$$``.
    """
    directory = Path(directory)
    if (directory / "tokenizer.model").is_file():
        return LlamaTokenizer(directory, pad_token)
    if (directory / "tokenizer.json").is_file():
        return JsonTokenizer(directory, pad_token)
    raise UserError(
        f"{directory} has no tokenizer.model or tokenizer.json; copy the tokenizer files of the language model there"
    )


@dataclass(frozen=True)
class TextBatch:
    """Padded token ids of several texts."""

    ids: np.ndarray  # int32 [b t]
    mask: np.ndarray  # bool [b t], True where there is text


class BertTokenizer:
    """BERT's uncased WordPiece with ``[DEC]`` behind its vocabulary (LAVIS ``Blip2Base.init_tokenizer``)."""

    def __init__(self, vocabulary: Mapping[str, int], *, lowercase: bool = True, name: str = "vocab.txt") -> None:
        vocabulary = dict(vocabulary)
        if missing := [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]:
            raise UserError(f"{name} lacks {missing[0]}; take the vocabulary of bert-base-uncased")
        vocabulary.setdefault("[DEC]", max(vocabulary.values()) + 1)
        self._tokenizer = tokenizers.Tokenizer(
            models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
        )
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]") if token in vocabulary]
        self._tokenizer.add_special_tokens(special)
        self.special_tokens = tuple(special)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.dec_id = (
            vocabulary[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")
        )
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(
        self, text: str, *, max_length: int | None = None, truncate: Literal["left", "right"] = "right"
    ) -> list[int]:
        """``[CLS] text [SEP]``; a text too long for ``max_length`` loses its end, or its start with "left"."""
        require_encodable(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if max_length is not None and len(ids) > max_length - 2:
            room = max(max_length - 2, 0)
            ids = ids[len(ids) - room :] if truncate == "left" else ids[:room]
        return [self.cls_id, *ids, self.sep_id]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        pad: Literal["max_length", "longest"] = "max_length",
        truncate: Literal["left", "right"] = "right",
    ) -> TextBatch:
        """Encode and right-pad, to ``max_length`` or (``pad="longest"``, or no ``max_length``) to the longest."""
        rows = [self.encode(text, max_length=max_length, truncate=truncate) for text in texts]
        width = max((len(row) for row in rows), default=0)
        if pad == "max_length" and max_length is not None:
            width = max_length
        batch = TextBatch(np.full((len(rows), width), self.pad_id, np.int32), np.zeros((len(rows), width), bool))
        for i, row in enumerate(rows):
            batch.ids[i, : len(row)] = row
            batch.mask[i, : len(row)] = True
        return batch

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [index for index in map(int, ids) if 0 <= index < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special)


def load_bert_tokenizer(path: str | Path) -> BertTokenizer:
    """The Q-Former's tokeniser, from a ``vocab.txt`` or a directory with ``vocab.txt`` or ``tokenizer.json``."""
    path = Path(path)
    file = path if path.is_file() else next((path / name for name in _BERT_FILES if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} has no vocab.txt; put the vocabulary of bert-base-uncased there")
    lowercase = read_json(file.parent / "tokenizer_config.json").get("do_lower_case", True)
    if file.suffix == ".json":
        vocabulary = read_tokenizer_json(file).get_vocab(with_added_tokens=True)
    else:
        lines = read_text(file).split("\n")
        vocabulary = {token.rstrip("\r"): i for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
        vocabulary |= read_special_tokens(file.parent).added
    return BertTokenizer(vocabulary, lowercase=lowercase, name=str(file))


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokeniser files of ``source`` (a directory, or one ``vocab.txt``) into directory ``target``."""
    source, target = Path(source), Path(target)
    if source.is_file():
        files = [source]
    else:
        names = dict.fromkeys((*_WORD_FILES, *_SIDE_FILES))
        files = [source / name for name in names if (source / name).is_file()]
        if not any(file.name not in _SIDE_FILES for file in files):
            raise UserError(f"{source} has no tokenizer files (any of {', '.join(dict.fromkeys(_WORD_FILES))})")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)


class StreamDecoder:
    """Text of a growing sequence, piece by piece.

    What ``push`` and ``finish`` return, joined, equals ``tokenizer.decode`` of all the ids. Half a character
    is never shown: up to three U+FFFD at the end wait for the bytes that may complete them.
    """

    _CONTEXT = 8  # ids kept once shown: enough that the next piece keeps its leading space

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of decode(_ids) already returned

    def push(self, index: int) -> str:
        """Add one id; the text that it settles, often empty."""
        if index in self._tokenizer.hidden_ids or not 0 <= index < self._tokenizer.vocab_size:
            return ""
        self._ids.append(int(index))
        if index in self._tokenizer.unstable_ids:
            return ""
        text = self._tokenizer.decode(self._ids)
        stripped = text.rstrip("\ufffd")
        held = min(len(text) - len(stripped), 3)
        delta = text[self._shown : len(text) - held]
        self._shown += len(delta)
        if not held and len(self._ids) > 4 * self._CONTEXT:
            self._ids = self._ids[-self._CONTEXT :]
            self._shown = len(self._tokenizer.decode(self._ids))
        return delta

    def finish(self) -> str:
        """What was held back."""
        text = self._tokenizer.decode(self._ids)
        delta = text[self._shown :]
        self._shown = len(text)
        return delta


_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


def clean_caption(text: str, *, max_words: int = 50, prompt: str = "") -> str:
    """A caption as BLIP-2 trains on it: lower case, punctuation blanked, at most ``max_words`` words.

    Agrees with LAVIS ``BlipCaptionProcessor``: single tabs and newlines inside stay. ``prompt`` goes in front.
    """
    text = re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", text.lower()))
    return prompt + " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, *, max_words: int = 50) -> str:
    """A question as LAVIS's ``BlipQuestionProcessor`` gives it: the same, but punctuation is deleted."""
    return " ".join(_PUNCTUATION.sub("", text.lower()).rstrip(" ").split(" ")[:max_words])


def require_encodable(text: str) -> None:
    """Refuse what is not text, and lone surrogates, which no tokeniser can read."""
    if not isinstance(text, str):
        raise UserError(f"expected text, got {type(text).__name__}: {str(text)[:60]!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X})"
        raise UserError(f"the text is not valid Unicode: {where}; decode its source as UTF-8") from error


def read_special_tokens(directory: Path) -> SpecialTokens:
    """What ``tokenizer_config.json``, ``special_tokens_map.json`` (which wins) and ``added_tokens.json`` say.

    An empty string, as early LLaMA conversions have, counts as absent.
    """
    config = read_json(directory / "tokenizer_config.json")
    mapped = read_json(directory / "special_tokens_map.json")
    # In the config bare strings are made whole tokens; in the map they stay bare and swallow blanks.
    roles = {role: _special_token(config.get(role), bare_strips=False) for role in _ROLES}
    roles |= {role: _special_token(mapped[role], bare_strips=True) for role in _ROLES if mapped.get(role)}
    added = {str(name): int(index) for name, index in read_json(directory / "added_tokens.json").items()}
    others = [_special_token(value, bare_strips=True) for value in mapped.get("additional_special_tokens") or ()]
    for index, value in (config.get("added_tokens_decoder") or {}).items():
        token = _special_token(value, bare_strips=False)
        if token is not None:
            added[token.content] = int(index)
            if value.get("special"):
                others.append(token)
    return SpecialTokens(
        {role: token for role, token in roles.items() if token is not None},
        tuple(token for token in others if token is not None),
        added,
    )


def _special_token(value: Any, *, bare_strips: bool) -> SpecialToken | None:
    if isinstance(value, dict):
        content = value.get("content")
        return SpecialToken(content, bool(value.get("lstrip")), bool(value.get("rstrip"))) if content else None
    return SpecialToken(value, bare_strips, bare_strips) if isinstance(value, str) and value else None


def _choose_pad(wanted: str | None, roles: Mapping[str, SpecialToken], find: Any) -> str:
    own = roles.get("pad_token")
    candidates = (wanted, own.content if own else None, roles["eos_token"].content)
    return next(token for token in candidates if token and find(token) is not None)


def _splitter(tokens: Mapping[str, Any]) -> re.Pattern[str] | None:
    """A pattern that cuts text at special tokens, the longest first; odd parts of ``split`` are tokens."""
    names = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    read_json(path)  # names the file if it is no JSON; the library's own message does not
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer of the tokenizers library ({error}); copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not an object; copy it again")
    return values


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
