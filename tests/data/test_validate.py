"""What ``mgpt4 data validate`` and ``index`` say, and the page that they write."""

from __future__ import annotations

import base64
import io
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgpt4_jax import cli
from mgpt4_jax.commands.datasets import DATA_COMMANDS
from mgpt4_jax.data.page import MAX_BAD, render_page, write_page
from mgpt4_jax.data.prompts import VICUNA_V0
from mgpt4_jax.data.rows import RowBuilder
from mgpt4_jax.data.samples import Sample, Source
from mgpt4_jax.data.sources import open_source
from mgpt4_jax.data.validate import (
    BAD_LINES,
    Report,
    TokenFeed,
    WordFeed,
    histogram,
    spread,
    validate_source,
    visible,
)
from mgpt4_jax.errors import UserError
from mgpt4_jax.train_config import TextConfig
from tests.data.making import KINDS, make_data_set, make_pairs, members_of, picture, write_lines, write_tar
from tests.generate.conftest import model_dir  # noqa: F401  (fixture)

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "golden" / "data" / "minigpt4_vicuna" / "llm"
QUESTION = "<Img><ImageHere></Img> Describe this image in detail."


def token_feed(objective: str = "align", clean: bool = False, **text: Any) -> TokenFeed:
    return TokenFeed(RowBuilder(TOKENIZER, TextConfig(**text), VICUNA_V0, 6, objective, clean))  # type: ignore[arg-type]


class Listed:
    """A source of given samples; an error in their place is raised."""

    name = "listed"

    def __init__(self, *samples: Sample | str) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        if isinstance(sample, str):
            raise UserError(sample)
        return sample

    def fingerprint(self) -> str:
        return ""


def captions(*texts: str, image: bytes | None = None) -> Source:
    image = image or picture()
    return Listed(*(Sample(f"s{i}", image, text) for i, text in enumerate(texts)))


def check(source: Source, feed: TokenFeed | WordFeed | None = None, **options: Any) -> Report:
    return validate_source(source, feed or token_feed(), image_size=28, threads=2, **options)


# --- what is counted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_data_set_of_every_kind(tmp_path: Path, kind: str) -> None:
    pairs = make_pairs(9)
    feed = token_feed(max_text_length=100)
    report = check(open_source(make_data_set(kind, tmp_path / "set", pairs)), feed, shown=4)
    assert (report.total, report.checked, report.good, report.bad, report.lost) == (9, 9, 9, [], 0)
    expected = [len(feed.rows.tokenizer.encode(caption + "\n")) for _, _, caption in pairs]
    assert list(report.lengths) == expected
    assert list(report.positions) == [1 + 6 + length for length in expected]
    assert report.smallest == report.largest == (24, 16)
    assert len(report.shown) == 4
    assert report.headline().endswith("9 samples, all checked, 0 bad")


def test_lengths_are_those_of_the_batches() -> None:
    report = check(captions("a", "a cat on a mat " * 3, "b c"), token_feed(max_text_length=200, buckets=(16, 64, 96)))
    low, median, high, most = spread(report.lengths)
    assert (low, median, most) == tuple(sorted(report.lengths)) and high in report.lengths
    assert report.buckets() == {16: 2, 64: 1}
    padding = 1 - sum(report.positions) / (16 * 2 + 64)
    assert f"rows by the length they are padded to: 16: 2, 64: 1; {padding:.0%} of it is padding" in report.facts()


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        ([5], [(5, 5, 1)]),
        ([1, 2, 2, 4], [(1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 4, 1)]),
        ([0, 23, 24], [(0, 2, 1), *((i, i + 2, 0) for i in range(3, 21, 3)), (21, 23, 1), (24, 26, 1)]),
    ],
)
def test_histogram(values: list[int], bins: list[tuple[int, int, int]]) -> None:
    assert histogram(values) == bins
    assert sum(count for _, _, count in bins) == len(values)


def test_captions_that_lose_their_end() -> None:
    text = "a small green square on a pale ground"
    feed = token_feed(max_text_length=10)
    ids = feed.rows.tokenizer.encode(text + "\n")
    just_fits = token_feed(max_text_length=len(ids))
    report = check(captions(text, "a"), feed)
    assert report.lost == 1 and max(report.lengths) == len(ids)
    fed = report.shown[0].fed
    assert fed.predicted + fed.lost == text + "\n" and fed.lost.strip()
    assert fed.predicted == feed.rows.tokenizer.decode(ids[:10])
    assert "1 (50.0%) lose their end at text.max_text_length = 10" in report.facts()
    assert check(captions(text, "a"), just_fits).lost == 0


def test_an_answer_cut_within_a_character() -> None:
    """Bytes of 🙂 on both sides of the cut: what is shown may lack it, but nothing fails."""
    for length in range(1, 12):
        fed = check(captions("🙂🙂 end"), token_feed(max_text_length=length)).shown[0].fed
        assert fed.lost.endswith(" end\n") or "end\n".endswith(fed.lost)


def test_limit_spreads_over_the_data_set() -> None:
    source = captions(*(f"caption {i}" for i in range(100)))
    report = check(source, limit=4)
    assert (report.total, report.checked) == (100, 4)
    assert [shown.name for shown in report.shown] == ["s0", "s25", "s50", "s75"]
    assert report.headline() == "listed: 100 samples, 4 checked, 0 bad"
    assert check(source, limit=1000).checked == 100


def test_threads_change_nothing_and_progress_is_told(tmp_path: Path) -> None:
    source = open_source(make_data_set("webdataset", tmp_path / "set", make_pairs(40)))
    calls: list[tuple[int, int]] = []
    one = validate_source(source, token_feed(), image_size=28, threads=1)
    many = validate_source(source, token_feed(), image_size=28, threads=8, report=lambda *call: calls.append(call))
    assert one == many
    assert calls == [(i, 40) for i in range(1, 41)]


# --- exactly as it will be fed -----------------------------------------------------------------------------


def test_align_shows_the_picture_alone() -> None:
    fed = check(captions("A Cat!"), token_feed(clean=True)).shown[0].fed
    assert (fed.before, fed.predicted, fed.lost) == ("<s>[picture: 6 tokens]", "a cat\n", "")


def test_finetune_shows_the_template() -> None:
    feed = token_feed("finetune", instructions=(QUESTION,), end_symbol="###")
    source = Listed(
        Sample("a", picture(), "A Cat!"),
        Sample("b", picture(), "Red.", "Which colour?"),
        Sample("c", None, "Hello.", "Say hello."),
    )
    report = check(source, feed)
    assert [shown.fed.before for shown in report.shown] == [
        "<s> ###Human: <Img>[picture: 6 tokens]</Img> Describe this image in detail. ###Assistant: ",
        "<s> ###Human: <Img>[picture: 6 tokens]</Img> Which colour? ###Assistant: ",
        "<s> ###Human: Say hello. ###Assistant: ",
    ]
    assert [shown.fed.predicted for shown in report.shown] == ["A Cat!###", "Red.###", "Hello.###"]
    assert report.blind == 1 and report.shown[2].jpeg is None
    assert "without a picture: 1" in report.facts()


def test_shown_words_are_the_ids_of_the_row() -> None:
    """The page cannot drift from training: its words are spelt from the row that training builds."""
    feed = token_feed("finetune", instructions=(QUESTION,), end_symbol="###", max_text_length=8)
    sample = Sample("a", picture(), "a cat that goes on and on")
    row, fed = feed.rows.row(sample, QUESTION), feed.read(sample, QUESTION)
    start = int(np.flatnonzero(row.targets >= 0)[0])
    assert feed.rows.tokenizer.decode(row.ids[start:].tolist()) == fed.predicted
    assert fed.positions == len(row)


def test_every_instruction_is_shown_and_the_longest_is_checked() -> None:
    short, long = QUESTION, QUESTION + " Say all that you see" * 3
    feed = token_feed("finetune", instructions=(short, long), end_symbol="###")
    report = check(captions("a", "b"), feed)
    assert {("Say all" in shown.fed.before) for shown in report.shown} == {True, False}
    assert len({shown.fed.positions for shown in report.shown}) == 2 and len(set(report.positions)) == 1
    assert max(report.positions) == max(shown.fed.positions for shown in report.shown)


def test_an_instruction_that_nobody_reads_is_told() -> None:
    source = Listed(Sample("a", picture(), "Red.", "Which colour?"), Sample("b", picture(), "x"))
    report = check(source)
    assert "with an instruction of their own, which only objective finetune reads: 1" in report.facts()
    assert check(source, token_feed("finetune", instructions=(QUESTION,))).unread == 0


def test_without_a_model_words_are_counted() -> None:
    feed = WordFeed(TextConfig(), clean_captions=True)
    report = check(captions("A  cat, on a mat.", "..."), feed)
    assert report.bad == ["s1: the caption is empty once it is cleaned"]
    assert list(report.lengths) == [5] and report.lost == 0
    assert report.shown[0].fed.before == "[picture] " and report.shown[0].fed.predicted == "a cat, on a mat\n"
    assert "answers in words (tokens need --model)" in report.facts()[0]
    told = WordFeed(TextConfig(instructions=(QUESTION,)), objective="finetune")
    assert check(captions("a"), told).shown[0].fed.before == f"[picture] {QUESTION} "


# --- bad samples -------------------------------------------------------------------------------------------

HEADER = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
BOMB = picture(format="PNG")[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + picture(format="PNG")[33:]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!doctype html><p>404", "this is a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawings are not read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"%PDF-1.7", "PDF files are not read"),
        (b"\x00" * 1000, "not a picture that can be read"),
        (picture()[:-2], "truncated or broken"),
        (picture()[:200], "broken"),
        (BOMB, "over the cap"),
    ],
)
def test_bad_pictures_are_named(image: bytes, reason: str) -> None:
    report = check(Listed(Sample("a.tar: 7", image, "a"), Sample("b", picture(), "b")))
    assert (report.checked, report.good) == (2, 1)
    (line,) = report.bad
    assert line.startswith("a.tar: 7: ") and reason in line


@pytest.mark.parametrize(
    ("feed", "sample", "reason"),
    [
        (token_feed(max_length=20), Sample("x", picture(), "a " * 40), "over text.max_length = 20"),
        (token_feed(buckets=(16,)), Sample("x", picture(), "a " * 40), "the longest bucket is 16"),
        (token_feed(clean=True), Sample("x", picture(), "!!!"), "empty once it is cleaned"),
        (
            token_feed("finetune", instructions=(QUESTION,)),
            Sample("x", picture(), "a", "<ImageHere> and <ImageHere>"),
            "2 <ImageHere> but 1 picture",
        ),
    ],
)
def test_what_training_would_refuse_is_bad(feed: TokenFeed, sample: Sample, reason: str) -> None:
    report = check(Listed(sample), feed)
    assert len(report.bad) == 1 and report.bad[0].startswith("x: ") and reason in report.bad[0]


def test_names_stand_once_in_a_line() -> None:
    report = check(Listed("my.jsonl:3: is not valid JSON", Sample("my.jsonl:4", b"", "a")))
    assert report.bad == ["my.jsonl:3: is not valid JSON", "my.jsonl:4: the picture's bytes: the file is empty"]


def test_all_bad() -> None:
    report = check(Listed(*(f"s{i}: bad" for i in range(BAD_LINES + 5))))
    assert report.good == 0 and report.facts() == ["no good sample"]
    lines = report.lines()
    assert f"  bad: s{BAD_LINES - 1}: bad" in lines and f"  bad: s{BAD_LINES}: bad" not in lines
    assert any("and 5 more" in line for line in lines)
    assert f"s{BAD_LINES + 4}: bad" in render_page([report])


def test_lines_cannot_steer_a_terminal() -> None:
    assert visible("a\x1b[31m\u202eb\nc\t\u00e9\u65e5🙂") == "a\\u{1b}[31m\\u{202e}b⏎\nc\té日🙂"
    report = check(Listed("s\x1b]0;title\x07: bad"))
    assert all(line.isprintable() for line in report.lines())


# --- the page ----------------------------------------------------------------------------------------------


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


HOSTILE = [
    "<script>alert(1)</script>",
    "</span></div><img src=x onerror=alert(1)>",
    '"><iframe src="http://evil.example">',
    "<style>*{display:none}</style>",
    "&lt;b&gt; &amp;amp;",
    "]]><!--",
    "\u202eright to left\u2066",
    "<a href=javascript:alert(1)>x</a>",
]


def test_a_page_shows_hostile_words_as_text() -> None:
    feed = token_feed("finetune", max_text_length=300, instructions=(QUESTION,))
    samples = [Sample(f"<b>{i}", picture(i), text, text) for i, text in enumerate(HOSTILE)]
    report = check(Listed(*samples, "<script>bad()</script>: is bad"), feed)
    report.name = "<u>name</u>"
    text = render_page([report])
    page = Page(text)
    ours = "html head meta title style body h1 h2 h3 p b span ul ol li table tr td div img".split()
    assert {tag for tag, _ in page.tags} <= set(ours)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/jpeg;base64,")
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(HOSTILE)
    assert len([tag for tag, _ in page.tags if tag == "style"]) == 1
    for caption in HOSTILE:
        assert page.text.count(visible(caption)) >= 2  # as instruction and as answer
    for shown in ("<script>bad()</script>: is bad", "<u>name</u>", "<b>3"):
        assert shown in page.text
    policy = next(attributes for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_page_embeds_what_the_model_sees() -> None:
    report = check(captions("a cat", image=picture(width=300, height=100)))
    page = Page(render_page([report]))
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.format == "JPEG" and image.size == (28, 28)
    assert "300x100" in page.text and f"{report.lengths[0]} tokens" in page.text
    assert "<s>[picture: 6 tokens]a cat⏎" in page.text


def test_a_page_of_several_data_sets_marks_what_is_cut() -> None:
    good = check(captions("a cat"))
    cut = check(captions("a cat on a mat in a hat " * 9))
    page = Page(render_page([good, cut]))
    assert [tag for tag, _ in page.tags].count("h2") == 2
    assert len([1 for tag, attributes in page.tags if attributes.get("class") == "lost"]) == 2  # legend and caption
    assert "2 samples, none bad" in page.text


def test_a_page_bounds_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_BAD >= 1000
    monkeypatch.setattr("mgpt4_jax.data.page.MAX_BAD", 3)
    text = render_page([check(Listed(*(f"s{i}: bad" for i in range(5))))])
    assert "s2: bad" in text and "s3: bad" not in text and "and 2 more" in text


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    report = check(captions("a cat"))
    write_page(tmp_path / "page.html", [report])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page([report])
    with pytest.raises(UserError, match=r"nowhere/page\.html: cannot be written"):
        write_page(tmp_path / "nowhere" / "page.html", [report])
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_page(tmp_path / "folder.html", [report])
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "folder.html"}


# --- the commands ------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Three samples, the second without its picture."""
    (tmp_path / "a.jpg").write_bytes(picture())
    rows = [("a.jpg", "a cat"), ("gone.jpg", "a dog"), ("a.jpg", "a cat on a mat " * 20)]
    return write_lines(tmp_path / "my.jsonl", [{"image": image, "caption": text} for image, text in rows])


@pytest.mark.parametrize("command", list(DATA_COMMANDS))
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["data", command, "--help"])
    out = capsys.readouterr().out
    assert leaving.value.code == 0
    assert f"mgpt4 data {command}" in out and "example:" in out


def test_validate_needs_no_model(capsys: pytest.CaptureFixture[str], lines: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run(capsys, "validate", "--kind", "jsonl", "--path", lines, "--out", page)
    assert (code, err) == (1, "")
    assert "my.jsonl: 3 samples, all checked, 1 bad" in out and f"bad: {lines}:2: " in out and "gone.jpg" in out
    assert "in words" in out and f"look at {page}" in out
    assert page.read_text().count("<img") == 2
    code, out, _ = run(capsys, "validate", "--kind", "jsonl", "--path", lines, "--limit", 1)
    assert code == 0 and "3 samples, 1 checked, 0 bad" in out


def test_validate_counts_with_the_model(
    capsys: pytest.CaptureFixture[str],
    lines: Path,
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    code, out, _ = run(capsys, "validate", "--kind", "jsonl", "--path", lines, "--model", model_dir)
    assert code == 1
    assert "answers in tokens" in out and "1 (50.0%) lose their end at text.max_text_length = 32" in out


def test_validate_reads_the_file_of_a_run(
    capsys: pytest.CaptureFixture[str],
    lines: Path,
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """All of its data sets, with its template, end symbol and lengths; what the command does not need is accepted."""
    config = ROOT.parent / "configs" / "tiny_stage2.yaml"
    train = json.dumps([{"kind": "jsonl", "path": str(lines)}])
    align = make_data_set("cc_sbu_align", tmp_path / "align", make_pairs(3))
    validation = json.dumps([{"kind": "cc_sbu_align", "path": align.path}])
    page = tmp_path / "page.html"
    sets = ("--data.train", train, "--data.validation", validation)
    code, out, err = run(
        capsys, "validate", "--config", config, *sets, "--model", model_dir, "--text.max_text_length", 40, "--out", page
    )
    assert (code, err) == (1, "")
    assert "my.jsonl: 3 samples" in out and "align: 3 samples, all checked, 0 bad" in out
    assert "text.max_text_length = 40" in out
    text = Page(page.read_text()).text
    assert "<s> ###Human: <Img>[picture: " in text and "]</Img> Describe this image in detail. ###Assistant: " in text
    code, out, _ = run(capsys, "validate", "--config", config, *sets, "--kind", "cc_sbu_align", "--path", align.path)
    assert code == 0 and "my.jsonl" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "no data set is named"),
        (["validate", "--kind", "jsonl"], "--kind and --path belong together"),
        (["validate", "--path", "x"], "--kind and --path belong together"),
        (["validate", "--kind", "zip", "--path", "x"], "kind must be one of webdataset"),
        (["validate", "--kind", "jsonl", "--path", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["validate", "--kind", "jsonl", "--path", "x", "--limit", "0"], "--limit must be at least 1"),
        (["validate", "--kind", "jsonl", "--path", "x", "--text.max_text_length", "0"], "max_text_length"),
        (["validate", "--kind", "jsonl", "--path", "x", "--model", "nowhere"], "model.json"),
        (["validate", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["index"], "pattern"),
        (["index", "nowhere/{0..3}.tar"], "no such file"),
        (["index", "s3://bucket/{0..3}.tar"], "is not read"),
        ([], "action"),
        (["dance"], "dance"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_index(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", members_of(make_pairs(i + 1)))
    assert run(capsys, "index", tmp_path / "{0..2}.tar") == (0, "3 tars, 6 samples, 0 tars that cannot be read\n", "")
    assert len(list(tmp_path.glob("*.index.npz"))) == 3
    (tmp_path / "1.tar").write_bytes(b"<html>")
    code, out, _ = run(capsys, "index", tmp_path / "*")
    assert code == 1
    assert out.splitlines()[0].startswith(f"bad: {tmp_path / '1.tar'}: is a web page")
    assert out.splitlines()[1] == "3 tars, 4 samples, 1 tars that cannot be read"


def test_index_of_tars_without_samples_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    assert run(capsys, "index", tmp_path / "a.tar")[0] == 1
