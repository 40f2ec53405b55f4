"""Judging frozen features: one file per protocol, one row per protocol in ``PROTOCOLS``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hjepa.config import EvaluationConfig
from hjepa.errors import UserError
from hjepa.evaluation import knn, linear
from hjepa.evaluation.features import Encoder, Features, extract, raw_pixels

__all__ = ["PROTOCOLS", "Encoder", "Features", "Protocol", "Row", "evaluate_features", "extract", "raw_pixels"]

# (train_x [N, D], train_y [N], test_x [M, D], test_y [M], config, num_classes) -> metric name -> value
Protocol = Callable[[Tensor, Tensor, Tensor, Tensor, EvaluationConfig, int], dict[str, float]]

PROTOCOLS: dict[str, Protocol] = {
    "knn": knn.evaluate,
    "linear": linear.evaluate,
}

Row = dict[str, str | float]  # "encoder", "level", and every metric of every protocol; accuracies are from 0 to 1


def evaluate_features(
    encoder: str, train: Features, test: Features, *, config: EvaluationConfig, num_classes: int
) -> list[Row]:
    """Run all protocols on every level: the rows of one encoder in the table of ``evaluation.json``.

    Args:
        encoder: The name the rows carry, such as ``trained`` or ``raw pixels``.

    Raises:
        UserError: if a split is empty or has images without a label, or labels that ``num_classes`` does not allow.
    """
    _check_labels("train", train, num_classes)
    _check_labels("test", test, num_classes)
    rows: list[Row] = []
    for level, train_x in train.tables.items():
        row: Row = {"encoder": encoder, "level": level}
        for protocol in PROTOCOLS.values():
            row |= protocol(train_x, train.labels, test.tables[level], test.labels, config, num_classes)
        rows.append(row)
    return rows


def _check_labels(split: str, features: Features, num_classes: int) -> None:
    labels = features.labels
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
