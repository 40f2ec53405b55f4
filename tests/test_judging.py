"""Evaluation put together: names of metrics, what the gate is given, confusion, and curves over checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hjepa.config import load_config
from hjepa.evaluation import Judged
from hjepa.judging import checkpoint_points, confusion, diagnosis, flat_metrics, outcomes
from hjepa.steps import evaluation_summary


def judged(correct: torch.Tensor) -> Judged:
    return Judged([], {("all", "linear_top1"): correct, ("1", "knn_top1"): 1 - correct}, {}, [])


def test_flat_metrics__name_every_row_and_the_gain_over_the_untrained_encoder() -> None:
    table = [
        {"encoder": "trained", "level": "all", "knn_top1": 0.8, "linear_top1": 0.9},
        {"encoder": "trained", "level": "1", "knn_top1": 0.7},
        {"encoder": "random init", "level": "all", "knn_top1": 0.5, "linear_top1": 0.6},
        {"encoder": "raw pixels", "level": "-", "knn_top1": 0.4},
        {"encoder": "pixel PCA", "level": "-", "knn_top1": 0.3},
    ]
    metrics = flat_metrics(table)
    assert metrics["eval/level_1/knn_top1"] == 0.7
    assert metrics["reference/pixels/knn_top1"] == 0.4
    assert metrics["reference/pca/knn_top1"] == 0.3
    assert metrics["gain/linear_top1"] == pytest.approx(0.3)


@pytest.mark.parametrize(("metric", "flip"), [("eval/linear_top1", False), ("eval/level_1/knn_top1", True)])
def test_outcomes__are_the_right_answers_bit_by_bit(metric: str, flip: bool) -> None:
    correct = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1])
    found = outcomes(metric, judged(correct))["outcomes"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["correct"]), np.uint8), count=found["count"])
    assert found["metric"] == metric
    assert bits.tolist() == ((1 - correct) if flip else correct).int().tolist()


@pytest.mark.parametrize("metric", ["eval/rankme", "gain/linear_top1", "eval/level_0/linear_top1"])
def test_outcomes__are_left_out_where_a_metric_is_no_count_of_right_answers(metric: str) -> None:
    assert outcomes(metric, judged(torch.ones(4))) == {}


def test_outcomes__are_left_out_where_seeds_disagree() -> None:
    assert outcomes("eval/linear_top1", judged(torch.tensor([1.0, 1 / 3, 0]))) == {}


def test_confusion__has_a_row_per_true_class_and_counts_every_image() -> None:
    truth, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    assert confusion(truth, predicted, 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_checkpoint_points__need_both_measures_and_come_in_order() -> None:
    journal = [
        {"images_seen": 200, "collapse/rankme": 4.0, "probe/knn_top1": 0.4},
        {"images_seen": 100, "collapse/rankme": 3.0},
        {"images_seen": 100, "probe/knn_top1": 0.3},
        {"images_seen": 300, "collapse/rankme": 5.0, "train/loss": 0.1},
        {"images_seen": 400, "collapse/rankme": "NaN", "probe/knn_top1": 0.5},
    ]
    assert checkpoint_points(journal) == [
        {"images_seen": 100, "rankme": 3.0, "knn_top1": 0.3},
        {"images_seen": 200, "rankme": 4.0, "knn_top1": 0.4},
    ]


def test_diagnosis__names_the_collapsed_level_and_is_empty_for_a_healthy_encoder() -> None:
    config = load_config("default")
    healthy = [
        {"encoder": "trained", "level": level, "std": 0.5, "rankme": 40.0} for level in ("mean", "0", "1", "all")
    ]
    assert diagnosis(config, healthy) == ""
    healthy[2] |= {"std": 0.0, "rankme": 1.0}
    assert "level 1" in diagnosis(config, healthy)


def test_summary__shows_intervals_links_and_rows_of_different_protocols() -> None:
    manifest = {
        "table": [
            {"encoder": "trained", "level": "all", "knn_top1": 0.8, "knn_top1_low": 0.7, "knn_top1_high": 0.9},
            {"encoder": "raw pixels", "level": "-", "linear_top1": 0.5},
        ],
        "collapse": "",
        "notes": ["3 of 9 classes have no test image"],
        "links": {"MLflow run": "http://mlflow:5000/#/x"},
    }
    text = evaluation_summary(manifest)
    assert "| trained | all | 0.800 (0.700 to 0.900) |  |" in text
    assert "| raw pixels | - |  | 0.500 |" in text
    assert "note: 3 of 9 classes" in text
    assert "[MLflow run](http://mlflow:5000/#/x)" in text
