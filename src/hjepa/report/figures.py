"""The report's charts and pictures, made ready for the template."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hjepa.report import charts
from hjepa.report.tables import interval, is_score, level_label, main_rows, metric_label, metric_names, short
from hjepa.utils.pictures import Picture

if TYPE_CHECKING:
    from hjepa.report.document import Neighbours

Json = Mapping[str, Any]
View = dict[str, Any]
Curves = Mapping[str, charts.Points]

ENCODERS = ("trained", "random init")  # these have levels
REFERENCES = ("raw pixels", "pixel PCA")
SMALL = 64  # pixels: below it PNG is smaller than JPEG, and as exact
THUMBNAIL = 96  # pixels on the longer side, at which even pictures of noise stay within the size of a report
MOST_IMAGES, MOST_NEIGHBOURS = 8, 6
MOST_DOTS = 3000
MOST_LEVEL_CHARTS = 6
MASKS_WIDTH = 1200  # pixels
CURVES = (  # title, metric, metric of a level, another metric of the same chart and its name
    ("Loss", "train/loss", "train/loss_{}", ("val/loss", "validation")),
    ("Effective rank (RankMe)", "collapse/rankme", "collapse/{}/rankme", None),
    ("Standard deviation across images", "collapse/std", "collapse/{}/std", None),
    ("k-NN accuracy of the probe", "probe/knn_top1", "", None),
)


# -- charts ----------------------------------------------------------------------------------------------------------


def legend(names: Sequence[str], first: int = 0) -> list[tuple[int, str]]:
    return [((first + i) % charts.COLOURS, name) for i, name in enumerate(names)]


def curve_charts(curves: Curves) -> list[View]:
    """Loss, and how close the embeddings are to collapse, over images seen; without what was not logged."""
    found = []
    for title, whole, pattern, extra in CURVES:
        series = {"all levels": curves[whole]} if whole in curves else {}
        for level in range(8):
            if pattern and (name := pattern.format(f"level_{level}")) in curves:
                series[f"level {level}"] = curves[name]
        if extra and extra[0] in curves:
            series[extra[1]] = curves[extra[0]]
        if series:
            found.append(curve_chart(title, series, share="probe" in whole))
    return found


def curve_chart(title: str, series: Curves, *, share: bool, numbers: Sequence[int] = ()) -> View:
    values = [y for points in series.values() for _, y in points]
    log = title == "Loss" and min(values) > 0 and max(values) > 10 * min(values)
    form = charts.percent if share else charts.compact
    chart = charts.lines(title, series, log=log, form=form, numbers=numbers)
    keys = legend(list(series)) if len(series) > 1 else []
    return {"title": f"{title}, logarithmic" if log else title, "chart": chart, "legend": keys}


def level_charts(evaluation: Json) -> list[View]:
    """The scores of every readout, trained beside untrained, with the pixels as upright lines."""
    table = evaluation["table"]
    rows = {(row["encoder"], str(row["level"])): row for row in table}
    levels = list(dict.fromkeys(level for encoder, level in rows if encoder in ENCODERS))
    charted = []
    names = [name for name in metric_names(table) if is_score(name) and not re.match(r"knn\d", name)]
    for name in names[:MOST_LEVEL_CHARTS]:
        lines = [(level_label(v), [interval(rows.get((e, v), {}), name) for e in ENCODERS]) for v in levels]
        lines = [line for line in lines if any(line[1])]
        pixels = {e: interval(row, name) for e, row in main_rows(table).items() if e in REFERENCES}
        references = [(encoder, item.value) for encoder, item in pixels.items() if item]
        if not lines:
            continue
        words = "; ".join(
            f"{level}: {' against '.join(charts.percent(item.value) for item in items if item)}"
            for level, items in lines
        )
        chart = charts.ranges(f"{metric_label(name)}, trained against untrained. {words}", lines, references)
        keys = legend(ENCODERS) + legend([encoder for encoder, _ in references], first=2)
        charted.append({"title": metric_label(name), "chart": chart, "legend": keys, "references": len(references)})
    return charted


def label_free(evaluation: Json) -> View | None:
    """Does the measure that needs no labels rank the checkpoints as the labels do?"""
    found = evaluation.get("label_free") or {}
    points = [(p["rankme"], p["knn_top1"]) for p in found.get("points", ())]
    points = [(x, y) for x, y in points if np.isfinite(x) and np.isfinite(y)]
    if len(points) < 2:
        return None
    title = f"k-NN accuracy against RankMe of {len(points)} checkpoints"
    chart = charts.scatter(title, points, x_name="RankMe", form=charts.percent)
    return {"chart": chart, "spearman": found.get("spearman"), "count": len(points)}


def embedding(points: NDArray[Any] | None, labels: Sequence[int], classes: Sequence[str]) -> View | None:
    """The test images in two dimensions; ten classes get a colour, the rest is grey."""
    if points is None or len(points) < 2:
        return None
    points, labels = np.asarray(points)[:MOST_DOTS], list(labels)[:MOST_DOTS]
    counts = Counter(labels).most_common(charts.COLOURS)
    coloured = {label: i for i, label in enumerate(sorted(label for label, _ in counts if label >= 0))}
    groups = [coloured.get(label, -1) for label in labels] if labels else [0] * len(points)
    names = [short(classes[label]) if label < len(classes) else str(label) for label in coloured]
    title = f"{len(points):,} images by the first two principal components of their embeddings"
    others = len(set(labels)) - len(coloured)
    return {
        "chart": charts.cloud(title, points, groups),
        "legend": legend(names),
        "others": others,
        "count": len(points),
    }


def errors(levels: Sequence[NDArray[Any]]) -> list[View]:
    charted = []
    for level, values in enumerate(levels):
        finite = np.isfinite(values)
        if not finite.any():
            continue
        row, column = divmod(int(np.where(finite, values, -np.inf).argmax()), values.shape[1])
        low, high = float(values[finite].min()), float(values[finite].max())
        title = f"Error of level {level} by position, from {low:.3g} to {high:.3g}; the largest in row {row + 1}, "
        title += f"column {column + 1}"
        charted.append(
            {
                "title": f"Level {level}",
                "chart": charts.heat_grid(title, values),
                "low": f"{low:.3g}",
                "high": f"{high:.3g}",
                "unseen": int((~finite).sum()),
            }
        )
    return charted


# -- pictures --------------------------------------------------------------------------------------------------------


def data_uri(picture: Picture, longest: int = THUMBNAIL, *, exact: bool = False) -> str:
    """(H, W, 3) as a ``data:`` address, scaled down to ``longest`` pixels; small and ``exact`` ones keep hard edges."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    exact = exact or max(image.size) <= SMALL
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, "png", optimize=True)
    else:
        image.save(buffer, "jpeg", quality=85)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def feature_maps(images: Picture | None, maps: Sequence[Picture]) -> View | None:
    if images is None or not maps:
        return None
    rows = []
    for i, image in enumerate(images[:MOST_IMAGES]):
        rows.append([data_uri(image), *(data_uri(level[i], exact=True) for level in maps)])
    return {"columns": ["image", *(f"level {level}" for level in range(len(maps)))], "rows": rows}


def neighbours(found: Neighbours | None, classes: Sequence[str]) -> View | None:
    if found is None:
        return None
    rows: list[View] = []
    for i, query in enumerate(found.queries[:MOST_IMAGES]):
        mine = found.query_labels[i] if len(found.query_labels) else None
        cells: list[View] = []
        for j, picture in enumerate(found.found[i][:MOST_NEIGHBOURS]):
            theirs = found.found_labels[i][j] if len(found.found_labels) else None
            same = None if mine is None or theirs is None else bool(mine == theirs)
            cells.append({"uri": data_uri(picture), "name": _class(theirs, classes), "same": same})
        rows.append({"uri": data_uri(query), "name": _class(mine, classes), "cells": cells})
    judged = [cell["same"] for row in rows for cell in row["cells"] if cell["same"] is not None]
    return {"rows": rows, "judged": len(judged), "same": sum(judged), "columns": len(rows[0]["cells"]) if rows else 0}


def _class(label: int | None, classes: Sequence[str]) -> str:
    if label is None or label < 0:
        return ""
    return short(classes[label], 24) if label < len(classes) else f"class {label}"


def masks(picture: Picture | None) -> str | None:
    return None if picture is None else data_uri(picture, MASKS_WIDTH)
