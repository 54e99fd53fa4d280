"""One HTML page about data sets: nothing is loaded from elsewhere, and what data sets say is text, never markup."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from mgpt4_jax.data.validate import Report, Shown, histogram, visible
from mgpt4_jax.errors import UserError

MAX_BAD = 10_000  # that the page lists

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #1d2733; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2.5em; border-top: 1px solid #d5dae1; padding-top: 1em; }
.good { color: #17734a; } .bad { color: #b3261e; } .dim { color: #667484; }
table { border-collapse: collapse; } td { padding: 0 .6em 0 0; white-space: nowrap; }
.bar { background: #6f9bd1; height: .8em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1em; margin-top: 1em; }
.card { border: 1px solid #d5dae1; border-radius: 6px; padding: .7em; overflow: hidden; }
.card img, .none { width: 100%; aspect-ratio: 1; border-radius: 4px; display: block; background: #eef1f5; }
.none { display: grid; place-items: center; color: #667484; }
.name { font-size: .8em; color: #667484; margin: .5em 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 24em; overflow-y: auto; }
.before { color: #667484; } .predicted { background: #e3f1e8; }
.lost { background: #fbe3e1; text-decoration: line-through; }
.list { max-height: 30em; overflow-y: auto; border: 1px solid #d5dae1; padding: .5em .5em .5em 3.5em; }
.list li { overflow-wrap: anywhere; unicode-bidi: isolate; }
"""

_LEGEND = (
    '<p class="dim">Pictures are as the model sees them: square. '
    '<span class="before">Grey</span> is read, <span class="predicted">green</span> is to be predicted, '
    '<span class="lost">red</span> is cut off. ⏎ is a line break.</p>'
)


def write_page(path: Path, reports: Sequence[Report]) -> None:
    """Write the page; it appears under its name only when it is whole.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(render_page(reports), encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def render_page(reports: Sequence[Report]) -> str:
    """The page as HTML."""
    bad = sum(len(report.bad) for report in reports)
    total = sum(report.checked for report in reports)
    verdict = f'<b class="bad">{bad:,} of {total:,} samples are bad</b>' if bad else f"{total:,} samples, none bad"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # Whatever a caption may hold: the page runs nothing and fetches nothing.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Data for training</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>Data for training</h1>\n<p>{verdict}</p>\n{_LEGEND}",
            *map(_section, reports),
            "</body>\n</html>\n",
        ]
    )


def _section(report: Report) -> str:
    facts = "".join(f"<li>{_text(fact)}</li>" for fact in report.facts())
    parts = [f"<h2>{_text(report.headline())}</h2>", f"<ul>{facts}</ul>"]
    if report.good:
        parts.append(_bars(report))
    if report.bad:
        rows = "".join(f"<li>{_text(line)}</li>" for line in report.bad[:MAX_BAD])
        more = len(report.bad) - MAX_BAD
        parts.append(f'<h3 class="bad">Bad samples</h3>\n<ol class="list">{rows}</ol>')
        parts += [f'<p class="dim">and {more:,} more</p>'] if more > 0 else []
    cards = "\n".join(_card(shown, report.unit) for shown in report.shown)
    return "\n".join([*parts, f'<div class="cards">\n{cards}\n</div>'])


def _bars(report: Report) -> str:
    bins = histogram(report.lengths)
    most = max(count for _, _, count in bins)
    rows = "".join(
        f'<tr><td class="dim">{first}–{last}</td><td style="width: 30em">'
        f'<div class="bar" style="width: {100 * count / most:.1f}%"></div></td><td>{count:,}</td></tr>'
        for first, last, count in bins
    )
    return f'<table aria-label="answers by their length in {report.unit}">{rows}</table>'


def _card(shown: Shown, unit: str) -> str:
    if shown.jpeg is None:
        picture = '<div class="none">no picture</div>'
    else:
        picture = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(shown.jpeg).decode()}">'
    size = "" if shown.size is None else f" · {shown.size[0]}x{shown.size[1]}"
    fed = shown.fed
    spans = (("before", fed.before), ("predicted", fed.predicted), ("lost", fed.lost))
    words = "".join(f'<span class="{kind}">{_text(text)}</span>' for kind, text in spans if text)
    return (
        f'<div class="card">{picture}\n<div class="name">{_text(shown.name)}{size} · {fed.length} {unit}</div>\n'
        f'<div class="text">{words}</div></div>'
    )


def _text(text: str) -> str:
    return html.escape(visible(text))
