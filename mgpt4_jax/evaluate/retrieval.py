"""Retrieval as BLIP-2 is measured: similarity of all pairs (ITC), then the best of each row are matched (ITM).

Agrees with LAVIS ``compute_sim_matrix``. A pair that is among the best of its picture and of its text is matched once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.data.images import ImageSource, eval_transform, load_image
from mgpt4_jax.data.text import BertTokenizer
from mgpt4_jax.models import build
from mgpt4_jax.progress import Report
from mgpt4_jax.sharding import batch_sharding
from mgpt4_jax.typing import Float, Int, Params

TEXT_LENGTH = 35  # word pieces of a text; longer ones are cut
OUTSIDE = -100.0  # score of a pair that was not matched
BLOCK = 256  # pictures whose similarities to all texts are taken at once
PART = 8192  # pairs that are matched between two files of `matched`


class Features(NamedTuple):
    """Of all pictures and texts, on the host: rows of fixed programs, padding dropped."""

    tokens: Float[np.ndarray, "i p e"]
    similarity: Float[np.ndarray, "i t"]
    ids: Int[np.ndarray, "t l"]
    valid: np.ndarray


class Retriever:
    """The programs of retrieval: each has one shape, ``rows`` over all devices of the mesh."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: BertTokenizer,
        *,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        rows: int = 16,
    ):
        shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = -(-rows // shards) * shards
        self._place = None if mesh is None else batch_sharding(mesh)
        self.config, self.tokenizer, self._params = config, tokenizer, params
        module = build(config, jnp.dtype(dtype))

        def method(name: str) -> Any:
            return jax.jit(partial(module.apply, method=name))

        self._images, self._texts, self._match = (
            method(name) for name in ("image_features", "text_features", "match_logits")
        )
        self._similarity = jax.jit(module.similarity)

    def features(self, images: Sequence[ImageSource], texts: Sequence[str], report: Report | None = None) -> Features:
        """Read and encode everything; pictures are read as they are needed.

        Raises:
          UserError: a picture cannot be read; its name is in the message.
        """
        size = self.config.vit.image_size

        def pixels(index: np.ndarray) -> np.ndarray:
            read = {i: eval_transform(load_image(images[i]), size) for i in set(index.tolist())}
            return np.stack([read[i] for i in index.tolist()])

        return self._features(len(images), pixels, texts, report)

    def features_of_pixels(self, pixels: Float[np.ndarray, "i H W 3"], texts: Sequence[str]) -> Features:
        """The same of pictures that are read and normalised."""
        return self._features(len(pixels), lambda index: pixels[index], texts, None)

    def _features(
        self, count: int, pixels: Callable[[np.ndarray], np.ndarray], texts: Sequence[str], report: Report | None
    ) -> Features:
        length = min(TEXT_LENGTH, self.config.qformer.max_positions)
        batch = self.tokenizer.encode_batch(list(texts), max_length=length)
        ids, valid = np.asarray(batch.ids), np.asarray(batch.mask)

        def text(index: np.ndarray) -> tuple[Any]:
            return (self._texts(self._variables, *self._put(ids[index], valid[index]))[:, 0],)

        def image(index: np.ndarray) -> tuple[Any, Any]:
            found = self._images(self._variables, *self._put(pixels(index)))
            return found.tokens, found.embeds

        [words], (tokens, embeds) = self._over(len(ids), text), self._over(count, image, report)
        blocks = [self._similarity(embeds[start : start + BLOCK], words) for start in range(0, count, BLOCK)]
        return Features(tokens, np.concatenate([np.asarray(block) for block in blocks]), ids, valid)

    def match(self, features: Features, pairs: Int[np.ndarray, "m 2"], report: Report | None = None) -> np.ndarray:
        """The matching logit ("yes") of (picture, text) pairs."""

        def logits(index: np.ndarray) -> tuple[Any]:
            first, second = pairs[index].T
            arrays = self._put(features.tokens[first], features.ids[second], features.valid[second])
            return (self._match(self._variables, *arrays)[:, 1],)

        return self._over(len(pairs), logits, report)[0]

    @property
    def _variables(self) -> dict[str, Params]:
        return {"params": self._params}

    def _put(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        return arrays if self._place is None else tuple(jax.device_put(array, self._place) for array in arrays)

    def _over(
        self, count: int, function: Callable[[np.ndarray], tuple[Any, ...]], report: Report | None = None
    ) -> list[np.ndarray]:
        """``function`` of the indices of each batch; the last is filled with copies, which are dropped."""
        parts = []
        for start in range(0, count, self.rows):
            index = np.minimum(np.arange(start, start + self.rows), count - 1)
            kept = min(self.rows, count - start)
            parts.append([np.asarray(array)[:kept] for array in function(index)])
            if report:
                report(start + kept, count)
        return [np.concatenate(column) for column in zip(*parts, strict=True)]


def best_pairs(similarity: Float[np.ndarray, "i t"], k: int) -> Int[np.ndarray, "m 2"]:
    """(picture, text) of the ``k`` best texts of each picture and pictures of each text, each pair once, in order."""
    chosen = _best(similarity, k) | _best(similarity.T, k).T
    return np.argwhere(chosen)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
    return chosen


def rerank(
    similarity: Float[np.ndarray, "i t"],
    pairs: Int[np.ndarray, "m 2"],
    logits: Float[np.ndarray, " m"],
    k: int,
    weight: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``[i t]`` and ``[t i]`` of the best ``k`` of each row, ``OUTSIDE`` for the rest.

    A score is the matching logit and ``weight`` times the similarity: 1 is LAVIS's sum; one over the
    temperature adds the logit of contrast, as its softmax has it.
    """
    matched = np.float32(weight) * similarity
    matched[pairs[:, 0], pairs[:, 1]] += logits
    to_text = np.where(_best(similarity, k), matched, np.float32(OUTSIDE))
    return to_text, np.where(_best(similarity.T, k), matched.T, np.float32(OUTSIDE))


def match_in_parts(
    retriever: Retriever,
    features: Features,
    pairs: Int[np.ndarray, "m 2"],
    folder: Path,
    report: Report | None = None,
) -> np.ndarray:
    """``match`` of all pairs; what is done is kept in ``folder``, where a second run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in zip(itertools.count(), range(0, len(pairs), PART), strict=False):
        path = folder / f"{number:06d}.npy"
        if not path.exists():
            temporary = path.with_name(f"{path.name}.tmp")
            with temporary.open("wb") as file:
                np.save(file, retriever.match(features, pairs[start : start + PART]))
            os.replace(temporary, path)
        parts.append(np.load(path))
        if report:
            report(min(start + PART, len(pairs)), len(pairs))
    return np.concatenate(parts)
