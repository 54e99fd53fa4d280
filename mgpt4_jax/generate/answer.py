"""From a question in words and pictures to a request of the engine, and from its ids back to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mgpt4_jax.data.images import ImageSource, eval_transform, load_image
from mgpt4_jax.data.prompts import Prompt, Template, clean_answer, prepare_prompt, stop_sequences
from mgpt4_jax.data.text import BertTokenizer, StreamDecoder, Tokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.engine import Engine, Request, check_num_images
from mgpt4_jax.generate.sampling import MAX_STOPS, SamplingParams
from mgpt4_jax.generate.vision import ImageEncoder

STREAM_CHUNK = 4  # tokens between two pieces of a streamed answer


@dataclass(frozen=True)
class Question:
    """What a user asks: words, pictures, and how to decode the answer."""

    text: str
    images: tuple[ImageSource, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template: Template | None = None  # None: the model's own


@dataclass(frozen=True)
class Generation:
    """An answer. ``ids`` are all new ids, with the ones that stopped it; ``text`` ends before a stop."""

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int


@dataclass
class Prepared:
    """A question ready for the engine, and the text that grows from its answer."""

    request: Request
    answer: AnswerText
    template: Template

    def generation(self, reason: Literal["stop", "length"]) -> Generation:
        text = clean_answer(self.template, self.answer.finish())
        return Generation(text, self.answer.ids, reason, len(self.request.ids), len(self.answer.ids))


@dataclass
class AnswerText:
    """Text of an answer as its ids come, cut before the first stop string."""

    tokenizer: Tokenizer
    stops: tuple[str, ...] = ()
    min_new_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        self._decoder, self._stopped, self._shown, self._safe_from = StreamDecoder(self.tokenizer), False, 0, 0

    def push(self, ids: list[int]) -> bool:
        """Add new ids; True when a stop string is complete. Ids behind it are dropped."""
        for token in ids:
            self.ids.append(token)
            self._add(self._decoder.push(token))
            if self._stopped:
                return True
        return False

    def _add(self, delta: str) -> None:
        start = len(self.text)
        self.text += delta
        if len(self.ids) <= self.min_new_tokens:
            self._safe_from = len(self.text)
            return
        reach = max(map(len, self.stops), default=1) - 1  # a stop may have begun before this piece
        begin = max(start - reach, self._safe_from)
        ends = [at for stop in self.stops if (at := self.text.find(stop, begin)) >= 0]
        if ends:
            self.text, self._stopped = self.text[: min(ends)], True

    def finish(self) -> str:
        """The whole text, with what the decoder held back."""
        if not self._stopped:
            self._add(self._decoder.finish())
        return self.text

    def take(self, *, final: bool = False) -> str:
        """Text to show since the last call; what may be the beginning of a stop string waits."""
        end = len(self.text)
        if not final and not self._stopped:
            end -= max((held for stop in self.stops for held in _overlaps(self.text, stop)), default=0)
        piece, self._shown = self.text[self._shown : end], max(end, self._shown)
        return piece


def _overlaps(text: str, stop: str) -> Iterator[int]:
    """Lengths of the ends of ``text`` that begin ``stop``."""
    return (size for size in range(1, len(stop)) if text.endswith(stop[:size]))


@dataclass
class Answerer:
    """Everything that answers: tokenisers, picture encoder, engine, template. One thread at a time."""

    engine: Engine
    tokenizer: Tokenizer
    template: Template
    encoder: ImageEncoder | None = None
    qformer_tokenizer: BertTokenizer | None = None

    def prepare(self, questions: Sequence[Question]) -> list[Prepared | UserError]:
        """Read, check and tokenise each question and encode all pictures; a bad one gives its error."""
        drafts = [self._draft(question) for question in questions]
        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        self._encode(good)
        return [self._finish(draft) if isinstance(draft, _Draft) else draft for draft in drafts]

    def prepare_prompt(self, prompt: Prompt, pixels: Sequence[np.ndarray], question: Question) -> Prepared:
        """The same for a prompt that is tokenised already (chat)."""
        draft = _Draft(question, question.template or self.template, prompt, list(pixels))
        self._encode([draft])
        prepared = self._finish(draft)
        if isinstance(prepared, UserError):
            raise prepared
        return prepared

    def answers(self, questions: Iterable[Prepared]) -> Iterator[tuple[int, Generation]]:
        """Answers with the indices of their questions, in the order in which they end."""
        running: dict[int, Prepared] = {}

        def requests() -> Iterator[Request]:
            for index, prepared in enumerate(questions):
                running[index] = prepared
                yield prepared.request

        for update in self.engine.run(requests()):
            if update.finish_reason is not None:
                yield update.index, running.pop(update.index).generation(update.finish_reason)

    def stream(self, prepared: Prepared) -> Iterator[str]:
        """Pieces of one answer, a few tokens each."""
        for update in self.engine.run([prepared.request], chunk=STREAM_CHUNK):
            if update.finish_reason is not None:
                prepared.answer.finish()
            if piece := prepared.answer.take(final=update.finish_reason is not None):
                yield piece

    def read_pixels(self, images: Iterable[ImageSource]) -> list[np.ndarray]:
        images = list(images)
        if images and self.encoder is None:
            raise UserError("this model has no picture side: ask without pictures")
        return [eval_transform(load_image(image), self.engine.config.vit.image_size) for image in images]

    def _draft(self, question: Question) -> _Draft | UserError:
        template = question.template or self.template
        try:
            check_num_images(len(question.images))
            prompt = prepare_prompt(
                self.tokenizer,
                template,
                question.text,
                num_images=len(question.images),
                tokens_per_image=self.engine.config.tokens_per_image,
            )
            return _Draft(question, template, prompt, self.read_pixels(question.images))
        except UserError as error:
            return error

    def _encode(self, drafts: list[_Draft]) -> None:
        pixels = [picture for draft in drafts for picture in draft.pixels]
        if not pixels or self.encoder is None:
            return
        texts = None
        if self.encoder.reads_text:
            texts = [self._instruction(draft.question.text) for draft in drafts for _ in draft.pixels]
        tokens = iter(self.encoder.encode(pixels, texts))
        for draft in drafts:
            draft.tokens = [next(tokens) for _ in draft.pixels]

    def _instruction(self, text: str) -> list[int]:
        if self.qformer_tokenizer is None:
            raise UserError("the model directory lacks qformer_tokenizer/; convert it with --qformer-tokenizer")
        assert self.encoder is not None
        return self.qformer_tokenizer.encode(text, max_length=self.encoder.text_lengths[-1])

    def _finish(self, draft: _Draft) -> Prepared | UserError:
        sampling, stops = draft.question.sampling, draft.template.stops
        text = AnswerText(self.tokenizer, (*sampling.stop, *stops), sampling.min_new_tokens)
        sequences = (*sampling.stop_ids, *stop_sequences(draft.template, self.tokenizer))
        request = Request(
            draft.prompt.ids,
            draft.prompt.slots,
            np.concatenate(draft.tokens) if draft.tokens else None,
            sampling.with_stops(sequences[:MAX_STOPS]),  # the text is watched for the template's stops, too
            text.push,
        )
        try:
            self.engine.check(request)
        except UserError as error:
            return error
        return Prepared(request, text, draft.template)


@dataclass
class _Draft:
    """A question on its way: read and tokenised, its pictures not yet encoded."""

    question: Question
    template: Template
    prompt: Prompt
    pixels: list[np.ndarray]
    tokens: list[np.ndarray] = field(default_factory=list)
