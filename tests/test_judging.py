"""Evaluation put together: names of metrics, what the gate is given, confusion, and curves over checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config import load_config, primary_metrics
from hjepa.data.loader import ShardDataset
from hjepa.data.prepare import prepare
from hjepa.data.sources import ArraySplit, Source
from hjepa.errors import HjepaError
from hjepa.evaluation import Judged
from hjepa.export import untrained_encoder
from hjepa.judging import Judge, checkpoint_points, confusion, diagnosis, flat_metrics, judge, outcomes
from hjepa.models import HJEPAModel
from hjepa.steps import evaluation_summary
from hjepa.training import model_of_checkpoint
from hjepa.utils.checkpoint import write_checkpoint

CONFIG = load_config(
    """
data: {image_size: 16, channels: 1, num_workers: 0}
model: {patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2, num_levels: 2,
        predictor: {embed_dim: 8, depth: 1, num_heads: 2}}
masking: {num_targets: 2}
evaluation: {batch_size: 16}
"""
)


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


# -- where predictions fail ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """60 and 40 images in two classes, on a grid of 8x8 patches."""
    folder = tmp_path_factory.mktemp("prepared")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 16, 16), dtype=np.uint8)
    labels = np.arange(100) % 2
    pixels[labels == 1] //= 2
    splits = {"train": ArraySplit(pixels[:60], labels[:60]), "test": ArraySplit(pixels[60:], labels[60:])}
    manifest = prepare(Source("squares", "made here", splits), CONFIG.data, folder).manifest
    images = {name: ShardDataset(manifest, name, folder.joinpath) for name in splits}
    return Judge(CONFIG, manifest, images, "cpu")


class Oracle(nn.Module):
    """Predicts ``answer`` (D,) everywhere, but is off by ``miss`` in ``cell`` of ``level``."""

    def __init__(self, answer: Tensor, *, level: int = 0, cell: int = 0, miss: float = 0.0):
        super().__init__()
        self.answer, self.level, self.cell, self.miss = answer, level, cell, miss

    def forward(self, _context: Tensor, _visible: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        return [
            self.answer + self.miss * ((cells == self.cell) & (level == self.level))[..., None]
            for level, cells in enumerate(targets)
        ]


@pytest.fixture
def uniform_world() -> tuple[HJEPAModel, Tensor]:
    """A model whose target is the same vector in every cell of every image, and that vector."""
    model = HJEPAModel(CONFIG)
    says = torch.linspace(-1, 2, CONFIG.model.embed_dim)
    with torch.no_grad():
        model.target_encoder.norm.weight.zero_()
        model.target_encoder.norm.bias.copy_(says)
    return model, F.layer_norm(says, says.shape)


def test_errors__a_perfect_prediction_has_none(of: Judge, uniform_world: tuple[HJEPAModel, Tensor]) -> None:
    model, answer = uniform_world
    model.predictor = Oracle(answer)  # type: ignore[assignment]
    found = of.errors(model)
    assert [level.shape for level in found] == [(8, 8), (4, 4)]
    assert all(level.max() < 1e-12 for level in found)


@pytest.mark.parametrize(("level", "cell"), [(0, 1), (0, 58), (1, 7)])
def test_errors__stand_where_the_prediction_misses(
    of: Judge, uniform_world: tuple[HJEPAModel, Tensor], level: int, cell: int
) -> None:
    model, answer = uniform_world
    model.predictor = Oracle(answer, level=level, cell=cell, miss=3.0)  # type: ignore[assignment]
    found = of.errors(model)
    assert found[level].flat[cell] == pytest.approx(3.0 - 0.5)  # smooth L1 with a beta of 1
    found[level].flat[cell] = 0
    assert all(values.max() < 1e-12 for values in found)


def test_errors__of_few_images_reach_every_cell_and_are_the_same_again(of: Judge) -> None:
    torch.manual_seed(0)
    model = HJEPAModel(CONFIG)
    given: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    first, again = of.errors(model), of.errors(copy.deepcopy(model))
    assert all(np.isfinite(level).all() and (level > 0).all() for level in first)
    pixels = torch.cat(given[: len(given) // 2])
    _, times = pixels.flatten(1).unique(dim=0, return_counts=True)
    assert (len(times), int(times.min()), int(times.max())) == (40, 512 // 40, 512 // 40 + 1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_masks__are_the_runs_own_and_change_with_the_draw(of: Judge) -> None:
    blocks = {tuple(of.masks(draw, 8).targets[1].shape) for draw in range(16)}
    assert len(blocks) > 1
    masks = of.masks(3, 8)
    assert masks.targets[0].shape[:2] == (8, CONFIG.masking.num_targets)
    shown = {(i, int(p)) for i in range(8) for p in masks.context[i]}
    assert shown.isdisjoint((i, int(p)) for i in range(8) for p in masks.targets[0][i].flatten())


def test_judge__draws_errors_of_the_whole_model_and_passes_notes_on(of: Judge) -> None:
    encoders = {name: untrained_encoder(CONFIG, **of.dataset["statistics"]) for name in ("trained", "random init")}
    told = {"device": "cpu", "notes": ["the journal is gone"]}
    whole = judge(CONFIG, of.dataset, encoders, of.images, model=HJEPAModel(CONFIG), **told)
    assert [level.shape for level in whole.pictures.errors] == [(8, 8), (4, 4)]
    alone = judge(CONFIG, of.dataset, encoders, of.images, **told)
    assert not alone.pictures.errors
    assert alone.pictures.masks is not None
    assert alone.manifest["notes"][-1] == "the journal is gone"
    assert alone.manifest == whole.manifest
    # Whatever evaluation.primary_metric may name is measured.
    assert set(primary_metrics(CONFIG)) <= set(whole.manifest["metrics"])


def test_model_of_checkpoint__restores_every_weight(tmp_path: Path) -> None:
    model = HJEPAModel(CONFIG)
    write_checkpoint(tmp_path / "c.pth", {"model": model.state_dict()})
    restored = model_of_checkpoint(tmp_path / "c.pth", CONFIG, name="c").state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in model.state_dict().items())


def test_model_of_checkpoint__of_another_shape_is_refused_in_words(tmp_path: Path) -> None:
    other = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"num_levels": 1})})
    write_checkpoint(tmp_path / "c.pth", {"model": HJEPAModel(other).state_dict()})
    with pytest.raises(HjepaError, match=r"s3://b/c\.pth does not fit.*only in the model: predictor") as raised:
        model_of_checkpoint(tmp_path / "c.pth", CONFIG, name="s3://b/c.pth")
    assert "Use it with the configuration it was trained with" in str(raised.value)
