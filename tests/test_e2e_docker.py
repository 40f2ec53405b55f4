"""What is in the images, training in them, and the compiled pipeline with each step in its own; make e2e-docker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import hjepa
from components.images import EVALUATE, PREPARE_DATA, TOOLS, TRAIN
from hjepa.adapters.stack import Stack
from hjepa.config import DataConfig
from hjepa.data.fashion_mnist import check_fashion_mnist
from hjepa.utils.checkpoint import LATEST, read_checkpoint
from tests.docker_pipeline import HARDENED, USER

docker = pytest.importorskip("docker")
pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

PIPELINE = Path(__file__).parents[1] / "pipelines/compiled/pretrain.yaml"
IMAGES = (PREPARE_DATA, TRAIN, EVALUATE, TOOLS)
MB = 10**6
RANKS = 2  # of the training task, as if its pod had two GPUs


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine: {error}")
    missing = [image for image in IMAGES if not client.images.list(image)]
    if missing:
        pytest.fail(f"{', '.join(missing)} not built: run make images first")
    yield client
    client.close()


def inside(engine: Any, image: str, command: list[str], **more: Any) -> str:
    """What a command prints in a hardened container without a network."""
    settings: dict[str, Any] = HARDENED | {"network_mode": "none"} | more
    output: bytes = engine.containers.run(
        image, command[1:], entrypoint=command[0], remove=True, stderr=True, **settings
    )
    return output.decode()


# -- what is in the images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
def test_image__runs_as_any_user_on_a_read_only_root(engine: Any, image: str) -> None:
    assert engine.containers.run(image, ["--version"], remove=True, **HARDENED).decode().split() == [
        "hjepa",
        hjepa.__version__,
    ]
    settings = engine.images.get(image).attrs["Config"]
    assert settings["User"] == "10001:0"
    labels = settings["Labels"]
    assert labels["org.opencontainers.image.version"] == hjepa.__version__
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", labels["org.opencontainers.image.revision"])


@pytest.mark.parametrize("image", IMAGES)
def test_image__holds_no_compiler_no_cache_and_kfp_without_its_dependencies(engine: Any, image: str) -> None:
    found = inside(engine, image, ["sh", "-c", "command -v gcc cc clang make; ls /var/cache/pip ~root/.cache; :"])
    assert not re.search(r"^/", found, re.MULTILINE), found
    code = (
        "import sys, kfp.dsl.executor_main; print(sorted(n for n in sys.modules if n in ('docstring_parser', 'yaml')))"
    )
    assert inside(engine, image, ["python3", "-c", code], environment={"_KFP_RUNTIME": "true"}).strip() == "[]"


def test_tools__are_below_400_mb_and_have_no_torch(engine: Any) -> None:
    assert engine.images.get(TOOLS).attrs["Size"] < 400 * MB
    code = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('torchvision'))"
    assert inside(engine, TOOLS, ["python3", "-c", code]).split() == ["None", "None"]


def test_torch__is_one_layer_of_three_images(engine: Any) -> None:
    layers = [engine.images.get(image).attrs["RootFS"]["Layers"] for image in (PREPARE_DATA, TRAIN, EVALUATE)]
    shared = [layer for layer in layers[0] if all(layer in other for other in layers)]
    own = [set(other) - set(shared) for other in layers]
    assert all(len(rest) <= 1 for rest in own)  # the package itself, at most
    sizes = {image: engine.images.get(image).history() for image in (TRAIN, EVALUATE)}
    largest = {image: max(history, key=lambda layer: layer["Size"])["CreatedBy"] for image, history in sizes.items()}
    assert len(set(largest.values())) == 1


# -- training in a container -----------------------------------------------------------------------------------------

CONFIG = """
data: {name: image-folder, root: /data, image_size: 16, channels: 1, crop_scale: [0.5, 1.0], num_workers: 1,
       cache_dir: /volume/cache, test_fraction: 0.2}
model: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, num_levels: 2, predictor: {embed_dim: 8, depth: 1,
        num_heads: 2}}
masking: {num_targets: 2}
training: {batch_size: 12, epochs: 3000, warmup_epochs: 1, device: cpu}
checkpoint: {save_frequency: 5, checkpoint_dir: /volume/checkpoints}
collapse: {frequency: 100, probe_samples: 32, action: warn}
logging: {log_dir: /volume/logs, log_frequency: 3, tensorboard: {enabled: false}}
evaluation: {knn_k: 3}
"""
STEPS_BETWEEN_CHECKPOINTS = 20  # five epochs of 48 images


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The volumes of a training pod."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "class").mkdir(parents=True)
    for i in range(60):
        pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "class" / f"{i:03d}.png")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "work").mkdir(mode=0o777)
    (tmp_path / "work").chmod(0o777)
    (tmp_path / "termination-log").touch()
    (tmp_path / "termination-log").chmod(0o666)
    return tmp_path


@pytest.fixture
def start(engine: Any, place: Path) -> Iterator[Callable[[int], Any]]:
    """Starts the training pod's container; what is left of it at the end is removed."""
    started = []

    def one(ranks: int) -> Any:
        started.append(_start(engine, place, ranks))
        return started[-1]

    yield one
    for container in started:
        container.remove(force=True)


def _start(engine: Any, place: Path, ranks: int) -> Any:
    def mount(name: str, target: str, read_only: bool) -> Any:
        return docker.types.Mount(target, str(place / name), type="bind", read_only=read_only)

    mounts = [mount("data", "/data", True), mount("config.yaml", "/config.yaml", True), mount("work", "/volume", False)]
    mounts += [mount("termination-log", "/dev/termination-log", False)]
    environment = {"OMP_NUM_THREADS": "1", "HJEPA_PROCESSES": str(ranks)}
    settings: dict[str, Any] = HARDENED | {"network_mode": "none", "mounts": mounts, "environment": environment}
    return engine.containers.run(TRAIN, ["train", "--config", "/config.yaml"], detach=True, **settings)


def said(container: Any) -> str:
    output: bytes = container.logs()
    return output.decode()


def wait_for(container: Any, pattern: str, seconds: float = 180) -> re.Match[str]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := re.search(pattern, said(container)):
            return found
        container.reload()
        assert container.status in {"created", "running"}, said(container)
        time.sleep(0.2)
    pytest.fail(said(container))


def last_step(container: Any) -> int:
    return max(int(step) for step in re.findall(r"step (\d+)/", said(container)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_training__told_to_stop_saves_and_goes_on_there_and_a_kill_costs_little(
    start: Callable[[int], Any], place: Path, ranks: int
) -> None:
    report = []
    first = start(ranks)
    wait_for(first, r"step (6[0-9]|[7-9][0-9]|\d{3,})/")
    begun = time.monotonic()
    first.stop(timeout=60)  # as the kubelet does: SIGTERM, then SIGKILL
    took = time.monotonic() - begun
    message = json.loads((place / "termination-log").read_text())
    assert first.wait()["StatusCode"] == message["rc"] == 143
    told = re.search(r"SIGTERM at step (\d+) of|signal at step (\d+) of", message["reason"])
    assert told is not None, message
    saved = int(told[1] or told[2])
    assert read_checkpoint(place / "work/checkpoints" / LATEST)["step"] == saved
    report.append(f"{ranks} ranks: SIGTERM at step {saved}, ended after {took:.1f} s")

    second = start(ranks)
    resumed = int(wait_for(second, r"resumed from \S+ at step (\d+) of")[1])
    assert resumed == saved
    wait_for(second, rf"step ({saved + 60}|{saved + 6}[1-9]|{saved + 7}\d)/")
    second.kill("SIGKILL")
    assert second.wait()["StatusCode"] == 137
    reached = last_step(second)

    third = start(ranks)
    after_kill = int(wait_for(third, r"resumed from \S+ at step (\d+) of")[1])
    third.kill("SIGKILL")
    # The log shows every third step, and the newest checkpoint may have been on its way to the disk.
    assert saved < after_kill
    assert reached - after_kill <= STEPS_BETWEEN_CHECKPOINTS + 3
    report.append(f"resumed at {resumed}; SIGKILL at step {reached}, resumed at {after_kill}")
    print("; ".join(report))


# -- the pipeline ----------------------------------------------------------------------------------------------------


def test_pipeline__each_step_in_its_image_ends_with_a_registered_model(engine: Any, tmp_path: Path) -> None:
    stack = Stack(tmp_path / "home")
    stack.up()
    try:
        _run_pipeline(stack.environment(), tmp_path)
    finally:
        stack.down()


def _run_pipeline(environment: dict[str, str], folder: Path) -> None:
    from mlflow import MlflowClient

    source = DataConfig(name="fashion-mnist")
    check_fashion_mnist(source)
    images = Path(source.cache_dir).expanduser() / "fashion-mnist"
    root = folder / "pipeline"
    root.mkdir()
    root.chmod(0o777)
    settings = {
        "training.epochs": 1,
        "training.device": "cpu",
        "model.depth": 2,
        "evaluation.train_samples": 2000,
        "evaluation.test_samples": 2000,
    }
    arguments = {
        "config": "demo",
        "overrides": [f"{key}={value}" for key, value in settings.items()],
        "data_root": "/data",
        "registered_model": "in-containers",
        "run": "e2e-docker",
        "gpus": "0",
    }
    request = folder / "request.json"
    request.write_text(
        json.dumps(
            {
                "pipeline": str(PIPELINE),
                "arguments": arguments,
                "root": str(root),
                "environment": environment | {"OMP_NUM_THREADS": "1", "HJEPA_PROCESSES": str(RANKS)},
                "read_only": {str(images): "/data"},
            }
        )
    )
    begun = time.monotonic()
    command = [sys.executable, "-m", "tests.docker_pipeline", str(request)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]

    assert f"training with {RANKS} processes on this node" in done.stdout
    ran = set(re.findall(r"Found image '([^']+)'", done.stdout))
    executors = next(yaml.safe_load_all(PIPELINE.read_text()))["deploymentSpec"]["executors"]
    assert ran == {executor["container"]["image"] for executor in executors.values()} == set(IMAGES)
    written = [path for path in root.rglob("*") if path.is_file()]
    assert written
    assert {path.stat().st_uid for path in written} == {USER}

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias("in-containers", "champion")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/knn_top1"] > 0.5
    assert run.data.tags["hjepa.code_version"].startswith(f"{hjepa.__version__}+")
    score, code = run.data.metrics["eval/knn_top1"], run.data.tags["hjepa.code_version"]
    print(
        f"pipeline: {time.monotonic() - begun:.0f} s, version {version.version} is champion, k-NN {score:.3f}, {code}"
    )
