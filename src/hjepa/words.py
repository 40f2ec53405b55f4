"""How messages, tables and reports write numbers."""

from __future__ import annotations

import math


def counted(number: int, what: str) -> str:
    """1, "set" -> ``1 set``; 12345, "set" -> ``12,345 sets``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def in_bytes(count: float) -> str:
    """12345678 -> ``12.3 MB``."""
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
