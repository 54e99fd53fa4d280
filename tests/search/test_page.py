"""The page of a search: pictures inside, names as text whatever they are."""

from __future__ import annotations

import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mgpt4_jax.data.page_shell import visible
from mgpt4_jax.errors import UserError
from mgpt4_jax.search import Hit
from mgpt4_jax.search.page import render_page, write_page
from tests.search.conftest import write_picture

HOSTILE = [
    "<script>alert(1)<%script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "a\n\x1b[2J\u202egnp.png",
    "&lt;b&gt;&amp;.png",
    os.fsdecode(b"latin-\xe9.png"),
]


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_names_and_words_are_text(tmp_path: Path) -> None:
    hits = [Hit(write_picture(tmp_path / name, 0), 0.5, 0.25) for name in HOSTILE]
    write_page(tmp_path / "page.html", hits, text="<b>red</b> & </p>")
    page = Page((tmp_path / "page.html").read_text())
    assert {tag for tag, _ in page.tags} == set("html head meta title style body h1 p div img".split())
    assert not any(name.startswith("on") or name == "href" for _, attributes in page.tags for name in attributes)
    assert "<b>red</b> & </p>" in page.text
    for name in HOSTILE:
        assert visible(str(tmp_path / name)) in page.text
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_it_shows_thumbnails_scores_and_what_is_gone(tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (900, 300), "red").save(wide)
    page = Page(render_page([Hit(wide, 0.51234, 0.98765), Hit(tmp_path / "gone.png", 0.4)], text="red"))
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    head, _, data = image["src"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert (head, thumbnail.format, thumbnail.size) == ("data:image/jpeg;base64", "JPEG", (360, 120))
    assert "1 · match 0.988 · similarity 0.512" in page.text and "2 · similarity 0.400" in page.text
    assert "no picture" in page.text and "2 pictures, best first; ordered by match" in page.text
    page = Page(render_page([Hit(wide, 0.5)], image=wide))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2  # the query too
    assert "1 picture, best first; ordered by similarity" in page.text


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/page\.html: cannot be written"):
        write_page(tmp_path / "no/page.html", [], text="two")
