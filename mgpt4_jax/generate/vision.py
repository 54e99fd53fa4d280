"""Pictures to language-model tokens: jitted over a few batch sizes, cached by the content of the pixels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import partial

import jax
import numpy as np

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.models import build
from mgpt4_jax.typing import Bool, DType, Float, Int, Params

BATCH_SIZES = (8, 4, 2, 1)
TEXT_LENGTHS = (32, 128, 512)  # what the instruction of an InstructBLIP model is padded to, if it reads so far
CACHED_PICTURES = 256


class ImageEncoder:
    """``encode_image`` of a model. ``params`` lie on its devices, without the language model."""

    def __init__(self, config: ModelConfig, params: Params, dtype: DType):
        self.config, self.params = config, params
        self.reads_text = config.qformer is not None and config.qformer.with_text
        positions = config.qformer.max_positions if config.qformer is not None else 0
        self.text_lengths = sorted({min(length, positions) for length in TEXT_LENGTHS})
        module = build(config, dtype)
        self._encode = jax.jit(partial(module.apply, method="encode_image"))
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def encode(
        self, pixels: list[Float[np.ndarray, "H W 3"]], texts: list[list[int]] | None = None
    ) -> list[Float[np.ndarray, "q d"]]:
        """Tokens of each picture; ``texts`` are the ids of the instruction that goes with it (InstructBLIP)."""
        keys = [_key(picture, None if texts is None else texts[i]) for i, picture in enumerate(pixels)]
        missing = [i for i, key in enumerate(keys) if key not in self._cache and key not in keys[:i]]
        found = dict(self._cache)
        for group in self._groups(missing, texts):
            batch = np.stack([pixels[i] for i in group])
            text = () if texts is None else self._pad_texts([texts[i] for i in group])
            tokens = np.asarray(self._encode({"params": self.params}, batch, *text))
            found |= {keys[i]: row for i, row in zip(group, tokens, strict=True)}
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > CACHED_PICTURES:
            self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def num_compiled(self) -> int:
        return self._encode._cache_size()

    def _groups(self, indices: list[int], texts: list[list[int]] | None) -> list[list[int]]:
        """Batches of a power of two of pictures, whose texts have one padded length."""
        by_length: dict[int, list[int]] = {}
        for i in indices:
            by_length.setdefault(0 if texts is None else self._text_length(texts[i]), []).append(i)
        groups = []
        for same in by_length.values():
            while same:
                size = next(size for size in BATCH_SIZES if size <= len(same))
                groups.append(same[:size])
                same = same[size:]
        return groups

    def _text_length(self, ids: list[int]) -> int:
        return next(length for length in self.text_lengths if length >= len(ids))

    def _pad_texts(self, texts: list[list[int]]) -> tuple[Int[np.ndarray, "i t"], Bool[np.ndarray, "i t"]]:
        """Right-padded ids and which of them are text."""
        length = self._text_length(max(texts, key=len))
        ids, valid = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            valid[row, : len(text)] = True
        return ids, valid


def _key(pixels: np.ndarray, text: list[int] | None) -> bytes:
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    digest.update(b"" if text is None else np.array(text, np.int32).tobytes())
    return digest.digest()
