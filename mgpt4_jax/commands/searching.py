"""``mgpt4 search``: pictures of folders, found by words or by a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from mgpt4_jax.commands import Commands
from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

if TYPE_CHECKING:
    from mgpt4_jax.search import Hit, SearchIndex


def _add_search(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model directory, of BLIP-2's stage 1")
    text = parser.add_argument("text", metavar="[text]", help="find pictures by these words")
    text.required = False  # nargs="?" would be taken as missing when an option stands between it and the model
    parser.add_argument("--index", type=Path, required=True, help="the directory of the index; --add makes it")
    parser.add_argument("--add", action="append", help="index the pictures below this folder; may be given again")
    parser.add_argument("--remove", action="append", help="forget the pictures of this folder; may be given again")
    parser.add_argument("--image", help="find pictures by this one")
    parser.add_argument("-k", type=int, default=10, help="show so many (10)")
    parser.add_argument(
        "--candidates", type=int, default=32, help="of words: look again at so many, which takes time; 0: at none (32)"
    )
    parser.add_argument("--page", type=Path, help="write what was found there, with thumbnails (HTML)")
    parser.add_argument("--mesh", help="how to cut the model over devices: 'fsdp=4' (one device)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16 or auto (the default): what suits the device"
    )


def _search(arguments: Namespace) -> int:
    _check(arguments)
    index, bad = _open(arguments), 0
    for folder in arguments.remove or ():
        print(f"{folder}: {index.remove(folder):,} removed", file=sys.stderr)
    for folder in arguments.add or ():
        bad += _add(index, folder)
    if arguments.text is not None or arguments.image is not None:
        hits = index.search(arguments.text, image=arguments.image, k=arguments.k, candidates=arguments.candidates)
        _show(hits)
        if arguments.page:
            from mgpt4_jax.search.page import write_page

            write_page(arguments.page, hits, text=arguments.text, image=arguments.image)
            print(f"look at {arguments.page}", file=sys.stderr)
    return 1 if bad else 0


def _check(arguments: Namespace) -> None:
    """What is asked for, before the time that loading takes."""
    finds = [name for name in ("text", "image") if arguments[name] is not None]
    if not (finds or arguments.add or arguments.remove):
        raise UserError("nothing to do: give words, --image FILE or --add FOLDER")
    if len(finds) > 1:
        raise UserError("give words or --image, not both")
    if arguments.page and not finds:
        raise UserError("--page shows what was found: give words or --image too")
    if arguments.k < 1 or arguments.candidates < 0:
        raise UserError("-k must be at least 1 and --candidates at least 0")
    if not arguments.add and not (arguments.index / "index.json").is_file():
        raise UserError(f"{arguments.index}: no index there; make one with --add FOLDER")


def _open(arguments: Namespace) -> SearchIndex:
    from mgpt4_jax.api import RetrievalModel, load
    from mgpt4_jax.checkpoint import read_manifest
    from mgpt4_jax.search import SearchIndex

    architecture = read_manifest(arguments.model).config.architecture
    if architecture != "blip2":
        raise UserError(
            f"{arguments.model}: a {architecture} model does not search; convert one of BLIP-2's stage 1 (blip2)"
        )
    model = load(arguments.model, mesh=arguments.mesh, dtype=arguments.dtype)
    assert isinstance(model, RetrievalModel)  # as its architecture says
    return SearchIndex.open(arguments.index, model)


def _add(index: SearchIndex, folder: str) -> int:
    """Add a folder, name what is bad in it, and return how much that is."""
    from mgpt4_jax.data.page_shell import visible

    with progress("indexing") as report:
        added = index.add(folder, report)
    for line in added.bad:
        print(f"bad: {visible(line)}", file=sys.stderr)
    print(f"{visible(folder)}: {added.line()}; {len(index):,} pictures in {index.directory}", file=sys.stderr)
    return len(added.bad)


def _show(hits: list[Hit]) -> None:
    """A line a picture: its scores and its path, which comes last so that it may hold anything."""
    from mgpt4_jax.data.page_shell import visible

    for hit in hits:
        match = "     " if hit.match is None else f"{hit.match:.3f}"
        print(f"{match}  {hit.similarity:6.3f}  {visible(str(hit.path))}")


COMMANDS: Commands = {
    "search": (
        _search,
        _add_search,
        "Index folders of pictures; find them by words or by a picture.",
        "mgpt4 search models/blip2 --index photos.index --add photos\n  "
        'mgpt4 search models/blip2 --index photos.index "a red bicycle" --page found.html',
    ),
}
