"""What can go wrong, sorted by who can mend it; the exit codes are part of the command-line contract."""

from __future__ import annotations


class HjepaError(Exception):
    """A failure whose message is written for the person who gets it. Exit code 1."""

    exit_code = 1


class UserError(HjepaError):
    """The caller's mistake: configuration, data contract, credentials. Exit code 2, never a traceback.

    The message says what was wrong, what was expected, and what to change.
    """

    exit_code = 2


class FutileRetryError(HjepaError):
    """A failure that a retry would only repeat, such as collapse or diverged numerics. Exit code 13."""

    exit_code = 13


class PreemptedError(HjepaError):
    """The run was told to stop, saved its state, and can go on where it was. Exit code 143."""

    exit_code = 143
