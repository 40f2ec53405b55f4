"""The fake API server refuses what a real one refuses, and speaks to plain kubectl."""

from __future__ import annotations

import functools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hjepa.adapters.cluster import pytorchjob, trainjob
from hjepa.adapters.cluster.client import PODS, AccessError, Api, ApiError, Cluster
from tests.fake_apiserver import ApiError as Refused
from tests.fake_apiserver import (
    FakeApiServer,
    json_patch,
    matches_labels,
    merge_patch,
    strategic_patch,
    without_dropped,
)
from tests.test_launcher import make_spec

CONFIGMAPS = Api("", "v1", "configmaps")


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    with FakeApiServer(namespaces={"training": {"pod-security.kubernetes.io/enforce": "restricted"}}) as server:
        yield server


@pytest.fixture
def cluster(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    return Cluster(budget_seconds=2)


def config_map(name: str = "a", **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"x": name}}, "data": data}


def test_update__of_an_old_version_is_a_conflict(cluster: Cluster) -> None:
    made = cluster.create(CONFIGMAPS, config_map(k="1"))
    cluster.patch(CONFIGMAPS, "a", {"data": {"k": "2"}})
    with pytest.raises(ApiError, match="the object has been modified") as refused:
        cluster.patch(
            CONFIGMAPS, "a", {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"k": "3"}}
        )
    assert refused.value.status == 409
    with pytest.raises(ApiError, match="already exists"):
        cluster.create(CONFIGMAPS, config_map())


def test_delete__with_another_uid_does_nothing(cluster: Cluster) -> None:
    cluster.create(CONFIGMAPS, config_map())
    assert not cluster.delete(CONFIGMAPS, "a", uid="of-another")
    assert cluster.delete(CONFIGMAPS, "a")
    assert not cluster.delete(CONFIGMAPS, "a")


def test_status__is_written_by_its_subresource_alone(server: FakeApiServer, cluster: Cluster) -> None:
    api = Api("kubeflow.org", "v1", "pytorchjobs")
    job = pytorchjob.render(make_spec())[0]
    name = job["metadata"]["name"]
    assert "status" not in cluster.create(api, job | {"status": {"conditions": []}})
    assert "status" not in cluster.patch(api, name, {"status": {"conditions": []}})
    cluster.request(
        "PATCH",
        api.path("training", name, "status"),
        doing="patch",
        body={"status": {"completionTime": "now"}, "spec": {"nprocPerNode": "9"}},
        content="application/merge-patch+json",
    )
    found = cluster.get(api, name)
    assert found is not None
    assert found["status"] == {"completionTime": "now"}
    assert found["spec"]["nprocPerNode"] == "1"


@pytest.mark.parametrize(
    ("spoil", "code", "told"),
    [
        (lambda spec: spec.update(nprocPerNode=4), 422, "spec.nprocPerNode in body must be of type string"),
        (lambda spec: spec["runPolicy"].update(backoffLimit="3"), 422, "must be of type integer"),
        (lambda spec: spec["runPolicy"].update(ttlSecondAfterFinished=3), 400, 'unknown field "spec.runPolicy.ttlSec'),
        (lambda spec: spec.pop("pytorchReplicaSpecs"), 422, "spec.pytorchReplicaSpecs: Required value"),
        (lambda spec: container(spec)["securityContext"].update(readonlyRootFilesystem=True), 400, "readonlyRootFile"),
        (lambda spec: container(spec)["resources"]["limits"].update(memory="32Gigs"), 422, "is no quantity"),
        (lambda spec: container(spec).update(name="main"), 403, "must have at least one pytorch container"),
        (lambda spec: container(spec).pop("image"), 403, "image: Required value"),
        (lambda spec: workers(spec).update(replicas=0), 403, "must be at least 1"),
        (lambda spec: spec["pytorchReplicaSpecs"].update(Workers=workers(spec)), 403, "Unsupported value"),
        (lambda spec: spec["runPolicy"].update(managedBy="me"), 403, "managedBy: Unsupported value"),
        (lambda spec: spec["pytorchReplicaSpecs"].update(Master={"template": {}}), 403, "must be 1"),
    ],
)
def test_pytorchjob__mistakes_are_refused(
    server: FakeApiServer, spoil: Callable[[dict[str, Any]], Any], code: int, told: str
) -> None:
    job = pytorchjob.render(make_spec())[0]
    spoil(job["spec"])
    with pytest.raises(Refused, match=told.replace("[", r"\[")) as refused:
        server.create(job)
    assert refused.value.status == code


def workers(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["pytorchReplicaSpecs"]["Worker"]
    return found


def container(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workers(spec)["template"]["spec"]["containers"][0]
    return found


def test_trainjob__is_fixed_once_made(server: FakeApiServer, cluster: Cluster) -> None:
    for manifest in trainjob.render(make_spec()):
        server.create(manifest)
    api = Api("trainer.kubeflow.org", "v1alpha1", "trainjobs")
    with pytest.raises(ApiError, match="field is immutable"):
        cluster.patch(api, "hjepa-0123456789", {"spec": {"trainer": {"numNodes": 9}}})
    assert cluster.patch(api, "hjepa-0123456789", {"spec": {"suspend": True}})["spec"]["suspend"] is True


def test_owner__takes_its_dependents_along_and_foreground_waits_for_them(
    server: FakeApiServer, cluster: Cluster
) -> None:
    server.kubelet = True  # pods have a grace period
    owner = cluster.create(CONFIGMAPS, config_map())
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": owner["metadata"]["uid"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "ownerReferences": [reference]}}
    template = pytorchjob.render(make_spec())[0]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    server.create(pod | {"spec": template["spec"]})
    assert cluster.delete(CONFIGMAPS, "a", foreground=True)
    assert cluster.get(CONFIGMAPS, "a") is not None
    found = cluster.get(PODS, "p")
    assert found is not None
    assert found["metadata"]["deletionGracePeriodSeconds"] == 2
    server.delete("Pod", "p", force=True)
    assert cluster.get(CONFIGMAPS, "a") is None


def test_watch__tells_each_change_once_and_in_order(server: FakeApiServer, cluster: Cluster) -> None:
    version = cluster.create(CONFIGMAPS, config_map())["metadata"]["resourceVersion"]

    def change() -> None:
        for number in range(30):
            cluster.patch(CONFIGMAPS, "a", {"data": {"k": str(number)}})
            server.create(config_map(f"other-{number}"))
        cluster.delete(CONFIGMAPS, "a")

    thread = threading.Thread(target=change)
    thread.start()
    seen = []
    for kind, obj in cluster.watch(CONFIGMAPS, "a", version, 20):
        seen.append((kind, obj["data"].get("k")))
        if kind == "DELETED":
            break
    thread.join()
    assert seen == [*(("MODIFIED", str(number)) for number in range(30)), ("DELETED", "29")]
    began = time.monotonic()
    assert list(cluster.watch(CONFIGMAPS, "a", str(server.listing(server.resource("Pod"), "", {})["metadata"][
        "resourceVersion"]), 1)) == []  # fmt: skip
    assert 0.8 < time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("a=1", True),
        ("a==1,b=2", True),
        ("a!=1", False),
        ("c!=1", True),
        ("a", True),
        ("!a", False),
        ("!c", True),
        ("a in (1, 3)", True),
        ("a notin (1,3),b", False),
        ("a in (2),b=2", False),
    ],
)
def test_selector(selector: str, matches: bool) -> None:
    assert matches_labels({"metadata": {"labels": {"a": "1", "b": "2"}}}, selector) == matches


def test_patches() -> None:
    assert merge_patch({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"c": None}, "e": [1]}) == {
        "a": 1,
        "b": {"d": 2},
        "e": [1],
    }
    operations = [
        {"op": "add", "path": "/l/1", "value": "x"},
        {"op": "remove", "path": "/m/a~1b"},
        {"op": "replace", "path": "/n", "value": 2},
    ]
    assert json_patch({"l": ["a", "b"], "m": {"a/b": 1}, "n": 1}, operations) == {"l": ["a", "x", "b"], "m": {}, "n": 2}
    assert without_dropped({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2}, {"a": 1}) == {"a": 1, "c": 3}


def test_strategic_patch__merges_lists_by_what_tells_their_items_apart() -> None:
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "tmp", "mountPath": "/var", "readOnly": True}]
    pod = {
        "containers": [{"name": "main", "image": "a:1", "volumeMounts": mounts, "args": ["x", "y"]}, {"name": "other"}],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "tolerations": [{"key": "a"}],
    }
    main = {
        "name": "main",
        "image": "a:2",
        "args": ["z"],
        "$setElementOrder/volumeMounts": [{"mountPath": "/var"}, {"mountPath": "/new"}],
        "volumeMounts": [
            {"$patch": "delete", "mountPath": "/tmp"},
            {"mountPath": "/var", "readOnly": None},
            {"name": "tmp", "mountPath": "/new"},
        ],
    }
    patch = {
        "containers": [main, {"$patch": "delete", "name": "other"}],
        "volumes": [{"$retainKeys": ["name", "configMap"], "name": "tmp", "configMap": {"name": "c"}}],
        "tolerations": [{"key": "b"}],
    }
    mounts = [{"name": "tmp", "mountPath": "/var"}, {"name": "tmp", "mountPath": "/new"}]
    assert strategic_patch(pod, patch) == {
        "containers": [{"name": "main", "image": "a:2", "args": ["z"], "volumeMounts": mounts}],
        "volumes": [{"name": "tmp", "configMap": {"name": "c"}}],
        "tolerations": [{"key": "b"}],
    }
    replaced = strategic_patch(pod, {"volumes": [{"$patch": "replace"}, {"name": "new"}]})
    assert replaced["volumes"] == [{"name": "new"}]


def test_rbac__is_that_of_the_stored_roles(
    server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.users["secret-1"] = "system:serviceaccount:training:launcher"
    group = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"]}]
    server.create({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": "r"}, "rules": rules})
    server.create(
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "r"},
            "subjects": [{"kind": "ServiceAccount", "name": "launcher", "namespace": "training"}],
            "roleRef": {"apiGroup": group, "kind": "Role", "name": "r"},
        }
    )
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig", token="secret-1")))
    cluster = Cluster()
    assert cluster.list(PODS) == []
    with pytest.raises(AccessError, match="create configmaps"):
        cluster.create(CONFIGMAPS, config_map())
    asked = [("get", "", "pods/log"), ("delete", "", "pods"), ("list", "", "pods"), ("list", "apps", "pods")]
    assert [cluster.allowed(*question) for question in asked] == [True, False, True, False]
    assert {("list", "", "pods"), ("create", "", "configmaps")} == server.permissions_used()


def call_kubectl(kubeconfig: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(kubeconfig.parent), "KUBECONFIG": str(kubeconfig)}
    command = ["kubectl", *arguments]
    return subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)


def test_kubectl__changes_a_mount_uses_short_names_and_is_told_of_protobuf(
    server: FakeApiServer, tmp_path: Path
) -> None:
    kubectl = functools.partial(call_kubectl, server.write_kubeconfig(tmp_path / "kubeconfig"))
    main = {"name": "main", "image": "a:1", "volumeMounts": [{"name": "v", "mountPath": "/a"}]}
    template = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"containers": [main], "volumes": [{"name": "v", "emptyDir": {}}]},
    }
    deployment: dict[str, Any] = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template},
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": {"template": template}}
    assert kubectl("apply", "-f", "-", given=yaml.safe_dump_all([deployment, job])).stdout.count("created") == 2
    main["volumeMounts"] = [{"name": "v", "mountPath": "/b"}]
    changed = kubectl("apply", "-f", "-", given=yaml.safe_dump(deployment))
    assert "deployment.apps/d configured" in changed.stdout, changed.stderr
    stored = server.get("Deployment", "d")
    assert stored is not None
    (container,) = stored["spec"]["template"]["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "v", "mountPath": "/b"}]
    refused = kubectl("apply", "-f", "-", given=yaml.safe_dump(job))
    assert "spec.template: Invalid value: field is immutable" in refused.stderr
    assert "deployment.apps/d" in kubectl("get", "deploy,cm", "-o", "name").stdout
    created = kubectl("create", "secret", "generic", "s", "--from-literal=a=b")
    assert created.returncode == 1
    assert "protobuf" in created.stderr
    assert "--dry-run=client -o yaml" in created.stderr
    deleted = kubectl("delete", "ns", "training", "--timeout=20s")
    assert 'namespace "training" deleted' in deleted.stdout, deleted.stderr


@pytest.mark.parametrize("how", [[], ["--server-side"]])
def test_kubectl__applies_waits_and_deletes(server: FakeApiServer, tmp_path: Path, how: list[str]) -> None:
    kubeconfig = server.write_kubeconfig(tmp_path / "kubeconfig")

    kubectl = functools.partial(call_kubectl, kubeconfig)
    manifests = yaml.safe_dump_all([*pytorchjob.render(make_spec()), *trainjob.render(make_spec())])
    for expected in ("created", "unchanged") if not how else ("serverside-applied",) * 2:
        applied = kubectl("apply", *how, "-f", "-", given=manifests)
        assert applied.stdout.count(expected) == 3, applied.stderr
    version = server.find("PyTorchJob")[0]["metadata"]["resourceVersion"]
    dry = kubectl("apply", *how, "--dry-run=server", "-f", "-", given=manifests.replace("hjepa-train:1", "other:1"))
    assert dry.returncode == 0, dry.stderr
    assert server.find("PyTorchJob")[0]["metadata"]["resourceVersion"] == version
    wrong = kubectl("apply", *how, "-f", "-", given=manifests.replace("cleanPodPolicy", "cleanPodPolcy"))
    assert wrong.returncode == 1
    assert 'unknown field "spec.runPolicy.cleanPodPolcy"' in wrong.stderr
    job = "pytorchjob/hjepa-0123456789"
    server.set_status("PyTorchJob", "hjepa-0123456789", {"conditions": [{"type": "Succeeded", "status": "True"}]})
    waited = kubectl("wait", "--for=condition=Succeeded", job, "--timeout=20s")
    assert "condition met" in waited.stdout, waited.stderr
    assert kubectl("delete", job, "--timeout=20s").returncode == 0
    assert server.find("PyTorchJob") == []
