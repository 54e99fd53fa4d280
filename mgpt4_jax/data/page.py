"""One HTML page about data sets: nothing is loaded from elsewhere, and what data sets say is text, never markup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mgpt4_jax.data.page_shell import as_text, render_picture, render_shell, write_whole
from mgpt4_jax.data.validate import Report, Shown, histogram

MAX_BAD = 10_000  # that the page lists

_STYLE = """
.bar { background: #6f9bd1; height: .8em; }
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
    write_whole(path, render_page(reports))


def render_page(reports: Sequence[Report]) -> str:
    """The page as HTML."""
    bad = sum(len(report.bad) for report in reports)
    total = sum(report.checked for report in reports)
    verdict = f'<b class="bad">{bad:,} of {total:,} samples are bad</b>' if bad else f"{total:,} samples, none bad"
    parts = [f"<p>{verdict}</p>\n{_LEGEND}", *map(_section, reports)]
    return render_shell("Data for training", parts, _STYLE)


def _section(report: Report) -> str:
    facts = "".join(f"<li>{as_text(fact)}</li>" for fact in report.facts())
    parts = [f"<h2>{as_text(report.headline())}</h2>", f"<ul>{facts}</ul>"]
    if report.good:
        parts.append(_bars(report))
    if report.bad:
        rows = "".join(f"<li>{as_text(line)}</li>" for line in report.bad[:MAX_BAD])
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
    size = "" if shown.size is None else f" · {shown.size[0]}x{shown.size[1]}"
    fed = shown.fed
    spans = (("before", fed.before), ("predicted", fed.predicted), ("lost", fed.lost))
    words = "".join(f'<span class="{kind}">{as_text(text)}</span>' for kind, text in spans if text)
    name = f'<div class="name">{as_text(shown.name)}{size} · {fed.length} {unit}</div>'
    return f'<div class="card">{render_picture(shown.jpeg)}\n{name}\n<div class="text">{words}</div></div>'
