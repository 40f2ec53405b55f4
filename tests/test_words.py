"""How numbers and lines are written."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

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


def test_print_line__of_two_unbuffered_processes_never_mixes(tmp_path: Path) -> None:
    code = (
        "import sys; from hjepa.words import print_line; sys.stdin.read()\n"
        "for _ in range(2000): print_line(sys.argv[1], sys.stderr)"
    )
    with (tmp_path / "both").open("wb") as both:
        processes = [
            subprocess.Popen([sys.executable, "-u", "-c", code, name], stdin=subprocess.PIPE, stderr=both)
            for name in ("one", "two")
        ]
        for process in processes:
            assert process.stdin
            process.stdin.close()  # they start together
        assert [process.wait(60) for process in processes] == [0, 0]
    assert Counter((tmp_path / "both").read_text("utf-8").splitlines()) == {"one": 2000, "two": 2000}
