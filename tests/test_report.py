"""The report: one document that needs nothing else, says all that is known, and says what is missing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config import Config, dump_yaml, load_config
from hjepa.export import ExportedEncoder, untrained_encoder
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.report import Neighbours, Pictures, Report, figures, read_journal, render, tables
from hjepa.report.charts import Axis, Interval, axis, heat_grid, thinned
from hjepa.report.document import by_metric
from hjepa.report.pictures import embedding_map, nearest, pca_maps, position_errors
from hjepa.utils.pictures import as_pictures, mask_picture

TINY = """
data: {image_size: 32, channels: 3}
model: {patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2, num_levels: 2,
        predictor: {embed_dim: 12, depth: 1, num_heads: 2}}
masking: {num_targets: 2}
"""
SECTIONS = [
    "results", "levels", "training", "label-free", "confusion", "classes", "maps", "neighbours", "embedding", "errors",
    "masks", "data", "reproduce", "config",
]  # fmt: skip
HOSTILE = '<script>alert("x")</script>&'
VOID = {"meta", "img", "br", "line", "circle", "rect", "polyline", "path"}


class Page(HTMLParser):
    """What a browser would find, and whether every element is closed."""

    def __init__(self, document: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(document)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


def masks_of(config: Config, step: int, count: int = 6) -> MaskTensors:
    context, targets, union, place, rows = MultiBlockMasking(config)(step=step, epochs=0, samples=np.arange(count))
    tensor = torch.from_numpy
    return MaskTensors(tensor(context), [tensor(t) for t in targets], tensor(union), tensor(place), rows)


def row(encoder: str, level: str, linear: float, *, half: float = 0.02) -> dict[str, Any]:
    ends = {"linear_top1": linear, "linear_top1_low": linear - half, "linear_top1_high": linear + half}
    measures = {} if level == "-" else {"rankme": 12.0, "std": 0.4}
    return {"encoder": encoder, "level": level, "knn_top1": linear - 0.1, **ends, **measures}


def manifests(classes: Sequence[str]) -> dict[str, Any]:
    n = len(classes)
    split = {"samples": 10 * n, "per_class": [10] * n, "shape": [32, 32], "shards": [{"bytes": 2_500_000}]}
    dataset = {
        "name": "shapes",
        "digest": "d" * 64,
        "source": {"kind": "image-folder", "detail": "a folder", "notes": ["two images lie beside train/"]},
        "channels": 3,
        "classes": list(classes),
        "splits": {"train": split, "test": split},
        "statistics": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "quarantine": {"total": 3, "share": 0.03, "by_reason": {"truncated": 2, "too large": 1}},
    }
    evaluation = {
        "primary_metric": {"name": "eval/linear_top1", "value": 0.8},
        "metrics": {},
        "table": [
            row("trained", "0", 0.75),
            row("trained", "all", 0.8) | {"linear_top1_std": 0.004},
            row("random init", "0", 0.55),
            row("random init", "all", 0.6),
            row("raw pixels", "-", 0.7),
            row("pixel PCA", "-", 0.65),
        ],
        "split": {"train": 60, "test": 1234, "dataset_digest": "d" * 64},
        "classes": list(classes),
        "confusion": (np.eye(n, dtype=int) * 8 + np.roll(np.eye(n, dtype=int), 1, 1) * 2).tolist(),
        "collapse": "",
        "label_free": {
            "spearman": 0.5,
            "points": [{"images_seen": i, "rankme": 5.0 + i, "knn_top1": 0.5 + i / 100} for i in range(4)],
        },
    }
    checkpoint = {"images_seen": 60032, "step": 469, "uri": "s3://b/c", "code_version": "1", "config_digest": "c"}
    model = {
        "uri": "s3://b/m",
        "digest": "m" * 64,
        "packages": {"torch": "2"},
        "checks": {"onnx": {"max_abs_difference": 2e-6, "tolerance": 1e-4, "passed": True}},
    }
    return {"dataset": dataset, "evaluation": evaluation, "checkpoint": checkpoint, "model": model}


def curves() -> list[dict[str, Any]]:
    losses = [
        {"images_seen": i * 100, "train/loss": 1 / (i + 1), "train/loss_level_0": 2 / (i + 1)} for i in range(500)
    ]
    probes = [
        {"images_seen": i * 100, "collapse/rankme": 9.0, "collapse/level_0/rankme": 8.0, "collapse/std": 0.3,
         "probe/knn_top1": 0.5}
        for i in range(5)
    ]  # fmt: skip
    return losses + probes


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(TINY)


@pytest.fixture(scope="module")
def encoder(config: Config) -> ExportedEncoder:
    return untrained_encoder(config, mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def pictures(config: Config, encoder: ExportedEncoder) -> Pictures:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = masks_of(config, 0)
    features = encoder.embed(encoder.preprocess(images))["all"]
    found = nearest(features, features, 3)
    shown = as_pictures(images)
    return Pictures(
        images=shown,
        maps=pca_maps(encoder, images),
        neighbours=Neighbours(shown, shown[found.numpy()], [0, 1, 2] * 2, (found % 3).tolist()),
        embedding=embedding_map(features),
        embedding_labels=[0, 1, 2] * 2,
        errors=position_errors(HJEPAModel(config), [(encoder.preprocess(images), masks)]),
        masks=mask_picture(images, masks.context, masks.targets, config.grid_size),
    )


@pytest.fixture
def report(config: Config, pictures: Pictures) -> Report:
    return Report(
        run="demo-1",
        made_at="2026-11-28 04:00 UTC",
        **manifests(["circle", "square", "star"]),
        config=dump_yaml(config),
        curves=curves(),
        links={"MLflow run": "https://mlflow.example/run", "Stored at": "s3://bucket/runs/demo-1"},
        reproduce="hjepa run --config demo --run demo-1",
        pictures=pictures,
    )


# -- the document ----------------------------------------------------------------------------------------------------


def test_render__every_section_is_there_named_and_reachable(report: Report) -> None:
    page = Page(render(report))
    found = page.all("section")
    assert [section["id"] for section in found] == SECTIONS
    assert [a["href"] for a in page.all("a") if a["href"].startswith("#")] == [f"#{name}" for name in SECTIONS]
    titles = {heading.get("id") for heading in page.all("h2")}
    assert {section["aria-labelledby"] for section in found} == titles
    assert not re.search(r'class="missing"', render(report))


def test_render__needs_no_network_and_no_script(report: Report) -> None:
    document = render(report)
    page = Page(document)
    assert not page.all("script")
    assert not page.all("link")
    assert len(page.all("img")) == 6 * 3 + 6 * 4 + 1
    assert all(re.match(r"data:image/(png|jpeg);base64,", image["src"]) for image in page.all("img"))
    assert not re.search(r"url\(|@import|\bon\w+=|srcset|xlink", document)
    assert [a["href"] for a in page.all("a") if not a["href"].startswith("#")] == ["https://mlflow.example/run"]


def test_render__is_accessible(report: Report) -> None:
    page = Page(render(report))
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert all(header["scope"] in {"row", "col"} for header in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_render__says_the_numbers_with_their_intervals(report: Report) -> None:
    text = Page(render(report)).text
    for words in (
        "80.00 % Linear probe, all levels",
        "95 % interval 78.00 – 82.00",
        "On 1,234 test images of shapes the linear probe on frozen features reaches 80.00 %, 20.00 points more",
        "± 0.40 over seeds",
        "+0.50 over 4 checkpoints",
        "3 files were set aside (3.00 %): 2 truncated, 1 too large",
        "passed: largest difference 2.0e-06, allowed 1.0e-04",
        "hjepa run --config demo --run demo-1",
        "embed_dim: 24",
        "2.5 MB",
    ):
        assert words in text, words


def test_render__hostile_names_are_text(report: Report) -> None:
    hostile = manifests([HOSTILE, "square", "star"])
    hostile["dataset"]["name"] = HOSTILE
    hostile["dataset"]["quarantine"]["by_reason"] = {HOSTILE: 3}
    hostile["evaluation"]["collapse"] = HOSTILE
    links = {HOSTILE: "javascript:alert(1)", "x": f'https://a.example/"{HOSTILE}'}
    document = render(
        replace(report, run=HOSTILE, links=links, config=f"a: {HOSTILE}", reproduce=f"echo {HOSTILE}", **hostile)
    )
    page = Page(document)
    assert not page.all("script")
    assert "<script" not in document
    assert page.text.count(HOSTILE) >= 10
    assert all(not a["href"].startswith("javascript") for a in page.all("a"))


def test_render__what_is_missing_is_said(report: Report) -> None:
    bare = manifests([])
    for split in bare["dataset"]["splits"].values():
        split["per_class"] = None
    evaluation = bare["evaluation"]
    evaluation["primary_metric"] = {"name": "eval/rankme", "value": 12.0}
    evaluation["table"] = [
        {"encoder": name, "level": "all", "rankme": value} for name, value in (("trained", 12.0), ("random init", 9.0))
    ]
    for key in ("classes", "confusion", "label_free"):
        del evaluation[key]
    page = Page(render(replace(report, **bare, curves=(), pictures=Pictures(), reproduce="", config="")))
    assert [section["id"] for section in page.all("section")] == SECTIONS
    for words in (
        "No scores by level. The data set has no labels in both splits",
        "No curves",
        "Without labels there is no k-NN accuracy",
        "No confusion matrix. The data set has no labels",
        "No accuracy by class. The data set has no labels",
        "No feature maps",
        "No neighbours",
        "No embedding map",
        "No errors by position",
        "No mask examples",
        "No command was recorded",
        "The configuration was not at hand",
        "the RankMe of the trained encoder is 12, that of the same encoder without training 9",
    ):
        assert words in page.text, words


def test_render__a_collapse_is_announced(report: Report) -> None:
    evaluation = {**report.evaluation, "collapse": "collapse: of level 0 the effective rank is 1.20"}
    assert (
        "The embeddings look collapsed. collapse: of level 0"
        in Page(render(replace(report, evaluation=evaluation))).text
    )
    assert "look collapsed" not in render(report)


def test_render__large_inputs_stay_below_3_mb(report: Report) -> None:
    generator = np.random.default_rng(0)
    many = manifests([f"a class with a long name {i}" for i in range(1000)])
    noise = generator.integers(0, 256, (16, 256, 256, 3), dtype=np.uint8)
    pictures = Pictures(
        images=noise,
        maps=[noise, noise, noise],
        neighbours=Neighbours(noise, np.repeat(noise[:, None], 12, 1), list(range(16)), [list(range(12))] * 16),
        embedding=generator.normal(size=(10_000, 2)),
        embedding_labels=generator.integers(0, 1000, 10_000).tolist(),
        errors=[generator.random((32, 32))],
        masks=generator.integers(0, 256, (1200, 2400, 3), dtype=np.uint8),
    )
    document = render(replace(report, **many, curves=curves() * 20, pictures=pictures))
    assert len(document.encode()) < 3_000_000
    assert "1000 classes are too many for a readable matrix" in document


@pytest.mark.parametrize(("classes", "cells"), [(2, 4), (40, 1600), (41, 0)])
def test_confusion__is_a_matrix_up_to_forty_classes(report: Report, classes: int, cells: int) -> None:
    many = manifests([f"c{i}" for i in range(classes)])
    page = Page(render(replace(report, **many)))
    assert len([td for td in page.all("td") if "--p:" in td.get("style", "")]) == cells
    assert ("The pairs that are mixed up most" in page.text) == (not cells)


# -- tables ----------------------------------------------------------------------------------------------------------


def test_headline__one_row_per_encoder_and_the_best_marked() -> None:
    headline = tables.headline(manifests(["a", "b"])["evaluation"])
    assert [(r["encoder"], r["level"]) for r in headline["rows"]] == [
        ("trained", "all levels"),
        ("random init", "all levels"),
        ("raw pixels", ""),
        ("pixel PCA", ""),
    ]
    assert [column["label"] for column in headline["columns"]] == ["k-NN", "Linear probe"]
    assert [[cell["best"] for cell in r["cells"]] for r in headline["rows"]] == [[True, True]] + [[False, False]] * 3


@pytest.mark.parametrize(
    ("random", "verdict"), [(0.70, "training helped"), (0.79, "this is within the noise"), (0.90, "training hurt")]
)
def test_in_words__the_verdict_follows_the_interval(random: float, verdict: str) -> None:
    content = manifests(["a", "b"])
    content["evaluation"]["table"][3] = row("random init", "all", random)
    sentences = tables.in_words(content["evaluation"], content["dataset"])
    assert sentences[0].endswith(f"{verdict}.")
    assert len(sentences) == 1  # raw pixels and their PCA are beaten


def test_in_words__a_paired_interval_and_a_better_baseline_are_told() -> None:
    content = manifests(["a", "b"])
    content["evaluation"]["metrics"] = {
        "gain/linear_top1": 0.2,
        "gain/linear_top1_low": 0.19,
        "gain/linear_top1_high": 0.21,
    }
    content["evaluation"]["table"][4] = row("raw pixels", "-", 0.85)
    first, second = tables.in_words(content["evaluation"], content["dataset"])
    assert "+19.00 to +21.00" in first
    assert second == "Raw pixels reach 85.00\N{NO-BREAK SPACE}%: the encoder does not beat them."


def test_gain_over__known_answer() -> None:
    gain = tables.gain_over(Interval(0.8, 0.77, 0.84), Interval(0.6, 0.57, 0.64))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.2, 0.2 - 0.05, 0.2 + 0.05))


def test_wilson__known_answer() -> None:
    found = tables.wilson(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert tables.wilson(10, 10).ends == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_per_class__worst_first_and_absent_classes_named() -> None:
    found = tables.per_class({"classes": ["a", "b", "c"], "confusion": [[9, 1, 0], [5, 5, 0], [0, 0, 0]]})
    assert found is not None
    assert [(r["name"], r["value"], r["images"]) for r in found["shown"]] == [("b", "50.00", 10), ("a", "90.00", 10)]
    assert found["absent"] == ["c"]


def test_metric_names__ends_and_spreads_are_no_columns() -> None:
    rows = [{"encoder": "e", "level": "0", "knn_top1": 1, "knn_top1_low": 0, "knn_top1_std": 0, "std": 1, "x_low": 1}]
    assert tables.metric_names(rows) == ["knn_top1", "std", "x_low"]


# -- charts ----------------------------------------------------------------------------------------------------------


def test_axis__ticks_are_round_and_inside() -> None:
    assert Axis(0, 1, 0, 100).ticks() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert Axis(0, 1, 0, 100)(0.25) == 25
    assert Axis(0.01, 1, 0, 100, log=True)(0.1) == pytest.approx(50)
    assert axis([3.0, 3.0], 0, 1).ticks()
    assert axis([0.05, 0.3], 0, 1, log=True).ticks() == pytest.approx([0.05, 0.1, 0.2])


def test_heat_grid__nearly_equal_errors_look_so() -> None:
    document = heat_grid("errors", np.array([[0.035, 0.037], [np.nan, 0.0]]))
    assert re.findall(r'class="(\w+)"[^>]*fill-opacity="([\d.]+)"', document) == [
        ("cell", "0.95"),
        ("cell", "1.00"),
        ("unseen", "1.00"),
        ("cell", "0.00"),
    ]
    assert "nan" not in heat_grid("none", np.full((2, 2), np.nan))
    assert heat_grid("zero", np.zeros((2, 2))).count('fill-opacity="0.00"') == 4


def test_thinned__keeps_the_ends() -> None:
    points = [(float(i), 0.0) for i in range(5000)]
    kept = thinned(points)
    assert len(kept) <= 240
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_by_metric__the_last_value_at_a_place_counts_and_nan_does_not() -> None:
    records = [
        {"images_seen": 20, "a": 2.0},
        {"images_seen": 10, "a": 1.0},
        {"images_seen": 20, "a": 3.0, "b": float("nan")},
    ]
    assert by_metric(records) == {"a": [(10.0, 1.0), (20.0, 3.0)]}


def test_read_journal__both_formats_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"images_seen": 5, "train/loss": 1.0}, {"t": 1, "s": 9, "m": {"train/loss": 0.5}}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"images_se', "utf-8")
    assert read_journal(path) == [{"images_seen": 5, "train/loss": 1.0}, {"images_seen": 9, "train/loss": 0.5}]


def test_label_free__two_checkpoints_are_needed() -> None:
    content = manifests(["a", "b"])["evaluation"]
    assert figures.label_free(content) is not None
    one = copy.deepcopy(content)
    one["label_free"]["points"] = one["label_free"]["points"][:1]
    assert figures.label_free(one) is None


# -- what is computed from tensors -----------------------------------------------------------------------------------


def test_pca_maps__halves_of_an_image_have_two_colours(encoder: ExportedEncoder) -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :, 16:] = 255
    encoder = copy.deepcopy(encoder)
    encoder.vit.positions.zero_()  # what is left is what the pixels say
    maps = pca_maps(encoder, images)
    assert [(m.shape, m.dtype) for m in maps] == [((2, 32, 32, 3), np.uint8)] * 2
    for level in maps:
        left, right = level[:, :, :16, 0].astype(int), level[:, :, 16:, 0].astype(int)
        assert np.ptp(left) <= 1
        assert np.ptp(right) <= 1
        assert abs(left.mean() - right.mean()) > 250
        assert (level[0] == level[1]).all()


def test_pca_maps__a_cell_is_one_colour(encoder: ExportedEncoder) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for level, found in enumerate(pca_maps(encoder, images)):
        side = 4 * 2**level
        cells = found.reshape(2, 32 // side, side, 32 // side, side, 3)
        assert (cells == cells[:, :, :1, :, :1]).all()
        assert len(np.unique(found[0].reshape(-1, 3), axis=0)) > 1


def test_nearest__is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 8, generator=generator) + 5, torch.randn(6, 8, generator=generator) + 5
    found = nearest(train, test, 5)
    mean = train.mean(0)
    for query, indices in zip(test, found, strict=True):
        cosine = [float(torch.dot(query - mean, t - mean) / ((query - mean).norm() * (t - mean).norm())) for t in train]
        assert indices.tolist() == sorted(range(40), key=lambda i: -cosine[i])[:5]
    assert nearest(train, train, 1)[:, 0].tolist() == list(range(40))
    assert nearest(train[:3], test, 9).shape == (6, 3)


def test_embedding_map__finds_the_plane_of_the_points() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(50, 2, generator=generator) * torch.tensor([5.0, 1.0])
    axes = torch.linalg.qr(torch.randn(9, 2, generator=generator))[0]
    found = torch.from_numpy(embedding_map(plane @ axes.T + 7))
    assert torch.allclose(torch.pdist(found), torch.pdist(plane.double()), atol=1e-4)
    assert found[:, 0].std() > found[:, 1].std()


def test_position_errors__equal_a_count_by_hand(config: Config) -> None:
    torch.manual_seed(0)
    model = HJEPAModel(config)
    batches: list[tuple[Tensor, MaskTensors]] = [(torch.randn(6, 3, 32, 32), masks_of(config, s)) for s in range(2)]
    found = position_errors(model, batches, beta=0.5)
    assert model.training
    for level, grid in ((0, 8), (1, 4)):
        errors: list[list[float]] = [[] for _ in range(grid**2)]
        for images, masks in batches:
            with torch.no_grad():
                out = model(images, masks)
            for image in range(6):
                for block in range(2):
                    for place, cell in enumerate(masks.targets[level][image, block].tolist()):
                        pair = out.predictions[level][image, block, place], out.targets[level][image, block, place]
                        errors[cell].append(float(F.smooth_l1_loss(*pair, beta=0.5)))
        expected = np.array([np.mean(e) if e else np.nan for e in errors]).reshape(grid, grid)
        np.testing.assert_allclose(found[level], expected, rtol=1e-5)


def test_position_errors__a_cell_that_no_mask_covers_is_nan(config: Config) -> None:
    found = position_errors(HJEPAModel(config), [(torch.randn(1, 3, 32, 32), masks_of(config, 0, count=1))])
    covered = set(masks_of(config, 0, count=1).targets[0].flatten().tolist())
    assert np.isnan(found[0]).sum() == 64 - len(covered)
    assert np.isnan(found[0]).any()
