"""`hjepa job`: manifests without a server, and jobs in a cluster that speaks the Kubernetes API."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_apiserver import FakeApiServer

from hjepa import steps
from hjepa.adapters.cluster import jobs, launcher, pytorchjob, trainjob
from hjepa.adapters.cluster.spec import SPEC_HASH, job_name
from hjepa.cli import _arguments, _check_run_uri, build_parser, compiled_pipeline, main
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


@contextmanager
def signals_kept() -> Iterator[None]:
    """Around the command line in this process, which sets handlers of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


@pytest.mark.parametrize("backend", list(launcher.BACKENDS))
def test_logs__follow_from_before_the_first_pod_to_the_end_of_the_job(
    kubeconfig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Through an image that is pulled for long, a container that starts again in its pod, and the pod's successor."""
    server, path = kubeconfig
    name = apply(server, tmp_path, "--backend", backend, "--run", "mine")
    monkeypatch.setenv("KUBECONFIG", path)
    monkeypatch.setattr(jobs, "_LONGEST_PAUSE_SECONDS", 0.05)
    of_job, of_index, container = POD[backend]
    labels = {of_job: name, of_index: "0", "jobset.sigs.k8s.io/replicatedjob-name": "node"}

    def pod(number: int, phase: str, *said: str, **state: Any) -> None:
        metadata = {"name": f"{name}-{number}", "labels": labels}
        if not [item for item in server.find("Pod") if item["metadata"]["name"] == metadata["name"]]:
            body = {"containers": [{"name": container, "image": "x"}]}
            server.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": body})
        for line in said:
            server.log(metadata["name"], line, container=container)
        statuses = [{"name": container, "state": state}]
        server.set_status("Pod", metadata["name"], {"phase": phase, "containerStatuses": statuses})

    def asked(resource: str) -> int:
        return sum(request.resource == resource for request in server.requests)

    heard: list[str] = []
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(lambda: heard.extend(jobs.log(name, follow=True)) or "ended")
        try:
            server.wait_for(lambda: asked("pods") > 3)
            pod(0, "Pending", waiting={"reason": "ContainerCreating"})
            server.wait_for(lambda: asked("pods/log") > 8)  # each answered with 400
            pod(0, "Running", "one", running={})
            server.wait_for(lambda: heard == ["one"])
            pod(0, "Failed", terminated={"exitCode": 1})
            before = asked("pods/log")
            server.wait_for(lambda: asked("pods/log") > before + 1)
            pod(0, "Running", "two", running={})
            server.wait_for(lambda: heard == ["one", "two"])
            server.delete("Pod", f"{name}-0", force=True)
            pod(1, "Running", "three", running={})
            server.wait_for(lambda: heard[2:] == ["three"])
            assert not ended.done()
            pod(1, "Failed", "the end", terminated={"exitCode": 1})
        finally:
            kind = launcher.BACKENDS[backend].module.KIND
            failed = {"type": "Failed", "status": "True", "reason": "x", "message": "y"}
            server.set_status(kind, name, {"conditions": [failed]})
        assert ended.result(timeout=20) == "ended"
    assert heard == ["one", "two", "three", "the end"]


def test_logs__follow_ends_with_a_job_that_is_cleaned_up(
    kubeconfig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, path = kubeconfig
    name = apply(server, tmp_path, "--backend", "trainjob", "--run", "mine")
    monkeypatch.setenv("KUBECONFIG", path)
    monkeypatch.setattr(jobs, "_LONGEST_PAUSE_SECONDS", 0.05)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(lambda: list(jobs.log(name, follow=True)))
        server.wait_for(lambda: sum(request.resource == "pods" for request in server.requests) > 1)
        server.delete("TrainJob", name, force=True)
        assert ended.result(timeout=20) == []


# -- beside --run-uri ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["train", "export", "job render", "job submit", "job logs", "job cancel"])
@pytest.mark.parametrize(
    "beside", [["--config", "default"], ["--run", "other"], ["--set", "training.lr=9"], ["--profile", "p.yaml"]]
)
def test_run_uri__refuses_what_it_would_ignore(
    step: str, beside: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = ["--run-uri", "s3://bucket/runs/mine"]
    if step.startswith("job") and beside[0] == "--profile":
        _check_run_uri(build_parser().parse_args([*step.split(), *uri, *beside, "--set", "cluster.nodes=2"]))
        return
    with signals_kept():
        assert main([*step.split(), *uri, *beside]) == 2
    assert f"error: {beside[0]}" in (said := capfd.readouterr().err)
    assert "beside --run-uri" in said


def test_run_uri__a_step_takes_no_other_cluster_either() -> None:
    options = ["--run-uri", "s3://bucket/runs/mine", "--set", "cluster.nodes=2"]
    with pytest.raises(UserError, match=r"--set cluster\.nodes=2 beside --run-uri"):
        _check_run_uri(build_parser().parse_args(["evaluate", *options]))
    _check_run_uri(build_parser().parse_args(["train", *options[:2], "--resume", "auto", "--device", "cpu"]))


# -- addresses of this machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["http://localhost:8333", "http://127.0.0.1:8333", "http://[::1]:8333", "https://s3.localhost", "http://0.0.0.0:1"],
)
def test_training_job__servers_of_this_machine_are_none_in_a_pod(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    for backend in ("auto", *launcher.BACKENDS):
        with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL is .*cluster\.env: \{AWS_ENDPOINT_URL: "):
            steps.training_job(steps.Run("mine", config, "", ""), [f"cluster.backend={backend}"])
    run = steps.Run("mine", config, "", "")
    assert steps.training_job(run, ["cluster.backend=local"]).env["AWS_ENDPOINT_URL"] == address
    # The user's own words: the address inside, or this one, for a server that every pod has beside it.
    for said in ("http://hjepa-s3:8333", address):
        job = steps.training_job(run, [f"cluster.env={{AWS_ENDPOINT_URL: '{said}'}}"])
        assert job.env["AWS_ENDPOINT_URL"] == said
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is "):
        steps.training_job(steps.Run("mine", config, "m", address))


def test_training_job__an_address_in_the_configuration_outranks_the_pods_variable() -> None:
    config = load_config("default", ["storage.endpoint_url=http://localhost:8333"])
    with pytest.raises(UserError, match=r"storage\.endpoint_url is .*leave storage\.endpoint_url null"):
        steps.training_job(steps.Run("mine", config, "", ""), ["cluster.env={AWS_ENDPOINT_URL: 'http://inside:1'}"])


def test_render__server_of_this_machine_is_a_users_mistake(tmp_path: Path) -> None:
    done = hjepa(tmp_path, "render", "--backend", "trainjob", "--run", "r1", AWS_ENDPOINT_URL="http://localhost:8333")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cluster.env" in done.stderr


# -- names, and a look at a cluster that is none ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "x" * 300, "Not A Name", "-a"])
def test_run_name__of_a_pipeline_is_judged_before_any_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected lower-case letters, digits"):
        steps.resolve_config(
            config="demo", overrides=[], settings={}, run=name, resolved_path=str(tmp_path / "resolved.json")
        )
    assert not (tmp_path / "resolved.json").exists()


@pytest.mark.parametrize("option", [["--pod"], ["--endpoint", "http://localhost:8080"]])
def test_doctor__options_of_a_cluster_need_one(option: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with signals_kept():
        assert main(["doctor", *option]) == 2
    assert f"{option[0]}: this is a look at a cluster; add --cluster" in capfd.readouterr().err


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
