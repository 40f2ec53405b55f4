"""From the manifests of a run to one HTML document: no script, no resource of elsewhere, below 3 MB."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hjepa.report import figures, tables
from hjepa.report.page import fill
from hjepa.utils.pictures import Picture

Json = Mapping[str, Any]
SECTIONS = {
    "results": "Results",
    "levels": "Levels",
    "training": "Training",
    "label-free": "Label-free score",
    "confusion": "Confusion",
    "classes": "Classes",
    "maps": "Feature maps",
    "neighbours": "Neighbours",
    "embedding": "Embedding",
    "errors": "Errors by position",
    "masks": "Masks",
    "data": "Data set",
    "reproduce": "Reproduce",
    "config": "Configuration",
}
Curves = dict[str, list[tuple[float, float]]]  # metric -> (images seen, value), ascending


@dataclass(frozen=True)
class Neighbours:
    """Test images and the training images whose features are most like theirs."""

    queries: Picture  # (n, H, W, 3)
    found: Picture  # (n, k, H, W, 3), the nearest first
    query_labels: Sequence[int] = ()  # n, empty where there are no labels
    found_labels: Sequence[Sequence[int]] = ()  # n x k


@dataclass(frozen=True)
class Pictures:
    """What ``hjepa.report.pictures`` computed. A part that is missing is left out of the report, which says so."""

    images: Picture | None = None  # (n, S, S, 3), what ``maps`` were made of
    maps: Sequence[Picture] = ()  # per level (n, S, S, 3)
    neighbours: Neighbours | None = None
    embedding: NDArray[Any] | None = None  # (n, 2)
    embedding_labels: Sequence[int] = ()  # n, empty where there are no labels
    errors: Sequence[NDArray[Any]] = ()  # per level (grid, grid), NaN where nothing was predicted
    masks: Picture | None = None  # (H, W, 3), as ``hjepa.utils.pictures.mask_picture`` draws it


@dataclass(frozen=True)
class Report:
    """All that a report says; manifests as the steps of the pipeline write them."""

    run: str
    made_at: str  # a date, or a date and a time with its zone
    dataset: Json  # dataset.json
    checkpoint: Json
    model: Json  # model.json
    evaluation: Json  # evaluation.json
    config: str  # the whole configuration, as YAML
    curves: Sequence[Json] = ()  # lines of metrics.jsonl: {"images_seen": n, metric: value, ...}
    links: Mapping[str, str] = field(default_factory=dict)  # words -> address; only http(s) ones can be clicked
    reproduce: str = ""  # the command
    pictures: Pictures = field(default_factory=Pictures)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics journal for ``Report.curves``: one of a run alone, or one that went to MLflow.

    A last line that a killed process left half written is skipped.
    """
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        records.append({"images_seen": content["s"], **content["m"]} if "m" in content else content)
    return records


def render(report: Report) -> str:
    """The document. Names that come from outside are escaped."""
    labelled = _labelled(report.dataset)
    view = {
        "title": report.run,
        "kind": "H-JEPA report",
        "made_at": report.made_at,
        "sections": list(SECTIONS.items()),
        "report": report,
        "labelled": labelled,
        "headline": tables.headline(report.evaluation),
        "lead": tables.in_words(report.evaluation, report.dataset),
        "primary": tables.primary(report.evaluation),
        "levels": tables.all_levels(report.evaluation),
        "level_charts": figures.level_charts(report.evaluation),
        "curve_charts": figures.curve_charts(by_metric(report.curves)),
        "label_free": figures.label_free(report.evaluation),
        "confusion": tables.confusion(report.evaluation),
        "accuracies": tables.per_class(report.evaluation),
        "maps": figures.feature_maps(report.pictures.images, report.pictures.maps),
        "neighbours": figures.neighbours(report.pictures.neighbours, _classes(report)),
        "embedding": figures.embedding(report.pictures.embedding, report.pictures.embedding_labels, _classes(report)),
        "errors": figures.errors(report.pictures.errors),
        "masks": figures.masks(report.pictures.masks),
        "card": tables.dataset_card(report.dataset),
        "facts": tables.identity(report.checkpoint, report.model, report.evaluation),
        "no_labels": "The data set has no labels in both splits, so nothing can be counted as right or wrong.",
    }
    return fill("report.html.j2", view)


def by_metric(records: Sequence[Json]) -> Curves:
    """The curve of every metric; of what was logged twice at one place, by a run that was resumed, the last counts."""
    found: dict[str, dict[float, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "images_seen" and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {})[float(record["images_seen"])] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def _labelled(dataset: Json) -> bool:
    splits = dataset.get("splits", {})
    return all(splits.get(name, {}).get("per_class") is not None for name in ("train", "test"))


def _classes(report: Report) -> list[str]:
    return list(report.evaluation.get("classes") or report.dataset.get("classes") or [])
