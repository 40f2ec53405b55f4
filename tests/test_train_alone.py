"""``hjepa train`` on its own: real processes, killed at random moments, without S3, MLflow or a pipeline."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.config import load_config
from hjepa.errors import UserError
from hjepa.training import train_alone
from hjepa.utils.checkpoint import LATEST, read_checkpoint

CONFIG = """
data: {{name: image-folder, root: {root}, image_size: 16, channels: 1, crop_scale: [0.5, 1.0], num_workers: 1,
       cache_dir: {folder}/cache, test_fraction: 0.2}}
model: {{patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, num_levels: 2, predictor: {{embed_dim: 8, depth: 1,
        num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{batch_size: 12, epochs: 15, warmup_epochs: 2, device: cpu, weight_decay_end: 0.4}}
checkpoint: {{save_frequency: 1, checkpoint_dir: {folder}/checkpoints}}
collapse: {{frequency: 5, probe_samples: 32, action: warn}}
logging: {{log_dir: {folder}/logs, log_frequency: 3, tensorboard: {{enabled: false}}}}
evaluation: {{knn_k: 3}}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty grey images in two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(80):
        folder = root / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 128, (20, 24), dtype=np.uint8)
        pixels[:, : 12 + i % 2 * 8] += 100
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "hjepa", "train", "--config", str(config), *arguments]


def environment() -> dict[str, str]:
    """Without anything that leads to a server."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def configure(folder: Path, images: Path) -> Path:
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=folder, root=images))
    return path


def finish(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(config, *arguments),
        env=environment(),
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def journal(folder: Path) -> dict[tuple[int, str], float]:
    """Everything logged but speeds, by (images seen, name); a value that was logged twice must be the same twice."""
    found: dict[tuple[int, str], float] = {}
    for line in (folder / "logs" / "hjepa" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("images_seen")
        for name, value in record.items():
            if not name.startswith(("perf/", "system/")):
                assert found.setdefault((step, name), value) == value, (step, name)
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_train__alone_needs_no_server_and_says_where_everything_is(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = configure(folder, images)
    done = finish(config, "--set", "training.epochs=3")
    assert "1 rank, 1 thread: 16 steps of 12 images, 2 levels" in done.stdout
    assert "done: step 16, 192 images seen" in done.stdout
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "cache", "checkpoints", "logs"}
    content = read_checkpoint(folder / "checkpoints" / LATEST)
    assert content["metrics"].keys() >= {"val/loss", "probe/knn_top1", "collapse/level_1/rankme"}
    again = finish(config, "--set", "training.epochs=3")
    assert "resumed from" in again.stdout
    assert "at step 16 of 16" in again.stdout


def test_train__a_missing_checkpoint_and_a_missing_gpu_are_users_mistakes(images: Path, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", images)
    wrong = [["--resume", str(tmp_path / "none.pth")]]
    wrong += [] if torch.cuda.is_available() else [["--device", "cuda:1"]]
    for arguments in wrong:
        done = subprocess.run(
            command(config, *arguments), env=environment(), capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


def test_train__a_missing_checkpoint_is_said_before_any_image_is_prepared(images: Path, tmp_path: Path) -> None:
    settings = load_config(str(configure(tmp_path / "run", images)))
    with pytest.raises(UserError, match=r"no checkpoint at .*none\.pth"):
        train_alone(settings, resume=tmp_path / "none.pth")
    assert not (tmp_path / "run" / "cache").exists()


def test_sigterm__saves_the_state_exits_with_143_and_the_same_command_goes_on(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = configure(folder, images)
    # Nothing else saves before the end, and the end is far: what is found afterwards is what the signal saved.
    settings = ["--set", "checkpoint.save_frequency=1000", "--set", "training.epochs=400"]
    lines = folder / "logs" / "hjepa" / "metrics.jsonl"
    with subprocess.Popen(
        command(config, *settings), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not lines.exists() or len(lines.read_text().splitlines()) < 3:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    told = re.search(r"error: SIGTERM at step (\d+) of 2134: the state is saved, the run can be resumed", said)
    assert told, said
    assert "Traceback" not in said
    content = read_checkpoint(folder / "checkpoints" / LATEST)
    step = int(told[1])
    assert content["step"] == step >= 3
    # A shorter run would be another one; this one is told to stop once more.
    with subprocess.Popen(
        command(config, *settings), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as again:
        assert again.stdout is not None
        shown = next(line for line in again.stdout if line.startswith("resumed from"))
        assert shown.endswith(f"{LATEST} at step {step} of 2134\n")
        next(line for line in again.stdout if line.startswith("epoch "))
        again.send_signal(signal.SIGTERM)
        again.communicate(timeout=60)
    assert again.returncode == 143
    assert read_checkpoint(folder / "checkpoints" / LATEST)["step"] > step


def test_resume__after_three_sigkills_equals_the_uninterrupted_run_bit_for_bit(images: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(configure(straight, images))
    config = configure(killed, images)
    lines = killed / "logs" / "hjepa" / "metrics.jsonl"
    latest = killed / "checkpoints" / LATEST
    moments = sorted(random.Random(time.time_ns()).sample(range(2, 26), 3))
    print("killed at lines", moments)  # shown when the test fails
    for moment in moments:
        # Checkpoints are written beside the training: the first kills may come before any, the last one may not.
        needs_checkpoint = moment == moments[-1]
        with subprocess.Popen(
            command(config), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            deadline = time.monotonic() + 120
            while (
                not lines.exists()
                or len(lines.read_text().splitlines()) < moment
                or (needs_checkpoint and not latest.exists())
            ):
                assert process.poll() is None, process.stdout.read() if process.stdout else ""
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
    done = finish(config)
    assert "resumed from" in done.stdout
    a, b = (read_checkpoint(folder / "checkpoints" / LATEST) for folder in (straight, killed))
    assert a["step"] == b["step"] == 80  # ceil(15 * 64 / 12)
    for part in ("model", "optimizer", "scaler", "ranking"):
        assert equal(a[part], b[part]), part
    for content in (a, b):
        content["metrics"] = {
            name: value for name, value in content["metrics"].items() if not name.startswith(("perf/", "system/"))
        }
    assert a["metrics"] == b["metrics"]
    assert journal(straight) == journal(killed)
    schedules = {name for _, name in journal(straight) if name.startswith("optim/")}
    assert schedules >= {"optim/lr", "optim/ema_momentum", "optim/weight_decay"}
