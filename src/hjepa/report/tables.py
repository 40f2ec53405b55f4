"""The report's numbers: what stands in its tables and sentences, made ready for the template."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hjepa.report.charts import Interval, bar

Json = Mapping[str, Any]
View = dict[str, Any]

NAMES = {
    "knn_top1": "k-NN",
    "linear_top1": "Linear probe",
    "attentive_top1": "Attentive probe",
    "low_shot_1pct_top1": "Low-shot, 1 %",
    "low_shot_10pct_top1": "Low-shot, 10 %",
    "retrieval_map": "Retrieval mAP",
    "retrieval_recall1": "Retrieval recall@1",
    "dense_map": "Dense mAP",
    "dense_recall1": "Dense recall@1",
    "rankme": "RankMe",
    "alpha_req": "α-ReQ",
    "lidar": "LiDAR",
    "std": "Std across images",
    "cosine": "Mean cosine",
    "norm": "Mean norm",
    "uniformity": "Uniformity",
    "alignment": "Alignment",
}
SCORES = ("knn", "linear", "attentive", "low_shot", "retrieval", "dense")  # shares from 0 to 1
SPREADS = ("_low", "_high", "_std")
LARGEST_MATRIX = 40  # classes
MOST_PAIRS = 20
SHOWN_CLASSES = 20
MOST_NAMED = 24
LONGEST_NAME = 80


def short(text: object, length: int = LONGEST_NAME) -> str:
    words = str(text)
    return words if len(words) <= length else f"{words[: length - 1]}…"


# -- metrics ---------------------------------------------------------------------------------------------------------


def is_score(name: str) -> bool:
    """Whether the metric is a share of right answers; the others need no labels."""
    return name.startswith(SCORES)


def metric_label(name: str) -> str:
    """Words for a metric; ``knn20_top1`` is the k-NN of 20 neighbours."""
    if other_k := re.fullmatch(r"knn(\d+)_top1", name):
        return f"k-NN, k = {other_k[1]}"
    return NAMES.get(name, name.replace("_top1", "").replace("_", " "))


def level_label(level: str) -> str:
    return {"-": "", "all": "all levels", "mean": "mean"}.get(level, f"level {level}")


def number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.2f}" if is_score(name) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(row: Json, name: str) -> Interval | None:
    """The metric of a row of the table, None where the row lacks it."""
    if row.get(name) is None:
        return None
    return Interval(float(row[name]), row.get(f"{name}_low"), row.get(f"{name}_high"))


def metric_names(rows: Sequence[Json]) -> list[str]:
    """The metrics of the rows in their order, without the ends of intervals and the spreads."""
    names = list(dict.fromkeys(key for row in rows for key in row if key not in {"encoder", "level"}))
    return [name for name in names if not any(name.endswith(end) and name[: -len(end)] in names for end in SPREADS)]


def primary(evaluation: Json) -> View:
    """The number that decides, with its interval."""
    name, level = primary_name(evaluation)
    return {**column_of(name), "level": level_label(level), **cell_of(name, primary_interval(evaluation))}


def primary_interval(evaluation: Json) -> Interval:
    name, level = primary_name(evaluation)
    row = main_rows(evaluation["table"]).get("trained", {})
    row = next((r for r in evaluation["table"] if r["encoder"] == "trained" and r["level"] == level), row)
    return Interval(float(evaluation["primary_metric"]["value"]), row.get(f"{name}_low"), row.get(f"{name}_high"))


def primary_name(evaluation: Json) -> tuple[str, str]:
    """Metric and level: eval/linear_top1 is of all levels, eval/mean/... of the mean, eval/level_0/... of level 0."""
    parts = evaluation["primary_metric"]["name"].split("/")
    return parts[-1], parts[1].removeprefix("level_") if len(parts) == 3 else "all"


def main_rows(table: Sequence[Json]) -> dict[str, Json]:
    """One row per encoder: that of all its levels, or its only one."""
    rows: dict[str, Json] = {}
    for row in table:
        if row["encoder"] not in rows or row["level"] == "all":
            rows[row["encoder"]] = row
    return rows


def headline(evaluation: Json) -> View:
    rows = list(main_rows(evaluation["table"]).values())
    names = [name for name in metric_names(rows) if is_score(name)] or metric_names(rows)
    return {"columns": [column_of(name) for name in names], "rows": cells_of(rows, names)}


def all_levels(evaluation: Json) -> list[View]:
    """Every row of the evaluation: one table of scores, one of measures that need no labels."""
    rows, names = evaluation["table"], metric_names(evaluation["table"])
    found = []
    for caption, chosen in (
        ("Scores of every readout", [name for name in names if is_score(name)]),
        ("Measures that need no labels", [name for name in names if not is_score(name)]),
    ):
        kept = [row for row in rows if any(row.get(name) is not None for name in chosen)]
        if chosen and kept:
            columns = [column_of(name) for name in chosen]
            found.append({"caption": caption, "columns": columns, "rows": cells_of(kept, chosen)})
    return found


def column_of(name: str) -> View:
    return {"label": metric_label(name), "unit": "%" if is_score(name) else ""}


def cells_of(rows: Sequence[Json], names: Sequence[str]) -> list[View]:
    """The table's rows, with intervals on one scale per column and the best score of each column marked."""
    columns = {name: [interval(row, name) for row in rows] for name in names}
    views = []
    for i, row in enumerate(rows):
        cells = []
        for name, column in columns.items():
            cells.append(cell_of(name, column[i], column, row.get(f"{name}_std")))
        encoder, level = row["encoder"], level_label(str(row["level"]))
        views.append({"encoder": encoder, "level": level, "cells": cells, "accent": encoder == "trained"})
    return views


def cell_of(
    name: str, item: Interval | None, column: Sequence[Interval | None] = (), spread: float | None = None
) -> View:
    if item is None:
        return {"value": ""}
    present = [other for other in column if other and other.finite]
    best = is_score(name) and bool(present) and item.value == max(other.value for other in present)
    cell: View = {"value": number(name, item.value), "best": best, "interval": "", "bar": "", "spread": ""}
    if spread is not None:
        cell["spread"] = f"± {number(name, spread)} over seeds"
    if item.low is not None and item.high is not None and item.finite:
        cell["interval"] = f"{number(name, item.low)} – {number(name, item.high)}"
        ends = [end for other in present for end in other.ends]
        cell["bar"] = bar(item, min(ends), max(ends)) if ends else Markup("")
    return cell


# -- in words --------------------------------------------------------------------------------------------------------


def gain_over(trained: Interval, other: Interval) -> Interval:
    """The difference of two values with its interval, from the two intervals taken as independent.

    MOVER (Zou and Donner 2008, section 2). Both are measured on the same images, which makes this one wider than a
    paired interval, never bolder.
    """
    gain = trained.value - other.value
    if None in (trained.low, trained.high, other.low, other.high):
        return Interval(gain)
    low, high = trained.ends
    other_low, other_high = other.ends
    return Interval(
        gain,
        gain - math.hypot(trained.value - low, other_high - other.value),
        gain + math.hypot(high - trained.value, other.value - other_low),
    )


def in_words(evaluation: Json, dataset: Json) -> list[str]:
    """What the numbers say, in plain sentences."""
    (name, level), table = primary_name(evaluation), evaluation["table"]
    found = {row["encoder"]: interval(row, name) for row in table if str(row["level"]) in {level, "-"}}
    where = judged_on(evaluation, dataset)
    trained, random = found.get("trained"), found.get("random init")
    if trained is None or random is None:
        return [f"{metric_label(name)} is {number(name, evaluation['primary_metric']['value'])} on {where}."]
    if not is_score(name):
        return [
            f"On {where} the {metric_label(name)} of the trained encoder is {number(name, trained.value)}, that of "
            f"the same encoder without training {number(name, random.value)}. Without labels, neither is "
            "known to be better."
        ]
    sentences = [_gain_sentence(evaluation, name, level, where, trained, random)]
    for encoder, subject, rest in (
        ("raw pixels", "Raw pixels reach", "the encoder does not beat them"),
        ("pixel PCA", "A PCA of the pixels reaches", "the encoder does not beat it"),
    ):
        baseline = found.get(encoder)
        if baseline is not None and baseline.value >= trained.value:
            sentences.append(f"{subject} {percentage(baseline.value)}: {rest}.")
    return sentences


def judged_on(evaluation: Json, dataset: Json) -> str:
    split = evaluation.get("split", {})
    images = split.get("test", split.get("train", 0))
    return f"{images:,} {'test' if 'test' in split else 'training'} images of {short(dataset.get('name', 'the data'))}"


def _gain_sentence(evaluation: Json, name: str, level: str, where: str, trained: Interval, random: Interval) -> str:
    gain = _measured_gain(evaluation, name, level) or gain_over(trained, random)
    label = metric_label(name)
    text = f"On {where} the {label[0].lower()}{label[1:]} on frozen features reaches {percentage(trained.value)}, "
    text += f"{abs(100 * gain.value):.2f} points {'more' if gain.value >= 0 else 'less'} than on those of the same "
    text += f"encoder without training ({percentage(random.value)})"
    if gain.low is None or gain.high is None:
        return f"{text}."
    verdict = "training helped" if gain.low > 0 else "training hurt" if gain.high < 0 else "this is within the noise"
    return f"{text}; the 95\N{NO-BREAK SPACE}% interval of the difference is {signed_ends(name, gain)}: {verdict}."


def signed(name: str, difference: float) -> str:
    """A difference of two values of a metric, with its sign; that of shares in points."""
    words = f"{100 * difference:+.2f}" if is_score(name) else f"{difference:+.3g}"
    return words.replace("-", "−") if math.isfinite(difference) else "not finite"


def signed_ends(name: str, item: Interval) -> str:
    low, high = item.ends
    return f"{signed(name, low)} to {signed(name, high)}"


def percentage(share: float) -> str:
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def _measured_gain(evaluation: Json, name: str, level: str) -> Interval | None:
    """The paired interval of the evaluation, if it has one."""
    key = f"gain/{'' if level == 'all' else f'{level}/' if level == 'mean' else f'level_{level}/'}{name}"
    metrics = evaluation.get("metrics", {})
    if f"{key}_low" not in metrics or f"{key}_high" not in metrics or key not in metrics:
        return None
    return Interval(metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"])


# -- classes ---------------------------------------------------------------------------------------------------------


def confusion(evaluation: Json) -> View | None:
    """The matrix in shares of the true class, or, of too many classes, the pairs that are mixed up most."""
    matrix, names = evaluation.get("confusion"), evaluation.get("classes")
    if not matrix or not names:
        return None
    view: View = {"names": names, "rows": [], "pairs": _pairs(matrix, names), "classes": len(names)}
    if len(names) <= LARGEST_MATRIX:
        view["rows"] = [_matrix_row(i, counts, names) for i, counts in enumerate(matrix)]
        view["numbers"] = len(names) <= 20
    return view


def _matrix_row(i: int, counts: Sequence[int], names: Sequence[str]) -> View:
    total = sum(counts)
    cells = []
    for j, count in enumerate(counts):
        share = count / total if total else 0.0
        words = f"{short(names[i], 40)} → {short(names[j], 40)}: {count:,} of {total:,}"
        text = f"{100 * share:.0f}" if share >= 0.005 else ""
        cells.append({"share": share, "percent": round(100 * share), "text": text, "words": words, "right": i == j})
    return {"name": names[i], "cells": cells}


def _pairs(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> list[View]:
    wrong = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
    wrong.sort(key=lambda item: (-item[0], item[1], item[2]))
    return [
        {"true": names[i], "predicted": names[j], "count": count, "share": count / sum(matrix[i])}
        for count, i, j in wrong[:MOST_PAIRS]
    ]


def wilson(right: int, total: int, z: float = 1.959964) -> Interval:
    """A share with its 95 % interval (Wilson 1927): it stays within 0 and 1 and holds for few images."""
    share, square = right / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def per_class(evaluation: Json) -> View | None:
    """The share of each class that is recognised, the worst first; of many classes the ends, and the rest folded."""
    matrix, names = evaluation.get("confusion"), evaluation.get("classes")
    if not matrix or not names:
        return None
    rows, absent = [], []
    for i, (name, counts) in enumerate(zip(names, matrix, strict=True)):
        if not (total := sum(counts)):
            absent.append(name)
            continue
        item = wilson(counts[i], total)
        rows.append(
            {"name": name, "images": total, **cell_of("linear", item), "bar": bar(item, 0, 1), "key": item.value}
        )
    rows.sort(key=lambda row: row["key"])
    folded = rows[SHOWN_CLASSES // 2 : -SHOWN_CLASSES // 2] if len(rows) > LARGEST_MATRIX else []
    shown = rows[: SHOWN_CLASSES // 2] if folded else rows
    best = rows[-SHOWN_CLASSES // 2 :] if folded else []
    return {"shown": shown, "folded": folded, "best": best, "absent": absent[:MOST_NAMED], "missing": len(absent)}


# -- data set, identity ----------------------------------------------------------------------------------------------


def dataset_card(dataset: Json) -> View:
    splits = []
    for name, split in dataset.get("splits", {}).items():
        per_class, shape = split.get("per_class"), split.get("shape")
        splits.append(
            {
                "name": name,
                "images": split["samples"],
                "shards": len(split.get("shards", ())),
                "bytes": sum(shard["bytes"] for shard in split.get("shards", ())),
                "per_class": _range(per_class) if per_class else "no labels",
                "shape": " × ".join(map(str, shape)) if shape else "mixed",
            }
        )
    classes = dataset.get("classes", [])
    statistics = dataset.get("statistics", {})
    quarantine = dataset.get("quarantine", {})
    return {
        "splits": splits,
        "classes": len(classes),
        "named": classes[:MOST_NAMED],
        "more": max(len(classes) - MOST_NAMED, 0),
        "source": dataset.get("source", {}),
        "statistics": {name: ", ".join(f"{v:.4f}" for v in values) for name, values in statistics.items()},
        "set_aside": quarantine.get("total", 0),
        "share": 100 * quarantine.get("share", 0.0),
        "reasons": quarantine.get("by_reason", {}),
    }


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"


def identity(checkpoint: Json, model: Json, evaluation: Json) -> list[tuple[str, str]]:
    """What was measured, by its fingerprints."""
    rows = [
        ("Images seen", f"{checkpoint['images_seen']:,}" if "images_seen" in checkpoint else ""),
        ("Step", f"{checkpoint['step']:,}" if "step" in checkpoint else ""),
        ("Checkpoint", checkpoint.get("uri", "")),
        ("Model", model.get("uri", "")),
        ("Model digest", model.get("digest", "")),
        ("Data set digest", evaluation.get("split", {}).get("dataset_digest", "")),
        ("Configuration digest", checkpoint.get("config_digest", "")),
        ("Code", checkpoint.get("code_version", "")),
        ("Packages", ", ".join(f"{name} {version}" for name, version in model.get("packages", {}).items())),
    ]
    rows += [(f"Export check, {name}", _check(facts)) for name, facts in model.get("checks", {}).items()]
    return [(name, value) for name, value in rows if value]


def _check(facts: Json) -> str:
    verdict = "passed" if facts.get("passed") else "FAILED"
    return f"{verdict}: largest difference {facts['max_abs_difference']:.1e}, allowed {facts['tolerance']:.1e}"
