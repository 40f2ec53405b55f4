"""How messages, tables and reports are written."""

from __future__ import annotations

import math
from typing import TextIO


def print_line(line: str, stream: TextIO) -> None:
    """Print a line with its end in one write, so that those of several ranks do not mix.

    ``print`` writes the end on its own, and where output is unbuffered, as in a pod, another process's line gets
    between the two.
    """
    print(f"{line}\n", end="", file=stream, flush=True)


def counted(number: int, what: str) -> str:
    """1, "set" -> ``1 set``; 12345, "set" -> ``12,345 sets``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def in_bytes(count: float) -> str:
    """12345678 -> ``12.3 MB``."""
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
