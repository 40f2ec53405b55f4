"""`hjepa job`: manifests without a server, and jobs in a cluster that speaks the Kubernetes API."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_apiserver import FakeApiServer

from hjepa import steps
from hjepa.adapters.cluster import launcher, pytorchjob, trainjob
from hjepa.adapters.cluster.spec import SPEC_HASH, job_name
from hjepa.cli import _arguments, build_parser, compiled_pipeline
from hjepa.config import load_config
from hjepa.errors import UserError


@pytest.fixture(autouse=True)
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server of this machine, nor of another test of this process, belongs to a job."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "KUBECONFIG"))]:
        monkeypatch.delenv(name)


def hjepa(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hjepa.cli", "job", *arguments]
    return subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


def rendered(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    done = hjepa(tmp_path, "render", *arguments)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize(
    ("backend", "kinds"), [("pytorchjob", ["PyTorchJob"]), ("trainjob", ["TrainingRuntime", "TrainJob"])]
)
def test_render__is_what_the_launcher_would_send(tmp_path: Path, backend: str, kinds: list[str]) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("cluster: {nodes: 3, gpus_per_node: 8, registry: registry.example.com/team}\n", "utf-8")
    settings = ["--run", "mine", "--profile", str(profile), "--set", "storage.uri=s3://bucket/team"]
    manifests = rendered(tmp_path, "--backend", backend, *settings)
    assert [manifest["kind"] for manifest in manifests] == kinds
    assert {manifest["metadata"]["name"] for manifest in manifests} == {job_name("mine")}
    overrides = [*steps.profile_settings(str(profile)), "storage.uri=s3://bucket/team", f"cluster.backend={backend}"]
    run = steps.Run("mine", load_config("default", overrides), "", "")
    module = {"pytorchjob": pytorchjob, "trainjob": trainjob}[backend]
    assert manifests == module.render(steps.training_job(run))
    text = json.dumps(manifests)
    assert '"--run-uri", "s3://bucket/team/runs/mine"' in text
    assert "registry.example.com/team/hjepa-train:" in text


def test_render__auto_is_no_manifest(tmp_path: Path) -> None:
    done = hjepa(tmp_path, "render", "--run", "mine")
    assert done.returncode == 2
    assert "--backend trainjob or --backend pytorchjob" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "cluster.nodes=0"], "cluster.nodes: got 0"),
        (["--set", "cluster.memory=64Gigs"], "cluster.memory"),
        (["--run", "Not A Name"], "--run Not A Name"),
        (["--profile", "missing.yaml"], "missing.yaml"),
    ],
)
def test_render__mistakes_are_users_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = hjepa(tmp_path, "render", "--backend", "trainjob", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_training_job__other_sections_are_refused() -> None:
    run = steps.Run("mine", load_config(), "", "")
    with pytest.raises(UserError, match="section cluster alone"):
        steps.training_job(run, ["training.epochs=50"])


def test_training_job__is_the_same_for_every_try_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another KFP run of the same name adopts the job, so nothing of the KFP run may be in it."""
    config = load_config()
    first = steps.training_job(steps.Run("mine", config, "m", "http://mlflow", job="kfp-1"))
    second = steps.training_job(steps.Run("mine", config, "m", "http://mlflow", job="kfp-2"))
    assert (
        pytorchjob.render(first)[0]["metadata"]["annotations"][SPEC_HASH]
        == (pytorchjob.render(second)[0]["metadata"]["annotations"][SPEC_HASH])
    )


def test_training_job__forwards_the_mlflow_run_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    spec = steps.training_job(steps.Run("mine", load_config(), "run-of-kfp", "http://mlflow:5000"))
    assert spec.env["MLFLOW_RUN_ID"] == "run-of-kfp"
    assert spec.env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert spec.env["MLFLOW_EXPERIMENT_ID"] == "7"
    assert "secret" not in json.dumps(dict(spec.env))


@pytest.mark.parametrize(
    ("name", "label"), [("a.b_c-1", "a.b_c-1"), ("run 1/x", "run-1-x"), ("x" * 62 + "--", "x" * 62), ("_a_", "a")]
)
def test_label_value__is_one(name: str, label: str) -> None:
    assert steps.label_value(name) == label


# -- with a cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Any:
    with FakeApiServer() as server:
        yield server, str(server.write_kubeconfig(tmp_path / "kubeconfig"))


def apply(server: FakeApiServer, tmp_path: Path, *arguments: str) -> str:
    for manifest in rendered(tmp_path, *arguments):
        server.create(manifest)
    return str(manifest["metadata"]["name"])


@pytest.mark.parametrize("backend", list(launcher.BACKENDS))
def test_cancel__deletes_the_job_and_what_came_with_it(kubeconfig: Any, tmp_path: Path, backend: str) -> None:
    server, path = kubeconfig
    apply(server, tmp_path, "--backend", backend, "--run", "mine")
    kind = launcher.BACKENDS[backend].module.KIND
    assert len(server.find(kind)) == 1
    done = hjepa(tmp_path, "cancel", "--run", "mine", KUBECONFIG=path)
    assert done.returncode == 0, done.stderr
    assert server.find(kind) == server.find("TrainingRuntime") == []
    again = hjepa(tmp_path, "cancel", "--run", "mine", KUBECONFIG=path)
    assert again.returncode == 2
    assert f"there is no job {job_name('mine')}" in again.stderr


POD = {
    "pytorchjob": ("training.kubeflow.org/job-name", "training.kubeflow.org/replica-index", "pytorch"),
    "trainjob": ("jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-completion-index", "node"),
}


def make_pod(server: FakeApiServer, backend: str, job: str, index: int) -> str:
    of_job, of_index, container = POD[backend]
    name = f"{job}-{index}"
    labels = {of_job: job, of_index: str(index), "jobset.sigs.k8s.io/replicatedjob-name": "node"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": container, "image": "x"}]},
    }
    server.create(pod)
    server.log(name, f"I am node {index}", container=container)
    server.log(name, "second line", container=container)
    server.set_status("Pod", name, {"phase": "Succeeded"})
    return name


@pytest.mark.parametrize("backend", list(launcher.BACKENDS))
@pytest.mark.parametrize("follow", [[], ["--follow"]], ids=["once", "follow"])
def test_logs__are_those_of_the_first_node(kubeconfig: Any, tmp_path: Path, backend: str, follow: list[str]) -> None:
    server, path = kubeconfig
    job = apply(server, tmp_path, "--backend", backend, "--run", "mine")
    none_yet = hjepa(tmp_path, "logs", "--run", "mine", KUBECONFIG=path)
    assert none_yet.returncode == 2
    assert "has no pod yet" in none_yet.stderr
    for index in (1, 0):
        make_pod(server, backend, job, index)
    done = hjepa(tmp_path, "logs", "--run", "mine", *follow, KUBECONFIG=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["I am node 0", "second line"]


def test_logs__of_no_job_is_a_users_mistake(kubeconfig: Any, tmp_path: Path) -> None:
    done = hjepa(tmp_path, "logs", "--run", "mine", KUBECONFIG=kubeconfig[1])
    assert done.returncode == 2
    assert f"there is no job {job_name('mine')} in namespace training" in done.stderr


# -- what docs/CLUSTER.md says ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "CLUSTER.md").read_text("utf-8")


def told(program: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return [line[1:] for line in words]


@pytest.mark.parametrize("command", told("hjepa"), ids=" ".join)
def test_guide__command_parses_and_its_settings_hold(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = build_parser().parse_args(command)
    profile = steps.profile_settings(str(options.profile)) if getattr(options, "profile", None) else []
    load_config(getattr(options, "config", "default"), [*profile, *getattr(options, "set", [])])
    if hasattr(options, "parameters"):
        _arguments(options, compiled_pipeline(options.pipeline))


def test_guide__paths_exist() -> None:
    named = set(re.findall(r"(?:manifests|pipelines|docs)/[\w./-]+\w", GUIDE))
    assert {path for path in named if not (ROOT / path).exists()} == set()
    assert {path.name for path in (ROOT / "pipelines" / "profiles").iterdir()} == {
        Path(path).name for path in named if "/profiles/" in path
    }
