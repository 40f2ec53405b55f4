"""A sweep through the command line: three settings under kfp.local, one comparison, one decision of the gate."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image, ImageDraw

from hjepa.adapters.stack import Stack

pytestmark = pytest.mark.timeout(900)

CONFIG = """
data: {{name: image-folder, root: "{root}", image_size: 32, num_workers: 0, cache_dir: "{home}/cache"}}
model: {{patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2, num_levels: 1, ema: {{momentum: 0.9}},
        predictor: {{embed_dim: 8, depth: 1, num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{epochs: 2, warmup_epochs: 0, batch_size: 20, device: cpu}}
checkpoint: {{checkpoint_dir: "{home}/checkpoints"}}
collapse: {{probe_samples: 40, frequency: 4, action: warn}}
logging: {{experiment_name: sweep, log_dir: "{home}/logs", log_frequency: 2, tensorboard: {{enabled: false}}}}
evaluation: {{batch_size: 64, seeds: [0], bootstrap_resamples: 100, attentive_epochs: 1, linear_iterations: 10}}
export: {{formats: []}}
tracking: {{registered_model: swept}}
"""
SETS = """
plain: []
fast: [training.lr=5e-3]
deep: [model.depth=2, model.num_levels=2]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a configuration, three settings, and 120 drawings of two shapes."""
    home = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)
    for shape in ("circle", "square"):
        (home / "images" / shape).mkdir(parents=True)
        for i in range(60):
            image = Image.fromarray(rng.integers(0, 90, (40, 40, 3), dtype=np.uint8))
            draw, colour = ImageDraw.Draw(image), tuple(int(v) for v in rng.integers(120, 256, 3))
            (draw.ellipse if shape == "circle" else draw.rectangle)((8, 8, 32, 32), fill=colour)
            image.save(home / "images" / shape / f"{i:03d}.png")
    (home / "shapes.yaml").write_text(CONFIG.format(root=home / "images", home=home), "utf-8")
    (home / "sets.yaml").write_text(SETS, "utf-8")
    yield home
    Stack(home).down()


def command(home: Path, *arguments: str) -> list[str]:
    program = [sys.executable, "-m", "hjepa.cli", "run", "--home", str(home), "--config", str(home / "shapes.yaml")]
    return [*program, *arguments]


def hjepa(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(home, *arguments), capture_output=True, text=True, check=False, timeout=600, stdin=subprocess.DEVNULL
    )


def artifact(home: Path, step: str, output: str) -> Any:
    (path,) = (home / "runs" / "lr").glob(f"artifacts/*/{step}/{output}")
    return path.read_text("utf-8")


def test_sweep__three_settings_meet_in_one_report_and_one_decision(home: Path) -> None:
    done = hjepa(home, "--sweep", str(home / "sets.yaml"), "--run", "lr", "--keep-stack")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Every branch trained, and each in a log of its own; the images were prepared once.
    for name in ("plain", "fast", "deep"):
        assert f"[{name}.train] done in" in done.stdout
        assert "checkpoint: step" in (home / "runs" / "lr" / "logs" / f"{name}.train.log").read_text("utf-8")
    assert done.stdout.count("prepare-data] done in") == 1
    assert done.stdout.count("register-model] done in") == 1

    comparison = json.loads(artifact(home, "compare-branches", "comparison"))
    rows = {row["name"]: row for row in comparison["branches"]}
    assert list(rows) == ["plain", "fast", "deep"]
    assert comparison["best"] == max(rows, key=lambda name: (not rows[name]["obstacle"], rows[name]["value"]))
    assert rows["deep"]["settings"] == {
        "model.depth": "2",
        "model.num_levels": "2",
        "training.lr": rows["plain"]["settings"]["training.lr"],
    }
    page = artifact(home, "compare-branches", "report")
    assert all(name in page for name in rows)

    server = Stack(home).environment()["MLFLOW_TRACKING_URI"]
    client = MlflowClient(server, registry_uri=server)
    (version,) = client.search_model_versions("name = 'swept'")
    winner = client.get_run(comparison["mlflow_runs"][comparison["best"]])
    assert version.run_id == winner.info.run_id
    assert client.get_model_version_by_alias("swept", "champion").version == version.version
    parent = winner.data.tags["mlflow.parentRunId"]
    for name, run_id in comparison["mlflow_runs"].items():
        run = client.get_run(run_id)
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"lr-{name}"
        assert run.data.metrics["eval/linear_top1"] == pytest.approx(rows[name]["value"])
        assert run.inputs.dataset_inputs
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_run(parent).data.tags["hjepa.best_branch"] == comparison["best"]

    # The same command finds everything done, and decides nothing anew.
    again = hjepa(home, "--sweep", str(home / "sets.yaml"), "--run", "lr")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert again.stdout.count("train: already done for run") == 3
    assert (
        json.loads(sorted((home / "runs" / "lr").glob("artifacts/*/compare-branches/comparison"))[-1].read_text())[
            "best"
        ]
        == comparison["best"]
    )

    # Other settings for a branch that has trained are refused before anything is prepared or trained.
    (home / "other.yaml").write_text(SETS.replace("5e-3", "6e-3").replace("depth=2", "depth=3"), "utf-8")
    refused = hjepa(home, "--sweep", str(home / "other.yaml"), "--run", "lr")
    assert refused.returncode == 2
    assert "prepare-data] started" not in refused.stdout
    for words in ("run lr-fast was trained", "training.lr: 0.005 there, 0.006 here", "run lr-deep was trained"):
        assert words in refused.stderr, refused.stderr
    assert "lr-plain was" not in refused.stderr
    # Nor may one that has trained be left out, and a plain run take the sweep's name.
    (home / "fewer.yaml").write_text("plain: []\nnew: [seed=3]\n", "utf-8")
    fewer = hjepa(home, "--sweep", str(home / "fewer.yaml"), "--run", "lr")
    assert fewer.returncode == 2
    for name in ("lr-fast", "lr-deep"):
        assert f"run {name} is a branch that has trained, and is not among them" in fewer.stderr
    plain = hjepa(home, "--run", "lr")
    assert plain.returncode == 2
    assert "run lr is a sweep" in plain.stderr


def test_sweep__mistakes_in_all_sets_are_told_before_any_server_starts(home: Path) -> None:
    (home / "bad.yaml").write_text(
        "lr: [training.lr=-1]\nseed: [training.sed=1]\nother: [data.name=cifar10]\nsame: []\ntoo: []\n", "utf-8"
    )
    done = hjepa(home, "--sweep", str(home / "bad.yaml"))
    assert done.returncode == 2
    for words in ("training.lr", "training.sed", "data.name", "same configuration"):
        assert words in done.stderr, words
    assert "Traceback" not in done.stderr
    assert "S3 server" not in done.stdout


@pytest.mark.slow
def test_sweep__a_branch_that_fails_is_named_and_the_others_are_kept(home: Path) -> None:
    where = f"checkpoint.checkpoint_dir={home}/shapes.yaml/below-a-file"
    (home / "one-bad.yaml").write_text(f"bad: [{where}]\ngood: [training.lr=5e-3]\n", "utf-8")
    failed = hjepa(home, "--sweep", str(home / "one-bad.yaml"), "--run", "mended")
    assert failed.returncode == 2
    assert "train of mended-bad" in failed.stdout
    assert "[good.evaluate] done in" in failed.stdout
    assert "compare-branches] started" not in failed.stdout
    # Mended, the same sweep goes on with what is there.
    (home / "one-bad.yaml").write_text("bad: [training.lr=2e-3]\ngood: [training.lr=5e-3]\n", "utf-8")
    mended = hjepa(home, "--sweep", str(home / "one-bad.yaml"), "--run", "mended")
    assert mended.returncode == 0, mended.stdout[-3000:] + mended.stderr[-3000:]
    assert mended.stdout.count("train: already done for run") == 1
    assert "is the best of 2" in mended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_sweep__stopped_in_a_branch_begins_no_other_and_its_rows_do_not_run_for_ever(
    home: Path, number: signal.Signals, code: int
) -> None:
    name = f"stopped-{code}"
    long = ["--sweep", str(home / "sets.yaml"), "--run", name, "--set", "training.epochs=100000", "--keep-stack"]
    process = subprocess.Popen(command(home, *long), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if line.startswith("[plain.train] epoch"):
            process.send_signal(number)
            break
    seen.append(process.stdout.read())
    output = "".join(seen)
    assert process.wait(timeout=60) == code, output
    assert "[plain.train] stopped after" in output
    assert "the state is saved" in output
    assert "FAILED" not in output
    assert "failed" not in output
    assert "[fast." not in output

    server = Stack(home).environment()["MLFLOW_TRACKING_URI"]
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("sweep")
    rows = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert rows[name] == rows[f"{name}-plain"] == "KILLED"
    assert f"{name}-fast" not in rows
