"""Requests of a language model: what they may ask, how they are stacked for the device, how answers come back."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mgpt4_jax.config import ModelConfig
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam import Step
from mgpt4_jax.generate.sampling import MAX_STOPS, STOP_WIDTH, SamplingParams, pack_stops
from mgpt4_jax.typing import Array, DType, Float, Int

MAX_IMAGES = 16  # pictures in one request
MAX_EOS = 4
STOP_SHAPE = (MAX_STOPS + MAX_EOS, STOP_WIDTH)

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt: token ids with image slots (-1: text, else a row of ``images``)."""

    ids: Int[np.ndarray, " t"]
    slots: Int[np.ndarray, " t"]
    images: Float[np.ndarray, "s d"] | None
    sampling: SamplingParams
    watch: Callable[[list[int]], bool] | None = None
    """Gets the new ids of each chunk and returns True to stop the row (texts that stop an answer)."""


class Prompts(NamedTuple):
    """Right-padded prompts, as a device gets them."""

    ids: Int[Array, "b t"]
    slots: Int[Array, "b t"]
    images: Float[Array, "b s d"] | None
    lengths: Int[Array, " b"]


@dataclass(frozen=True)
class Update:
    """What a request gained in a chunk. ``ids`` hold the token or sequence that stopped it, too."""

    index: int  # of the request
    ids: list[int]
    finish_reason: FinishReason | None = None


class Begun(NamedTuple):
    """Prompts that were read: what ``beam_search`` goes on from."""

    step: Step
    cache: Any
    logits: Float[Array, "b v"]
    row_axis: Any = 0


class Intake(ABC):
    """What an engine can be asked: sizes, ends of sequence, and the arrays of several requests.

    A prompt and its answer fit in ``max_length``. ``bos_id`` is the dummy token that stands before an answer.
    """

    params: Any  # as `begin` takes them

    def __init__(
        self, config: ModelConfig, dtype: DType, slots: int, max_length: int, eos_ids: tuple[int, ...], bos_id: int
    ):
        if slots < 1 or slots & (slots - 1):
            raise UserError(f"slots must be a power of two, got {slots}")
        if len(eos_ids) > MAX_EOS:
            raise UserError(f"{len(eos_ids)} end-of-sequence ids; at most {MAX_EOS} are supported")
        self.config, self.dtype, self.slots, self.max_length = config, dtype, slots, max_length
        self.eos_ids, self.bos_id = eos_ids, bos_id
        self.lengths = length_buckets(max_length)
        self.vocab_size = config.language_model.vocab_size

    @abstractmethod
    def begin(self, params: Any, prompts: Prompts, num_beams: int, room: int) -> Begun:
        """Read prompts that up to ``room`` new tokens follow; traced into the program of a search."""

    def check(self, request: Request) -> None:
        """Raises ``UserError`` for a request that cannot be run."""
        length, new = len(request.ids), request.sampling.max_new_tokens
        if length == 0:
            raise UserError("the prompt is empty")
        check_num_images(self._num_images(request))
        if length + new > self.max_length:
            raise UserError(
                f"the prompt has {length} tokens and max_new_tokens is {new}: together they exceed the context of "
                f"{self.max_length}; shorten the prompt, or ask for at most {max(self.max_length - length, 0)}"
            )
        if max(itertools.chain(*request.sampling.stop_ids), default=0) >= self.vocab_size:
            raise UserError(f"stop_ids: the vocabulary has {self.vocab_size} tokens")

    def _num_images(self, request: Request) -> int:
        return 0 if request.images is None else -(-len(request.images) // self.config.tokens_per_image)

    def image_bucket(self, request: Request) -> int:
        """Its pictures, rounded up to a power of two, none to one."""
        return 1 << max(self._num_images(request) - 1, 0).bit_length()

    def stack_prompts(self, requests: list[Request]) -> Prompts:
        """Host arrays of several requests, as long and with as many pictures as the bucket of the largest has."""
        length = bucket(self.lengths, max(len(request.ids) for request in requests))
        ids = np.stack([_pad(request.ids, length, 0) for request in requests])
        slots = np.stack([_pad(request.slots, length, -1) for request in requests])
        images = None
        if self.config.vit is not None:
            rows = max(map(self.image_bucket, requests)) * self.config.tokens_per_image
            images = np.zeros((len(requests), rows, self.config.language_model.hidden_size), self.dtype)
            for row, request in enumerate(requests):
                if request.images is not None:
                    images[row, : len(request.images)] = request.images
        return Prompts(ids, slots, images, np.array([len(request.ids) for request in requests], np.int32))

    def room_behind(self, requests: list[Request]) -> int:
        """How many new tokens there is room for when these are searched together."""
        return bucket(self.lengths, max(request.sampling.max_new_tokens for request in requests))

    def stack_stops(self, requests: list[Request]) -> Int[np.ndarray, "b k w"]:
        """What ends each request: its own sequences and the ends of sequence."""
        stops = [(*request.sampling.stop_ids, *((eos,) for eos in self.eos_ids)) for request in requests]
        return pack_stops(stops, *STOP_SHAPE)


def check_num_images(count: int) -> None:
    if count > MAX_IMAGES:
        raise UserError(f"{count} pictures in one prompt; at most {MAX_IMAGES} are supported")


def length_buckets(max_length: int) -> list[int]:
    """32, 64, 128, ... and ``max_length``: the lengths that prompts and caches are padded to."""
    powers = [32 << i for i in range(max(0, math.ceil(math.log2(max_length / 32))))]
    return [*powers, max_length]


def bucket(lengths: list[int], size: int) -> int:
    """The smallest of the ``lengths`` that ``size`` fits."""
    return next(length for length in lengths if length >= size)


def _pad(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), filler, np.int32)]).astype(np.int32)
