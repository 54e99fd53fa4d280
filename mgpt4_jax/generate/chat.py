"""A conversation about pictures, as MiniGPT-4's ``conversation.py`` (``Chat``) holds it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from mgpt4_jax.data.images import ImageSource
from mgpt4_jax.data.prompts import (
    Message,
    Prompt,
    Template,
    add_answer,
    add_image,
    add_question,
    build_prompt,
    chat_prompt,
    crop_left,
)
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.answer import Answerer, Generation, Prepared, Question
from mgpt4_jax.generate.sampling import SamplingParams, sampling_params
from mgpt4_jax.typing import Float

DEFAULTS = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.05, max_new_tokens=300)
"""What MiniGPT-4's chat draws with; ``temperature=0`` asks for the most likely words."""

MAX_LENGTH = 2000  # context and answer, in tokens

_log = logging.getLogger(__name__)


class Chat:
    """Show pictures and ask about them; every answer sees the whole conversation.

    When the context and the room for an answer exceed ``max_length`` tokens, the oldest ones are dropped,
    as the original does, and a warning says so: the pictures may be among them.
    """

    def __init__(self, answerer: Answerer, template: Template | None = None, max_length: int = MAX_LENGTH):
        self._answerer = answerer
        self.template = template or answerer.template
        self.max_length = min(max_length, answerer.engine.max_length)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said and shown."""
        self.messages: tuple[Message, ...] = ()
        self._pixels: list[np.ndarray] = []

    def add_image(self, image: ImageSource) -> None:
        """Show a picture: a path, bytes, a data URI or a Pillow image."""
        [pixels] = self._answerer.read_pixels([image])
        self.add_pixels(pixels)

    def add_pixels(self, pixels: Float[np.ndarray, "H W 3"]) -> None:
        """Show a picture that is resized and normalised already."""
        self.messages = add_image(self.messages, self.template)
        self._pixels.append(pixels)

    def ask(self, text: str, **sampling: Any) -> str:
        """The answer to ``text``; decoding defaults to MiniGPT-4's (see ``DEFAULTS``)."""
        return self.answer(text, **sampling).text

    def answer(self, text: str, **sampling: Any) -> Generation:
        """``ask`` with the ids, the counts of tokens and why it ended."""
        messages, prepared = self._prepare(text, sampling)
        [(_, generation)] = self._answerer.answers([prepared])
        self.messages = add_answer(messages, generation.text)
        return generation

    def stream(self, text: str, **sampling: Any) -> Iterator[str]:
        """Pieces of the answer as they come; it joins the conversation once it is complete."""
        messages, prepared = self._prepare(text, sampling)
        return self._stream(messages, prepared)

    def _stream(self, messages: tuple[Message, ...], prepared: Prepared) -> Iterator[str]:
        yield from self._answerer.stream(prepared)
        self.messages = add_answer(messages, prepared.generation("stop").text)

    def _prepare(self, text: str, sampling: dict[str, Any]) -> tuple[tuple[Message, ...], Prepared]:
        params = sampling_params(sampling, DEFAULTS)
        tokenizer = self._answerer.tokenizer
        messages = add_question(self.messages, text, self.template, special_tokens=tokenizer.special_tokens)
        prompt = build_prompt(
            tokenizer,
            chat_prompt(self.template, messages),
            num_images=len(self._pixels),
            tokens_per_image=self._answerer.engine.config.tokens_per_image,
            images_first=self.template.images_first,
        )
        prompt = self._crop(prompt, params.max_new_tokens)
        question = Question(text, sampling=params, template=self.template)
        return messages, self._answerer.prepare_prompt(prompt, self._pixels, question)

    def _crop(self, prompt: Prompt, max_new_tokens: int) -> Prompt:
        room = self.max_length - max_new_tokens
        if len(prompt) <= room:
            return prompt
        if room < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} leaves no room in a context of {self.max_length} tokens")
        lost = len(prompt) - room
        _log.warning("the first %d tokens of the conversation no longer fit and are dropped; reset the chat", lost)
        return crop_left(prompt, room)
