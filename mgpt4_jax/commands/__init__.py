"""The commands of ``mgpt4``, a file for each kind of task; ``cli.py`` runs them.

Heavy imports stand inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

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
