"""The page of `make demo`: one file with its pictures inside, of what the commands found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgpt4_jax.data.page_shell import as_text, render_picture, render_shell, write_whole

LEGEND = (
    "All are percent but CIDEr. test: pictures never seen, of pairs of colour and shape that were; unseen: of pairs "
    "that were not. align: after captions alone; finetune: after instructions; alone: without BLIP-2's stage 2; blind: "
    "shown the mean picture; in words: the language model, told the scene; constant: always the most "
    "frequent answer. r1: found first among 100, by similarity (itc) or matched again; named: of all things in the "
    "pictures."
)
LONG = 30  # letters of an answer that is not set bold
_STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1em; margin: 1.5em 0; }
.tile { background: #f3f6fa; border-radius: 8px; padding: .8em 1em; }
.tile b { display: block; font-size: 1.9em; line-height: 1.25; color: #1f5fa8; }
.cards { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.card img { image-rendering: pixelated; outline: 1px solid #e6eaef; }
.card { border-top-width: 4px; } .card.right { border-top-color: #17734a; } .card.wrong { border-top-color: #b3261e; }
.question { margin: .5em 0 .2em; } .answer { font-weight: 600; overflow-wrap: anywhere; }
.answer.long { font-weight: normal; }
.right .answer::before { content: "✓ "; color: #17734a; } .wrong .answer::before { content: "✗ "; color: #b3261e; }
.query { margin: 1.4em 0 0; } .query q { font-size: 1.1em; font-weight: 600; }
.hits { grid-template-columns: repeat(auto-fill, minmax(110px, 150px)); margin-top: .5em; }
.hits .answer { margin-top: .5em; white-space: nowrap; }
.wide { overflow-x: auto; } .wide table { margin: .5em 0; }
th { text-align: left; font-weight: 600; padding: .15em 1.4em .15em 0; } td { padding: .15em 1.4em .15em 0; }
th + th { text-align: right; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.all td { font-weight: 600; }
.beside { display: flex; flex-wrap: wrap; gap: 1em 2em; align-items: flex-start; }
.curves { flex: 1 1 340px; } .curves img { width: 100%; max-width: 760px; display: block; }
details { margin: .6em 0; } summary { cursor: pointer; color: #1f5fa8; }
pre { background: #f3f6fa; border-radius: 6px; padding: .8em; overflow-x: auto; font-size: .85em; }
h2 { margin-top: 2em; }
@media (max-width: 500px) {
  body { margin: 1em auto; } .cards { grid-template-columns: repeat(2, 1fr); gap: .6em; }
  .hits { grid-template-columns: repeat(4, 1fr); } .hits .card { padding: .35em; }
  .hits .answer { white-space: normal; font-size: .8em; } .wide table { font-size: .9em; }
  th, td { padding-right: .7em; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: .6em; } .tile b { font-size: 1.4em; }
}
"""


@dataclass(frozen=True)
class Answer:
    """What was answered about a picture; ``truth`` is what is right."""

    image: Path
    question: str
    text: str
    truth: str
    is_right: bool


@dataclass(frozen=True)
class Query:
    """What a search found, best first; ``right`` are the names of the pictures that the words fit.

    A hit is a picture, the probability that words and picture belong together, and their similarity.
    """

    text: str
    hits: Sequence[tuple[Path, float, float]]
    right: frozenset[str]


@dataclass(frozen=True)
class Findings:
    """All that the page shows.

    Args:
      verified: by the name of a model what ``mgpt4 verify --json`` wrote.
      scores: by the title of a column the ``scores.json`` of an evaluation; in the order of the columns,
        of which the first are ``before`` the training and after it.
      curves: the PNG of the run, which ``stopped_at`` says where it was stopped and resumed.
      manifest: of the weights, as ``tiny_report.py`` writes it; empty: there is none.
      among: how many pictures were searched.
    """

    answers: Sequence[Answer]
    queries: Sequence[Query]
    verified: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, float]]
    curves: Path
    stopped_at: int
    steps: int
    among: int
    seconds: float
    commands: Sequence[str] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)


def write_page(path: Path, found: Findings) -> None:
    """Write the page; it appears under its name only when it is whole.

    Raises:
      UserError: it cannot be written.
    """
    write_whole(path, render_page(found))


def render_page(found: Findings) -> str:
    """The page as HTML."""
    sections = [_tiles, _answers, _search, _training, _verified, _figures, _commands]
    lead = (
        "<p>A vision tower, a Q-Former and a language model, hundreds to thousands of times smaller than the published "
        "ones and in the same file layouts. All pictures on this page are of scenes that no model was trained on. "
        f"Everything was done on this machine in {found.seconds:.0f} seconds.</p>"
    )
    return render_shell("MiniGPT-4 in small", [lead, *(section(found) for section in sections)], _STYLE)


def _tiles(found: Findings) -> str:
    right = sum(answer.is_right for answer in found.answers)
    first = sum(query.hits[0][0].name in query.right for query in found.queries if query.hits)
    rows = [row for table in found.verified.values() for row in table["rows"]]
    agree = sum(row["passed"] for row in rows)
    before, after, *_ = [scores["exact_match"] for scores in found.scores.values()]
    tiles = [
        (f"{right} of {len(found.answers)}", "answers about pictures never seen are right"),
        (f"{first} of {len(found.queries)}", f"searches find a right picture first, among {found.among}"),
        (f"{before:.0f}% → {after:.0f}%", f"of questions right, before and after {found.steps} steps of training"),
        (f"{agree} of {len(rows)}", "comparisons with PyTorch agree"),
    ]
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{big}</b>{small}</div>" for big, small in tiles)}</div>'


def _answers(found: Findings) -> str:
    cards = "\n".join(map(_answer_card, found.answers))
    return (
        "<h2>Questions about pictures never seen</h2>\n"
        '<p class="dim">Answered in one batch by the shipped weights, with the likeliest words. A description is right '
        "if it names all that there is.</p>\n"
        f'<div class="cards">\n{cards}\n</div>'
    )


def _answer_card(answer: Answer) -> str:
    truth = "" if answer.is_right else f'<div class="dim">right: {as_text(answer.truth)}</div>'
    text = as_text(answer.text) if answer.text else '<span class="dim">(nothing)</span>'
    kind = "answer long" if len(answer.text) > LONG else "answer"
    return (
        f'<div class="card {_mark(answer.is_right)}">{_picture(answer.image)}\n'
        f'<div class="question">{as_text(answer.question)}</div>\n<div class="{kind}">{text}</div>{truth}</div>'
    )


def _mark(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _picture(path: Path) -> str:
    return render_picture(path.read_bytes(), "png", path.name)


def _search(found: Findings) -> str:
    parts = ["<h2>Pictures found by words</h2>"]
    parts.append(
        f'<p class="dim">The best of {found.among} pictures, by BLIP-2: with the probability that words and picture '
        "belong together, by which they are ordered, and their similarity.</p>"
    )
    for query in found.queries:
        are = "picture is" if len(query.right) == 1 else "pictures are"
        parts.append(f'<p class="query"><q>{as_text(query.text)}</q> <span class="dim">{len(query.right)} {are} right')
        cards = "".join(_hit_card(query, place) for place in range(len(query.hits)))
        parts.append(f'</span></p>\n<div class="cards hits">{cards}</div>')
    return "\n".join(parts)


def _hit_card(query: Query, place: int) -> str:
    """Right, or wrong where a right one should be: in the first place."""
    path, match, similarity = query.hits[place]
    mark = "right" if path.name in query.right else "" if place else "wrong"
    numbers = f'<div class="answer">{match:.3f} <span class="dim">{similarity:.3f}</span></div>'
    return f'<div class="card {mark}">{_picture(path)}\n{numbers}</div>'


def _training(found: Findings) -> str:
    """The curves, and the table: a row a kind of question, a column an evaluation."""
    kinds = [name for name in next(iter(found.scores.values())) if name.startswith("exact_match_")]
    rows = [[kind.removeprefix("exact_match_"), *_percents(found, kind)] for kind in kinds]
    head = ["questions right", *found.scores]
    table = _table(head, [*rows, ["all", *_percents(found, "exact_match")]], is_summed=True)
    count = found.scores["before"]["items"]
    return (
        "<h2>One linear layer, trained here</h2>\n"
        "<p>Vision tower, Q-Former and language model are frozen; a new projection between them begins random. "
        f"The run on four simulated devices was told to stop, saved itself at step {found.stopped_at}, and the same "
        f"line again took it up to step {found.steps}.</p>\n"
        f'<p class="dim">{count} short questions about pictures never seen, right if answered to the letter. Not '
        "seeing is to be shown the mean of many pictures each time.</p>\n"
        f'<div class="beside">{table}\n'
        f'<div class="curves">{render_picture(found.curves.read_bytes(), "png", "the training curves")}</div></div>'
    )


def _percents(found: Findings, name: str) -> list[str]:
    return [f"{scores[name]:.0f}%" if name in scores else "" for scores in found.scores.values()]


def _verified(found: Findings) -> str:
    parts = ["<h2>The same numbers as PyTorch</h2>"]
    parts.append('<p class="dim">The same files and inputs, PyTorch beside JAX, layer by layer.</p>')
    for name, table in found.verified.items():
        rows = table["rows"]
        largest = max((row["max_rel"] for row in rows), default=0.0)
        verdict = '<b class="good">passed</b>' if table["passed"] else '<b class="bad">failed</b>'
        cells = [
            [row["component"], f"{row['max_abs']:.1e}", f"{row['max_rel']:.1e}", "✓" if row["passed"] else "✗"]
            for row in rows
        ]
        parts.append(
            f"<details><summary>{as_text(name)}: {verdict}, {len(rows)} comparisons, largest relative error "
            f"{largest:.1e}</summary>{_table(['', 'largest error', 'relative', ''], cells)}</details>"
        )
    return "\n".join(parts)


def _figures(found: Findings) -> str:
    """What the weights reached when they were made; nothing where that is not recorded."""
    manifest = found.manifest
    if not manifest.get("figures"):
        return ""
    made = [f"made by `{manifest['command']}`"] if "command" in manifest else []
    made += [f"seed {manifest['seed']}"] if "seed" in manifest else []
    if seconds := manifest.get("seconds"):
        made.append(f"its steps took {sum(seconds.values()) / 60:.0f} minutes together")
    note = "As their manifest records it" + "".join(f"; {as_text(part)}" for part in made) + f". {LEGEND}"
    tables = "\n".join(_table(head, rows) for head, rows in pivot(dict(flatten(manifest["figures"]))))
    return f'<h2>What the shipped weights reach</h2>\n<p class="dim">{note}</p>\n{tables}'


def flatten(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of nested figures as text: ``{"test": {"r1": 98.25}}`` gives ``test/r1`` and ``98.25``."""
    for name, value in values.items():
        whole = f"{before}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{whole}/")
        else:
            some = value if isinstance(value, list | tuple) else [value]
            yield whole, ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in some)


def pivot(figures: Mapping[str, str]) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and rows of tables: a row for all before the last ``/`` of a name, rows of equal columns in one table."""
    rows: dict[str, dict[str, str]] = {}
    for name, value in figures.items():
        row, _, column = name.rpartition("/")
        rows.setdefault(row, {})[column] = value
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row, cells in rows.items():
        tables.setdefault(tuple(cells), []).append([row.replace("/", " · "), *cells.values()])
    return [(["", *map(_metric, columns)], own) for columns, own in tables.items()]


def _metric(name: str) -> str:
    return "all" if name == "exact_match" else name.removeprefix("exact_match_")


def _commands(found: Findings) -> str:
    lines = "\n".join(as_text(command) for command in found.commands)
    return f"<h2>How this page was made</h2>\n<details><summary>The commands</summary><pre>{lines}</pre></details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], is_summed: bool = False) -> str:
    """The first column holds words, the others numbers; ``is_summed``: the last row stands out."""
    lines = ["".join(f"<th>{as_text(cell)}</th>" for cell in head)]
    for row in rows:
        name, *numbers = map(as_text, row)
        lines.append(f"<td>{name}</td>" + "".join(f'<td class="number">{number}</td>' for number in numbers))
    kinds = [' class="all"' if is_summed and index == len(rows) else "" for index in range(len(lines))]
    body = "\n".join(f"<tr{kind}>{line}</tr>" for kind, line in zip(kinds, lines, strict=True))
    return f'<div class="wide"><table>{body}</table></div>'
