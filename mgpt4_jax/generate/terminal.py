"""``mgpt4 chat``: a conversation on a terminal, or over pipes."""

from __future__ import annotations

import sys
from typing import Any

from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.chat import Chat

HELP = "/image FILE shows a picture, /reset forgets everything, /quit ends; anything else is a question"


def talk(chat: Chat, sampling: dict[str, Any]) -> None:
    """Read lines until the input ends. A mistake is one line on stderr, and the conversation goes on."""
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    while (line := _read()) is not None:
        try:
            if line == "/quit":
                return
            _obey(chat, line, sampling)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise UserError("the input is not valid UTF-8") from None


def _obey(chat: Chat, line: str, sampling: dict[str, Any]) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        chat.add_image(rest.strip())
    elif command == "/reset":
        chat.reset()
    elif command == "/help" or (command.startswith("/") and " " not in line):
        print(HELP, file=sys.stderr)
    elif line:
        for piece in chat.stream(line, **sampling):
            print(piece, end="", flush=True)
        print(flush=True)
