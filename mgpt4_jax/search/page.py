"""The page of what a search found: thumbnails, scores and names, in one file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mgpt4_jax.data.images import load_image
from mgpt4_jax.data.page_shell import as_text, render_picture, render_shell, write_whole
from mgpt4_jax.errors import UserError
from mgpt4_jax.search.index import Hit

THUMBNAIL = 360  # pixels of the longer side
QUALITY = 80

_STYLE = """
.card img { object-fit: contain; } .query { width: 240px; }
"""


def write_page(path: Path, hits: Sequence[Hit], *, text: str | None = None, image: Path | str | None = None) -> None:
    """Write the page; it appears under its name only when it is whole.

    Raises:
      UserError: it cannot be written.
    """
    write_whole(path, render_page(hits, text=text, image=image))


def render_page(hits: Sequence[Hit], *, text: str | None = None, image: Path | str | None = None) -> str:
    """The page as HTML; the query is ``text`` or ``image``, as it was given to the search."""
    if text is not None:
        query = f'<p class="text">{as_text(text)}</p>'
    else:
        query = f'<div class="card query">{render_picture(_thumbnail(image))}\n{_name(str(image))}</div>'
    count = f"{len(hits):,} picture{'' if len(hits) == 1 else 's'}, best first"
    cards = "\n".join(_card(place, hit) for place, hit in enumerate(hits, 1))
    return render_shell(
        "Pictures found",
        [query, f'<p class="dim">{count}; {_legend(hits)}</p>', f'<div class="cards">\n{cards}\n</div>'],
        _STYLE,
    )


def _legend(hits: Sequence[Hit]) -> str:
    if all(hit.match is None for hit in hits):
        return "ordered by similarity"
    return "ordered by match, the probability that words and picture belong together"


def _card(place: int, hit: Hit) -> str:
    match = "" if hit.match is None else f"match {hit.match:.3f} · "
    scores = f"{place} · {match}similarity {hit.similarity:.3f}"
    return (
        f'<div class="card">{render_picture(_thumbnail(hit.path))}\n{_name(str(hit.path))}\n<div>{scores}</div></div>'
    )


def _name(name: str) -> str:
    return f'<div class="name">{as_text(name)}</div>'


def _thumbnail(source: Path | str) -> bytes | None:
    """A small JPEG of a picture, or None if it cannot be read any more."""
    try:
        image = load_image(source)
    except UserError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
