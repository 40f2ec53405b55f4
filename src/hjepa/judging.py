"""Evaluation put together: the table of an exported encoder beside its baselines, and what its report shows.

Without S3 and MLflow: images come in as opened splits, what was found goes out as one JSON manifest and pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hjepa import evaluation, training
from hjepa.config import Config
from hjepa.data.loader import ShardDataset
from hjepa.data.transforms import normalize
from hjepa.errors import UserError
from hjepa.evaluation import Features, Judged, Row, label_free
from hjepa.export import ExportedEncoder
from hjepa.masks import MultiBlockMasking
from hjepa.models import HJEPAModel, MaskTensors
from hjepa.report import Neighbours, Pictures
from hjepa.report.pictures import embedding_map, nearest, pca_maps, position_errors
from hjepa.trainers.step import move
from hjepa.utils.collapse import CollapseMonitor, collapse_metrics
from hjepa.utils.logging import say
from hjepa.utils.pictures import as_pictures, mask_picture

Json = dict[str, Any]

PIXELS = 32  # side of the raw-pixel baseline; a linear probe on more would not fit into memory
PREFIXES = {
    "trained": "eval",
    "random init": "reference/random",
    "raw pixels": "reference/pixels",
    "pixel PCA": "reference/pca",
}
SHOWN, NEIGHBOURS, MAPPED = 8, 6, 1500  # images of the report's figures
PREDICTED, DRAWS = 512, 16  # images whose hidden cells are predicted, in batches that share the size of their blocks
# What changes no result, or only chooses among results: scores stay comparable.
NO_MATTER = {"batch_size", "primary_metric", "token_cache_gb"}


@dataclass(frozen=True)
class Judgement:
    manifest: Json  # of evaluation.json, all but its schema and the model's digest
    pictures: Pictures


class Judge:
    """One split of one data set, on which every encoder is judged alike."""

    def __init__(self, config: Config, dataset: Mapping[str, Any], images: Mapping[str, ShardDataset], device: str):
        self.config, self.dataset, self.images, self.device = config, dataset, images, device
        limits = {"train": config.evaluation.train_samples, "test": config.evaluation.test_samples}
        self.limits = {name: limits[name] for name in images}
        self.labelled = "test" in images and all(dataset["splits"][name]["per_class"] is not None for name in limits)
        self.classes = list(dataset["classes"])
        self.judged_split = "test" if "test" in images else "train"

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        return training.eval_batches(self.config, self.images[split], self.limits[split])

    def encoder(self, name: str, encoder: ExportedEncoder) -> tuple[Judged, dict[str, Features]]:
        """The rows of one encoder, and its features."""
        config, device = self.config.evaluation, self.device
        say(f"judging the {name} encoder")
        features: dict[str, Features] = {}
        if self.labelled:
            tokens = {
                split: evaluation.read_tokens(encoder, partial(self.batches, split), config=config, device=device)
                for split in ("train", "test")
            }
            features = {split: each.features for split, each in tokens.items() if each.features is not None}
            classes = len(self.classes)
            dense = evaluation.evaluate_tokens(tokens["train"], tokens["test"], config=config, num_classes=classes)
            found = evaluation.evaluate_features(
                name, features["train"], features["test"], config=config, num_classes=classes, extra=dense
            )
        else:
            features = {split: evaluation.extract(encoder, self.batches(split), device) for split in self.images}
            levels = features[self.judged_split].tables
            found = Judged([{"encoder": name, "level": level} for level in levels], {}, {}, [])
        views = label_free.embed_views(encoder, self.batches(self.judged_split), config=config, device=device)
        for row in found.rows:
            level = str(row["level"])
            z = features[self.judged_split].tables[level]
            row |= collapse_metrics(z[: label_free.IMAGES]) | label_free.measure(z, views[level])
        return found, features

    def pixels(self) -> list[Row]:
        """The rows of what needs no encoder: pixels as they are, and their principal components."""
        side = min(self.config.data.image_size, PIXELS)
        train, test = (evaluation.raw_pixels(self.batches(split), side) for split in ("train", "test"))
        rows: list[Row] = []
        for name, (one, other) in {"raw pixels": (train, test), "pixel PCA": evaluation.pixel_pca(train, test)}.items():
            say(f"judging {name}")
            found = evaluation.evaluate_features(
                name, one, other, config=self.config.evaluation, num_classes=len(self.classes)
            )
            rows += found.rows
        return rows

    def pictures(
        self, encoder: ExportedEncoder, features: Mapping[str, Features], model: HJEPAModel | None = None
    ) -> Pictures:
        """What the report draws of the trained encoder; no neighbours where there is one split alone.

        Args:
            model: That of the encoder, for the errors of its predictions.
        """
        split = self.judged_split
        judged = features[split]
        shown = self._first(split, SHOWN)
        labels = judged.labels[:MAPPED].tolist() if judged.labelled else []
        neighbours = None
        if split == "test":
            found = nearest(features["train"].tables["all"], judged.tables["all"][:SHOWN], NEIGHBOURS)
            where = found.flatten().tolist()
            pictures = dict(zip(sorted(set(where)), self._chosen("train", set(where)), strict=True))
            neighbours = Neighbours(
                queries=as_pictures(shown),
                found=np.stack([as_pictures([pictures[i] for i in row]) for row in found.tolist()]),
                query_labels=judged.labels[:SHOWN].tolist() if self.labelled else [],
                found_labels=features["train"].labels[found].tolist() if self.labelled else [],
            )
        masks = self.masks(0, len(shown))
        return Pictures(
            images=as_pictures(shown),
            maps=pca_maps(encoder, shown, device=self.device),
            neighbours=neighbours,
            embedding=embedding_map(judged.tables["all"][:MAPPED]),
            embedding_labels=labels,
            errors=self.errors(model) if model else (),
            masks=mask_picture(shown, masks.context, masks.targets, self.config.grid_size),
        )

    def errors(self, model: HJEPAModel) -> list[NDArray[np.float64]]:
        """Per level (grid, grid), the mean error of predicting a cell; NaN where no mask of these draws hid one.

        Always of ``PREDICTED`` pairs of an image and a mask: where there are fewer images they come again, under other
        masks.
        """
        say("predicting hidden cells")
        images, size = self._first(self.judged_split, PREDICTED), PREDICTED // DRAWS
        statistics = self.dataset["statistics"]

        def batches() -> Iterator[tuple[Tensor, MaskTensors]]:
            for draw in range(DRAWS):
                chosen = images[torch.arange(draw * size, (draw + 1) * size) % len(images)].to(self.device)
                masks = move(self.masks(draw, size), torch.device(self.device))
                yield normalize(chosen, statistics["mean"], statistics["std"]), masks

        return position_errors(model.to(self.device), batches(), beta=self.config.loss.smooth_l1_beta)

    def masks(self, draw: int, count: int) -> MaskTensors:
        """Masks of ``count`` images, drawn as training draws those of its step ``draw``."""
        samples = np.arange(draw * count, (draw + 1) * count)
        masks = MultiBlockMasking(self.config)(step=draw, epochs=0, samples=samples)
        context, union, place = (torch.from_numpy(item) for item in (masks.context, masks.union, masks.place))
        return MaskTensors(context, [torch.from_numpy(cells) for cells in masks.targets], union, place, masks.rows)

    def _first(self, split: str, count: int) -> Tensor:
        return torch.stack(list(islice((image for batch, _ in self.batches(split) for image in batch), count)))

    def _chosen(self, split: str, wanted: set[int]) -> list[Tensor]:
        """The images of these numbers, ascending."""
        numbered = enumerate(image for batch, _ in self.batches(split) for image in batch)
        return [image for number, image in islice(numbered, max(wanted) + 1) if number in wanted]


def judge(
    config: Config,
    dataset: Mapping[str, Any],
    encoders: Mapping[str, ExportedEncoder],
    images: Mapping[str, ShardDataset],
    *,
    device: str,
    model: HJEPAModel | None = None,
    journal: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> Judgement:
    """Judge ``trained`` beside the other encoders and raw pixels, on one split.

    Args:
        dataset: Its manifest.
        encoders: ``trained`` and ``random init``.
        images: The splits that have images.
        model: The whole model of ``trained``; without it the errors of its predictions are not shown.
        journal: What training logged: {"images_seen": n, metric: value, ...}.
        notes: What the reader has to know about all this.

    Raises:
        UserError: ``evaluation.primary_metric`` is not among what was measured.
    """
    of = Judge(config, dataset, images, device)
    table: list[Row] = []
    trained: Judged | None = None
    pictures = Pictures()
    for name, encoder in encoders.items():
        found, features = of.encoder(name, encoder)
        table += found.rows
        if name == "trained":
            trained, pictures = found, of.pictures(encoder, features, model)
    if of.labelled:
        table += of.pixels()
    assert trained is not None
    unlabelled = "the data set has no labels in both splits: label-free measures only, no k-NN and no probe"
    notes = [*(trained.notes if of.labelled else [unlabelled]), *notes]
    for note in notes:
        say(f"note: {note}")
    metrics = flat_metrics(table)
    primary = config.evaluation.primary_metric if of.labelled else "eval/rankme"
    if primary not in metrics:
        raise UserError(
            f"evaluation.primary_metric={primary} is not measured; choose one of {', '.join(sorted(metrics))}"
        )
    points = checkpoint_points(journal)
    manifest: Json = {
        "primary_metric": {"name": primary, "value": metrics[primary]},
        "metrics": metrics,
        "table": table,
        "notes": notes,
        "collapse": diagnosis(config, trained.rows),
        "label_free": {"spearman": label_free.spearman(points), "points": points},
        "split": {
            **{name: min(of.limits[name] or len(split), len(split)) for name, split in images.items()},
            "dataset_digest": dataset["digest"],
        },
        # What a score depends on; scores of other settings are not comparable.
        "settings": config.evaluation.model_dump(mode="json", exclude=NO_MATTER),
    }
    manifest |= outcomes(primary, trained)
    if of.labelled:
        truth = torch.cat([labels for _, labels in of.batches("test")])
        predicted = trained.predictions["all", "linear_top1"]
        manifest |= {"classes": of.classes, "confusion": confusion(truth, predicted, len(of.classes))}
    return Judgement(manifest, pictures)


def flat_metrics(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Row by row with a name of its own for each: eval/linear_top1, reference/random/level_0/knn_top1, gain/..."""
    metrics: dict[str, float] = {}
    for row in table:
        level = str(row["level"])
        prefix = PREFIXES[str(row["encoder"])] + {"all": "", "-": "", "mean": "/mean"}.get(level, f"/level_{level}")
        metrics |= {f"{prefix}/{key}": float(value) for key, value in row.items() if key not in {"encoder", "level"}}
    for name in ("knn_top1", "linear_top1", "mean/knn_top1", "mean/linear_top1"):
        if f"eval/{name}" in metrics:
            metrics[f"gain/{name}"] = metrics[f"eval/{name}"] - metrics[f"reference/random/{name}"]
    return metrics


def outcomes(primary: str, trained: Judged) -> Json:
    """Which test items the primary metric counts as right, for the gate's paired comparison; empty without any."""
    kind, *where, metric = primary.split("/")
    level = where[0].removeprefix("level_") if where else "all"
    correct = trained.outcomes.get((level, metric)) if kind == "eval" and len(where) < 2 else None
    if correct is None or not bool(((correct == 0) | (correct == 1)).all()):
        return {}
    bits = np.packbits(correct.bool().numpy())
    return {"outcomes": {"metric": primary, "count": len(correct), "correct": bits.tobytes().hex()}}


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> list[list[int]]:
    """Counts: row true class, column predicted, from labels int64 [M] each."""
    counts: list[list[int]] = (
        torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, -1).tolist()
    )
    return counts


def diagnosis(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """What training's collapse monitor says of the judged features; empty for a healthy encoder."""
    found: dict[str, float] = {}
    for row in rows:
        level = str(row["level"])
        if level == "all" or level.isdigit():
            where = "collapse/" if level == "all" else f"collapse/level_{level}/"
            found |= {f"{where}{name}": float(row[name]) for name in ("std", "rankme") if name in row}
    return CollapseMonitor(config.collapse).update(found) or ""


def checkpoint_points(journal: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Effective rank and k-NN of each probe during training, in the order of images seen."""
    probes: dict[int, dict[str, float]] = {}
    for record in journal:
        for name, short in (("collapse/rankme", "rankme"), ("probe/knn_top1", "knn_top1")):
            if isinstance(record.get(name), int | float):
                probes.setdefault(int(record["images_seen"]), {})[short] = float(record[name])
    return [{"images_seen": seen, **probes[seen]} for seen in sorted(probes) if len(probes[seen]) == 2]
