"""What every HTML page of ours is wrapped in: it runs nothing, loads nothing, and all words in it are text.

A page is one file with its pictures inside, so that it can be kept, sent and opened anywhere.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable
from pathlib import Path

from mgpt4_jax.errors import UserError

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #1d2733; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2.5em; border-top: 1px solid #d5dae1; padding-top: 1em; }
.good { color: #17734a; } .bad { color: #b3261e; } .dim { color: #667484; }
table { border-collapse: collapse; } td { padding: 0 .6em 0 0; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1em; margin-top: 1em; }
.card { border: 1px solid #d5dae1; border-radius: 6px; padding: .7em; overflow: hidden; }
.card img, .none { width: 100%; aspect-ratio: 1; border-radius: 4px; display: block; background: #eef1f5; }
.none { display: grid; place-items: center; color: #667484; }
.name { font-size: .8em; color: #667484; margin: .5em 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 24em; overflow-y: auto; }
"""


def render_shell(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page of this title, which is text, and of ``parts``, which are HTML; ``style`` is added to ours."""
    name = as_text(title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # Whatever a caption may hold: the page runs nothing and fetches nothing.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>",
            f"<h1>{name}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def render_picture(data: bytes | None, kind: str = "jpeg", alt: str = "") -> str:
    """A picture inside the page, or the place of one; ``alt`` is what is read to those who do not see it."""
    if data is None:
        return '<div class="none">no picture</div>'
    return f'<img alt="{as_text(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def write_whole(path: Path, page: str) -> None:
    """Write a page; it appears under its name only when it is whole.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def as_text(text: str) -> str:
    """``text`` for the page: no markup, and nothing that cannot be seen."""
    return html.escape(visible(text))


def visible(text: str) -> str:
    """``text`` with what would not be seen, or would steer a terminal, written out; a line break gets a mark."""
    return "".join(
        "⏎\n" if c == "\n" else c if c.isprintable() or c in "\t\u200d" else f"\\u{{{ord(c):x}}}" for c in text
    )
