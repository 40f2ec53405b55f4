"""The branches of a sweep beside each other: one HTML document, as a run's report is, and drawn from the same parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hjepa.report import charts, figures, tables
from hjepa.report.charts import Interval
from hjepa.report.document import by_metric
from hjepa.report.page import fill

Json = Mapping[str, Any]
View = dict[str, Any]

MOST_COLUMNS = 4  # settings with a column of their own; of more, all share one
LONGEST_NAME = 48
LEVEL_METRICS = ("knn_top1", "linear_top1")  # compared level by level, beside the primary metric
PLAIN_METRICS = ("knn_top1", "linear_top1", "rankme")  # columns of the table, beside the primary metric
PIXELS = ("raw pixels", "pixel PCA")
SECTIONS = {
    "results": "Branches",
    "training": "Training",
    "levels": "Levels",
    "baselines": "Baselines",
    "notes": "Notes",
    "links": "Links",
    "reproduce": "Reproduce",
    "config": "Configuration",
}


@dataclass(frozen=True)
class Branch:
    """One run of a sweep; manifests as the steps of the pipeline write them."""

    name: str  # its own in the sweep
    settings: Mapping[str, str]  # only the keys in which the branches differ, as text
    run: str
    evaluation: Json  # evaluation.json; empty for a branch that has none
    checkpoint: Json
    curves: Sequence[Json] = ()  # lines of metrics.jsonl: {"images_seen": n, metric: value, ...}
    links: Mapping[str, str] = field(default_factory=dict)  # words -> address; only http(s) ones can be clicked


@dataclass(frozen=True)
class Sweep:
    """All that the page says."""

    name: str
    made_at: str  # a date, or a date and a time with its zone
    dataset: Json  # dataset.json
    branches: Sequence[Branch]
    best: str  # the name of a branch
    comparisons: Mapping[str, Json]  # branch -> {"difference", "low", "high"}: the best minus it; empty for the best
    config: str  # the configuration that the branches share, as YAML
    links: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""  # the command
    confidence: float = 0.95  # of the intervals in ``comparisons``


@dataclass(frozen=True)
class Ranked:
    """A branch at its place."""

    number: int  # from 0: it decides colour and dashes
    branch: Branch
    score: Interval  # the primary metric; NaN where there is none
    behind: Interval | None  # what the best is better by, with its paired interval; None for the best, or not compared

    @property
    def name(self) -> str:
        return tables.short(self.branch.name, LONGEST_NAME)

    @property
    def key(self) -> str:
        """A name that is its own even where long names are cut to the same."""
        return f"{self.number + 1} {self.name}"

    @property
    def measured(self) -> bool:
        return math.isfinite(self.score.value)

    @property
    def interval(self) -> Interval | None:
        """Of what the best is better by; None where it was not compared image by image."""
        found = self.behind
        return found if found and found.finite and found.low is not None and found.high is not None else None

    @property
    def told_apart(self) -> bool:
        """Whether that interval lies on one side of zero."""
        return self.interval is not None and self.interval.ends[0] * self.interval.ends[1] > 0

    @property
    def table(self) -> list[Json]:
        return [row for row in self.branch.evaluation.get("table", ()) if row["encoder"] == "trained"]


def render_sweep(sweep: Sweep) -> str:
    """The document. Names that come from outside are escaped.

    Raises:
        ValueError: no branch has the name of the best.
    """
    ranked = ranking(sweep)
    evaluation = _evaluation(ranked)
    collapsed = ranked[0].branch.evaluation.get("collapse", "")
    confidence = f"{100 * sweep.confidence:.4g} %"
    return fill(
        "sweep.html.j2",
        {
            "title": sweep.name,
            "kind": "H-JEPA sweep",
            "made_at": sweep.made_at,
            "sections": list(SECTIONS.items()),
            "sweep": sweep,
            "ranked": ranked,
            "primary": _primary(ranked, evaluation),
            "lead": in_words(ranked, evaluation, sweep.dataset, confidence),
            "confidence": confidence,
            "collapsed": collapsed,
            "table": _table(ranked, evaluation),
            "legend": [(item.number, item.name) for item in ranked],
            "curve_charts": _curve_charts(ranked),
            "curveless": [item.name for item in ranked if not _has_curves(item)],
            "level_charts": _level_charts(ranked, evaluation),
            "levels": _levels(ranked),
            "baselines": _baselines(ranked),
            "notes": _notes(ranked),
            "swatch": charts.swatch,
        },
    )


def ranking(sweep: Sweep) -> list[Ranked]:
    """The best, then the others by their primary metric, those without one last."""
    if sweep.best not in {branch.name for branch in sweep.branches}:
        raise ValueError(f"no branch is called {sweep.best}, only {', '.join(b.name for b in sweep.branches)}")
    scores = {branch.name: _score(branch.evaluation) for branch in sweep.branches}

    def place(branch: Branch) -> tuple[bool, bool, float]:
        value = scores[branch.name].value
        return branch.name != sweep.best, not math.isfinite(value), -value if math.isfinite(value) else 0.0

    found = []
    for number, branch in enumerate(sorted(sweep.branches, key=place)):
        against = sweep.comparisons.get(branch.name) if branch.name != sweep.best else None
        behind = Interval(against["difference"], against.get("low"), against.get("high")) if against else None
        found.append(Ranked(number, branch, scores[branch.name], behind))
    return found


def _score(evaluation: Json) -> Interval:
    if not evaluation or evaluation["primary_metric"]["value"] is None:  # a strict JSON has no NaN
        return Interval(math.nan)
    return tables.primary_interval(evaluation)


def _evaluation(ranked: Sequence[Ranked]) -> Json:
    """That of the best, or of the first branch that has one: metric and images are those of all branches."""
    return next((item.branch.evaluation for item in ranked if item.branch.evaluation), {})


def _primary(ranked: Sequence[Ranked], evaluation: Json) -> View | None:
    if not evaluation:
        return None
    name, level = tables.primary_name(evaluation)
    return {**tables.column_of(name), "level": tables.level_label(level), **tables.cell_of(name, ranked[0].score)}


# -- in words --------------------------------------------------------------------------------------------------------


def in_words(ranked: Sequence[Ranked], evaluation: Json, dataset: Json, confidence: str = "95 %") -> list[str]:
    """Which setting is best, by how much, and how far that can be believed."""
    best, *others = ranked
    if not best.measured:
        return ["The winner has no finite primary metric: there is nothing to compare the other branches with."]
    name, _ = tables.primary_name(evaluation)
    label = tables.metric_label(name)
    label = label[0].lower() + label[1:] if tables.is_score(name) else label
    where = tables.judged_on(evaluation, dataset)
    text = (
        f"{_named(best)} is the best of {len(ranked)} branches: " if others else f"{_named(best)} is the only branch: "
    )
    text += f"on {where} its {label} is {_value(name, best.score.value)}"
    second = next((item for item in others if item.measured and item.score.value <= best.score.value), None)
    sentences = [f"{text}{_lead(name, best, second, confidence)}"]
    if not tables.is_score(name):
        sentences.append("No label was used, so a larger value is not known to be a better encoder.")
    for item in others:
        if item.measured and item.score.value > best.score.value:
            reason = "it looks collapsed" if item.branch.evaluation.get("collapse") else "its report may say why"
            sentences.append(
                f"{_named(item)} measures more, {_value(name, item.score.value)}, and did not win: {reason}."
            )
    if even := [item.name for item in others if item.interval and not item.told_apart]:
        count = f"{len(even)} branches are" if len(even) > 1 else "One branch is"
        sentences.append(f"{count} not told apart from the best by these images: {', '.join(even)}.")
    if others:
        sentences.append(
            f"The best of {len(ranked)} on the same test images is an optimistic number: among equals luck decides who "
            "comes first, and that luck is counted in. So the intervals of differences are the wider, the more "
            f"branches were compared ({confidence} here), and so is the one that the gate asks for."
        )
    return sentences


def _lead(name: str, best: Ranked, second: Ranked | None, confidence: str) -> str:
    if second is None:
        return "."
    gap = best.score.value - second.score.value
    points = f"{100 * gap:.2f} points" if tables.is_score(name) else f"{gap:.3g}"
    text = f", {points} more than the second, {_named(second)}, with {_value(name, second.score.value)}"
    if second.interval is None:
        return f"{text}. The two were not compared image by image, so nothing says whether that is noise."
    ends = tables.signed_ends(name, second.interval)
    text += f". The paired {confidence} interval of this difference is {ends}: "
    if second.told_apart:
        return f"{text}it is outside the noise."
    return f"{text}it is within the noise, and other test images could well turn the order round."


def _named(item: Ranked) -> str:
    told = tables.short(", ".join(_pairs(item.branch.settings)), 160)
    return f"{item.name} ({told})" if told and told != item.name else item.name


def _value(name: str, value: float) -> str:
    return tables.percentage(value) if tables.is_score(name) else tables.number(name, value)


# -- tables ----------------------------------------------------------------------------------------------------------


def _table(ranked: Sequence[Ranked], evaluation: Json) -> View:
    """What the branches are, and what came out."""
    keys = list(dict.fromkeys(key for item in ranked for key in item.branch.settings))
    shared = len(keys) > MOST_COLUMNS
    columns = _columns(ranked, evaluation) if evaluation else []
    rows = []
    for i, item in enumerate(ranked):
        settings, checkpoint = item.branch.settings, item.branch.checkpoint
        collapsed = bool(item.branch.evaluation.get("collapse"))
        rows.append(
            {
                "item": item,
                "settings": [_pairs(settings)] if shared else [[settings.get(key, "–")] for key in keys],
                "cells": [cells[i] for _, cells in columns],
                "step": _count(checkpoint.get("step")),
                "images": _count(checkpoint.get("images_seen")),
                "collapse": "collapsed" if collapsed else "none" if item.branch.evaluation else "not judged",
                "alarm": collapsed,
            }
        )
    return {"settings": ["Settings"] if shared else keys, "columns": [head for head, _ in columns], "rows": rows}


def _columns(ranked: Sequence[Ranked], evaluation: Json) -> list[tuple[View, list[View]]]:
    """(heading, a cell per branch): the primary metric, what the best is better by, and the usual ones."""
    name, level = tables.primary_name(evaluation)
    scores = [item.score if item.branch.evaluation else None for item in ranked]
    head = {**tables.column_of(name), "label": f"{tables.metric_label(name)}, {tables.level_label(level)}"}
    found = [(head, _cells(scores, name))]
    if len(ranked) > 1:
        points = {"label": "Behind the best", "unit": "points" if tables.is_score(name) else ""}
        found.append((points, _behind(ranked, name)))
    rows = [tables.main_rows(item.table).get("trained", {}) for item in ranked]
    for plain in tables.metric_names(rows):
        if plain in PLAIN_METRICS and (plain, "all") != (name, level):
            found.append((tables.column_of(plain), _cells([tables.interval(row, plain) for row in rows], plain)))
    return found


def _pairs(settings: Mapping[str, str]) -> list[str]:
    return [f"{key} = {value}" for key, value in settings.items()]


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _cells(column: Sequence[Interval | None], name: str) -> list[View]:
    return [tables.cell_of(name, item, column) for item in column]


def _behind(ranked: Sequence[Ranked], name: str) -> list[View]:
    """The paired differences, on one scale that zero is on."""
    ends = [end for item in ranked if item.interval for end in (0.0, *item.interval.ends)]
    found: list[View] = []
    for item in ranked:
        cell: View = {"value": "" if item.number else "best", "best": False, "bar": "", "interval": "", "spread": ""}
        if item.behind is not None and math.isfinite(item.behind.value):
            cell["value"] = tables.signed(name, item.behind.value)
            if item.interval is not None:
                cell["bar"] = charts.bar(item.interval, min(ends), max(ends), zero=True)
                cell["interval"] = tables.signed_ends(name, item.interval)
                cell["spread"] = "" if item.told_apart else "within the noise"
        found.append(cell)
    return found


def _levels(ranked: Sequence[Ranked]) -> list[View]:
    """Every number of every level of every branch."""
    rows = [{**row, "encoder": item.key} for item in ranked for row in item.table]
    best = ranked[0].key
    found = tables.all_levels({"table": rows})
    for table in found:
        for row in table["rows"]:
            row["accent"] = row["encoder"] == best
    return found


def _baselines(ranked: Sequence[Ranked]) -> View | None:
    """What needs no training, once: an untrained encoder that differs between branches is told for each."""
    found: dict[str, tuple[Json, list[str]]] = {}
    for item in ranked:
        for row in tables.main_rows(item.branch.evaluation.get("table", ())).values():
            if row["encoder"] != "trained":
                rounded = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
                found.setdefault(repr(sorted(rounded.items())), (row, []))[1].append(item.name)
    often = [row["encoder"] for row, _ in found.values()]
    rows = []
    for row, names in found.values():
        whose = f"{row['encoder']}, of {tables.short(', '.join(names), 80)}"
        rows.append({**row, "encoder": whose if often.count(row["encoder"]) > 1 else row["encoder"]})
    names = [name for name in tables.metric_names(rows) if tables.is_score(name)] or tables.metric_names(rows)
    if not rows or not names:
        return None
    return {"columns": [tables.column_of(name) for name in names], "rows": tables.cells_of(rows, names)}


def _notes(ranked: Sequence[Ranked]) -> list[tuple[str, str]]:
    """(whose, what): a note that all branches share is told once."""
    found: dict[str, list[str]] = {}
    for item in ranked:
        evaluation = item.branch.evaluation
        told = [f"collapse: {evaluation['collapse']}"] if evaluation.get("collapse") else []
        told += evaluation.get("notes", ()) if evaluation else ["it has no evaluation"]
        told += [] if item.measured or not evaluation else ["its primary metric is not finite"]
        for note in told:
            found.setdefault(note, []).append(item.name)
    everyone = len(ranked)
    return [
        ("All branches" if len(names) == everyone > 1 else ", ".join(names), tables.short(note, 400))
        for note, names in found.items()
    ]


# -- charts ----------------------------------------------------------------------------------------------------------


def _has_curves(item: Ranked) -> bool:
    curves = by_metric(item.branch.curves)
    return any(metric in curves for _, metric, *_ in figures.CURVES)


def _curve_charts(ranked: Sequence[Ranked]) -> list[View]:
    curves = {item.number: by_metric(item.branch.curves) for item in ranked}
    found = []
    for title, metric, *_ in figures.CURVES:
        # The best is drawn last, above the others.
        shown = [item for item in reversed(ranked) if metric in curves[item.number]]
        if shown:
            series = {item.key: curves[item.number][metric] for item in shown}
            numbers = [item.number for item in shown]
            found.append(figures.curve_chart(title, series, share="probe" in metric, numbers=numbers))
    return found


def _level_charts(ranked: Sequence[Ranked], evaluation: Json) -> list[View]:
    """The scores of every level, one interval per branch, with the pixels as upright lines."""
    if not evaluation:
        return []
    name, _ = tables.primary_name(evaluation)
    rows = {(item.number, str(row["level"])): row for item in ranked for row in item.table}
    levels = list(dict.fromkeys(level for _, level in rows))
    pixels = tables.main_rows(evaluation["table"])
    charted = []
    for metric in dict.fromkeys((name, *LEVEL_METRICS)):
        found = {
            level: [_finite(rows.get((item.number, level), {}), metric) for item in ranked]
            for level in levels
            if tables.is_score(metric)
        }
        lines = [(tables.level_label(level), items) for level, items in found.items() if any(items)]
        if not lines:
            continue
        references = [(e, item.value) for e in PIXELS if (item := _finite(pixels.get(e, {}), metric))]
        words = "; ".join(
            f"{level}: {', '.join(f'{n + 1} {charts.percent(item.value)}' for n, item in enumerate(items) if item)}"
            for level, items in lines
        )
        label = tables.metric_label(metric)
        chart = charts.ranges(f"{label} by branch. {words}", lines, references, numbers=[r.number for r in ranked])
        charted.append({"title": label, "chart": chart, "references": [encoder for encoder, _ in references]})
    return charted


def _finite(row: Json, name: str) -> Interval | None:
    found = tables.interval(row, name)
    return found if found and found.finite else None
