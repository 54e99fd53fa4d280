"""``mgpt4 generate`` and ``chat``: answers about pictures."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from mgpt4_jax.commands import Commands
from mgpt4_jax.errors import UserError
from mgpt4_jax.progress import progress

if TYPE_CHECKING:
    from mgpt4_jax.api import Model
    from mgpt4_jax.generate.sampling import SamplingParams

EARLY_STOPPING: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}


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
    parser.add_argument("--num-beams", type=int, help="over 1: search with so many beams, and temperature 0 (1)")
    parser.add_argument("--length-penalty", type=float, help="of beams: over 0 prefers long answers (1)")
    parser.add_argument("--num-return-sequences", type=int, help="of beams: give so many of the best answers (1)")
    parser.add_argument(
        "--early-stopping", choices=tuple(EARLY_STOPPING), help="of beams: stop as soon as there are answers (false)"
    )


def _sampling(arguments: Namespace, defaults: SamplingParams) -> SamplingParams:
    from mgpt4_jax.generate.sampling import PARAMETER_NAMES, sampling_params

    given = {name: arguments[name] for name in PARAMETER_NAMES if arguments.get(name) is not None}
    if "early_stopping" in given:
        given["early_stopping"] = EARLY_STOPPING[given["early_stopping"]]
    return sampling_params(given, defaults)


def _load(arguments: Namespace, slots: int | None) -> Model:
    from mgpt4_jax.api import Model, load, make_plan
    from mgpt4_jax.checkpoint import read_manifest
    from mgpt4_jax.sharding import make_mesh

    options = {"dtype": arguments.dtype, "max_length": arguments.max_length, "slots": slots}
    manifest = read_manifest(arguments.model)
    if manifest.config.language_model is None:
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


COMMANDS: Commands = {
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
