"""`hjepa doctor --cluster` against a server that speaks the Kubernetes API: a remedy for every failing row."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_apiserver import FakeApiServer, pod_security_violations
from fake_kfp_server import FakeKfpServer

from hjepa.adapters.cluster import client, doctor
from hjepa.adapters.cluster.doctor import Row
from hjepa.config import load_config
from hjepa.errors import HjepaError, UserError

SETTINGS = ["cluster.gpus_per_node=8", "cluster.nodes=2", "storage.endpoint_url=http://s3:9000"]
S3 = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


def node(name: str, *, gpus: int = 8, taints: tuple[dict[str, str], ...] = (), **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": "H100", **labels}},
        "spec": {"taints": list(taints)},
        "status": {"allocatable": {"cpu": "95500m", "memory": "1000Gi", "nvidia.com/gpu": str(gpus)}},
    }


def secret(name: str, values: dict[str, str]) -> dict[str, Any]:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def account(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}


def fill(server: FakeApiServer) -> None:
    """Everything that a job of SETTINGS needs."""
    gpu = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    for manifest in (node("gpu-0", taints=(gpu,)), node("gpu-1"), node("small", gpus=0)):
        server.create(manifest)
    server.create(secret("hjepa-s3", S3))
    server.create(account("hjepa-train"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApiServer]:
    with FakeApiServer(namespaces={"training": {"pod-security.kubernetes.io/enforce": "restricted"}}) as server:
        fill(server)
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        yield server


def rows(*settings: str, **how: Any) -> dict[str, Row]:
    found = doctor.check(load_config("default", [*SETTINGS, *settings]), **how)
    assert all(row.remedy for row in found if row.ok is False), "a failing row without a remedy"
    return {row.name: row for row in found}


def test_check__of_a_cluster_that_has_everything(server: FakeApiServer) -> None:
    found = rows()
    assert {name for name, row in found.items() if row.ok is not True} == {"secret MLflow"}
    assert "Kubernetes v1.33.0" in found["API server"].detail
    assert found["namespace"].detail == "training, Pod Security restricted"
    assert found["nodes"].detail.startswith("2 of 3 fit (H100); wanted 2 with 8 x nvidia.com/gpu")
    assert found["secret S3"].detail == "hjepa-s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    changed = {request.verb for request in server.requests} - {"get", "list"}
    assert changed <= {"create"}  # of access reviews alone
    assert all(request.resource.endswith("accessreviews") for request in server.requests if request.verb == "create")


Break = Callable[[FakeApiServer], object]


@pytest.mark.parametrize(
    ("broken", "settings", "row", "detail", "remedy"),
    [
        (
            lambda s: s.delete("ServiceAccount", "hjepa-train"),
            (),
            "service account",
            "no service account",
            "manifests/overlays/accounts with its namespace set to training",
        ),
        (lambda s: s.delete("Secret", "hjepa-s3"), (), "secret S3", "no Secret 'hjepa-s3'", "create secret generic"),
        (
            lambda s: (s.delete("Secret", "hjepa-s3"), s.create(secret("hjepa-s3", {"AWS_ACCESS_KEY_ID": "a"}))),
            (),
            "secret S3",
            "lacks AWS_SECRET_ACCESS_KEY; it has AWS_ACCESS_KEY_ID",
            "--from-literal=AWS_SECRET_ACCESS_KEY=...",
        ),
        (
            lambda s: s.create(secret("hjepa-mlflow", {"MLFLOW_TRACKING_USERNAME": "u"})),
            (),
            "secret MLflow",
            "lacks MLFLOW_TRACKING_PASSWORD",
            "create secret",
        ),
        (
            lambda s: s.deny("create", "trainer.kubeflow.org", "trainjobs"),
            (),
            "rights",
            "may not create trainjobs.trainer.kubeflow.org in training",
            "Role",
        ),
        (
            lambda s: s.deny("get", "", "pods/log"),
            (),
            "rights",
            "may not get pods/log in training",
            "manifests/overlays/accounts with its namespace set to training, and bind its Role",
        ),
        (
            lambda s: s.deny("patch", "kubeflow.org", "pytorchjobs"),
            (),
            "rights",
            "may not patch pytorchjobs.kubeflow.org in training",
            "Role",
        ),
        (
            lambda s: None,
            ("cluster.gpus_per_node=16",),
            "nodes",
            "gpu-1: 8 nvidia.com/gpu of 16",
            "cluster.gpus_per_node",
        ),
        (lambda s: None, ("cluster.nodes=3",), "nodes", "small: 0 nvidia.com/gpu of 8", "cluster.nodes"),
        (
            lambda s: None,
            ("cluster.tolerations=[]",),
            "nodes",
            "taint nvidia.com/gpu=present:NoSchedule",
            "tolerations",
        ),
        (lambda s: None, ("cluster.node_selector={zone: a}",), "nodes", "label zone=none, not a", "node_selector"),
        (lambda s: None, ("cluster.memory=2Ti",), "nodes", "1000Gi memory of 2Ti", "cluster.memory"),
        (lambda s: None, ("cluster.namespace=elsewhere",), "namespace", "no namespace 'elsewhere'", "create namespace"),
        (lambda s: None, ("cluster.queue=fast",), "queue", "no LocalQueue 'fast'", "cluster.queue"),
        (
            lambda s: None,
            ("cluster.priority_class=high",),
            "priority class",
            "no PriorityClass",
            "cluster.priority_class",
        ),
    ],
)
def test_check__finds(
    server: FakeApiServer, broken: Break, settings: tuple[str, ...], row: str, detail: str, remedy: str
) -> None:
    broken(server)
    found = rows(*settings)[row]
    assert found.ok is False
    assert detail in found.detail
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("without", "backend", "failing"),
    [
        (("trainjobs", "trainingruntimes"), "auto", set()),
        (("trainjobs", "trainingruntimes"), "trainjob", {"operator trainjob"}),
        (("jobsets",), "trainjob", {"operator trainjob"}),
        (("pytorchjobs",), "pytorchjob", {"operator pytorchjob"}),
        (("pytorchjobs", "trainjobs", "trainingruntimes"), "auto", {"operator pytorchjob", "operator trainjob"}),
    ],
)
def test_check__operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...], backend: str, failing: set[str]
) -> None:
    with FakeApiServer(without=without) as server:
        fill(server)
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        found = rows(f"cluster.backend={backend}")
    assert {name for name, row in found.items() if row.ok is False} == failing
    assert all("install" in found[name].remedy for name in failing)


def test_check__what_may_not_be_seen_is_unknown_and_not_wrong(server: FakeApiServer) -> None:
    server.deny("get", "", "secrets")
    server.deny("list", "", "nodes")
    found = rows()
    assert found["secret S3"].ok is None
    assert found["nodes"].ok is None
    assert "may not look" in found["nodes"].detail


def test_check__without_a_look_at_workflows_nothing_fails(server: FakeApiServer) -> None:
    all_of_them = rows()["rights"].detail
    server.deny("get", "argoproj.io", "workflows")
    found = rows()
    assert found["rights workflows"].ok is None
    assert "cannot tell an eviction from a cancellation" in found["rights workflows"].detail
    assert "manifests/overlays/accounts" in found["rights workflows"].remedy
    assert found["rights"].ok is True
    numbers = [int(detail.split()[1]) for detail in (all_of_them, found["rights"].detail)]
    assert numbers[0] == numbers[1] + 1


def test_check__without_argo_nobody_needs_workflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeApiServer(without=("workflows",)) as server:
        fill(server)
        server.deny("get", "argoproj.io", "workflows")
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        found = rows()
    assert "rights workflows" not in found
    assert found["rights"].ok is True


def test_check__no_cluster_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="kubeconfig"):
        rows()
    with FakeApiServer() as gone:
        path = gone.write_kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr(client, "_ABSENT_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"no way to the Kubernetes API at .*correct the cluster's server"):
        rows()


def test_check__an_outage_is_one_message(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BUDGET_SECONDS", 0.5)
    server.fail(503, count=100)
    with pytest.raises(HjepaError, match="gave no answer") as told:
        rows()
    assert not isinstance(told.value, UserError)


def test_check__expired_credentials_end_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeApiServer() as server:
        server.token = "right"
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig", token="wrong")))
        with pytest.raises(UserError, match="does not accept these credentials"):
            rows()


# -- the pod ---------------------------------------------------------------------------------------------------------


def kubelet(server: FakeApiServer, act: Callable[[str], None]) -> threading.Thread:
    """Does to the doctor's pod what a kubelet would."""

    def wait() -> None:
        (pod,) = server.wait_for(lambda: server.find("Pod"))
        act(pod["metadata"]["name"])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_pod__tells_what_it_saw_and_is_deleted(server: FakeApiServer) -> None:
    seen: list[dict[str, Any]] = []

    def act(name: str) -> None:
        seen.extend(server.find("Pod"))
        server.log(name, "ok    S3: wrote, read and deleted an object", container="doctor")
        server.log(name, "FAIL  MLflow: connection refused", container="doctor")
        server.set_status("Pod", name, {"phase": "Failed"})

    thread = kubelet(server, act)
    found = rows(pod=True)
    thread.join()
    assert found["S3 from a pod"].detail == "wrote, read and deleted an object"
    assert found["S3 from a pod"].ok is True
    assert found["MLflow from a pod"].ok is False
    assert server.find("Pod") == []
    (pod,) = seen
    assert pod_security_violations(pod["spec"]) == []
    assert pod["spec"]["activeDeadlineSeconds"] == 300 + 60  # cluster.image_timeout_seconds and a minute to look
    container = pod["spec"]["containers"][0]
    assert container["args"][:3] == ["doctor", "--servers", "--config"]
    asked = load_config(container["args"][3])
    assert asked.storage.endpoint_url == "http://s3:9000"


@pytest.mark.parametrize("reason", ["InvalidImageName", "CreateContainerConfigError"])
def test_pod__that_cannot_start_is_told_at_once_and_deleted(server: FakeApiServer, reason: str) -> None:
    state = {"waiting": {"reason": reason, "message": "because"}}
    status = {
        "phase": "Pending",
        "containerStatuses": [
            {"name": "doctor", "state": state, "image": "x", "imageID": "", "ready": False, "restartCount": 0}
        ],
    }
    thread = kubelet(server, lambda name: server.set_status("Pod", name, status))
    found = rows(pod=True)
    thread.join()
    assert found["pod"].ok is False
    assert f"{reason}: because" in found["pod"].detail
    assert server.find("Pod") == []


@pytest.mark.parametrize(("phase", "ok"), [("Failed", False), ("Succeeded", None)])
def test_pod__whose_log_cannot_be_read_is_a_row_among_the_others(
    server: FakeApiServer, phase: str, ok: bool | None
) -> None:
    def act(name: str) -> None:
        server.fail(500, count=100, verb="get", resource="pods/log", message="no kubelet")
        server.set_status("Pod", name, {"phase": phase, "reason": "Evicted", "message": "low on memory"})

    thread = kubelet(server, act)
    found = rows(pod=True)
    thread.join()
    assert found["pod"].ok is ok
    assert f"it {phase.lower()} (Evicted: low on memory), and its log cannot be read" in found["pod"].detail
    assert "500 no kubelet" in found["pod"].detail
    assert found["nodes"].ok is True
    assert server.find("Pod") == []


def test_pod__of_a_server_that_falls_silent_is_a_row_among_the_others(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_BUDGET_SECONDS", 0.5)
    thread = kubelet(server, lambda name: server.fail(503, count=1000, message="down"))
    found = rows(pod=True)
    thread.join()
    assert found["pod"].ok is False
    assert "503 down" in found["pod"].detail
    assert "within 360 s" in found["pod"].remedy
    assert found["nodes"].ok is True


# -- the command -----------------------------------------------------------------------------------------------------


def hjepa(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hjepa.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ})


def test_command__prints_the_table_and_says_by_its_exit_code_whether_something_fails(server: FakeApiServer) -> None:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    with FakeKfpServer() as kfp:
        done = hjepa("--cluster", *settings, "--endpoint", kfp.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kfp.url}, API v2beta1" in done.stdout
    server.delete("Secret", "hjepa-s3")
    done = hjepa("--cluster", *settings, "--endpoint", "http://127.0.0.1:9")
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    failing = [number for number, line in enumerate(lines) if line.startswith("FAIL")]
    assert {lines[number][6:].split("  ")[0] for number in failing} == {"secret S3", "KFP"}
    assert all(lines[number + 1].strip().startswith("-> ") for number in failing)
