"""The ablation of the hierarchy: equal budgets, whole schedules, intervals, and a smoke run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import quality
from hjepa.data import create_dataloaders


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a hundred grey images in two classes instead of Fashion-MNIST."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(100):
        folder = root / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 128, (16, 16), dtype=np.uint8)
        pixels[:, : 6 + i % 2 * 6] += 100
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    settings = {"name": "image-folder", "root": root, "cache_dir": root / "cache", "test_fraction": 0.3}
    return [f"data.{key}={value}" for key, value in settings.items()]


@pytest.fixture
def plan(images: list[str]) -> quality.Plan:
    return quality.Plan((*quality.SMOKE, *images), (1, 2), "sigreg", budget=0.1, seeds=2, rounds=2, round_steps=2)


def arguments(images: list[str], folder: Path) -> list[str]:
    sets = [part for override in images for part in ("--set", override)]
    return ["--smoke", "--runs", str(folder / "runs.jsonl"), "--output", str(folder), *sets]


def test_smoke__trains_all_settings_once_and_writes_the_table(images: list[str], tmp_path: Path) -> None:
    quality.main(arguments(images, tmp_path))
    result = json.loads((tmp_path / "quality.json").read_text())
    names = ["I-JEPA", "I-JEPA, sigreg", "H-JEPA, 2 levels", "H-JEPA, 2 levels, sigreg"]
    names += ["H-JEPA, 3 levels", "H-JEPA, 3 levels, sigreg", quality.RANDOM]
    assert [row["setting"] for row in result["table"]] == names
    for row in result["table"]:
        assert len(row["step_seconds"]) == 2
        assert list(row["accuracy"]) == ["mean", "0", "1", "2", "all 1", "all 2", "all 3"]
        assert (row["images_seen"], row["skipped_steps"]) == (row["steps"] * 16, 0)
        assert all(0 <= found["linear_top1"]["mean"] <= 1 for found in row["accuracy"].values())
    for row in result["table"][:-1]:  # the file has five digits of the seconds
        assert row["steps"] * row["seconds_per_step"] == pytest.approx(0.1, abs=0.501 * row["seconds_per_step"])
    assert result["table"][-1]["steps"] == 0
    text = (tmp_path / "quality.md").read_text()
    assert all(f"| {name} |" in text for name in names)
    assert all(finding in text for finding in result["findings"])

    kept = (tmp_path / "runs.jsonl").read_text()
    # As a kill leaves it: one run's line is cut short, and that run is made again, alone.
    (tmp_path / "runs.jsonl").write_text(kept[:-100])
    quality.main(arguments(images, tmp_path))
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert lines[:-1] == kept.splitlines()[:-1]
    again, before = json.loads(lines[-1]), json.loads(kept.splitlines()[-1])
    assert (again["setting"], again["seed"], again["correct"]) == (before["setting"], before["seed"], before["correct"])


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_make_trainer__schedules_end_with_the_last_step(plan: quality.Plan, steps: int, tmp_path: Path) -> None:
    config = plan.config(plan.settings[-1], folder=str(tmp_path))
    loader, _ = create_dataloaders(config)
    trainer = quality.make_trainer(config, loader, steps)
    assert trainer.total_steps == steps
    last = trainer.schedules(steps - 1)
    assert last.lr == pytest.approx(config.training.min_lr)
    assert last.momentum == pytest.approx(config.model.ema.momentum_end)
    assert steps == 1 or trainer.schedules(steps - 2).lr > config.training.min_lr


def test_advance__moves_the_target_encoder_and_counts_its_steps_only(plan: quality.Plan, tmp_path: Path) -> None:
    config = plan.config(plan.settings[0], folder=str(tmp_path))
    loader, _ = create_dataloaders(config)
    trainer = quality.make_trainer(config, loader, 4)
    before = trainer.core.target_encoder.patch_embed.weight.clone()
    assert quality.advance(trainer, 0, 0) == (0, 0, 0)
    assert torch.equal(before, trainer.core.target_encoder.patch_embed.weight)
    spent = quality.advance(trainer, 0, 4)
    assert spent.cpu > 0
    assert not torch.equal(before, trainer.core.target_encoder.patch_embed.weight)


def test_plan__equal_settings_share_runs_and_others_do_not(plan: quality.Plan, images: list[str]) -> None:
    more_seeds = quality.Plan(plan.overrides, plan.levels, "sigreg", budget=0.1, seeds=5, rounds=2, round_steps=2)
    other_budget = quality.Plan(plan.overrides, plan.levels, "sigreg", budget=0.2, seeds=2, rounds=2, round_steps=2)
    assert plan.key == more_seeds.key != other_budget.key


def test_interval__is_students() -> None:
    mean, half = quality.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert quality.interval([5.0]) == (5.0, math.inf)


def record(setting: str, seed: int, correct: np.ndarray) -> quality.Record:
    text = np.packbits(correct).tobytes().hex()
    found = {"all 1": {"linear_top1": text}}
    return {"setting": setting, "seed": seed, "test_images": len(correct), "correct": found}


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([100, 104, 98], quality.BETTER),
        ([-100, -104, -98], quality.WORSE),
        ([100, -60, 20], quality.EVEN),  # the seeds disagree
        ([2, 2, 2], quality.EVEN),  # the seeds agree, the test images are too few
    ],
)
def test_difference__counts_outside_the_noise_of_seeds_and_of_test_images(gains: list[int], verdict: str) -> None:
    """Of 1001 images 500 are right; a setting gains some of the others, or loses some of those."""
    runs = []
    for seed, gain in enumerate(gains):
        base = np.arange(1001) < 500
        changed = base.copy()
        changed[500 : 500 + max(gain, 0)] = True
        changed[: max(-gain, 0)] = False
        # With as many images changed for the better as for the worse, noise of the test images and nothing else.
        changed[900:920], changed[400:420] = True, False
        runs += [record("a", seed, changed), record("b", seed, base)]
    found = quality.Outcomes(runs).difference(("a", "all 1", "linear_top1"), ("b", "all 1", "linear_top1"))
    assert found["difference"] == pytest.approx(sum(gains) / 3 / 1001)
    assert found["verdict"] == verdict
