"""Judging frozen features: one file per protocol.

Protocols of pooled features are the rows of ``PROTOCOLS``; those that read tokens are in ``evaluate_tokens``; what
needs no label is in ``label_free``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hjepa.config import EvaluationConfig
from hjepa.errors import UserError
from hjepa.evaluation import attentive, knn, label_free, linear, low_shot, retrieval
from hjepa.evaluation.features import Encoder, Features, extract, pixel_pca, raw_pixels
from hjepa.evaluation.outcome import Outcome, Outcomes
from hjepa.evaluation.tokens import TokenEncoder, Tokens, read_tokens
from hjepa.utils.bootstrap import intervals

__all__ = [
    "PROTOCOLS",
    "Encoder",
    "Features",
    "Judged",
    "Outcome",
    "Protocol",
    "Row",
    "TokenEncoder",
    "Tokens",
    "evaluate_features",
    "evaluate_tokens",
    "extract",
    "label_free",
    "pixel_pca",
    "raw_pixels",
    "read_tokens",
]

# (train_x [N, D], train_y [N], test_x [M, D], test_y [M], config, num_classes) -> metric name -> outcome
Protocol = Callable[[Tensor, Tensor, Tensor, Tensor, EvaluationConfig, int], dict[str, Outcome]]

PROTOCOLS: dict[str, Protocol] = {
    "knn": knn.judge,
    "linear": linear.judge,
    "low_shot": low_shot.judge,
    "retrieval": retrieval.judge,
}

# "encoder", "level", and every metric of every protocol, from 0 to 1: its value, the ends of its 95 % interval as
# <metric>_low and <metric>_high, and <metric>_std where it comes from several seeds.
Row = dict[str, str | float]


@dataclass(frozen=True)
class Judged:
    """What all protocols found about one encoder."""

    rows: list[Row]  # one per level
    outcomes: dict[tuple[str, str], Tensor]  # (level, metric) -> float32 [M], see Outcome.per_item
    predictions: dict[tuple[str, str], Tensor]  # (level, metric) -> int64 [M], the class of each test image
    notes: list[str]  # what a reader of the table must know about the split


def evaluate_features(
    encoder: str,
    train: Features,
    test: Features,
    *,
    config: EvaluationConfig,
    num_classes: int,
    extra: Mapping[str, Outcomes] | None = None,
) -> Judged:
    """Run all protocols on every level, with intervals from the same resamples of the test images.

    Args:
        encoder: The name the rows carry, such as ``trained`` or ``raw pixels``.
        extra: Level -> what other protocols found about it, such as ``evaluate_tokens``.

    Raises:
        UserError: if a split is empty or has images without a label, or labels that ``num_classes`` does not allow.
    """
    _check_labels("train", train.labels, num_classes)
    _check_labels("test", test.labels, num_classes)
    found: dict[str, dict[str, Outcome]] = {}
    for level, train_x in train.tables.items():
        found[level] = {}
        for protocol in PROTOCOLS.values():
            found[level] |= protocol(train_x, train.labels, test.tables[level], test.labels, config, num_classes)
        found[level] |= (extra or {}).get(level, {})
    return Judged(
        rows=_rows(encoder, found, config),
        outcomes=_by_metric({level: _given(outcomes, "per_item") for level, outcomes in found.items()}),
        predictions=_by_metric({level: _given(outcomes, "predicted") for level, outcomes in found.items()}),
        notes=_notes(train.labels, test.labels, num_classes),
    )


def evaluate_tokens(
    train: Tokens, test: Tokens, *, config: EvaluationConfig, num_classes: int
) -> dict[str, dict[str, Outcome]]:
    """Level -> what the attentive probe and the dense retrieval found.

    An encoder with one level has no level "all" of its own; its outcomes are given under that name too.

    Raises:
        UserError: as ``evaluate_features``.
    """
    _check_labels("train", train.labels, num_classes)
    _check_labels("test", test.labels, num_classes)
    probed = attentive.evaluate(train, test, config=config, num_classes=num_classes)
    retrieved = retrieval.dense(train, test, config=config)
    found = {level: probed[level] | retrieved[level] for level in train.levels}
    return {"all": found["0"], **found}


def _rows(encoder: str, found: Mapping[str, Outcomes], config: EvaluationConfig) -> list[Row]:
    columns = [(level, metric) for level, outcomes in found.items() for metric in outcomes]
    judged = [(key, found[key[0]][key[1]].per_item) for key in columns]
    items = {key: per_item for key, per_item in judged if per_item is not None}
    ends: dict[tuple[str, str], tuple[float, float]] = {}
    if items:
        table = torch.stack(list(items.values()), dim=1).double().cpu().numpy()  # [M, K]
        low, high = intervals(table, resamples=config.bootstrap_resamples, seed=config.seeds[0])
        ends = {key: (float(low[k]), float(high[k])) for k, key in enumerate(items) if np.isfinite(low[k])}
    rows: list[Row] = []
    for level, outcomes in found.items():
        row: Row = {"encoder": encoder, "level": level}
        for metric, outcome in outcomes.items():
            row[metric] = outcome.value
            if (level, metric) in ends:
                row[f"{metric}_low"], row[f"{metric}_high"] = ends[level, metric]
            if outcome.std is not None:
                row[f"{metric}_std"] = outcome.std
        rows.append(row)
    return rows


def _given(outcomes: Outcomes, field: str) -> dict[str, Tensor]:
    values = {metric: getattr(outcome, field) for metric, outcome in outcomes.items()}
    return {metric: value for metric, value in values.items() if value is not None}


def _by_metric(found: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], Tensor]:
    return {(level, metric): value for level, values in found.items() for metric, value in values.items()}


def _notes(train_y: Tensor, test_y: Tensor, num_classes: int) -> list[str]:
    notes = []
    trained, tested = torch.unique(train_y), torch.unique(test_y)
    if len(trained) == 1:
        notes.append("all training images have one class: an accuracy says nothing about the features")
    if len(trained) < num_classes:
        notes.append(
            f"{num_classes - len(trained)} of {num_classes} classes have no training image and are never predicted"
        )
    if len(tested) < num_classes:
        notes.append(
            f"{num_classes - len(tested)} of {num_classes} classes have no test image: "
            f"the figures are about the other {len(tested)}"
        )
    return notes


def _check_labels(split: str, labels: Tensor, num_classes: int) -> None:
    if not len(labels):
        raise UserError(f"the {split} split has no images; prepare the data set with images in it")
    missing = int((labels < 0).sum())
    if missing:
        raise UserError(
            f"{missing} of {len(labels)} images in the {split} split have no label, and k-NN and the linear probe need "
            "one for each. Give the data set labels (one sub-folder per class) and prepare it again"
        )
    if labels.max() >= num_classes:
        raise UserError(
            f"the {split} split has a label {int(labels.max())}, but the data set names {num_classes} classes "
            f"(0 to {num_classes - 1}). Prepare the data set again"
        )
