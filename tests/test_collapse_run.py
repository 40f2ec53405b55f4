"""A run that is made to collapse, on real images: the loss falls and falls, and training stops itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hjepa.config import load_config
from hjepa.data import create_dataloaders
from hjepa.errors import FutileRetryError
from hjepa.trainers import HJEPATrainer
from hjepa.training import build_trainer, make_probe
from hjepa.utils import MetricsLogger
from hjepa.utils.checkpoint import LATEST, read_checkpoint

CONFIG = """
data: {{name: image-folder, root: {root}, image_size: 16, channels: 1, crop_scale: [1.0, 1.0], num_workers: 0,
       cache_dir: {folder}/cache}}
model: {{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, num_levels: 2, ema: {{momentum: 0.97}},
        predictor: {{embed_dim: 16, depth: 1, num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{batch_size: 32, epochs: 20, warmup_epochs: 1, lr: 3e-3, device: cpu}}
checkpoint: {{checkpoint_dir: {folder}/{name}}}
collapse: {{frequency: 10, patience: 1, probe_samples: 128}}
logging: {{log_frequency: 8, log_dir: {folder}/logs, picture_frequency: 0, tensorboard: {{enabled: false}}}}
"""
COLLAPSING = ["model.ema.momentum=0", "model.ema.momentum_end=0", "model.stop_gradient=false"]
INTERVAL = 10 * 8  # steps between measurements: ten epochs of 230 training images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 grey drawings: discs, boxes and stripes of any place, size and shade."""
    root = tmp_path_factory.mktemp("drawings")
    rng = np.random.default_rng(0)
    for i in range(256):
        image = Image.new("L", (16, 16), int(rng.integers(0, 80)))
        pen, shade = ImageDraw.Draw(image), int(rng.integers(120, 256))
        x, y, size = (int(n) for n in (*rng.integers(0, 9, 2), rng.integers(4, 10)))
        if i % 3 == 0:
            pen.ellipse((x, y, x + size, y + size), fill=shade)
        elif i % 3 == 1:
            pen.rectangle((x, y, x + size, y + size), fill=shade)
        else:
            for start in range(x - 16, 32, size):
                pen.line((start, 0, start + y, 15), fill=shade, width=2)
        image.save(root / f"{i:03d}.png")
    return root


class Recorder:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.measured: list[Mapping[str, float]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])
        if "collapse/std" in metrics:
            self.measured.append(metrics)


def build(images: Path, folder: Path, name: str, *overrides: str) -> tuple[HJEPATrainer, Recorder]:
    config = load_config(CONFIG.format(root=images, folder=folder, name=name), overrides)
    loader, _ = create_dataloaders(config)
    recorder = Recorder()
    trainer = build_trainer(
        config,
        loader,
        device="cpu",
        resume=None,
        logger=MetricsLogger(name, folder, use_tensorboard=False, sinks=[recorder]),
        probe=make_probe(config, loader.dataset, loader.dataset.manifest, labelled=False),
    )
    return trainer, recorder


def test_collapse__is_stopped_at_the_first_measurement_while_the_loss_still_falls(images: Path, tmp_path: Path) -> None:
    trainer, recorder = build(images, tmp_path, "collapsing", *COLLAPSING)
    with pytest.raises(FutileRetryError) as raised:
        trainer.train()
    assert raised.value.exit_code == 13
    assert "of level 0 the standard deviation across images" in str(raised.value)
    assert "of level 1 the standard deviation across images" in str(raised.value)
    assert len(recorder.measured) == 1
    assert trainer.step == pytest.approx(INTERVAL, abs=10)
    assert trainer.step < trainer.total_steps / 2 + 1
    assert recorder.losses == sorted(recorder.losses, reverse=True), "the loss shows nothing but progress"
    assert recorder.losses[-1] < recorder.losses[0] / 100
    # What collapsed is kept, to be looked at, and a retry does not train on from it.
    assert read_checkpoint(tmp_path / "collapsing" / LATEST)["state"]["strikes"] == 1
    again, recorder = build(images, tmp_path, "collapsing", *COLLAPSING)
    again.resume_checkpoint = "auto"
    with pytest.raises(FutileRetryError):
        again.train()
    assert recorder.losses == []


def test_collapse__is_not_found_in_a_healthy_run_with_the_same_settings(images: Path, tmp_path: Path) -> None:
    trainer, recorder = build(images, tmp_path, "healthy")
    assert trainer.train().step == trainer.total_steps
    assert len(recorder.measured) == 2
    for measured in recorder.measured:
        assert all(measured[f"collapse/level_{level}/std"] > 0.1 for level in (0, 1))
    assert recorder.losses[-1] < recorder.losses[0]
