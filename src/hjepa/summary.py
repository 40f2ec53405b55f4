"""The one screen at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hjepa.utils.logging import format_seconds

Json = Mapping[str, Any]
COLUMNS = {"knn_top1": "k-NN", "linear_top1": "linear probe", "rankme": "effective rank", "std": "std"}
PERCENT = {"knn_top1", "linear_top1"}


@dataclass(frozen=True)
class Summary:
    """What the steps of a finished run wrote."""

    dataset: Json
    checkpoint: Json
    model: Json
    evaluation: Json
    registration: Json
    step_seconds: Mapping[str, float]
    overhead_seconds: float
    commands: Sequence[tuple[str, str]]  # (what it does, command)


def show(summary: Summary, console: Console) -> None:
    console.print()
    console.print(_probes(summary.evaluation))
    console.print(_facts(summary))
    console.print(_times(summary))
    console.print("[bold]next[/bold]")
    for purpose, command in summary.commands:
        # A command that is wrapped cannot be copied.
        console.print(f"  {purpose}:", highlight=False)
        console.print(f"    {command}", style="cyan", highlight=False, soft_wrap=True, markup=False)


def _probes(evaluation: Json) -> Table:
    split = evaluation["split"]
    sizes = ", ".join(f"{split[name]:,} {name}" for name in ("train", "test") if name in split)
    table = Table(title=f"frozen features, {sizes} images", title_justify="left", title_style="bold")
    table.add_column("encoder")
    table.add_column("level")
    shown = [name for name in COLUMNS if any(name in row for row in evaluation["table"])]
    for name in shown:
        table.add_column(COLUMNS[name], justify="right")
    previous = None
    for row in evaluation["table"]:
        if previous not in (None, row["encoder"]):
            table.add_section()
        style = "bold" if row["encoder"] == "trained" and row["level"] == "all" else ""
        table.add_row(row["encoder"], row["level"], *(_value(name, row.get(name)) for name in shown), style=style)
        previous = row["encoder"]
    return table


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name in PERCENT else f"{value:.3g}"


def _facts(summary: Summary) -> Table:
    dataset, registration, metrics = summary.dataset, summary.registration, summary.evaluation["metrics"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if "gain/knn_top1" in metrics:
        for level, prefix in (("all", "gain"), ("mean", "gain/mean")):
            knn, linear = (100 * metrics[f"{prefix}/{name}"] for name in ("knn_top1", "linear_top1"))
            name = f"gain over random init, {level}"
            table.add_row(name, f"k-NN {knn:+.2f}, linear probe {linear:+.2f} points")
    table.add_row("data set", f"{dataset['uri']}  ({dataset['bytes_uploaded']:,} bytes uploaded)")
    table.add_row("checkpoint", summary.checkpoint["uri"])
    table.add_row("model", summary.model["uri"])
    table.add_row("MLflow run", registration["mlflow_run_url"])
    if "compare_url" in registration:
        table.add_row("beside the champion", registration["compare_url"])
    table.add_row("registered", f"{registration['name']} version {registration['version']} @ {registration['alias']}")
    table.add_row("", registration["reason"])
    return table


def _times(summary: Summary) -> str:
    steps = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in summary.step_seconds.items())
    return f"[bold]time[/bold]  {steps}; pipeline overhead {summary.overhead_seconds:.1f} s\n"
