"""The program ``mgpt4``: one subcommand a task.

A command exits with 0 only on success. An error that a user can mend is one line on stderr and exit code
2, without a traceback unless ``--debug``; an interrupt is 130. Heavy imports stand inside the commands,
so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

if TYPE_CHECKING:
    from mgpt4_jax.api import Model
    from mgpt4_jax.data.validate import Feed
    from mgpt4_jax.generate.sampling import SamplingParams

Command = Callable[[Namespace], int]
Commands = dict[str, tuple[Command, Callable[[ArgumentParser], None], str, str]]
"""Of each command: what runs it, what adds its arguments, what it does, an example."""

_SOURCES = ("vit", "qformer", "llm", "llm_delta", "projection", "from_dir")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's chatter is not ours
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        arguments = make_parser().parse_args([word for word in argv if word != "--debug"])
        return COMMANDS[arguments.command][0](arguments[arguments.command])
    except UserError as error:
        return _fail(str(error), debug)
    except argparse.ArgumentError as error:
        command = " ".join(["mgpt4", *(word for word in argv[:1] if word in COMMANDS)])
        return _fail(f"{' '.join(str(error).split())} ({command} --help shows what there is)", debug)
    except KeyboardInterrupt:
        return _fail("interrupted", debug, code=130)
    except Exception as error:  # a defect of ours or of the machine (disk, memory): still one line, still non-zero
        if isinstance(error, BrokenPipeError):
            return 0
        return _fail(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", debug, code=1)


def _fail(message: str, debug: bool, code: int = 2) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mgpt4",
        exit_on_error=False,
        formatter_class=_HelpFormatter,
        description="MiniGPT-4 in JAX: convert published weights, prove them, answer about pictures.",
        epilog="--debug after any command shows the traceback of an error.",
    )
    commands = parser.add_subcommands(dest="command", required=True)
    _add_commands(commands, COMMANDS)
    return parser


def _add_commands(actions: Any, commands: Commands) -> None:
    for name, (_, add_arguments, summary, example) in commands.items():
        command = ArgumentParser(
            exit_on_error=False, formatter_class=_HelpFormatter, description=f"{summary}\n\nexample:\n  {example}"
        )
        actions.add_subcommand(name, command, help=summary)
        add_arguments(command)  # behind it: commands within commands are added from the outside in


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Plain argparse help: examples keep their lines, options are not followed by Python types."""


# --- inspect, convert, verify, export --------------------------------------------------------------------


def _add_inspect(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a weight file, a Hugging Face directory or a model directory")


def _inspect(arguments: Namespace) -> int:
    from mgpt4_jax.convert.inspect import inspect

    _console().print(inspect(arguments.path))
    return 0


def _add_sources(parser: ArgumentParser) -> None:
    parser.add_argument("--vit", type=Path, help="eva_vit_g.pth")
    parser.add_argument("--qformer", type=Path, help="blip2_pretrained*.pth")
    parser.add_argument("--llm", type=Path, help="Hugging Face directory of LLaMA or Vicuna")
    parser.add_argument("--llm-delta", type=Path, help="Vicuna delta weights, added to --llm")
    parser.add_argument("--projection", type=Path, help="pretrained_minigpt4*.pth or checkpoint_N.pth")
    parser.add_argument(
        "--from",
        dest="from_dir",
        type=Path,
        metavar="DIR",
        help="a whole Hugging Face directory: Blip2, InstructBlip (Vicuna) or LLaMA",
    )


def _add_convert(parser: ArgumentParser) -> None:
    _add_sources(parser)
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--template", help="conversation template: vicuna_v0, llama2, ... (guessed from the files)")
    parser.add_argument("--overrides", type=Path, help="YAML of what files of unusual sizes cannot tell")
    parser.add_argument("--image-size", type=int, help="resize the position embeddings to it")
    parser.add_argument("--tokenizer", type=Path, help="directory of the language model's tokeniser")
    parser.add_argument("--qformer-tokenizer", type=Path, help="directory with BERT's vocab.txt")
    parser.add_argument(
        "--allow-llm-mismatch",
        action="store_true",
        help="join a projection to a language model that it was not trained with",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory")


def _convert(arguments: Namespace) -> int:
    from mgpt4_jax.convert.convert import convert

    options = arguments.as_dict()
    options["overrides"] = read_overrides(options["overrides"])
    with progress("converting") as report:
        result = convert(**options, progress=report)
    _console().print(result)
    return 0


def read_overrides(path: Path | None) -> dict[str, Any]:
    """The mapping in a YAML file such as ``configs/tiny_overrides.yaml``; {} without a file."""
    import yaml

    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must map parts to fields, for example 'vit: {{num_heads: 4}}'")
    return values


def _add_verify(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model directory")
    _add_sources(parser)
    parser.add_argument("--golden", type=Path, help="a recorded case, whose numbers are compared too")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest error that passes (0.0001)")
    parser.add_argument("--json", type=Path, help="write the table there as JSON too")


def _verify(arguments: Namespace) -> int:
    from mgpt4_jax.convert.verify import verify

    sources = {name: arguments[name] for name in _SOURCES}
    with progress("verifying") as report:
        result = verify(
            arguments.model, **sources, golden=arguments.golden, tolerance=arguments.tolerance, progress=report
        )
    if arguments.json:
        arguments.json.write_text(result.to_json() + "\n")
    _console().print(result)
    return 0 if result.passed else 1


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model directory")
    parser.add_argument("--format", required=True, help="minigpt4 (one .pth), lavis or hf (directories)")
    parser.add_argument("--out", type=Path, required=True, help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="replace it")


def _export(arguments: Namespace) -> int:
    from mgpt4_jax.convert.export import export

    with progress("exporting") as report:
        files = export(
            arguments.model,
            format=arguments.format,
            out=arguments.out,
            overwrite=arguments.overwrite,
            progress=report,
        )
    for file in files:
        print(file)
    return 0


# --- train -----------------------------------------------------------------------------------------------


def _add_train(parser: ArgumentParser) -> None:
    from mgpt4_jax.distributed import add_options
    from mgpt4_jax.train_config import TrainConfig

    parser.add_argument("--config", action="config", help="a YAML file of configs/; options after it change its values")
    parser.add_class_arguments(TrainConfig, as_group=False)
    parser.add_argument("--resume-from", type=int, metavar="STEP", help="go on from this checkpoint, not the newest")
    add_options(parser)


def _train(arguments: Namespace) -> int:
    from mgpt4_jax.distributed import initialize, options_from
    from mgpt4_jax.train_config import TrainConfig

    options, resume_from = options_from(arguments), arguments.resume_from
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "train")
    fields = {field.name: arguments[field.name] for field in dataclasses.fields(TrainConfig)}
    config = parser.instantiate(Namespace(train=Namespace(**fields))).train
    initialize(options)
    from mgpt4_jax.train.loop import train

    outcome = train(config, resume_from=resume_from)
    return 0 if outcome.signal is None else 128 + outcome.signal


# --- data ------------------------------------------------------------------------------------------------


def _add_data(parser: ArgumentParser) -> None:
    _add_commands(parser.add_subcommands(dest="action", required=True), DATA_COMMANDS)


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
    parser.add_argument("--kind", help="of one data set: webdataset, cc_sbu_align, jsonl, array_record or tfds")
    parser.add_argument("--path", help="of this data set, in place of those of --config")
    parser.add_argument("--split", default="train", help="of a tfds data set (train)")
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
        configs = [SourceConfig(options.kind, options.path, split=options.split)]
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
    return TokenFeed(rows), manifest.config.vit.image_size


# --- generate, chat --------------------------------------------------------------------------------------


def _add_loading(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the model directory")
    parser.add_argument("--mesh", help="how to cut the model over devices: 'fsdp=4', 'data=2,tensor=2' (one device)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16 or auto (the default): what suits the device"
    )
    parser.add_argument("--max-length", type=int, help="longest prompt with its answer, in tokens (the model's limit)")
    parser.add_argument("--template", help="conversation template; 'none' gives the text as it is")


def _add_sampling(parser: ArgumentParser, temperature: str, top_p: str, penalty: str) -> None:
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (300)")
    parser.add_argument("--min-new-tokens", type=int, help="shortest answer (0)")
    parser.add_argument("--temperature", type=float, help=f"0 takes the most likely token ({temperature})")
    parser.add_argument("--top-k", type=int, help="draw among so many of the likeliest tokens only (0: among all)")
    parser.add_argument(
        "--top-p", type=float, help=f"draw among the likeliest tokens that together reach this probability ({top_p})"
    )
    parser.add_argument("--repetition-penalty", type=float, help=f"over 1: say less twice ({penalty})")
    parser.add_argument("--seed", type=int, help="of the draws (0)")
    parser.add_argument("--stop", action="append", help="end the answer before this text; may be given again")


def _sampling(arguments: Namespace, defaults: SamplingParams) -> SamplingParams:
    from mgpt4_jax.generate.sampling import PARAMETER_NAMES, sampling_params

    given = {name: arguments[name] for name in PARAMETER_NAMES if arguments.get(name) is not None}
    return sampling_params(given, defaults)


def _load(arguments: Namespace, slots: int | None) -> Model:
    from mgpt4_jax.api import Model, load, make_plan
    from mgpt4_jax.checkpoint import read_manifest
    from mgpt4_jax.sharding import make_mesh

    options = {"dtype": arguments.dtype, "max_length": arguments.max_length, "slots": slots}
    manifest = read_manifest(arguments.model)
    if manifest.config.llama is None:
        raise UserError(
            f"{arguments.model}: a {manifest.config.architecture} model writes no text; "
            "use it from Python: mgpt4_jax.load"
        )
    plan = make_plan(manifest, make_mesh(arguments.mesh), **options)
    print(plan, file=sys.stderr)
    options |= {"dtype": plan.dtype, "slots": plan.slots}
    model = load(arguments.model, mesh=arguments.mesh, **options)
    assert isinstance(model, Model)  # the other kind has no language model
    return model


def _add_generate(parser: ArgumentParser) -> None:
    _add_loading(parser)
    parser.add_argument("--input", type=Path, required=True, help='JSONL: {"id": 1, "image": "a.jpg", "prompt": "..."}')
    parser.add_argument(
        "--output", type=Path, required=True, help="JSONL, written line by line; a second run goes on where it ends"
    )
    parser.add_argument("--slots", type=int, help="rows decoded together, a power of two (8 on a CPU, else 32)")
    _add_sampling(parser, temperature="0", top_p="1", penalty="1")


def _generate(arguments: Namespace) -> int:
    from mgpt4_jax.data.prompts import get_template
    from mgpt4_jax.generate.batch import check_files, run_file
    from mgpt4_jax.generate.sampling import SamplingParams

    defaults = _sampling(arguments, SamplingParams())
    template = get_template(arguments.template) if arguments.template else None
    check_files(arguments.input, arguments.output)  # before the minutes that loading may take
    model = _load(arguments, arguments.slots)
    start = time.monotonic()
    with progress("answering") as report:
        summary = run_file(
            model.answerer, arguments.input, arguments.output, defaults=defaults, template=template, report=report
        )
    print(f"{summary.line(time.monotonic() - start)} -> {arguments.output}", file=sys.stderr)
    return 1 if summary.failed else 0


def _add_chat(parser: ArgumentParser) -> None:
    _add_loading(parser)
    parser.add_argument("--image", action="append", help="show this picture first; may be given again")
    _add_sampling(parser, temperature="1", top_p="0.9", penalty="1.05")


def _chat(arguments: Namespace) -> int:
    from mgpt4_jax.generate.chat import DEFAULTS
    from mgpt4_jax.generate.terminal import talk

    sampling = _sampling(arguments, DEFAULTS)
    chat = _load(arguments, slots=1).chat(arguments.template)
    for image in arguments.image or ():
        chat.add_image(image)
    talk(chat, dataclasses.asdict(sampling))
    return 0


def _console() -> Console:
    """Wide enough for the tables when there is no terminal; paths are never wrapped into them."""
    return Console(soft_wrap=True, emoji=False, width=None if sys.stdout.isatty() else 120)


DATA_COMMANDS: Commands = {
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
    "inspect": (_inspect, _add_inspect, "Say what a file is and what it can become.", "mgpt4 inspect eva_vit_g.pth"),
    "convert": (
        _convert,
        _add_convert,
        "Convert PyTorch weights to a model directory.",
        "mgpt4 convert --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --llm vicuna-7b "
        "--projection pretrained_minigpt4_7b.pth --out models/minigpt4-7b",
    ),
    "verify": (
        _verify,
        _add_verify,
        "Run PyTorch beside JAX on the same files, layer by layer.",
        "mgpt4 verify models/minigpt4-7b --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --llm vicuna-7b "
        "--projection pretrained_minigpt4_7b.pth",
    ),
    "export": (
        _export,
        _add_export,
        "Write a model in the layout of another program.",
        "mgpt4 export models/minigpt4-7b --format minigpt4 --out pretrained_minigpt4.pth",
    ),
    "train": (
        _train,
        _add_train,
        "Train a stage of a model, or go on with a run that stopped.",
        "mgpt4 train --config configs/minigpt4_stage1_7b.yaml --model models/minigpt4-7b --run runs/stage1",
    ),
    "data": (
        _data,
        _add_data,
        "Check data sets before a run, or index their tars.",
        "mgpt4 data validate --kind jsonl --path my.jsonl --out page.html",
    ),
    "generate": (
        _generate,
        _add_generate,
        "Answer a file of questions about pictures.",
        "mgpt4 generate models/minigpt4-7b --input questions.jsonl --output answers.jsonl",
    ),
    "chat": (
        _chat,
        _add_chat,
        "Talk about pictures in the terminal.",
        "mgpt4 chat models/minigpt4-7b --image cat.jpg",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
