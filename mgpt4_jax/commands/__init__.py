"""The commands of ``mgpt4``, a file for each kind of task; ``cli.py`` runs them.

Heavy imports stand inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from mgpt4_jax.errors import UserError

Command = Callable[[Namespace], int]
Commands = dict[str, tuple[Command, Callable[[ArgumentParser], None], str, str]]
"""Of each command: what runs it, what adds its arguments, what it does, an example."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Plain argparse help: examples keep their lines, options are not followed by Python types."""


def add_commands(actions: Any, commands: Commands) -> None:
    """Give a parser's subcommands their arguments, help and example."""
    for name, (_, add_arguments, summary, example) in commands.items():
        command = ArgumentParser(
            exit_on_error=False, formatter_class=HelpFormatter, description=f"{summary}\n\nexample:\n  {example}"
        )
        actions.add_subcommand(name, command, help=summary)
        add_arguments(command)  # behind it: commands within commands are added from the outside in


def console() -> Console:
    """Wide enough for the tables when there is no terminal; paths are never wrapped into them."""
    return Console(soft_wrap=True, emoji=False, width=None if sys.stdout.isatty() else 120)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; one that holds none is refused with its name and the place."""
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        reason = getattr(error, "problem", None) or " ".join(str(error).split())[:80]
        raise UserError(f"{path}{where}: is not valid YAML ({reason}); see configs/ for files that are") from error
