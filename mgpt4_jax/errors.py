"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the file, key or value, and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


class TrainingStopped(UserError):
    """Training cannot go on: a loss that is no number or out of proportion, or too many bad samples."""
