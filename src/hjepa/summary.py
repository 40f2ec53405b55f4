"""The one screen at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from hjepa import sweep
from hjepa.utils.logging import format_seconds
from hjepa.words import counted

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


@dataclass(frozen=True)
class SweepSummary:
    """What the steps of a finished sweep wrote."""

    comparison: Json
    registration: Json
    step_seconds: Mapping[str, float]
    overhead_seconds: float
    commands: Sequence[tuple[str, str]]


def show(summary: Summary, console: Console) -> None:
    console.print()
    console.print(_probes(summary.evaluation))
    _end(summary, _facts(summary), console)


def show_sweep(summary: SweepSummary, console: Console) -> None:
    comparison, registration = summary.comparison, summary.registration
    console.print()
    console.print(_branches(comparison))
    console.print(escape(sweep.in_words(comparison)), soft_wrap=True, emoji=False)
    facts = [("report", comparison["report"]), ("MLflow, side by side", comparison["compare_url"])]
    _end(summary, [*facts, ("registered", _registered(registration))], console)


def _branches(comparison: Json) -> Table:
    rows = comparison["branches"]
    table = Table(title=f"{len(rows)} branches", title_justify="left", title_style="bold")
    metric = comparison["primary_metric"].rpartition("/")[2]
    for name in ("branch", *rows[0]["settings"], COLUMNS.get(metric, metric), "best - this"):
        table.add_column(name, overflow="fold")
    for row in rows:
        texts = [row["name"], *row["settings"].values(), _value(metric, row["value"]), sweep.behind(row)]
        table.add_row(*map(escape, texts), style="bold" if row["name"] == comparison["best"] else "")
    return table


def _end(summary: Summary | SweepSummary, facts: Sequence[tuple[str, str]], console: Console) -> None:
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        # An address that is wrapped cannot be copied, and a log has lines of any length.
        console.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}", soft_wrap=True, emoji=False)
    console.print(Padding(escape(summary.registration["reason"]), (0, 0, 0, width + 2)))
    console.print(_times(summary))
    console.print("[bold]next[/bold]")
    for purpose, command in summary.commands:
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


def _facts(summary: Summary) -> list[tuple[str, str]]:
    dataset, registration, metrics = summary.dataset, summary.registration, summary.evaluation["metrics"]
    facts = []
    if "gain/knn_top1" in metrics:
        for level, prefix in (("all", "gain"), ("mean", "gain/mean")):
            knn, linear = (100 * metrics[f"{prefix}/{name}"] for name in ("knn_top1", "linear_top1"))
            name = f"gain over random init, {level}"
            facts.append((name, f"k-NN {knn:+.2f}, linear probe {linear:+.2f} points"))
    refused = dataset["quarantine"]["total"]
    told = f"{dataset['bytes_uploaded']:,} bytes uploaded" + (
        f", {counted(refused, 'file')} quarantined" if refused else ""
    )
    facts.append(("data set", f"{dataset['uri']}  ({told})"))
    facts.append(("checkpoint", summary.checkpoint["uri"]))
    facts.append(("model", summary.model["uri"]))
    facts.append(("MLflow run", registration["mlflow_run_url"]))
    if "compare_url" in registration:
        facts.append(("beside the champion", registration["compare_url"]))
    facts.append(("registered", _registered(registration)))
    return facts


def _registered(registration: Json) -> str:
    return f"{registration['name']} version {registration['version']} @ {registration['alias']}"


def _times(summary: Summary | SweepSummary) -> str:
    steps = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in summary.step_seconds.items())
    return f"[bold]time[/bold]  {steps}; pipeline overhead {summary.overhead_seconds:.1f} s\n"
