"""Show a running pipeline: a live table on a terminal, prefixed lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

Ending = Literal["done", "failed", "stopped"]


class View(Protocol):
    """What a pipeline run tells its audience. Called from one thread at a time."""

    def open(self, steps: Sequence[str]) -> None: ...

    def started(self, step: str) -> None: ...

    def line(self, step: str, text: str) -> None: ...

    def finished(self, step: str, ending: Ending, seconds: float) -> None: ...

    def notice(self, text: str) -> None: ...

    def close(self) -> None: ...


@contextmanager
def showing(view: View, steps: Sequence[str]) -> Iterator[None]:
    view.open(steps)
    try:
        yield
    finally:
        view.close()


def default_view() -> View:
    """The table if the standard output is a terminal that can redraw, lines otherwise."""
    console = Console()
    return TableView(console) if console.is_terminal and not console.is_dumb_terminal else LineView(sys.stdout)


class LineView:
    """``[train] epoch 3 ...``: for pipes, log files and CI."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def open(self, steps: Sequence[str]) -> None:
        self._write(f"steps: {' -> '.join(steps)}")

    def started(self, step: str) -> None:
        self._write(f"[{step}] started")

    def line(self, step: str, text: str) -> None:
        self._write(f"[{step}] {text}")

    def finished(self, step: str, ending: Ending, seconds: float) -> None:
        words = {"done": "done in", "failed": "FAILED after", "stopped": "stopped after"}
        self._write(f"[{step}] {words[ending]} {format_seconds(seconds)}")

    def notice(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        pass

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class TableView:
    """One row per step: state, time, and the last thing it said."""

    def __init__(self, console: Console):
        self._console = console
        self._rows: dict[str, _Row] = {}
        self._notice = ""
        # transient=False: the last state of the table stays on the screen.
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=5, transient=False)

    def open(self, steps: Sequence[str]) -> None:
        self._rows = {step: _Row(step) for step in steps}
        self._live.start()

    def started(self, step: str) -> None:
        self._rows.setdefault(step, _Row(step)).started = time.monotonic()

    def line(self, step: str, text: str) -> None:
        self._rows[step].last_line = text.strip()

    def finished(self, step: str, ending: Ending, seconds: float) -> None:
        row = self._rows[step]
        row.seconds, row.ending = seconds, ending
        self._live.refresh()

    def notice(self, text: str) -> None:
        self._notice = text
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, show_header=False, caption=self._notice or None)
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=7)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for row in self._rows.values():
            table.add_row(
                row.mark(), Text(row.step, style=row.style()), row.elapsed(), Text(row.last_line, style="dim")
            )
        return table


class _Row:
    def __init__(self, step: str):
        self.step = step
        self.started: float | None = None
        self.seconds: float | None = None
        self.ending: Ending = "done"
        self.last_line = ""
        self._spinner = Spinner("dots", style="cyan")

    def mark(self) -> Text | Spinner:
        if self.seconds is not None:
            marks = {"done": ("✓", "green"), "failed": ("✗", "bold red"), "stopped": ("■", "yellow")}
            return Text(*marks[self.ending])
        return Text("·", style="dim") if self.started is None else self._spinner

    def style(self) -> str:
        if self.seconds is not None and self.ending == "failed":
            return "bold red"
        return "dim" if self.started is None else ("bold" if self.seconds is None else "")

    def elapsed(self) -> str:
        if self.seconds is not None:
            return format_seconds(self.seconds)
        return "" if self.started is None else format_seconds(time.monotonic() - self.started)


def format_seconds(seconds: float) -> str:
    """``3.2 s``, ``4m07s``, ``2h05m``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
