"""A retry of KFP's after training ended with 13: there is nothing to gain."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from PIL import Image

from hjepa import steps
from hjepa.adapters.stack import BUCKET
from hjepa.errors import FutileRetryError, HjepaError

CONFIG = """
data: {{name: image-folder, root: "{images}", image_size: 32, num_workers: 0}}
model: {{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, predictor: {{embed_dim: 16, depth: 1, num_heads: 2}}}}
training: {{epochs: 2, warmup_epochs: 0, batch_size: 20, device: cpu}}
logging: {{experiment_name: retries}}
storage: {{uri: "{storage}"}}
tracking: {{registered_model: retries}}
cluster: {{backend: pytorchjob, gpus_per_node: 0, env: {{AWS_ENDPOINT_URL: "{s3}", MLFLOW_TRACKING_URI: "{mlflow}"}}}}
"""


def test_retry__of_the_same_pipeline_run_ends_as_the_try_before_and_takes_no_gpu(
    stack_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    for shade in range(50):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / "images" / "a" / f"{shade}.png")
    paths = {kind: str(tmp_path / f"{kind}.json") for kind in ("resolved", "dataset", "checkpoint")}
    text = CONFIG.format(
        images=tmp_path / "images",
        storage=f"s3://{BUCKET}/retries/{uuid.uuid4().hex}",
        s3=stack_environment["AWS_ENDPOINT_URL"],
        mlflow=stack_environment["MLFLOW_TRACKING_URI"],
    )

    def resolve(job: str) -> steps.Run:
        steps.resolve_config(config=text, overrides=[], settings={}, run="r", job=job, resolved_path=paths["resolved"])
        return steps.Run.read(paths["resolved"])

    def launch() -> None:
        steps.launch_training(**{f"{kind}_path": path for kind, path in paths.items()})

    dataset = {"schema": steps.SCHEMA, "name": "a", "digest": "0" * 64}
    Path(paths["dataset"]).write_text(json.dumps(dataset), "utf-8")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    run = resolve("kfp-1")
    verdict = {"step": "launch_training", "message": "level 1 collapsed", "exit_code": 13, "job": "kfp-1"}
    run.store.put_json(run.key(steps.ERROR), verdict)
    for _ in range(2):
        with pytest.raises(FutileRetryError, match=r"^level 1 collapsed$"):
            launch()
    # Started again by a person, it is another pipeline run, and goes on to ask the cluster.
    resolve("kfp-2")
    with pytest.raises(HjepaError, match="no cluster"):
        launch()
