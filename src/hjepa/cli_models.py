"""``hjepa models``: the registered versions, two of them side by side, and the champion moved by hand."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hjepa.utils.logging import say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hjepa.adapters.champions import Difference, Entry

HELP = "The registered versions: list, compare, move the champion."


def add_parser(commands: Any) -> None:
    """Adds ``models`` with its actions to the subparsers of the command line."""
    models = commands.add_parser("models", help=HELP, description=HELP)
    actions = models.add_subparsers(title="actions", metavar="ACTION", required=True)

    def add(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(name, help=help, description=help)
        command.set_defaults(command=run, action=function)
        command.add_argument("--name", help="registered model; it may be left out where there is one alone")
        command.add_argument("--uri", help="MLflow server; the default is MLFLOW_TRACKING_URI, or this machine's own")
        command.add_argument(
            "--home",
            type=Path,
            default=Path(os.environ.get("HJEPA_HOME", ".hjepa")),
            help="folder of this machine's servers (default: $HJEPA_HOME or .hjepa)",
        )
        return command

    add("ls", ls, "List the versions, each with its score.")
    command = add("diff", diff, "Show in what two versions differ: settings, metrics, and whether it is noise.")
    command.add_argument("first", metavar="A", help="number, or champion or challenger")
    command.add_argument("second", metavar="B", help="number, or champion or challenger")
    command = add("promote", promote, "Make a version the champion, if it passes the gate.")
    command.add_argument("version", metavar="VERSION", help="number, or challenger")
    command.add_argument("--force", action="store_true", help="even if the gate refuses")
    command.add_argument("--why", default="", help="a reason, kept with the version")
    command = add("rollback", rollback, "Make the version champion that was it before.")
    command.add_argument("--why", default="", help="a reason, kept with the version")


def run(options: argparse.Namespace) -> None:
    """Runs the chosen action. Raises UserError for an unknown name or version, HjepaError if MLflow is down."""
    options.action(options)


def ls(options: argparse.Namespace) -> None:
    from rich.markup import escape

    from hjepa.adapters import champions

    found = champions.entries(_server(options), options.name)
    if not found:
        say("nothing is registered yet; `hjepa run` or `hjepa register` makes the first version")
    console = console_of_any_width()
    for name, versions in found.items():
        console.print(_list(escape(name), versions))


def _list(name: str, versions: list[Entry]) -> Table:
    table = plain_table(
        name, "version", "alias", "metric", "value", "95 % interval", "dataset", "registered (UTC)", "run"
    )
    for entry in versions:
        score = entry.score
        add_row(
            table,
            str(entry.version),
            ", ".join(entry.aliases),
            score.metric if score else "-",
            f"{score.value:.4f}" if score else "-",
            f"{entry.interval[0]:.4f} to {entry.interval[1]:.4f}" if entry.interval else "-",
            entry.dataset_digest[:12] or "-",
            f"{entry.created:%Y-%m-%d %H:%M}",
            entry.run,
            style="bold green" if "champion" in entry.aliases else "",
        )
    return table


def diff(options: argparse.Namespace) -> None:
    from hjepa.adapters import champions

    found = champions.compare(_server(options), options.first, options.second, options.name)
    console = console_of_any_width()
    if found.params:
        console.print(_settings(found))
    else:
        say("the configurations of the two runs are the same")
    console.print(_metrics(found))
    if isinstance(found.noise, str):
        say(f"no paired comparison: {found.noise}")
        return
    clear = "outside the noise" if found.noise.low > 0 or found.noise.high < 0 else "within the noise"
    say(f"{found.metric}: version {found.versions[1]} against {found.versions[0]} is {clear}: {found.noise.text}")


def _settings(found: Difference) -> Table:
    table = plain_table("settings that differ", "setting", *(f"version {number}" for number in found.versions))
    for key, pair in found.params.items():
        add_row(table, key, *("-" if value is None else value for value in pair))
    return table


def _metrics(found: Difference) -> Table:
    table = plain_table("metrics", "metric", *(f"version {number}" for number in found.versions), "difference")
    for key, (first, second) in found.metrics.items():
        change = "" if first is None or second is None else f"{second - first:+.4f}"
        values = ("-" if value is None else f"{value:.4f}" for value in (first, second))
        add_row(table, key, *values, change, style="bold" if key == found.metric else "")
    return table


def promote(options: argparse.Namespace) -> None:
    from hjepa.adapters import champions

    move = champions.promote(_server(options), options.version, options.name, force=options.force, why=options.why)
    say(f"{move.name} version {move.champion} is champion: {move.reason}")
    if move.before not in (None, move.champion):
        say(f"`hjepa models rollback --name {move.name}` goes back to version {move.before}")


def rollback(options: argparse.Namespace) -> None:
    from hjepa.adapters import champions

    move = champions.rollback(_server(options), options.name, why=options.why)
    say(f"{move.name} version {move.champion} is champion: {move.reason}")


def _server(options: argparse.Namespace) -> str:
    """The MLflow server that is named, else the one of this machine if it runs."""
    from hjepa.adapters.tracking import tracking_uri

    if not options.uri and "MLFLOW_TRACKING_URI" not in os.environ and options.home.is_dir():
        from hjepa.adapters.stack import Stack

        stack = Stack(options.home)
        if stack.status().healthy:
            os.environ.update(stack.environment())
    return tracking_uri(options.uri)


def console_of_any_width() -> Console:
    from rich.console import Console

    # A log or a pipe has no width: its lines may be of any length.
    return Console(width=None if sys.stdout.isatty() else 240)


def plain_table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in {"value", "difference"} else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: str, style: str = "") -> None:
    """As plain text: a list among the settings would otherwise be read as markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells), style=style)
