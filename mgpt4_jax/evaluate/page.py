"""A page of examples: pictures with the answer, the references and the score, worst and best among them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgpt4_jax.data.images import load_image
from mgpt4_jax.data.page_shell import as_text, render_picture, render_shell, write_whole
from mgpt4_jax.errors import UserError

SIDE = 320  # of a picture on the page, in pixels
MAX_REFERENCES = 5
_STYLE = """
th { text-align: left; font-weight: normal; color: #667484; padding: 0 1.2em 0 0; }
.answer { background: #e3f1e8; border-radius: 4px; padding: .1em .4em; margin-bottom: .3em; }
.answer.wrong { background: #eef1f5; } .reference { color: #667484; }
"""

Table = Sequence[Sequence[str | float]]
"""Rows of cells: words are headings, numbers are scores."""


@dataclass(frozen=True)
class Example:
    """What one card shows; ``wrong``: which of the answers, by index, are known to be wrong."""

    name: str
    image: str
    question: str
    answers: Sequence[str]
    references: Sequence[str]
    score: str
    wrong: Sequence[int] = ()


def write_examples(path: Path, title: str, scores: Table, examples: Sequence[Example], note: str = "") -> None:
    """Write the page, which needs no other file; it appears when it is whole.

    Args:
      note: says what the cards show.

    Raises:
      UserError: it cannot be written.
    """
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in scores)
    cards = "\n".join(map(_card, examples))
    parts = [f"<table>{rows}</table>", f'<p class="dim">{as_text(note)}</p>', f'<div class="cards">\n{cards}\n</div>']
    write_whole(path, render_shell(title, parts, _STYLE))


def _cell(value: str | float) -> str:
    return f"<th>{as_text(value)}</th>" if isinstance(value, str) else f"<td>{value:.4g}</td>"


def _card(example: Example) -> str:
    lines = [f'<div class="question">{as_text(example.question)}</div>'] if example.question else []
    for index, text in enumerate(example.answers):
        kind = "answer wrong" if index in example.wrong else "answer"
        lines.append(f'<div class="{kind}">{as_text(text)}</div>')
    lines += [f'<div class="reference">{as_text(text)}</div>' for text in example.references[:MAX_REFERENCES]]
    name = f'<div class="name">{as_text(example.name)} · {as_text(example.score)}</div>'
    picture, words = render_picture(_jpeg(example.image) if example.image else None), "".join(lines)
    return f'<div class="card">{picture}\n{name}\n<div class="text">{words}</div></div>'


def _jpeg(source: str) -> bytes | None:
    """The picture, small; None if it cannot be read, which the answers tell already."""
    try:
        image = load_image(source)
    except UserError:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def spread(count: int, limit: int) -> list[int]:
    """``limit`` indices, evenly from the first to the last of ``count``."""
    if count <= limit:
        return list(range(count))
    return sorted({round(index * (count - 1) / max(limit - 1, 1)) for index in range(limit)})
