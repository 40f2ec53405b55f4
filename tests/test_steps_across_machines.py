"""Steps by hand on machines that share S3 and MLflow and nothing else: each home is one machine."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa import steps
from hjepa.adapters.cluster import launcher, pytorchjob
from hjepa.adapters.s3 import S3Store
from hjepa.adapters.stack import BUCKET
from hjepa.config import load_config, sha256_json
from hjepa.errors import UserError
from tests.fake_apiserver import FakeApiServer
from tests.job_controller import JobController

pytestmark = pytest.mark.timeout(600)

CONFIG = """
data: {{name: image-folder, root: "{images}", image_size: 32, num_workers: 0, cache_dir: cache}}
model: {{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, num_levels: 2, predictor: {{embed_dim: 16, depth: 1,
        num_heads: 2}}}}
masking: {{num_targets: 2}}
training: {{epochs: 2, warmup_epochs: 0, batch_size: 20, device: cpu, use_amp: false}}
checkpoint: {{save_frequency: 1, checkpoint_dir: checkpoints}}
collapse: {{probe_samples: 40, action: warn}}
logging: {{experiment_name: machines, log_dir: logs}}
storage: {{uri: "{storage}"}}
tracking: {{registered_model: machines}}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(50):
            pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels // (1 + (label == "b"))).save(root / label / f"{i}.png")
    return root


@pytest.fixture
def storage(stack_environment: dict[str, str]) -> str:
    return f"s3://{BUCKET}/machines/{uuid.uuid4().hex}"


def hjepa(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    machine.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "hjepa.cli", *arguments, "--home", str(machine / "home")]
    return subprocess.run(command, cwd=machine, capture_output=True, text=True, check=False, timeout=240)


def inside() -> list[str]:
    """Settings that say outright: the pods of these tests are processes here, so servers of this machine are theirs."""
    return [f"cluster.env.{name}={os.environ[name]}" for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI")]


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def manifest(machine: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((machine / "home" / "runs" / "far" / f"{kind}.json").read_text("utf-8"))
    return found


def test_steps__each_on_another_machine_make_one_run(images: Path, storage: str, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.mkdir()
    config = first / "config.yaml"
    config.write_text(CONFIG.format(images=images, storage=storage), "utf-8")
    run_uri = f"{storage}/runs/far"
    done(hjepa(first, "prepare-data", "--config", str(config), "--run", "far"))

    # The second machine has neither the configuration nor the images: only the address of the run.
    said = done(hjepa(second, "train", "--run-uri", run_uri, "--device", "cpu"))
    assert "180 images seen" in said  # 100 images, a tenth held out, 2 epochs
    assert manifest(second, "resolved") == manifest(first, "resolved")
    assert manifest(second, "checkpoint")["uri"].startswith(run_uri)

    # The third goes on where the second stopped; the first, by name, then finds what it never had.
    done(hjepa(third, "export", "--run-uri", run_uri))
    done(hjepa(first, "evaluate", "--config", str(config), "--run", "far"))
    assert manifest(first, "evaluation")["model_digest"] == manifest(third, "model")["digest"]
    store = S3Store(storage)
    report_of = first / "report.html"
    store.download("runs/far/report.html", report_of)
    told = report_of.read_text("utf-8")
    assert "Error of level 1 by position" in told
    assert "what the context encoder sees" in told.casefold()
    runs = {manifest(machine, "resolved")["run"]["mlflow_run_id"] for machine in (first, second, third)}
    assert len(runs) == 1

    # Trained already: a second pod of the same job takes the recorded result instead of training again.
    again = done(hjepa(third, "train", "--run-uri", run_uri))
    assert "already done for run far" in again
    kinds = {Path(item.key).stem for item in store.list("runs/far/manifests/")}
    assert kinds == {"resolved", "dataset", "checkpoint", "model", "evaluation"}

    # The export outlives its checkpoint: what only that could show is left out, and the page says why.
    scores = manifest(first, "evaluation")["metrics"]
    gone = manifest(second, "checkpoint")["uri"]
    store.delete(store.key_of(gone))
    store.delete("runs/far/steps/evaluate.json")
    done(hjepa(first, "evaluate", "--config", str(config), "--run", "far"))
    assert manifest(first, "evaluation")["metrics"] == scores
    store.download("runs/far/report.html", report_of)
    told = report_of.read_text("utf-8")
    assert f"the checkpoint {gone} is gone" in told
    assert "No errors by position" in told
    assert "Mask examples" in told


def test_cluster__a_changed_section_takes_effect_and_is_the_same_run(
    images: Path, storage: str, tmp_path: Path
) -> None:
    machine = tmp_path / "one"
    machine.mkdir()
    config = machine / "config.yaml"
    config.write_text(CONFIG.format(images=images, storage=storage), "utf-8")
    profile = machine / "profile.yaml"
    profile.write_text("cluster: {nodes: 2, memory: 32Gi}\n", "utf-8")
    settings = ["resolve-config", "--config", str(config), "--run", "far"]
    done(hjepa(machine, *settings))
    before = manifest(machine, "resolved")
    assert before["config"]["cluster"]["nodes"] == 1
    done(hjepa(machine, *settings, "--profile", str(profile), "--set", "cluster.nodes=3"))
    after = manifest(machine, "resolved")
    assert (after["config"]["cluster"]["nodes"], after["config"]["cluster"]["memory"]) == (3, "32Gi")
    assert after["config_digest"] == before["config_digest"]
    assert after["run"]["mlflow_run_id"] == before["run"]["mlflow_run_id"]


def test_run_uri__of_no_run_is_a_users_mistake(storage: str, tmp_path: Path) -> None:
    missing = hjepa(tmp_path / "m", "train", "--run-uri", f"{storage}/runs/nobody")
    assert missing.returncode == 2
    assert f"{storage}/runs/nobody/manifests/resolved.json does not exist" in missing.stderr


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/runs/", "s3://bucket/runs/a/b", "bucket/runs/a"])
def test_split_run_uri__refuses(uri: str) -> None:
    with pytest.raises(UserError, match=r"expected s3://"):
        steps.split_run_uri(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/runs/a", "s3://bucket/a/runs/b/runs/c/"])
def test_split_run_uri__is_the_inverse_of_the_runs_own(uri: str) -> None:
    store, name = steps.split_run_uri(uri)
    assert store.uri(f"runs/{name}") == uri.rstrip("/")


def test_profile__mistakes_are_told_as_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("cluster: {cpu: eight, nodez: 3}", "utf-8")
    with pytest.raises(UserError, match=r"(?s)mine\.yaml: 2 mistakes.*cluster\.cpu.*such as 500m.*Did you mean"):
        steps.profile_settings(str(path))


def test_profile__settings_are_those_of_its_section() -> None:
    source = (
        "cluster:\n  nodes: 4\n  node_selector: {gpu: 'true'}\n  tolerations: [{key: a, value: b, operator: Equal}]\n"
    )
    config = load_config("default", [*steps.profile_settings(source), "cluster.nodes=5"])
    assert config.cluster.nodes == 5
    assert config.cluster.node_selector == {"gpu": "true"}
    assert [(item.key, item.value) for item in config.cluster.tolerations] == [("a", "b")]
    assert sha256_json(load_config().model_dump(mode="json", exclude={"cluster"})) == config.digest


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("cluster: {image: 2024-01-01}", "image", "2024-01-01"),
        ("cluster: {env: {DAY: 2024-01-01}}", "env", {"DAY": "2024-01-01"}),
    ],
)
def test_profile__a_date_is_a_text_as_it_is_in_a_configuration(text: str, key: str, value: Any) -> None:
    for config in (load_config("default", steps.profile_settings(text)), load_config(text)):
        assert getattr(config.cluster, key) == value


@pytest.mark.parametrize("text", ["training: {epochs: 1}\n", "- a\n", "cluster: 3\n", "cluster: [\n"])
def test_profile__refuses_what_is_none(text: str) -> None:
    with pytest.raises(UserError, match="profile"):
        steps.profile_settings(text)


# -- a job, and the report -------------------------------------------------------------------------------------------


def test_job_submit__local_backend_trains_in_ranks_of_its_own(images: Path, storage: str, tmp_path: Path) -> None:
    machine = tmp_path / "one"
    machine.mkdir()
    config = machine / "config.yaml"
    config.write_text(CONFIG.format(images=images, storage=storage), "utf-8")
    run = ["--config", str(config), "--run", "far"]
    done(hjepa(machine, "prepare-data", *run))
    ranks = ["--set", "cluster.processes_per_node=2", "--set", "cluster.gpus_per_node=0"]
    said = done(hjepa(machine, "job", "submit", *run, *ranks, "--backend", "local"))
    assert "2 ranks" in said
    record = S3Store(storage).get_json("runs/far/steps/train.json")
    assert record["result"] == manifest(machine, "checkpoint")
    assert manifest(machine, "checkpoint")["images_seen"] == 180
    again = done(hjepa(machine, "job", "submit", *run, *ranks, "--backend", "local"))
    assert "already done for run far" in again


@pytest.fixture
def failed_run(images: Path, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of ``report`` for a run whose training step failed, as it does inside a KFP task."""
    monkeypatch.chdir(tmp_path)
    text = CONFIG.format(images=images, storage=storage)
    where = {"config": text, "overrides": [], "settings": {}, "profile": "", "run": "far", "job": "kfp-1"}
    steps.resolve_config(**where, resolved_path=str(tmp_path / "resolved.json"))
    monkeypatch.setenv("_KFP_RUNTIME", "true")
    with pytest.raises(SystemExit) as ended:
        steps.launch_training(
            resolved_path=str(tmp_path / "resolved.json"),
            dataset_path=str(tmp_path / "never-made.json"),
            checkpoint_path=str(tmp_path / "checkpoint.json"),
        )
    assert ended.value.code == 2
    monkeypatch.delenv("_KFP_RUNTIME")
    return where


def report(where: dict[str, Any], folder: Path, **how: str) -> str:
    path = folder / "summary.md"
    steps.report(
        **where, **{"state": "FAILED", "message": "Task exit-handler-1 failed.", **how}, summary_path=str(path)
    )
    return path.read_text("utf-8")


def mlflow_run(folder: Path) -> Any:
    run = steps.Run.read(folder / "resolved.json")
    return run.tracker.client.get_run(run.mlflow_run_id)


def test_report__names_step_and_cause_in_the_summary_and_in_mlflow(failed_run: dict[str, Any], tmp_path: Path) -> None:
    text = report(failed_run, tmp_path)
    assert text.startswith("run far: failed in launch_training: cannot read the dataset manifest")
    found = mlflow_run(tmp_path)
    assert found.info.status == "FAILED"
    assert found.data.tags["hjepa.failed_step"] == "launch_training"
    assert "never-made.json" in found.data.tags["hjepa.failure"]

    # The next try of this run opens it again; what failed before is no longer said.
    steps.resolve_config(**{**failed_run, "job": "kfp-2"}, resolved_path=str(tmp_path / "resolved.json"))
    found = mlflow_run(tmp_path)
    assert (found.info.status, found.data.tags["hjepa.failure"]) == ("RUNNING", "")
    assert report({**failed_run, "job": "kfp-2"}, tmp_path) == "run far: failed: Task exit-handler-1 failed.\n"


def test_report__of_a_try_that_never_opened_the_run_does_not_tell_of_an_older_one(
    failed_run: dict[str, Any], tmp_path: Path
) -> None:
    later = {**failed_run, "job": "kfp-2"}
    assert "its first step, before the run was opened: its log has the reason" in report(later, tmp_path)
    assert "training.lr" in report({**later, "overrides": ["training.lr=fast"]}, tmp_path)


def test_report__success_changes_nothing(failed_run: dict[str, Any], tmp_path: Path) -> None:
    before = mlflow_run(tmp_path).to_dictionary()
    assert report(failed_run, tmp_path, state="SUCCEEDED", message="") == "run far: succeeded\n"
    assert mlflow_run(tmp_path).to_dictionary() == before


def test_report__stops_the_job_that_a_killed_launcher_left(
    failed_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = steps.Run.read(tmp_path / "resolved.json")
    spec = steps.training_job(run, inside())
    with FakeApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        server.create(pytorchjob.render(spec)[0])
        run.store.put_json(run.key(steps.JOB), {"name": spec.name, "namespace": None})
        report(failed_run, tmp_path)
        assert server.find("PyTorchJob") == []
        # One that has ended is kept: its log and events are what is left to look at.
        server.create(pytorchjob.render(spec)[0])
        ended = {"conditions": [{"type": "Failed", "status": "True", "reason": "PyTorchJobFailed", "message": "x"}]}
        server.set_status("PyTorchJob", spec.name, ended)
        report(failed_run, tmp_path)
        assert len(server.find("PyTorchJob")) == 1
        # And a cluster that does not answer does not take the cause away.
    assert "cannot read the dataset manifest" in report(failed_run, tmp_path)


def test_report__without_s3_still_stops_the_job_and_passes_on_what_kfp_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    gone = ["storage.endpoint_url=http://127.0.0.1:9", "cluster.namespace=training"]
    where = {"config": "demo", "overrides": gone, "settings": {}, "profile": "", "run": "far", "job": "kfp-1"}
    job = steps.training_job(steps.Run("far", load_config("demo", ["cluster.backend=local"]), "", ""))
    with FakeApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        server.create(pytorchjob.render(job)[0])
        text = report(where, tmp_path)
        assert server.find("PyTorchJob") == []
    assert text.startswith("run far: failed: S3 cannot be asked: ")
    assert "127.0.0.1:9" in text
    assert text.endswith("KFP says: Task exit-handler-1 failed.\n")


def test_report__names_a_run_that_can_have_no_such_name(tmp_path: Path) -> None:
    where = {"config": "demo", "overrides": [], "settings": {}, "profile": "", "run": "a/b", "job": "kfp-1"}
    assert "failed in resolve_config: run a/b: expected lower-case" in report(where, tmp_path)


def test_resolve_config__takes_the_mlflow_run_of_the_platform_and_links_to_the_kfp_run(
    images: Path, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    given = client.create_run(client.create_experiment(f"of-kfp-{uuid.uuid4().hex}")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    monkeypatch.chdir(tmp_path)
    opened = steps.resolve_config(
        config=CONFIG.format(images=images, storage=storage),
        overrides=[],
        settings={"cluster.nodes": "4", "tracking.champion_margin": "0.02"},
        profile="cluster: {nodes: 2, gpus_per_node: 8}",
        run="far",
        job="kfp-1",
        pipeline_ui="https://kubeflow.example.com/pipeline/",
        resolved_path=str(tmp_path / "resolved.json"),
    )
    assert opened["mlflow_run_id"] == given
    tags = client.get_run(given).data.tags
    url = "https://kubeflow.example.com/pipeline/#/runs/details/kfp-1"
    assert (tags["hjepa.kfp_run_id"], tags["hjepa.kfp_run_url"]) == ("kfp-1", url)
    assert url in tags["mlflow.note.content"]
    run = steps.Run.read(tmp_path / "resolved.json")
    assert (run.config.cluster.nodes, run.config.cluster.gpus_per_node) == (4, 8)
    assert run.config.tracking.champion_margin == 0.02
    # The job's pods get the same run, and may be told another address of the same server.
    assert steps.training_job(run, inside()).env["MLFLOW_RUN_ID"] == given
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.inside:5000")
    assert steps.Run.read(tmp_path / "resolved.json").tracking_uri == "http://mlflow.inside:5000"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_job_submit__two_nodes_train_behind_an_api_server_and_their_checkpoint_comes_back(
    images: Path, storage: str, tmp_path: Path, stack_environment: dict[str, str], backend: str
) -> None:
    machine = tmp_path / "launcher"
    machine.mkdir()
    config = machine / "config.yaml"
    config.write_text(CONFIG.format(images=images, storage=storage), "utf-8")
    pods = tmp_path / "pods"
    pods.mkdir()
    settings = ["cluster.nodes=2", "cluster.gpus_per_node=0", f"cluster.env={{HJEPA_HOME: {pods}/home}}"]
    settings += inside()
    run = ["--config", str(config), "--run", "far", *(part for item in settings for part in ("--set", item))]
    done(hjepa(machine, "prepare-data", *run))
    keys = {key: stack_environment[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hjepa-s3"}, "data": encoded}
    with (
        FakeApiServer() as server,
        JobController(server, lives=None, folder=pods) as controller,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        server.create(secret)
        said = done(hjepa(machine, "job", "submit", *run, "--backend", backend))
        assert len(controller.pods_made) == 2
        assert "2 ranks" in said  # the first pod's log comes through
        assert server.find(launcher.BACKENDS[backend].module.KIND) == []  # it succeeded, and is cleaned up
    record = S3Store(storage).get_json("runs/far/steps/train.json")
    assert record["result"] == manifest(machine, "checkpoint")
    assert manifest(machine, "checkpoint")["images_seen"] == 180
    # Once more: nothing is launched.
    assert "already done for run far" in done(hjepa(machine, "job", "submit", *run, "--backend", backend))


@pytest.mark.slow
def test_run__the_distributed_pipeline_runs_here_from_the_same_yaml(images: Path, tmp_path: Path) -> None:
    machine = tmp_path / "one"
    machine.mkdir()
    config = machine / "config.yaml"
    config.write_text(CONFIG.format(images=images, storage="s3://hjepa"), "utf-8")
    ranks = ["--set", "cluster.processes_per_node=2", "--set", "cluster.gpus_per_node=0"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        said = done(hjepa(machine, "run", "--config", str(config), "--pipeline", "pretrain-distributed", *ranks))
    assert "[launch-training] job hjepa-" in said
    assert "2 ranks" in said
    assert "champion" in said
    assert re.search(r"\[report\] run config-\w+: succeeded", said)
