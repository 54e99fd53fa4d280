"""``mgpt4 data index`` and ``validate``: data sets before a run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from mgpt4_jax.commands import Commands, add_commands
from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

if TYPE_CHECKING:
    from mgpt4_jax.data.validate import Feed


def _add_data(parser: ArgumentParser) -> None:
    add_commands(parser.add_subcommands(dest="action", required=True), DATA_COMMANDS)


def _data(arguments: Namespace) -> int:
    return DATA_COMMANDS[arguments.action][0](arguments[arguments.action])


def _add_index(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", help="tars: a file, a folder, 'laion/{00000..10488}.tar' or 'laion/*.tar'")
    parser.add_argument("--processes", type=int, help="that read tars (one for each core, if there is 1 GiB to read)")


def _index(arguments: Namespace) -> int:
    from mgpt4_jax.data.tar_index import TarIndex, find_tars, try_index_tars

    paths = find_tars(arguments.pattern)
    with progress("indexing") as report:
        found = try_index_tars(paths, report, arguments.processes)
    errors = [index for index in found if isinstance(index, UserError)]
    for error in errors:
        print(f"bad: {error}")
    samples = sum(len(index) for index in found if isinstance(index, TarIndex))
    print(f"{len(paths):,} tars, {samples:,} samples, {len(errors):,} tars that cannot be read")
    return 0 if samples and not errors else 1


def _add_validate(parser: ArgumentParser) -> None:
    from mgpt4_jax.train_config import DataConfig, SourceConfig, TrainConfig

    parser.add_argument("--config", action="config", help="a YAML file of configs/: check its data as it will be fed")
    parser.add_argument("--kind", help="of one data set: webdataset, cc_sbu_align, jsonl, lavis, array_record or tfds")
    parser.add_argument("--path", help="of this data set, in place of those of --config")
    parser.add_argument("--split", default="train", help="of a tfds data set (train)")
    parser.add_argument("--images", help="the folder that a lavis list names its pictures from (its own)")
    parser.add_argument("--model", type=Path, help="the model directory, whose tokeniser counts (without it: words)")
    parser.add_argument("--out", type=Path, help="write a page of pictures with their words there (HTML)")
    parser.add_argument("--limit", type=int, help="check only so many samples, evenly spread (all)")
    used = ("train", "validation", "clean_captions", "num_threads")
    parser.add_argument("--data.train", type=tuple[SourceConfig, ...], default=(), help="several data sets")
    parser.add_argument("--data.validation", type=tuple[SourceConfig, ...], default=(), help="several more")
    parser.add_argument("--data.clean_captions", type=bool, default=False, help="as BLIP-2's caption processor (false)")
    parser.add_argument("--data.num_threads", type=int, default=4, help="that read and decode (4)")
    fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in ("objective", "text")]
    parser.add_class_arguments(TrainConfig, as_group=False, skip=set(fields))
    # The rest of a run's file is accepted, and does not matter here.
    ignored = [f"data.{field.name}" for field in dataclasses.fields(DataConfig) if field.name not in used]
    for name in (*ignored, *(name for name in fields if name not in ("data", "model"))):
        parser.add_argument(f"--{name}", type=Any, help=argparse.SUPPRESS)


def _validate(arguments: Namespace) -> int:
    from mgpt4_jax.data.page import write_page
    from mgpt4_jax.data.sources import open_source
    from mgpt4_jax.data.validate import validate_source
    from mgpt4_jax.train_config import SourceConfig

    parser = ArgumentParser(exit_on_error=False)
    _add_validate(parser)
    options = parser.instantiate(arguments)
    configs = [*options.data.train, *options.data.validation]
    if options.kind or options.path:
        if not (options.kind and options.path):
            raise UserError("--kind and --path belong together, for example --kind jsonl --path my.jsonl")
        configs = [SourceConfig(options.kind, options.path, split=options.split, images=options.images)]
    if not configs:
        raise UserError("no data set is named: give --kind and --path, or --config")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    feed, image_size = _feed(options)
    reports = []
    for config in configs:
        with progress("indexing") as report:
            source = open_source(config, report)
        with progress("checking") as report:
            checked = validate_source(
                source,
                feed,
                image_size=image_size,
                limit=options.limit,
                threads=options.data.num_threads,
                report=report,
            )
        print("\n".join(checked.lines()))
        reports.append(checked)
    if options.out:
        write_page(options.out, reports)
        print(f"look at {options.out}")
    return 1 if any(report.bad for report in reports) else 0


def _feed(options: Namespace) -> tuple[Feed, int]:
    """How samples are read, and the side of a picture in pixels: the model's, or what can be told without one."""
    from mgpt4_jax.data.validate import TokenFeed, WordFeed

    clean = options.data.clean_captions
    if options.model is None:
        return WordFeed(options.text, objective=options.objective, clean_captions=clean), 224
    from mgpt4_jax.checkpoint import read_manifest
    from mgpt4_jax.data.prompts import get_template
    from mgpt4_jax.data.rows import RowBuilder

    manifest = read_manifest(options.model)
    template = get_template(options.text.template or manifest.template)
    tokens = manifest.config.tokens_per_image
    rows = RowBuilder(options.model / "tokenizer", options.text, template, tokens, options.objective, clean)
    return TokenFeed(rows), manifest.config.image_size


def _add_shapes(parser: ArgumentParser) -> None:
    from mgpt4_jax.data.shapes_files import Sizes

    parser.add_argument("--out", type=Path, required=True, help="the new folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, their pictures and words (0)")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"how many ({field.default})")


def _shapes(arguments: Namespace) -> int:
    from mgpt4_jax.checkpoint import new_directory
    from mgpt4_jax.data.shapes_files import Sizes, write_world

    if arguments.out.exists():  # said here, as there is no --overwrite to advise
        raise UserError(f"{arguments.out}: exists already; choose another name")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: must be 0 or more")
    sizes = Sizes(**{field.name: arguments[field.name] for field in dataclasses.fields(Sizes)})
    with new_directory(arguments.out) as partial, progress("drawing") as report:
        write_world(partial, seed=arguments.seed, sizes=sizes, report=report)
    print(arguments.out)
    return 0


DATA_COMMANDS: Commands = {
    "shapes": (
        _shapes,
        _add_shapes,
        "Write a small world of drawn pictures with captions, questions, texts and tokenisers.",
        "mgpt4 data shapes --out world --seed 0",
    ),
    "index": (
        _index,
        _add_index,
        "Look through webdataset tars once, and keep a table beside each.",
        "mgpt4 data index 'laion/{00000..10488}.tar'",
    ),
    "validate": (
        _validate,
        _add_validate,
        "Check every sample before a run: bad ones by name, lengths, a page of pictures with their words.",
        "mgpt4 data validate --kind jsonl --path my.jsonl --model models/minigpt4-7b --out page.html\n"
        "  mgpt4 data validate --config configs/minigpt4_stage2_7b.yaml --model models/minigpt4-7b",
    ),
}

COMMANDS: Commands = {
    "data": (
        _data,
        _add_data,
        "Check data sets before a run, or index their tars.",
        "mgpt4 data validate --kind jsonl --path my.jsonl --out page.html",
    ),
}
