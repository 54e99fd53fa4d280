"""From a question in words and pictures to a request of the engine, and from its ids back to text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import jax
import numpy as np

from mgpt4_jax.data.images import ImageSource, eval_transform, load_image
from mgpt4_jax.data.prompts import Prompt, Template, clean_answer, prepare_prompt, stop_sequences
from mgpt4_jax.data.text import BertTokenizer, StreamDecoder, Tokenizer
from mgpt4_jax.data.text_lm import FramedTokenizer
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.beam_engine import BeamEngine, Hypothesis
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.generate.language import LanguageEngine
from mgpt4_jax.generate.requests import Request, check_num_images
from mgpt4_jax.generate.sampling import MAX_STOPS, SamplingParams
from mgpt4_jax.generate.stop_texts import TokenTexts, stop_table
from mgpt4_jax.generate.vision import ImageEncoder
from mgpt4_jax.typing import Array

STREAM_CHUNK = 4  # tokens between two pieces of a streamed answer
STOP_TABLES = 4  # of stop texts, kept on the device


@dataclass(frozen=True)
class Question:
    """What a user asks: words, pictures, and how to decode the answer."""

    text: str
    images: tuple[ImageSource, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template: Template | None = None  # None: the model's own


@dataclass(frozen=True)
class Generation:
    """An answer. ``ids`` are all new ids, with the ones that stopped it; ``text`` ends before a stop.

    Of beams it is the best one; ``score`` is the sum of its log-probabilities over the penalised length, and
    ``others`` are the next best, as far as ``num_return_sequences`` asked for them.
    """

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int
    score: float | None = None
    others: tuple[Generation, ...] = ()


@dataclass
class Prepared:
    """A question ready for the engine, and the text that grows from its answer."""

    request: Request
    answer: AnswerText
    template: Template

    @property
    def search(self) -> tuple[int, tuple[str, ...]] | None:
        """What those that are searched together have in common: beams and stop texts; None without beams."""
        beams = self.request.sampling.num_beams
        return None if beams == 1 else (beams, self.answer.stops)

    def generation(self, reason: Literal["stop", "length"]) -> Generation:
        return self._generation(self.answer, reason)

    def best(self, hypotheses: Sequence[Hypothesis]) -> Generation:
        """The first of ``hypotheses``, which becomes the answer, with the others."""
        found: list[Generation] = []
        for hypothesis in hypotheses:
            answer = AnswerText(self.answer.tokenizer, self.answer.stops, self.answer.min_new_tokens)
            reason = "stop" if answer.push(hypothesis.ids) else hypothesis.finish_reason
            self.answer = answer if not found else self.answer
            found.append(self._generation(answer, reason, hypothesis.score))
        return dataclasses.replace(found[0], others=tuple(found[1:]))

    def _generation(
        self, answer: AnswerText, reason: Literal["stop", "length"], score: float | None = None
    ) -> Generation:
        text = clean_answer(self.template, answer.finish())
        return Generation(text, answer.ids, reason, len(self.request.ids), len(answer.ids), score)


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
        if not self._stopped and isinstance(self.tokenizer, FramedTokenizer):
            self.text = self.tokenizer.decode(self.ids)  # it may have taken back a blank that was shown
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

    engine: Engine | LanguageEngine
    tokenizer: Tokenizer
    template: Template
    encoder: ImageEncoder | None = None
    qformer_tokenizer: BertTokenizer | None = None
    _tables: dict[tuple[str, ...], Array] = field(default_factory=dict)

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
        """Answers with the indices of their questions, in the order in which they end.

        Questions that follow each other and are searched with as many beams share a program; so do those without.
        """
        for search, group in itertools.groupby(enumerate(questions), key=lambda pair: pair[1].search):
            run = self._decode if search is None else partial(self._search, search)
            yield from run(group)

    def _decode(self, questions: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Generation]]:
        running: dict[int, tuple[int, Prepared]] = {}

        def requests() -> Iterator[Request]:
            for place, (index, prepared) in enumerate(questions):
                running[place] = index, prepared
                yield prepared.request

        for update in self.engine.run(requests()):
            if update.finish_reason is not None:
                index, prepared = running.pop(update.index)
                yield index, prepared.generation(update.finish_reason)

    def _search(
        self, search: tuple[int, tuple[str, ...]], questions: Iterator[tuple[int, Prepared]]
    ) -> Iterator[tuple[int, Generation]]:
        beams, stops = search
        while group := list(itertools.islice(questions, self.searcher.rows(beams))):
            found = self.searcher.run([prepared.request for _, prepared in group], self._stop_table(stops))
            for (index, prepared), hypotheses in zip(group, found, strict=True):
                yield index, prepared.best(hypotheses)

    @cached_property
    def searcher(self) -> BeamEngine:
        return BeamEngine(self.engine)

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    def _stop_table(self, stops: tuple[str, ...]) -> Array | None:
        """The table of ``stops`` on the device; the last few are kept."""
        if not stops:
            return None
        if stops not in self._tables:
            while len(self._tables) >= STOP_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[stops] = jax.device_put(stop_table(self._token_texts, stops, self.engine.vocab_size))
        return self._tables[stops]

    def stream(self, prepared: Prepared) -> Iterator[str]:
        """Pieces of one answer, a few tokens each; of beams, which settle on one at the end, the whole."""
        if prepared.search is not None:
            [(_, generation)] = self.answers([prepared])
            yield generation.text
            return
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
            (self.engine if sampling.num_beams == 1 else self.searcher).check(request)
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
