"""How numbers are written."""

from __future__ import annotations

import pytest

from hjepa.words import counted, in_bytes


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (139_345_408, "139.3 MB")]
)
def test_in_bytes__has_a_unit(count: int, words: str) -> None:
    assert in_bytes(count) == words


@pytest.mark.parametrize(("number", "words"), [(0, "0 sets"), (1, "1 set"), (12_345, "12,345 sets")])
def test_counted__has_a_plural(number: int, words: str) -> None:
    assert counted(number, "set") == words
