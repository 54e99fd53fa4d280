"""Look at a data set before a run: every sample is read, decoded and tokenised as training will.

``validate_source`` gives a ``Report``: how many samples there are, which are bad and why, how long the texts are, how
many lose their end, and a few pictures with their words exactly as they will be fed (``page.py`` shows them).
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from mgpt4_jax.config import IGNORED, MAX_SIZE
from mgpt4_jax.data.batching import TrainingSequence, bucket_for
from mgpt4_jax.data.images import load_image, resize
from mgpt4_jax.data.page_shell import visible
from mgpt4_jax.data.rows import RowBuilder, buckets_of
from mgpt4_jax.data.samples import Sample, Source
from mgpt4_jax.data.text import clean_caption
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import TextConfig

JPEG_QUALITY = 80
NUM_BINS = 12
BAR_WIDTH = 40  # characters
BAD_LINES = 20  # that are printed; the page has more

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fed:
    """A sample's words as the model will read them."""

    before: str  # what stands before the answer; a picture is ``[picture: 32 tokens]``
    predicted: str
    lost: str  # the end of the answer, cut at ``max_text_length``
    length: int  # of the whole answer with its end symbol
    positions: int  # of the row, with its picture


class Feed(Protocol):
    """From a sample to its words. ``unit`` is what lengths are counted in."""

    unit: str
    text: TextConfig
    instructions: tuple[str, ...]  # the longest first
    shows_instructions: bool  # the objective does

    def read(self, sample: Sample, instruction: str | None) -> Fed:
        """Raises ``UserError`` for what training would count as bad."""
        ...


class TokenFeed:
    """The sequences that training makes, spelt out."""

    unit = "tokens"

    def __init__(self, rows: RowBuilder) -> None:
        self.rows, self.text = rows, rows.text
        self.shows_instructions = rows.objective == "finetune"
        unlimited = dataclasses.replace(rows.text, max_text_length=MAX_SIZE, max_length=MAX_SIZE)
        self._whole_rows = dataclasses.replace(rows, text=unlimited)
        self._buckets = buckets_of(rows.text)
        self.instructions = tuple(
            sorted(rows.text.instructions, key=lambda text: len(rows.tokenizer.encode(text)), reverse=True)
        )

    def read(self, sample: Sample, instruction: str | None) -> Fed:
        row = self.rows.row(sample, instruction)
        bucket_for(len(row), self._buckets)
        start = int(np.flatnonzero(row.targets != IGNORED)[0])
        length, lost, predicted = len(row) - start, "", self._spell(row, start, len(row))
        if length >= self.text.max_text_length:
            whole = self._whole_rows.row(sample, instruction)
            length, said = len(whole) - start, self._spell(whole, start, len(whole))
            cut_in_a_character = not said.startswith(predicted)
            lost = self._spell(whole, len(row), len(whole)) if cut_in_a_character else said[len(predicted) :]
        return Fed(self._spell(row, 0, start), predicted, lost, length, len(row))

    def _spell(self, row: TrainingSequence, start: int, stop: int) -> str:
        """The text of a stretch of a row, its pictures named."""
        parts: list[str] = []
        for is_text, group in itertools.groupby(range(start, stop), lambda t: bool(row.slots[t] < 0)):
            places = list(group)
            ids = [int(row.ids[t]) for t in places]
            parts.append(
                self.rows.tokenizer.decode(ids, skip_special=False) if is_text else f"[picture: {len(ids)} tokens]"
            )
        return "".join(parts)


class WordFeed:
    """Without a model: the words, not yet in a template, and their number."""

    unit = "words"

    def __init__(self, text: TextConfig, *, objective: str = "align", clean_captions: bool = False) -> None:
        self.text, self._clean = text, clean_captions
        self.shows_instructions = objective == "finetune"
        self.instructions = tuple(sorted(text.instructions, key=lambda text: len(text.split()), reverse=True))

    def read(self, sample: Sample, instruction: str | None) -> Fed:
        answer = clean_caption(sample.answer) if self._clean and sample.instruction is None else sample.answer
        if not answer.strip():
            raise UserError("the caption is empty once it is cleaned")
        before = instruction if sample.instruction is None else sample.instruction
        parts = ["[picture]" if sample.image is not None else "", before if self.shows_instructions else ""]
        length = len(answer.split())
        return Fed(" ".join([part for part in parts if part] + [""]), answer + self.text.end_symbol, "", length, length)


@dataclass(frozen=True)
class Shown:
    """A sample for a person to look at."""

    name: str
    jpeg: bytes | None  # as the model sees it: square
    size: tuple[int, int] | None  # width and height of the picture file
    fed: Fed


@dataclass
class Report:
    """What is in a data set."""

    name: str
    total: int
    unit: str
    text: TextConfig
    checked: int = 0
    bad: list[str] = field(default_factory=list)  # 'name: reason'
    lost: int = 0  # texts whose end is cut off
    blind: int = 0  # samples without a picture
    unread: int = 0  # samples with an instruction of their own, which the objective does not show
    lengths: array[int] = field(default_factory=lambda: array("q"))  # of the answers of good samples
    positions: array[int] = field(default_factory=lambda: array("q"))  # of their rows
    smallest: tuple[int, int] | None = None  # picture, width and height
    largest: tuple[int, int] | None = None
    shown: list[Shown] = field(default_factory=list)

    @property
    def good(self) -> int:
        return self.checked - len(self.bad)

    def headline(self) -> str:
        checked = "all checked" if self.checked == self.total else f"{self.checked:,} checked"
        return f"{self.name}: {self.total:,} samples, {checked}, {len(self.bad):,} bad"

    def lines(self) -> list[str]:
        """The report for a terminal."""
        found = [self.headline(), *(f"  bad: {visible(line)}" for line in self.bad[:BAD_LINES])]
        if len(self.bad) > BAD_LINES:
            found.append(f"  and {len(self.bad) - BAD_LINES:,} more (--out writes a page that lists them)")
        found += [f"  {line}" for line in self.facts()]
        if self.good:
            bins = histogram(self.lengths)
            most = max(count for _, _, count in bins)
            label = max(len(f"{first}-{last}") for first, last, _ in bins)
            for first, last, count in bins:
                bar = "#" * -(-BAR_WIDTH * count // most)
                found.append(f"    {f'{first}-{last}' if last > first else str(first):>{label}} {bar} {count:,}")
        return found

    def facts(self) -> list[str]:
        """One line for each thing to know about the good samples."""
        if not self.good:
            return ["no good sample"]
        low, median, high, most = spread(self.lengths)
        ends = " with the end symbol" if self.unit == "tokens" else " (tokens need --model)"
        found = [f"answers in {self.unit}{ends}: least {low}, median {median}, 95% up to {high}, most {most}"]
        if self.unit == "tokens":
            share = self.lost / self.good
            limit = self.text.max_text_length
            found.append(f"{self.lost:,} ({share:.1%}) lose their end at text.max_text_length = {limit}")
            counts = self.buckets()
            padding = 1 - sum(self.positions) / sum(length * count for length, count in counts.items())
            used = ", ".join(f"{length}: {count:,}" for length, count in counts.items())
            found.append(f"rows by the length they are padded to: {used}; {padding:.0%} of it is padding")
        if self.smallest and self.largest:
            sizes = " to ".join(f"{width}x{height}" for width, height in (self.smallest, self.largest))
            found.append(f"pictures: {sizes}")
        if self.blind:
            found.append(f"without a picture: {self.blind:,}")
        if self.unread:
            found.append(f"with an instruction of their own, which only objective finetune reads: {self.unread:,}")
        return found

    def buckets(self) -> dict[int, int]:
        """How many rows are padded to which length."""
        lengths = np.array(buckets_of(self.text))
        found, counts = np.unique(lengths[np.searchsorted(lengths, np.array(self.positions))], return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))


def validate_source(
    source: Source,
    feed: Feed,
    *,
    image_size: int = 224,
    limit: int | None = None,
    shown: int = 24,
    threads: int = 4,
    report: Progress | None = None,
) -> Report:
    """Check samples.

    Args:
      feed: ``TokenFeed`` of the run's rows, or ``WordFeed`` where no model is at hand.
      limit: most samples to check, spread evenly over the data set; None: all.
      shown: pictures to keep for the page, spread evenly over those that are checked.
      threads: that read and decode.
      report: called with samples checked and samples to check.
    """
    indices = _spread_out(len(source), limit)
    visible = {indices[place] for place in _spread_out(len(indices), shown)} if shown else set()
    result = Report(source.name, len(source), feed.unit, feed.text)

    def check(index: int) -> _Checked:
        return _check(source, feed, index, image_size if index in visible else 0)

    with ThreadPoolExecutor(threads) as pool:
        for checked in _map(pool, check, indices, window=8 * threads):
            _add(result, checked)
            if report:
                report(result.checked, len(indices))
    return result


def spread(values: Sequence[int]) -> tuple[int, int, int, int]:
    """Least, median, 95th percentile and most; each is one of ``values``."""
    low, median, high, most = np.quantile(np.array(values), [0, 0.5, 0.95, 1], method="lower").tolist()
    return low, median, high, most


def histogram(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, last, count) of at most ``NUM_BINS`` bins of equal width, empty ones between them too."""
    array_ = np.array(values)
    low, high = int(array_.min()), int(array_.max())
    width = -(-(high - low + 1) // NUM_BINS)
    counts = np.bincount((array_ - low) // width)
    return [(low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class _Checked:
    """What became of one sample."""

    bad: str | None = None
    fed: Fed | None = None
    size: tuple[int, int] | None = None
    shown: Shown | None = None
    unread: bool = False


def _check(source: Source, feed: Feed, index: int, image_size: int) -> _Checked:
    """Read, decode and tokenise one sample; with an ``image_size``, keep its picture."""
    prefix = ""  # a source names its samples itself
    try:
        sample = source[index]
        prefix = f"{sample.name}: "
        fed = feed.read(sample, feed.instructions[0] if feed.instructions else None)
        image = None if sample.image is None else load_image(sample.image)
    except UserError as error:
        return _Checked(bad=prefix + str(error))
    size = None if image is None else image.size
    shown = None
    if image_size:
        drawn = feed.instructions[index % len(feed.instructions)] if feed.instructions else None
        jpeg = None if image is None else _jpeg(image, image_size)
        shown = Shown(sample.name, jpeg, size, feed.read(sample, drawn))
    return _Checked(None, fed, size, shown, sample.instruction is not None and not feed.shows_instructions)


def _add(report: Report, checked: _Checked) -> None:
    report.checked += 1
    if checked.bad is not None:
        report.bad.append(checked.bad)
        return
    assert checked.fed is not None
    report.lengths.append(checked.fed.length)
    report.positions.append(checked.fed.positions)
    report.lost += bool(checked.fed.lost)
    report.unread += checked.unread
    if checked.size is None:
        report.blind += 1
    else:
        sizes = [size for size in (checked.size, report.smallest, report.largest) if size]
        report.smallest, report.largest = min(sizes, key=np.prod), max(sizes, key=np.prod)
    if checked.shown:
        report.shown.append(checked.shown)


def _jpeg(image: Image.Image, size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(resize(image, size)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _spread_out(total: int, limit: int | None) -> Sequence[int]:
    """``limit`` of ``range(total)``, evenly spaced, or all."""
    if limit is None or limit >= total:
        return range(total)
    return [place * total // limit for place in range(limit)]


def _map(
    pool: ThreadPoolExecutor, function: Callable[[int], _Checked], indices: Sequence[int], window: int
) -> Iterator[_Checked]:
    """``pool.map`` with a bounded number of results that wait."""
    for start in range(0, len(indices), window):
        yield from pool.map(function, indices[start : start + window])
