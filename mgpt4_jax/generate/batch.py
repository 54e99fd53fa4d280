"""``mgpt4 generate``: questions from a JSONL file, answers to another, in order and resumable.

A line of the input is ``{"id": any, "image": path | [paths] | data-URI, "prompt": str, ...sampling}``; a line of
the output the id, ``text``, ``finish_reason`` (stop, length, error), the counts of tokens, and ``error``; of beams
also the ``score`` and, if more sequences are asked for, the ``others`` with theirs. A
bad line gives an error line. Answers are appended as soon as those before them are there; a second run
goes on behind them. To try failed lines again, delete their answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mgpt4_jax.data.prompts import Template
from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.answer import Answerer, Generation, Prepared, Question
from mgpt4_jax.generate.sampling import PARAMETER_NAMES, SamplingParams, sampling_params

FIELDS = ("id", "image", "prompt")
_RECORD_START = b'{"id": '  # of every line that we write: a torn one that begins otherwise is not ours


@dataclass(frozen=True)
class Line:
    """One line of the input; ``error`` says why it cannot be asked."""

    number: int  # from 1
    id: Any
    question: Question | None
    error: str | None = None

    @property
    def key(self) -> str:
        return _key(self.id, self.number)


@dataclass
class Summary:
    """Counts of lines: answered in this run, skipped because the output has them, and failed (now or before)."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    new_tokens: int = 0

    def line(self, seconds: float) -> str:
        """What a person wants to know at the end."""
        parts = [f"{self.answered} answered ({self.new_tokens} tokens in {seconds:.1f} s)"]
        parts += [f"{self.skipped} there already"] if self.skipped else []
        mend = "see the lines with finish_reason error; to try again, delete them from the output"
        parts += [f"{self.failed} failed: {mend}"] if self.failed else []
        return ", ".join(parts)


def run_file(
    answerer: Answerer,
    source: Path,
    target: Path,
    *,
    defaults: SamplingParams | None = None,
    template: Template | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Summary:
    """Answer every line of ``source`` that has no answer in ``target`` yet, in bounded memory.

    Raises:
      UserError: a file cannot be read or written, an id stands twice, another run writes ``target``.
    """
    numbers = check_files(source, target)
    with _open_output(target) as output:
        done, failed_before = _repair(output, target)
        total = len(numbers)
        summary = Summary(skipped=sum(key in done for key in numbers), failed=failed_before)
        waiting = (line for line in read_lines(source, defaults, template) if line.key not in done)
        for line, generation, error in _in_order(_answers(answerer, waiting)):
            output.write(_dump(_record(line, generation, error)))
            output.flush()
            if generation is None:
                summary.failed += 1
            else:
                summary.answered += 1
                summary.new_tokens += generation.new_tokens
            if report:
                report(summary.skipped + summary.answered + summary.failed - failed_before, total)
        os.fsync(output.fileno())
    return summary


def check_files(source: Path, target: Path) -> dict[str, int]:
    """``check_ids`` of the input, and whether the output has a place: what can be told before a model is loaded."""
    if source.is_fifo():
        raise UserError(f"{source}: is a pipe, and the questions are read twice; write them to a file first")
    if target.exists() and not target.is_file():
        raise UserError(f"{target}: is not a regular file; a second run could not go on where the first one ended")
    if source.exists() and target.exists() and source.samefile(target):
        raise UserError(f"{target}: the output would overwrite the input; choose another file")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target}: cannot be written (there is no directory {target.parent})")
    return check_ids(source)


# --- the input ---------------------------------------------------------------------------------------------


def check_ids(source: Path) -> dict[str, int]:
    """Line numbers by key, of lines that have an answer to be written; an id that stands twice is refused."""
    numbers: dict[str, int] = {}
    for number, raw in _raw_lines(source):
        try:
            values = _parse(raw)
        except UserError:
            values = {}
        key = _key(values.get("id"), number)
        if key in numbers:
            raise UserError(f"{source}:{number}: the id {key} stands on line {numbers[key]} already; ids must differ")
        numbers[key] = number
    return numbers


def read_lines(source: Path, defaults: SamplingParams | None, template: Template | None) -> Iterator[Line]:
    """Every line that is not blank; pictures are looked for beside the file."""
    for number, raw in _raw_lines(source):
        identity = None
        try:
            values = _parse(raw)
            identity = values.get("id")
            yield Line(number, identity, _question(values, source.parent, defaults, template))
        except UserError as error:
            yield Line(number, identity, None, str(error))


def _raw_lines(source: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with source.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8-sig"))  # Windows editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError("the line is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(f'the line must be an object such as {{"id": 1, "prompt": "..."}}, not a {kind}')
    try:
        json.dumps(values.get("id"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise UserError('"id" is not finite, or nested too deeply; the answer could not repeat it') from error
    return values


def _question(
    values: dict[str, Any], folder: Path, defaults: SamplingParams | None, template: Template | None
) -> Question:
    if "id" not in values or values["id"] is None:
        raise UserError('the line has no "id"; give each line one, so that its answer can be told')
    if "prompt" not in values:
        raise UserError('the line has no "prompt"')
    sampling = {name: value for name, value in values.items() if name not in FIELDS}
    if unknown := [name for name in sampling if name not in PARAMETER_NAMES]:
        raise UserError(f"unknown key {unknown[0]!r}; known: {', '.join((*FIELDS, *PARAMETER_NAMES))}")
    images = values.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) and image for image in images):
        raise UserError('"image" must be a path, a data URI, or a list of them')
    if not isinstance(values["prompt"], str):
        raise UserError(f'"prompt" must be text, got {type(values["prompt"]).__name__}')
    sources = tuple(image if _is_address(image) else str(folder / image) for image in images)
    return Question(values["prompt"], sources, sampling_params(sampling, defaults), template)


def _is_address(image: str) -> bool:
    """A data URI, or ``http://`` and the like, which `load_image` refuses by name."""
    return image[:5].lower() == "data:" or "://" in image


# --- answering ---------------------------------------------------------------------------------------------

Result = tuple[Line, Generation | None, str | None]


def _answers(answerer: Answerer, lines: Iterable[Line]) -> Iterator[tuple[int, Result]]:
    """Results with the places of their lines, as they come; pictures are read for as many lines as run together."""
    running: dict[int, tuple[int, Line]] = {}
    errors: list[tuple[int, Result]] = []
    places, starts = itertools.count(), itertools.count()

    def questions() -> Iterator[Prepared]:
        source = iter(lines)
        while window := list(itertools.islice(source, answerer.engine.slots)):
            asked = [line for line in window if line.question is not None]
            ready_lines = answerer.prepare([line.question for line in asked if line.question])
            prepared = dict(zip((line.number for line in asked), ready_lines, strict=True))
            for line in window:
                place, ready = next(places), prepared.get(line.number, line.error)
                if isinstance(ready, Prepared):
                    running[next(starts)] = place, line
                    yield ready
                else:
                    errors.append((place, (line, None, str(ready))))

    for index, generation in answerer.answers(questions()):
        yield from errors
        errors.clear()
        place, line = running.pop(index)
        yield place, (line, generation, None)
    yield from errors


def _in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Results in the order of their lines; those that come early wait."""
    early: dict[int, Result] = {}
    expected = 0
    for place, result in results:
        early[place] = result
        while expected in early:
            yield early.pop(expected)
            expected += 1


# --- the output --------------------------------------------------------------------------------------------


def _record(line: Line, generation: Generation | None, error: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"id": line.id}
    if line.id is None:
        record["line"] = line.number
    if generation is None:
        return {**record, "text": "", "finish_reason": "error", "prompt_tokens": 0, "new_tokens": 0, "error": error}
    record |= {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
    }
    if generation.score is not None:
        record["score"] = generation.score
    if generation.others:
        fields = ("text", "finish_reason", "new_tokens", "score")
        record["others"] = [{name: getattr(other, name) for name in fields} for other in generation.others]
    return {**record, "error": None}


def _dump(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # an id with a lone surrogate
        return json.dumps(record).encode("ascii") + b"\n"


@contextlib.contextmanager
def _open_output(target: Path) -> Iterator[BinaryIO]:
    """The output, open for reading and appending, and ours alone."""
    try:
        file = target.open("a+b")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{target}: another run is writing it; wait for it or choose another file") from error
        yield file


def _repair(output: BinaryIO, target: Path) -> tuple[set[str], int]:
    """Keys that have an answer, and how many of these are errors. A line torn by a kill is cut off."""
    output.seek(0)
    done: set[str] = set()
    failed = whole = 0
    for number, raw in enumerate(output, 1):
        try:
            record = json.loads(raw) if raw.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = {}
        if record is None and (number > 1 or raw.startswith(_RECORD_START) or _RECORD_START.startswith(raw)):
            break
        if not isinstance(record, dict) or "finish_reason" not in record:
            raise UserError(f"{target}:{number}: is not an answer of this program; choose another output file")
        done.add(_key(record.get("id"), record.get("line", 0)))
        failed += record["finish_reason"] == "error"
        whole += len(raw)
    output.truncate(whole)
    return done, failed


def _key(identity: Any, number: int) -> str:
    """Ids of any JSON type, told apart; a line without one is known by its number."""
    return f"line {number}" if identity is None else json.dumps(identity, sort_keys=True)
