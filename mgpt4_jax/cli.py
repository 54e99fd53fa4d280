"""The program ``mgpt4``: one subcommand a task.

A command exits with 0 only on success. An error that a user can mend is one line on stderr and exit code
2, without a traceback unless ``--debug``; an interrupt is 130. ``commands/`` holds what they do.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import traceback
from pathlib import Path

from jsonargparse import ArgumentParser

from mgpt4_jax.commands import (
    Commands,
    HelpFormatter,
    add_commands,
    answering,
    datasets,
    evaluating,
    read_yaml,
    searching,
    training,
    weights,
)
from mgpt4_jax.errors import UserError

COMMANDS: Commands = {
    **weights.COMMANDS,
    **datasets.COMMANDS,
    **training.COMMANDS,
    **answering.COMMANDS,
    **evaluating.COMMANDS,
    **searching.COMMANDS,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's chatter is not ours
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        check_config_files(argv)
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


def check_config_files(argv: list[str]) -> None:
    """Refuse by its name a file behind ``--config`` that is no YAML of settings: the parser would not name it."""
    words = [word for pair in itertools.pairwise(argv) if pair[0] == "--config" for word in pair[1:]]
    for word in (*words, *(word.removeprefix("--config=") for word in argv if word.startswith("--config="))):
        path = Path(word).expanduser()
        if not path.is_file():
            continue  # the parser says so
        if not isinstance(read_yaml(path), dict):
            raise UserError(f"{path}: holds no settings such as `batch_size: 8`; see configs/ for files that do")


def _fail(message: str, debug: bool, code: int = 2) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mgpt4",
        exit_on_error=False,
        formatter_class=HelpFormatter,
        description="MiniGPT-4 in JAX: convert published weights, prove them, answer about pictures.",
        epilog="--debug after any command shows the traceback of an error.",
    )
    commands = parser.add_subcommands(dest="command", required=True)
    add_commands(commands, COMMANDS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
