"""Real training on two nodes behind the fake API server: real ranks, S3, MLflow, and each operator's environment."""

from __future__ import annotations

import base64
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa import steps
from hjepa.adapters.s3 import S3Store
from hjepa.adapters.stack import BUCKET
from tests.fake_apiserver import FakeApiServer
from tests.job_controller import JobController
from tests.test_launcher import KINDS, in_background

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

CONFIG = """
data: {{name: image-folder, root: "{images}", image_size: 32, num_workers: 0, cache_dir: cache}}
model: {{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, num_levels: 2, predictor: {{embed_dim: 16, depth: 1,
        num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{epochs: {epochs}, warmup_epochs: 0, batch_size: 20, device: cpu, use_amp: false}}
checkpoint: {{save_frequency: 1, checkpoint_dir: checkpoints}}
collapse: {{probe_samples: 40, action: warn}}
logging: {{experiment_name: nodes, log_dir: logs}}
storage: {{uri: "{storage}"}}
tracking: {{registered_model: nodes}}
cluster: {{backend: {backend}, nodes: 2, gpus_per_node: 0, cpu: "1", memory: 2Gi, shm: 1Gi, grace_seconds: 20,
          cleanup: keep, env: {{AWS_ENDPOINT_URL: "{s3}", MLFLOW_TRACKING_URI: "{mlflow}"}}}}
"""


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack_environment: dict[str, str]
) -> Iterator[FakeApiServer]:
    labels = {"training": {"pod-security.kubernetes.io/enforce": "restricted"}}
    with FakeApiServer(namespaces=labels) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.chdir(tmp_path)
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        data = {name: base64.b64encode(os.environ[name].encode()).decode() for name in names}
        server.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hjepa-s3"}, "data": data})
        yield server


def prepare(folder: Path, backend: str, epochs: int) -> str:
    """The steps before training, as a pipeline runs them; returns where the run's objects are."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(50):
            pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels // (1 + (label == "b"))).save(folder / "images" / label / f"{i}.png")
    storage = f"s3://{BUCKET}/nodes/{uuid.uuid4().hex}"
    # The pods of this test are processes of this machine: its loopback addresses are theirs.
    servers = {"s3": os.environ["AWS_ENDPOINT_URL"], "mlflow": os.environ["MLFLOW_TRACKING_URI"]}
    text = CONFIG.format(images=folder / "images", storage=storage, epochs=epochs, backend=backend, **servers)
    resolved = str(folder / "resolved.json")
    steps.resolve_config(
        config=text, overrides=[], settings={}, profile="", run="far", job="kfp-1", resolved_path=resolved
    )
    steps.prepare_data(resolved_path=resolved, dataset_path=str(folder / "dataset.json"))
    return storage


def launch(folder: Path) -> dict[str, Any]:
    paths = {key: str(folder / f"{key.removesuffix('_path')}.json") for key in (
        "resolved_path", "dataset_path", "checkpoint_path")}  # fmt: skip
    steps.launch_training(**paths)
    return steps.read_manifest(paths["checkpoint_path"], "checkpoint")


@pytest.mark.parametrize("backend", list(KINDS))
def test_two_nodes__train_and_the_launcher_returns_their_checkpoint(
    server: FakeApiServer, tmp_path: Path, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = prepare(tmp_path, backend, epochs=2)
    with JobController(server, None, tmp_path) as controller:
        checkpoint = launch(tmp_path)
    assert len(controller.pods_made) == 2
    # Two epochs of 90 images in batches of 20 over both nodes.
    assert (checkpoint["images_seen"], checkpoint["step"]) == (180, 9)
    assert checkpoint["uri"].startswith(f"{storage}/runs/far/checkpoints/")
    store = S3Store(storage)
    assert store.get_json("runs/far/steps/train.json")["result"] == checkpoint
    logs = {name[1]: "\n".join(line for _, line in lines) for name, lines in server.logs.items()}
    assert len(logs) == 2
    rank_zero = next(text for name, text in logs.items() if re.search(r"-0(-\w{5})?$", name))
    assert "2 ranks (ddp)" in rank_zero
    assert "images seen" in capfd.readouterr().out  # rank 0's log came through the launcher


@pytest.mark.parametrize("backend", list(KINDS))
def test_two_nodes__one_is_killed_and_training_goes_on_from_the_checkpoint(
    server: FakeApiServer, tmp_path: Path, backend: str
) -> None:
    """The peer of the dead node fails too; the operator starts both again, and they meet at the saved step."""
    storage = prepare(tmp_path, backend, epochs=100)  # long enough for the kill to fall into it
    store = S3Store(storage)
    with JobController(server, None, tmp_path) as controller:
        join = in_background(lambda: launch(tmp_path))
        end = time.monotonic() + 200
        while not (saved := [item.key for item in store.list("runs/far/checkpoints/")]):
            assert time.monotonic() < end
            time.sleep(0.2)
        controller.kill(1)
        saved_step = max(int(key.split("/checkpoints/")[1].split("/")[0]) for key in saved)
        end = time.monotonic() + 200
        checkpoint = None
        while checkpoint is None:
            try:
                checkpoint = join()
            except AssertionError:  # still at work
                assert time.monotonic() < end
    assert (checkpoint["images_seen"], checkpoint["step"]) == (100 * 90, 450)
    text = "\n".join(line for lines in server.logs.values() for _, line in lines)
    resumed = [int(step) for step in re.findall(r"resum\w*[^\n]*?step (\d+)", text)]
    assert resumed, text[-3000:]
    assert min(resumed) >= saved_step, (resumed, saved_step)
