"""The kustomize tree: built offline by the real kubectl, applied to an API server with strict field validation."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from hjepa import steps
from hjepa.adapters.cluster import janitor, launcher
from hjepa.adapters.cluster.client import Cluster
from hjepa.adapters.cluster.spec import Owner, TrainSpec
from hjepa.config import ClusterConfig, load_config
from hjepa.errors import UserError
from tests.fake_apiserver import FakeApiServer, webhook_pytorchjob, webhook_trainjob
from tests.pod_security import pod_templates, violations

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
WITH_JOB = [name for name in OVERLAYS if name.startswith(("cpu", "gpu"))]
NAMESPACES = {"kubeflow-profile": "team-a"}

_found = importlib.util.spec_from_file_location("regenerate", MANIFESTS / "regenerate.py")
assert _found is not None
assert _found.loader is not None
regenerate = importlib.util.module_from_spec(_found)
_found.loader.exec_module(regenerate)

Object = dict[str, Any]


def kubectl(*arguments: str, kubeconfig: str = "/nonexistent", check: bool = True) -> subprocess.CompletedProcess[str]:
    offline = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": kubeconfig}
    done = subprocess.run(["kubectl", *arguments], env=offline, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stderr
    return done


@functools.cache
def _build(folder: Path) -> str:
    return kubectl("kustomize", str(folder)).stdout


def build(name: str) -> list[Object]:
    folder = MANIFESTS / "overlays" / name
    return [item for item in yaml.safe_load_all(_build(folder)) if item]


def with_component(name: str, component: str, tmp_path: Path) -> list[Object]:
    """The overlay as somebody would extend it: kustomize takes no absolute paths, so a copy of the tree."""
    tree = tmp_path / "manifests"
    shutil.copytree(MANIFESTS, tree)
    extended = tree / "overlays" / "extended"
    extended.mkdir()
    (extended / "kustomization.yaml").write_text(
        f"resources: [../{name}]\ncomponents: [../../components/{component}]\n", encoding="utf-8"
    )
    return [item for item in yaml.safe_load_all(kubectl("kustomize", str(extended)).stdout) if item]


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    (found,) = [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    return found


overlay = pytest.mark.parametrize("name", OVERLAYS)


# -- built -----------------------------------------------------------------------------------------------------------


@overlay
def test_overlay__is_complete_in_one_namespace(name: str) -> None:
    objects = build(name)
    assert {item["metadata"].get("namespace") for item in objects} == {NAMESPACES.get(name, "hjepa")}
    assert all(item["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") == "hjepa" for item in objects)
    identities = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(identities) == len(set(identities))
    names = {kind: {n for k, n in identities if k == kind} for kind, _ in identities}
    for pod in pod_templates(objects):
        account = pod["spec"].get("serviceAccountName")
        assert account is None or account in names["ServiceAccount"]
        maps = {volume["configMap"]["name"] for volume in pod["spec"].get("volumes", []) if "configMap" in volume}
        assert maps <= names.get("ConfigMap", set())
    for binding in (item for item in objects if item["kind"] == "RoleBinding"):
        assert binding["roleRef"]["name"] in names["Role"]
        assert all(subject["namespace"] for subject in binding["subjects"])


@pytest.mark.parametrize("folder", sorted(path.parent.relative_to(MANIFESTS) for path in MANIFESTS.rglob("job.yaml")))
def test_job__is_what_hjepa_job_render_makes_of_the_configuration_beside_it(folder: Path) -> None:
    if not (MANIFESTS / folder / "config.yaml").exists():
        assert str(folder) == "prepare-data"
        return
    assert (MANIFESTS / folder / "job.yaml").read_text("utf-8") == regenerate.job(MANIFESTS / folder), (
        "run: python manifests/regenerate.py"
    )


@pytest.mark.parametrize("name", WITH_JOB)
def test_job__comes_out_of_kustomize_unchanged_and_finds_the_run_that_prepare_data_resolves(name: str) -> None:
    objects = build(name)
    config = one(objects, "ConfigMap", "hjepa-config")["data"]
    folder = next(f for f in regenerate.folders(MANIFESTS) if regenerate.run_name(f) == config["run"])
    assert config["config.yaml"] == (folder / "config.yaml").read_text("utf-8")
    for wanted in yaml.safe_load_all((folder / "job.yaml").read_text("utf-8")):
        built = copy.deepcopy(one(objects, wanted["kind"], wanted["metadata"]["name"]))
        assert built["metadata"].pop("namespace") == "hjepa"
        assert built == wanted
    train = next(pod for pod in pod_templates([item for item in objects if item["kind"] != "Job"]))
    assert train["spec"]["containers"][0]["args"] == ["train", "--run-uri", f"s3://hjepa/runs/{config['run']}"]
    (prepare,) = pod_templates(one(objects, "Job", f"hjepa-prepare-data-{config['run']}"))
    main = prepare["spec"]["containers"][0]
    assert main["args"] == ["prepare-data", "--config", "/etc/hjepa/config.yaml", "--run", "$(HJEPA_RUN)"]
    assert {"name": "config", "mountPath": "/etc/hjepa", "readOnly": True} in main["volumeMounts"]
    assert main["env"][0] == {
        "name": "HJEPA_RUN",
        "valueFrom": {"configMapKeyRef": {"name": "hjepa-config", "key": "run"}},
    }


# -- safe ------------------------------------------------------------------------------------------------------------


@overlay
def test_pods__pass_pod_security_restricted(name: str) -> None:
    found = {pod["spec"]["containers"][0]["name"]: violations(pod["spec"]) for pod in pod_templates(build(name))}
    assert found
    assert not any(found.values()), found


@overlay
def test_pods__have_a_read_only_root_a_numeric_user_and_bounded_resources(name: str) -> None:
    for pod in pod_templates(build(name)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["enableServiceLinks"] is False
        assert spec.get("automountServiceAccountToken") is False or spec["serviceAccountName"] == "hjepa-janitor"
        assert all(volume["emptyDir"].get("sizeLimit") for volume in spec["volumes"] if "emptyDir" in volume)
        for main in spec["containers"]:
            assert main["securityContext"]["readOnlyRootFilesystem"] is True
            assert {mount["mountPath"] for mount in main["volumeMounts"]} >= {"/tmp"}
            assert main["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in main["resources"]["limits"]
            assert re.search(r":v?\d[\w.-]*$", main["image"]), main["image"]  # a tag that stays


@overlay
def test_no_secret__is_in_what_is_built(name: str) -> None:
    text = _build(MANIFESTS / "overlays" / name)
    assert "kind: Secret\n" not in text
    assert not re.search(r"AKIA[0-9A-Z]{16}|CHANGE-ME|BEGIN [A-Z ]*PRIVATE KEY", text)
    literals = [
        item
        for pod in pod_templates(build(name))
        for main in pod["spec"]["containers"]
        for item in main.get("env", [])
        if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", item["name"]) and "value" in item
    ]
    assert literals == []


def test_secret_example__has_every_key_that_the_pods_ask_for_and_no_value() -> None:
    secrets = {
        item["metadata"]["name"]: item for item in yaml.safe_load_all((MANIFESTS / "secret.example.yaml").read_text())
    }
    assert all(set(item["stringData"].values()) == {"CHANGE-ME"} for item in secrets.values())
    for pod in (pod for name in OVERLAYS for pod in pod_templates(build(name))):
        for main in pod["spec"]["containers"]:
            assert {source["secretRef"]["name"] for source in main.get("envFrom", [])} <= secrets.keys()
            for item in main.get("env", []):
                key = item.get("valueFrom", {}).get("secretKeyRef")
                assert key is None or key["key"] in secrets[key["name"]]["stringData"]
    assert not [path for path in MANIFESTS.rglob("kustomization.yaml") if "secret.example" in path.read_text("utf-8")]


def test_operators__webhooks_take_the_jobs() -> None:
    objects = [item for name in WITH_JOB for item in build(name)]
    jobs = [item for item in objects if item["kind"] == "PyTorchJob"]
    train_jobs = [item for item in objects if item["kind"] == "TrainJob"]
    assert (len(jobs), len(train_jobs)) == (2, 3)
    assert [webhook_pytorchjob(item) for item in jobs] == [[]] * 2
    assert [webhook_trainjob(item) for item in train_jobs] == [[]] * 3
    runtimes = {item["metadata"]["name"] for item in objects if item["kind"] == "TrainingRuntime"}
    assert {item["spec"]["runtimeRef"]["name"] for item in train_jobs} == runtimes


# -- the network -----------------------------------------------------------------------------------------------------


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(item["operator"] == "In" for item in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(item["key"]) in item["values"] for item in expressions
    )


def _is_peer(peer: Object, end: Object, namespace: str) -> bool:
    if "ipBlock" in peer:
        return "ip" in end and ip_address(end["ip"]) in ip_network(peer["ipBlock"]["cidr"])
    if "ip" in end:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": end["namespace"], **end.get("namespace_labels", {})}
        here = _selects(peer["namespaceSelector"], labels)
    else:
        here = end["namespace"] == namespace
    return here and _selects(peer.get("podSelector", {}), end["labels"])


def _direction_allows(policies: list[Object], pod: Object, other: Object, port: int, protocol: str, way: str) -> bool:
    if "ip" in pod:
        return True
    peers, rules = ("from", "ingress") if way == "Ingress" else ("to", "egress")
    chosen = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod["namespace"]
        and way in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], pod["labels"])
    ]
    return not chosen or any(
        (not rule.get(peers) or any(_is_peer(peer, other, pod["namespace"]) for peer in rule[peers]))
        and (not rule.get("ports") or {"port": port, "protocol": protocol} in rule["ports"])
        for policy in chosen
        for rule in policy["spec"].get(rules, [])
    )


def reaches(policies: list[Object], source: Object, target: Object, port: int, protocol: str = "TCP") -> bool:
    """Whether NetworkPolicies let a connection through: both ends have a say."""
    return _direction_allows(policies, source, target, port, protocol, "Egress") and _direction_allows(
        policies, target, source, port, protocol, "Ingress"
    )


def pod(name: str, component: str | None = None, namespace: str = "hjepa", **labels: str) -> Object:
    own = {"app.kubernetes.io/name": name} | ({"app.kubernetes.io/component": component} if component else {})
    return {"namespace": namespace, "labels": own, "namespace_labels": labels}


TRAIN, PREPARE, OTHER = pod("hjepa", "train"), pod("hjepa", "prepare-data"), pod("other")
S3, MLFLOW, POSTGRES = pod("hjepa-s3"), pod("hjepa-mlflow"), pod("hjepa-postgres")
DNS = {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
FOREIGN = pod("pipeline", namespace="kubeflow")
GUEST = {**FOREIGN, "namespace_labels": {"hjepa.dev/platform-client": "true"}}
INTERNET, METADATA, LOCAL_DNS = {"ip": "52.216.0.1"}, {"ip": "169.254.169.254"}, {"ip": "169.254.20.10"}


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        (TRAIN, TRAIN, 41234, True),  # NCCL and Gloo
        (TRAIN, TRAIN, 23456, True),
        (OTHER, TRAIN, 23456, False),
        (PREPARE, TRAIN, 23456, False),
        (TRAIN, PREPARE, 8080, False),
        (pod("hjepa", "train", namespace="elsewhere"), TRAIN, 23456, False),
        (INTERNET, TRAIN, 22, False),
        (OTHER, PREPARE, 8080, False),
        (TRAIN, S3, 8333, True),
        (PREPARE, S3, 8333, True),
        (TRAIN, MLFLOW, 5000, True),
        (TRAIN, pod("minio", namespace="storage"), 9000, True),
        (TRAIN, INTERNET, 443, True),
        (TRAIN, INTERNET, 80, False),
        (TRAIN, INTERNET, 8333, False),
        (TRAIN, METADATA, 80, False),
        (TRAIN, OTHER, 22, False),
        (TRAIN, POSTGRES, 5432, False),
        (OTHER, POSTGRES, 5432, False),
        (MLFLOW, POSTGRES, 5432, True),
        (MLFLOW, S3, 8333, True),
        (MLFLOW, INTERNET, 443, False),
        (S3, INTERNET, 443, False),
        (OTHER, S3, 8333, True),
        (OTHER, S3, 9333, False),  # the master of the object store
        (FOREIGN, S3, 8333, False),
        (GUEST, S3, 8333, True),
        (GUEST, MLFLOW, 5000, True),
        (GUEST, POSTGRES, 5432, False),
        (pod("hjepa-tensorboard"), S3, 8333, True),
        (OTHER, pod("hjepa-tensorboard"), 6006, False),
    ],
)
def test_network__lets_through_what_training_needs(source: Object, target: Object, port: int, allowed: bool) -> None:
    policies = [
        item for name in ("gpu-multinode-v1", "platform") for item in build(name) if item["kind"] == "NetworkPolicy"
    ]
    assert len(policies) == 6
    assert reaches(policies, source, target, port) is allowed


@pytest.mark.parametrize("source", [TRAIN, PREPARE, MLFLOW])
def test_network__names_can_be_resolved_by_the_clusters_own_dns_alone(source: Object) -> None:
    policies = [
        item for name in ("gpu-multinode-v2", "platform") for item in build(name) if item["kind"] == "NetworkPolicy"
    ]
    for protocol in ("UDP", "TCP"):
        assert reaches(policies, source, DNS, 53, protocol)
        assert reaches(policies, source, LOCAL_DNS, 53, protocol)
        assert not reaches(policies, source, INTERNET, 53, protocol)
        assert not reaches(policies, source, OTHER, 53, protocol)


@pytest.mark.parametrize("name", WITH_JOB)
def test_network__policies_meet_the_pods_that_are_made(name: str) -> None:
    objects = build(name)
    egress = one(objects, "NetworkPolicy", "hjepa-egress")["spec"]["podSelector"]
    ranks = one(objects, "NetworkPolicy", "hjepa-train-ranks")["spec"]["podSelector"]
    labels = [pod["metadata"]["labels"] for pod in pod_templates(objects)]
    assert [_selects(egress, item) for item in labels] == [True, True]
    assert sorted(_selects(ranks, item) for item in labels) == [False, True]


# -- applied ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    with FakeApiServer(namespaces=("hjepa", "team-a")) as running:
        yield running


@overlay
def test_apply__is_taken_with_strict_validation_and_changes_nothing_the_second_time(
    name: str, server: FakeApiServer, tmp_path: Path
) -> None:
    kubeconfig = str(server.write_kubeconfig(tmp_path / "kubeconfig"))
    arguments = ("apply", "--validate=strict", "-k", str(MANIFESTS / "overlays" / name))
    first = kubectl(*arguments, kubeconfig=kubeconfig).stdout.splitlines()
    assert len(first) == len(build(name))
    assert all(line.endswith(" created") for line in first), first
    again = kubectl(*arguments, kubeconfig=kubeconfig).stdout.splitlines()
    assert len(again) == len(first)
    assert all(line.endswith(" unchanged") for line in again), again


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gpu-multinode-v1", "cleanPodPolicy", "cleanPodPolice"),
        ("gpu-multinode-v1", "readOnlyRootFilesystem", "readonlyRootFilesystem"),
        ("gpu-multinode-v2", "restartStrategy", "restartStrategie"),
        ("gpu-multinode-v2", "numProcPerNode", "nprocPerNode"),
        ("cpu-smoke", "podSelector", "podSelektor"),
        ("kubeflow-profile", "concurrencyPolicy", "concurrency"),
        ("platform", "volumeClaimTemplates", "volumeClaimTemplate"),
    ],
)
def test_apply__refuses_a_misspelt_field(
    name: str, right: str, wrong: str, server: FakeApiServer, tmp_path: Path
) -> None:
    text = _build(MANIFESTS / "overlays" / name)
    assert f" {right}:" in text
    path = tmp_path / "misspelt.yaml"
    path.write_text(text.replace(f" {right}:", f" {wrong}:"), encoding="utf-8")
    kubeconfig = str(server.write_kubeconfig(tmp_path / "kubeconfig"))
    done = kubectl("apply", "--validate=strict", "-f", str(path), kubeconfig=kubeconfig, check=False)
    assert done.returncode == 1
    assert re.search(rf'unknown field "[\w.\[\]]*{wrong}"', done.stderr), done.stderr


@pytest.mark.parametrize("name", WITH_JOB)
def test_apply__without_the_training_job_leaves_time_to_prepare_the_data(
    name: str, server: FakeApiServer, tmp_path: Path
) -> None:
    kubeconfig = str(server.write_kubeconfig(tmp_path / "kubeconfig"))
    selector = "app.kubernetes.io/component!=train"
    kubectl("apply", "-k", str(MANIFESTS / "overlays" / name), "-l", selector, kubeconfig=kubeconfig)
    jobs = ("PyTorchJob", "TrainJob", "TrainingRuntime")
    assert len(server.find("Job", "hjepa")) == 1
    assert server.find("ConfigMap", "hjepa")
    assert [server.find(kind, "hjepa") for kind in jobs] == [[], [], []]
    kubectl("apply", "-k", str(MANIFESTS / "overlays" / name), kubeconfig=kubeconfig)
    assert sum(len(server.find(kind, "hjepa")) for kind in jobs[:2]) == 1


# -- rights ----------------------------------------------------------------------------------------------------------

PROFILE = "team-a"
PACE = launcher.Pace(poll=0.3, unnoticed=0.3, workflow=0.3, recreate=0.1, budget=5.0)


def rights(role: Object) -> set[tuple[str, str, str]]:
    """(verb, group, resource)"""
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


@pytest.fixture
def profile(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApiServer:
    """A Kubeflow profile after ``kubectl apply -k overlays/kubeflow-profile``, with a pipeline run whose pod we are."""
    admin = str(server.write_kubeconfig(tmp_path / "admin"))
    kubectl("apply", "-k", str(MANIFESTS / "overlays/kubeflow-profile"), kubeconfig=admin)
    workflow = server.create(
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": "run"}, "spec": {}}, PROFILE
    )
    owner = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "name": "run",
        "uid": workflow["metadata"]["uid"],
    }
    make_pod(server, "launcher", {}, ownerReferences=[owner])
    monkeypatch.setenv("KFP_POD_NAME", "launcher")
    return server


def make_pod(server: FakeApiServer, name: str, labels: dict[str, str], **metadata: Any) -> Object:
    main = {"name": "main", "image": "image:1"}
    pod = {"metadata": {"name": name, "labels": labels, **metadata}, "spec": {"containers": [main]}}
    return server.create({"apiVersion": "v1", "kind": "Pod", **pod}, PROFILE)


def log_in(server: FakeApiServer, account: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, requests are made, recorded and judged as this service account's."""
    server.users["token"] = f"system:serviceaccount:{PROFILE}:{account}"
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "user", namespace=PROFILE, token="token")))
    server.requests.clear()


def small_job(nodes: int = 1) -> TrainSpec:
    cluster = ClusterConfig(nodes=nodes, gpus_per_node=0, memory="1Gi", shm="64Mi", grace_seconds=1)
    return TrainSpec(name="hjepa-rights", image="image:1", args=("train",), cluster=cluster)


def ended(kind: str, *, well: bool) -> Object:
    good = "Complete" if kind == "TrainJob" else "Succeeded"
    return {"conditions": [{"type": good if well else "Failed", "status": "True", "reason": "R", "message": "m"}]}


def operate(server: FakeApiServer, kind: str) -> None:
    """The operator, once: nothing for a while, then a pod that logs, then success."""
    labels = {
        "PyTorchJob": {
            "training.kubeflow.org/job-name": "hjepa-rights",
            "training.kubeflow.org/replica-index": "0",
        },
        "TrainJob": {
            "jobset.sigs.k8s.io/jobset-name": "hjepa-rights",
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": "0",
        },
    }[kind]
    container = {"PyTorchJob": "pytorch", "TrainJob": "node"}[kind]

    def asked(*request: str) -> bool:
        return request in server.permissions_used()

    # A failed job of that name may still be there.
    server.wait_for(lambda: [job for job in server.find(kind, PROFILE) if not job.get("status")])
    created = {"type": "Created", "status": "True", "reason": "R", "message": "m"}
    server.set_status(kind, "hjepa-rights", {"conditions": [created]}, PROFILE)
    server.wait_for(lambda: asked("list", "", "events"))
    made = make_pod(server, "hjepa-rights-0", labels)
    running = {"name": container, "ready": True, "restartCount": 0, "image": "image:1", "state": {"running": {}}}
    ready = [{"type": "Ready", "status": "True"}]
    status = {"phase": "Running", "containerStatuses": [running], "conditions": ready}
    server.set_status("Pod", made["metadata"]["name"], status, PROFILE)
    server.log("hjepa-rights-0", "step 1", container=container, namespace=PROFILE)
    server.wait_for(lambda: asked("get", "", "pods/log") and asked("watch", *kinds_group(kind)))
    server.set_status("Pod", made["metadata"]["name"], {"phase": "Succeeded"}, PROFILE)
    server.set_status(kind, "hjepa-rights", ended(kind, well=True), PROFILE)


def kinds_group(kind: str) -> tuple[str, str]:
    return ("kubeflow.org", "pytorchjobs") if kind == "PyTorchJob" else ("trainer.kubeflow.org", "trainjobs")


def launch_once(server: FakeApiServer, backend: str) -> None:
    kind = launcher.BACKENDS[backend].module.KIND
    failed: list[BaseException] = []

    def follow() -> None:
        try:
            operate(server, kind)
        except TimeoutError as error:  # the launcher then waits for ever, unless its job ends
            failed.append(error)
            for job in server.find(kind, PROFILE):
                server.set_status(kind, job["metadata"]["name"], ended(kind, well=False), PROFILE)

    operator = threading.Thread(target=follow, daemon=True)
    operator.start()
    try:
        assert launcher.launch(small_job(), backend=backend, result=lambda: {"step": 1}, pace=PACE) == {"step": 1}
    finally:
        operator.join(30)
    assert not failed
    server.delete("Pod", "hjepa-rights-0", PROFILE, force=True)


def test_launcher__has_the_rights_that_it_uses_and_no_other(
    profile: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipeline's pod: over a runtime that somebody left, a job that had failed, and with another run's job."""
    stale = launcher.BACKENDS["trainjob"].module.render(small_job(nodes=3))[0]
    owner = Owner("argoproj.io/v1alpha1", "Workflow", "run", profile.get("Workflow", "run", PROFILE)["metadata"]["uid"])
    other = replace(owner, name="other", uid="the-uid-of-another-run")
    (failed,) = launcher.BACKENDS["pytorchjob"].module.render(replace(small_job(), owner=owner))
    log_in(profile, "default-editor", tmp_path, monkeypatch)
    used = set()
    for backend in ("trainjob", "pytorchjob"):
        module = launcher.BACKENDS[backend].module
        if backend == "trainjob":
            profile.create(stale, PROFILE)
        else:
            profile.create(failed, PROFILE)
            profile.set_status("PyTorchJob", "hjepa-rights", ended("PyTorchJob", well=False), PROFILE)
        profile.requests.clear()
        launch_once(profile, backend)
        for manifest in module.render(replace(small_job(), owner=other)):
            profile.create(manifest, PROFILE)
        profile.set_status(module.KIND, "hjepa-rights", ended(module.KIND, well=True), PROFILE)
        launcher.launch(small_job(), backend=backend, result=lambda: {"step": 1}, pace=PACE)
        used |= profile.permissions_used()
        assert profile.find(module.KIND, PROFILE) == []  # of two kinds by one name the second is refused
    assert used == rights(one(build("kubeflow-profile"), "Role", "hjepa-launcher"))


def test_launcher__without_one_of_its_rights_names_it(
    profile: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(profile, "hjepa-janitor", tmp_path, monkeypatch)
    monkeypatch.delenv("KFP_POD_NAME")
    with pytest.raises(UserError, match=r"get (?s:.)*pytorchjobs\.kubeflow\.org"):
        launcher.launch(small_job(), backend="pytorchjob", result=lambda: None, pace=PACE)


def test_janitor__has_the_rights_that_it_uses_and_no_other(
    profile: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Owner("argoproj.io/v1alpha1", "Workflow", "run", "the-uid-of-a-run-that-is-gone")
    for backend in launcher.BACKENDS.values():
        for manifest in backend.module.render(replace(small_job(), owner=gone)):
            profile.create(manifest, PROFILE)
    lone = launcher.BACKENDS["trainjob"].module.render(replace(small_job(), name="hjepa-lone", owner=gone))[0]
    profile.create(lone, PROFILE)
    long_ago = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    profile.update("TrainingRuntime", "hjepa-lone", lambda item: item["metadata"].update(long_ago), PROFILE)
    log_in(profile, "hjepa-janitor", tmp_path, monkeypatch)
    removed = {(item.kind, item.name) for item in janitor.sweep(Cluster(None, budget_seconds=5.0))}
    assert removed == {
        ("PyTorchJob", "hjepa-rights"),
        ("TrainJob", "hjepa-rights"),
        ("TrainingRuntime", "hjepa-lone"),
    }
    assert profile.permissions_used() == rights(one(build("kubeflow-profile"), "Role", "hjepa-janitor"))


def test_janitor__runs_by_the_command_of_its_cron_job(
    profile: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Owner("argoproj.io/v1alpha1", "Workflow", "run", "the-uid-of-a-run-that-is-gone")
    for manifest in launcher.BACKENDS["pytorchjob"].module.render(replace(small_job(), owner=gone)):
        profile.create(manifest, PROFILE)
    log_in(profile, "hjepa-janitor", tmp_path, monkeypatch)
    (template,) = pod_templates(one(build("kubeflow-profile"), "CronJob"))
    program, *arguments = template["spec"]["containers"][0]["command"]
    assert program == "python3"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert profile.find("PyTorchJob", PROFILE) == []
    assert "PyTorchJob hjepa-rights" in done.stdout + done.stderr


# -- components ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu-multinode-v1", "gpu-multinode-v2"])
def test_kueue__is_the_same_as_a_queue_in_the_configuration(name: str, tmp_path: Path) -> None:
    folder = MANIFESTS / "overlays" / name
    config = load_config(str(folder / "config.yaml"), ["cluster.queue=hjepa"])
    backend = launcher.BACKENDS[config.cluster.backend].module
    run = steps.Run(regenerate.run_name(folder), config, "", config.tracking.uri or "")
    wanted = backend.render(steps.training_job(run))[-1]
    built = one(with_component(name, "kueue", tmp_path), backend.KIND)
    assert "kueue.x-k8s.io/queue-name" in built["metadata"]["labels"]
    del built["metadata"]["namespace"]
    assert built == wanted


@pytest.mark.parametrize("name", ["gpu-multinode-v1", "gpu-multinode-v2"])
def test_rdma__asks_for_one_capability_that_restricted_refuses_and_nothing_else(name: str, tmp_path: Path) -> None:
    objects = [item for item in with_component(name, "rdma", tmp_path) if item["kind"] != "Job"]
    (template,) = pod_templates(objects)
    main = template["spec"]["containers"][0]
    assert violations(template["spec"]) == [f"{main['name']}: capabilities ['IPC_LOCK'] added"]
    assert main["resources"]["limits"]["rdma/hca"] == 1


@pytest.mark.parametrize("name", WITH_JOB)
def test_openshift__leaves_the_user_to_the_namespace(name: str, tmp_path: Path) -> None:
    objects = with_component(name, "openshift", tmp_path)
    pods = list(pod_templates(objects))
    assert len(pods) == 2
    for item in pods:
        assert item["spec"]["securityContext"].keys() == {"runAsNonRoot", "fsGroupChangePolicy", "seccompProfile"}
        assert violations(item["spec"]) == []
    dns = pod("dns", namespace="openshift-dns")
    assert reaches([item for item in objects if item["kind"] == "NetworkPolicy"], TRAIN, dns, 5353, "UDP")


# -- documents -------------------------------------------------------------------------------------------------------


def test_readme__names_every_overlay_and_component_and_no_other() -> None:
    text = (MANIFESTS / "README.md").read_text("utf-8")
    assert sorted(set(re.findall(r"overlays/([a-z][\w-]+)", text))) == OVERLAYS
    components = sorted(path.name for path in (MANIFESTS / "components").iterdir())
    assert sorted(set(re.findall(r"components/([a-z][\w-]+)", text))) == components


def test_readme__commands_do_what_they_say(tmp_path: Path) -> None:
    """All of them in their order, but those that need containers: logs, port-forward, rollout."""
    text = (MANIFESTS / "README.md").read_text("utf-8").replace("--timeout=1h", "--timeout=20s")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.replace("=...", "=x") for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"kubectl (?!.*(logs|port-forward|rollout) )", line)]
    assert len(commands) >= 10

    with FakeApiServer(namespaces=()) as server:
        kubeconfig = str(server.write_kubeconfig(tmp_path / "kubeconfig", namespace="hjepa"))
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": kubeconfig}
        for command in commands:
            if " wait " in command:
                done = {"conditions": [{"type": "Complete", "status": "True"}]}
                (waited,) = re.findall(r" job/(\S+)", command)
                server.set_status("Job", waited, done, "hjepa")
            if " create secret " in command:  # kubectl would send protobuf, which the server of the tests does not read
                command += " --dry-run=client -o yaml | kubectl apply -f -"
            answer = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
            )
            assert answer.returncode == 0, f"{command}: {answer.stderr}"
            assert "No resources found" not in answer.stdout, command
            if command.endswith("overlays/cpu-smoke"):
                assert len(server.find("PyTorchJob", "hjepa")) == 1
        left = {
            resource.kind: server.find(resource.kind, "hjepa") for resource in server.resources if resource.namespaced
        }
        assert len(left.pop("Secret")) == 2
        assert {kind for kind, found in left.items() if found} == {
            "Deployment",
            "StatefulSet",
            "Service",
            "NetworkPolicy",
        }


def test_prepare_data__every_overlay_in_a_namespace_prepares_its_own_run(tmp_path: Path) -> None:
    with FakeApiServer(namespaces=("hjepa",)) as server:
        kubeconfig = str(server.write_kubeconfig(tmp_path / "kubeconfig", namespace="hjepa"))
        for name in ("gpu-multinode-v2", "cpu-smoke-v2", "cpu-smoke"):
            kubectl("apply", "-k", str(MANIFESTS / "overlays" / name), kubeconfig=kubeconfig)
        jobs = {job["metadata"]["name"] for job in server.find("Job", "hjepa")}
    assert jobs == {f"hjepa-prepare-data-{run}" for run in ("gpu-multinode-v2", "cpu-smoke-v2", "cpu-smoke")}


def test_images_pvc__finds_the_job_of_an_overlay_that_extends_another(tmp_path: Path) -> None:
    (prepare,) = pod_templates(one(with_component("cpu-smoke", "images-pvc", tmp_path), "Job"))
    assert "hjepa-images" in [v.get("persistentVolumeClaim", {}).get("claimName") for v in prepare["spec"]["volumes"]]


def test_namespace__enforces_restricted() -> None:
    labels = yaml.safe_load((MANIFESTS / "namespace.yaml").read_text("utf-8"))["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
