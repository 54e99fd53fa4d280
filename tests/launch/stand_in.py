"""Stands in for ``mgpt4`` in the tests of ``launch/``: notes how it was called, and joins the others when told to.

Environment: ``RECORD`` is the folder of notes; ``STAND_IN_JOIN`` set: start jax.distributed as the trainer does;
``STAND_IN_EXIT``: the exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

NOTED = ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_DEBUG")


def join(words: list[str]) -> dict[str, int]:
    from mgpt4_jax.distributed import add_options, agree_max, initialize, options_from

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    initialize(options_from(parser.parse_known_args(words)[0]))

    import jax

    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "sum": agree_max(jax.process_index() + 40),
    }


def main() -> None:
    note = {"words": sys.argv[1:], "folder": os.getcwd(), "environment": {name: os.environ.get(name) for name in NOTED}}
    if "STAND_IN_JOIN" in os.environ:
        note["joined"] = join(sys.argv[1:])
    Path(os.environ["RECORD"], f"{os.getpid()}.json").write_text(json.dumps(note))
    sys.exit(int(os.environ.get("STAND_IN_EXIT", "0")))


if __name__ == "__main__":
    main()
