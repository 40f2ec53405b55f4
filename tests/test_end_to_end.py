"""The compiled pipeline on this machine, through the command line: real servers, real images, real kills."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

from hjepa.adapters.stack import Stack
from hjepa.utils.checkpoint import LATEST, read_checkpoint

CONFIG = """
data: {{name: image-folder, root: "{root}", image_size: 32, crop_scale: [0.5, 1.0], horizontal_flip: true,
       num_workers: 0, cache_dir: "{home}/cache"}}
model: {{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, num_levels: 2, ema: {{momentum: 0.9}},
        predictor: {{embed_dim: 16, depth: 1, num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{epochs: 40, warmup_epochs: 1, batch_size: 20, device: cpu}}
checkpoint: {{save_frequency: 2, keep_best_n: 1, checkpoint_dir: "{home}/checkpoints"}}
collapse: {{probe_samples: 60, frequency: 4, action: warn}}
logging: {{experiment_name: end-to-end, log_dir: "{home}/logs", log_frequency: 5}}
evaluation: {{batch_size: 64}}
tracking: {{registered_model: shapes}}
"""
SHAPES = ("circle", "square", "line")


pytestmark = pytest.mark.timeout(900)  # several pipelines and servers, on whatever machine this is


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 JPEG drawings of three shapes, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        (root / shape).mkdir()
        for i in range(100):
            width, height = (int(v) for v in rng.integers(40, 80, 2))
            image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
            draw, colour = ImageDraw.Draw(image), tuple(int(v) for v in rng.integers(120, 256, 3))
            box = (8, 8, width - 8, height - 8)
            if shape == "circle":
                draw.ellipse(box, fill=colour)
            elif shape == "square":
                draw.rectangle(box, outline=colour, width=4)
            else:
                draw.line(box, fill=colour, width=5)
            image.save(root / shape / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def home(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    (home / "shapes.yaml").write_text(CONFIG.format(root=images, home=home), "utf-8")
    yield home
    Stack(home).down()


def command(home: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "hjepa.cli",
        "run",
        "--home",
        str(home),
        "--config",
        str(home / "shapes.yaml"),
        *arguments,
    ]


def run(home: Path, *arguments: str) -> str:
    done = subprocess.run(command(home, *arguments), capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_until(home: Path, marker: str, number: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a run, send ``number`` when a line with ``marker`` appears, and wait for the end."""
    process = subprocess.Popen(
        command(home, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if marker in line:
            os.kill(process.pid, number)
            break
    else:
        pytest.fail("".join(seen))
    process.stdout.read()
    process.wait(timeout=60)
    return process


def of_home(home: Path) -> list[psutil.Process]:
    """Every living process that knows this home."""
    found = []
    for process in psutil.process_iter():
        try:
            mentions = str(home) in " ".join(process.cmdline()) or str(home) in " ".join(process.environ().values())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if mentions and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def steps_of(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"^\[train\] epoch \S+ +step (\d+)/", output, re.M)]


def test_pipeline__survives_a_kill_compares_runs_and_gives_a_usable_model(home: Path, images: Path) -> None:
    # 1. SIGKILL in the middle of training, then the same command again.
    killed = run_until(home, "step 300/", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any("executor_main" in " ".join(p.cmdline()) for p in of_home(home)):
        assert time.monotonic() < deadline, "the training step outlived its killed parent"
        time.sleep(0.2)
    first = run(home, "--keep-stack")
    assert "prepare_data: already done" in first
    assert "0 bytes uploaded" in first
    resumed = re.search(r"resumed from \S+ at step (\d+) of 540", first)
    assert resumed, first
    assert 250 <= int(resumed[1]) <= 330
    assert min(steps_of(first)) > int(resumed[1])
    assert max(steps_of(first)) == 540
    assert re.search(r"shapes version 1 @ champion", first)

    # 2. One changed setting: the data set is used again, a second row, and a decision with its reason.
    second = run(home, "--set", "training.epochs=2", "--set", "collapse.frequency=1")
    assert "0 bytes uploaded" in second
    assert re.search(r"shapes version 2 @ (champion|challenger)", second)

    stack = Stack(home)
    environment = {**os.environ, **stack.environment()}
    uri = environment["MLFLOW_TRACKING_URI"]
    client = mlflow.MlflowClient(uri, registry_uri=uri)  # other tests of this process may have named another
    experiment = client.get_experiment_by_name("end-to-end")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert len(client.search_model_versions("name='shapes'")) == 2
    values = {run.info.run_id: run.data.metrics["eval/linear_top1"] for run in runs}
    versions = {v.version: values[v.run_id] for v in client.search_model_versions("name='shapes'")}
    champion = client.get_model_version_by_alias("shapes", "champion").version
    expected = "2" if versions[max(versions, key=int)] > versions[min(versions, key=int)] + 0.005 else "1"
    assert str(champion) == expected
    for finished in runs:
        assert finished.info.status == "FINISHED"
        assert finished.data.tags["hjepa.dataset_digest"] == runs[0].data.tags["hjepa.dataset_digest"]
        history = client.get_metric_history(finished.info.run_id, "train/loss")
        assert [m.step for m in history] == sorted({m.step for m in history}), "images seen, each once"

    # 3. A fresh process with only the package: the registered model embeds as evaluation did.
    script = """
import json, sys, numpy as np, mlflow, torch, hjepa
from pathlib import Path
from PIL import Image
files = sorted(Path(sys.argv[1]).glob("*/00?.jpg"))
images = [np.asarray(Image.open(f).convert("RGB").resize((48, 48))) for f in files]
encoder = hjepa.load_encoder("models:/shapes@champion")
assert isinstance(encoder, torch.nn.Module)
pyfunc = mlflow.pyfunc.load_model("models:/shapes@champion")
batch = np.stack(images)
worst = 0.0
for level in ("all", "0", "1"):
    theirs = np.asarray(pyfunc.predict(batch, params={"level": level}))
    ours = encoder.embed_images(torch.from_numpy(batch).permute(0, 3, 1, 2), level if level == "all" else int(level))
    assert theirs.shape == tuple(ours.shape)
    worst = max(worst, float(np.abs(theirs - ours.numpy()).max()))
print(json.dumps({"worst": worst, "pickles": sorted(m for m in sys.modules if m in {"cloudpickle.loads"})}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(images)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["worst"] < 1e-5

    # 4. Down means down.
    down = subprocess.run(
        [sys.executable, "-m", "hjepa.cli", "stack", "down", "--home", str(home)], capture_output=True, check=False
    )
    assert down.returncode == 0
    assert of_home(home) == []


def test_ctrl_c__saves_the_state_and_leaves_nothing_running(home: Path) -> None:
    stopped = run_until(home, "step 100/", signal.SIGINT, "--run", "interrupted")
    assert stopped.returncode == 130
    assert of_home(home) == []
    (latest,) = (home / "checkpoints").glob(f"interrupted-*/{LATEST}")
    assert read_checkpoint(latest)["step"] >= 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=fashon-mnist"], "Did you mean fashion-mnist"),
        (["data.root=/nowhere"], "/nowhere"),
        (["training.lr=fast", "model.depht=3"], "2 mistakes"),
    ],
)
def test_mistake__is_told_before_any_server_starts(home: Path, overrides: list[str], message: str) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(command(home, *arguments), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting" not in done.stdout


def test_one_home__takes_one_run_at_a_time(home: Path) -> None:
    with (home / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command(home), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "another run" in done.stderr
