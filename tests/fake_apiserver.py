"""A Kubernetes API server for tests: real HTTP, state in memory; what a real server refuses is refused.

It serves the python client and plain ``kubectl`` (apply, apply -k, --server-side, --dry-run=server, get, wait, delete):
discovery, strict field validation, CRUD with optimistic locking, watches, selectors, status subresources, the four
kinds of patch, owner references, pods with logs, RBAC from the stored roles, Pod Security and the operators' webhooks.
Operators and kubelets are not part of it: see job_controller.py. Nor is protobuf, in which ``kubectl create`` sends
what it makes of its arguments (a Secret, a namespace): 415; add ``--dry-run=client -o yaml | kubectl apply -f -``.
By hand: ``python tests/fake_apiserver.py --port 8001``, then ``kubectl --server=http://127.0.0.1:8001 apply -f FILE``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import functools
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]


class Resource(NamedTuple):
    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    status: bool = True  # has the status subresource

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


class Key(NamedTuple):
    group: str
    plural: str
    namespace: str  # "" for what belongs to none
    name: str


CORE = (
    Resource("", "v1", "pods", "Pod"),
    Resource("", "v1", "namespaces", "Namespace", namespaced=False),
    Resource("", "v1", "nodes", "Node", namespaced=False),
    Resource("", "v1", "configmaps", "ConfigMap", status=False),
    Resource("", "v1", "secrets", "Secret", status=False),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", status=False),
    Resource("", "v1", "services", "Service"),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Resource("", "v1", "resourcequotas", "ResourceQuota"),
    Resource("", "v1", "limitranges", "LimitRange", status=False),
    Resource("", "v1", "events", "Event", status=False),
    Resource("apps", "v1", "deployments", "Deployment"),
    Resource("apps", "v1", "statefulsets", "StatefulSet"),
    Resource("apps", "v1", "daemonsets", "DaemonSet"),
    Resource("batch", "v1", "jobs", "Job"),
    Resource("batch", "v1", "cronjobs", "CronJob"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", status=False),
    Resource("networking.k8s.io", "v1", "ingresses", "Ingress"),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"),
    Resource("rbac.authorization.k8s.io", "v1", "roles", "Role", status=False),
    Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", status=False),
    Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False, status=False),
    Resource(
        "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False, status=False
    ),
    Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", namespaced=False, status=False),
    Resource(
        "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
    ),
)  # fmt: skip
PYTORCHJOB = Resource("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
TRAINJOB = Resource("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob")
CUSTOM = (
    PYTORCHJOB,
    TRAINJOB,
    Resource("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "TrainingRuntime", status=False),
    Resource(
        "trainer.kubeflow.org",
        "v1alpha1",
        "clustertrainingruntimes",
        "ClusterTrainingRuntime",
        namespaced=False,
        status=False,
    ),
    Resource("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet"),
    Resource("argoproj.io", "v1alpha1", "workflows", "Workflow", status=False),
    Resource("kueue.x-k8s.io", "v1beta1", "localqueues", "LocalQueue"),
    Resource("kueue.x-k8s.io", "v1beta1", "clusterqueues", "ClusterQueue", namespaced=False),
)

SHORT_NAMES = {
    "pods": ["po"], "namespaces": ["ns"], "nodes": ["no"], "configmaps": ["cm"], "serviceaccounts": ["sa"],
    "services": ["svc"], "persistentvolumeclaims": ["pvc"], "resourcequotas": ["quota"], "limitranges": ["limits"],
    "events": ["ev"], "deployments": ["deploy"], "statefulsets": ["sts"], "daemonsets": ["ds"], "cronjobs": ["cj"],
    "networkpolicies": ["netpol"], "ingresses": ["ing"], "poddisruptionbudgets": ["pdb"], "priorityclasses": ["pc"],
    "customresourcedefinitions": ["crd", "crds"],
}  # fmt: skip


# -- schemas ---------------------------------------------------------------------------------------------------------

# In the notation of the python client's models; "!" marks what is required. Core kinds come from those models.
SCHEMAS: dict[str, dict[str, str]] = {
    "PyTorchJob": {"spec": "PyTorchJobSpec", "status": "object"},
    "PyTorchJobSpec": {
        "nprocPerNode": "str",
        "elasticPolicy": "ElasticPolicy",
        "runPolicy": "RunPolicy",
        "pytorchReplicaSpecs!": "dict(str, ReplicaSpec)",
    },
    "ElasticPolicy": {
        "minReplicas": "int",
        "maxReplicas": "int",
        "rdzvBackend": "str",
        "rdzvPort": "int",
        "rdzvHost": "str",
        "rdzvId": "str",
        "rdzvConf": "list[RdzvConf]",
        "standalone": "bool",
        "maxRestarts": "int",
        "nProcPerNode": "int",
        "metrics": "list[object]",
    },
    "RdzvConf": {"key": "str", "value": "str"},
    "RunPolicy": {
        "cleanPodPolicy": "str",
        "ttlSecondsAfterFinished": "int",
        "activeDeadlineSeconds": "int",
        "backoffLimit": "int",
        "schedulingPolicy": "SchedulingPolicy",
        "suspend": "bool",
        "managedBy": "str",
    },
    "SchedulingPolicy": {
        "minAvailable": "int",
        "queue": "str",
        "minResources": "quantities",
        "priorityClass": "str",
        "scheduleTimeoutSeconds": "int",
    },
    "ReplicaSpec": {"replicas": "int", "restartPolicy": "str", "template": "V1PodTemplateSpec"},
    "TrainJob": {"spec": "TrainJobSpec", "status": "object"},
    "TrainJobSpec": {  # of 2.2 and later
        "runtimeRef!": "RuntimeRef",
        "trainer": "Trainer",
        "initializer": "Initializer",
        "runtimePatches": "list[object]",
        "suspend": "bool",
        "activeDeadlineSeconds": "int",
        "managedBy": "str",
    },
    "RuntimeRef": {"name!": "str", "apiGroup": "str", "kind": "str"},
    "Trainer": {
        "image": "str",
        "command": "list[str]",
        "args": "list[str]",
        "env": "list[V1EnvVar]",
        "numNodes": "int",
        "resourcesPerNode": "V1ResourceRequirements",
        "numProcPerNode": "int",
    },
    "Initializer": {"dataset": "object", "model": "object"},
    "TrainingRuntime": {"spec": "TrainingRuntimeSpec"},
    "ClusterTrainingRuntime": {"spec": "TrainingRuntimeSpec"},
    "TrainingRuntimeSpec": {
        "mlPolicy": "MLPolicy",
        "podGroupPolicy": "object",
        "template!": "JobSetTemplateSpec",
    },
    "MLPolicy": {"numNodes": "int", "torch": "TorchPolicy", "mpi": "object"},
    "TorchPolicy": {"numProcPerNode": "object", "elasticPolicy": "object"},
    "JobSetTemplateSpec": {"metadata": "V1ObjectMeta", "spec": "JobSetSpec"},
    "JobSet": {"spec": "JobSetSpec", "status": "object"},
    "JobSetSpec": {
        "replicatedJobs": "list[ReplicatedJob]",
        "network": "object",
        "successPolicy": "object",
        "failurePolicy": "FailurePolicy",
        "startupPolicy": "object",
        "suspend": "bool",
        "coordinator": "object",
        "managedBy": "str",
        "ttlSecondsAfterFinished": "int",
        "volumeClaimPolicies": "list[object]",
    },
    "FailurePolicy": {"maxRestarts": "int", "restartStrategy": "str", "rules": "list[FailurePolicyRule]"},
    "FailurePolicyRule": {
        "name!": "str",
        "action!": "str",
        "onJobFailureReasons": "list[str]",
        "onJobFailureMessagePatterns": "list[str]",
        "targetReplicatedJobs": "list[str]",
    },
    "ReplicatedJob": {
        "name!": "str",
        "groupName": "str",
        "template!": "V1JobTemplateSpec",
        "replicas": "int",
        "dependsOn": "list[object]",
    },
}
SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


@functools.cache
def _schema(name: str) -> dict[str, tuple[str, bool]] | None:
    """JSON field -> (type, required); None where anything goes."""
    if name in SCHEMAS:
        found = {key.rstrip("!"): (kind, key.endswith("!")) for key, kind in SCHEMAS[name].items()}
        top = {"apiVersion": ("str", True), "kind": ("str", True), "metadata": ("V1ObjectMeta", True)}
        return top | found if any(name == resource.kind for resource in CUSTOM) else found
    from kubernetes import client

    model = getattr(client, name, None)
    if model is None or not hasattr(model, "openapi_types"):
        return None
    fields = {}
    for attribute, json_name in model.attribute_map.items():
        kind = model.openapi_types[attribute].replace("List[", "list[").replace("Dict[str, ", "dict(str, ")
        kind = re.sub(r"^(dict\(str, .*)\]$", r"\1)", kind)
        required = _required(model, attribute, json_name)
        fields[json_name] = ("quantities" if json_name in ("limits", "requests") else kind, required)
    return fields


def _required(model: Any, attribute: str, json_name: str) -> bool:
    if hasattr(model, "model_fields"):  # the client is written with pydantic from version 36 or so on
        return any(
            found.is_required() for found in model.model_fields.values() if found.serialization_alias == json_name
        )
    from kubernetes import client

    empty = model.__new__(model)
    empty.local_vars_configuration = client.Configuration()
    try:
        setattr(empty, attribute, None)
    except ValueError:  # the model refuses None where the API needs a value
        return True
    return False


@dataclass
class Problems:
    unknown: list[str] = field(default_factory=list)  # paths that the schema does not have
    types: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def _prune(value: Any, kind: str, path: str, problems: Problems) -> None:
    """Collect what is wrong with ``value`` and take out what the schema does not have."""
    if value is None or kind in ("object", "datetime"):
        return
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            problems.types.append(f'{path}: Invalid value: "{JSON_TYPES[type(value)]}": must be of type array')
            return
        for index, item in enumerate(value):
            _prune(item, match[1], f"{path}[{index}]", problems)
    elif kind == "quantities" or (match := re.fullmatch(r"dict\(str, (.+)\)", kind)):
        if not isinstance(value, dict):
            problems.types.append(f'{path}: Invalid value: "{JSON_TYPES[type(value)]}": must be of type object')
            return
        for key, item in value.items():
            if kind == "quantities":
                if not re.fullmatch(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?", str(item)):
                    problems.types.append(f"{path}.{key}: Invalid value: {item!r}: is no quantity")
            else:
                _prune(item, match[1], f"{path}.{key}", problems)
    elif kind in SCALARS:
        wrong = not isinstance(value, SCALARS[kind]) or (kind != "bool" and isinstance(value, bool))
        if wrong:
            names = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}
            problems.types.append(
                f'{path}: Invalid value: "{JSON_TYPES[type(value)]}": {path} in body must be of type {names[kind]}'
            )
    else:
        schema = _schema(kind)
        if schema is None:
            return
        if not isinstance(value, dict):
            problems.types.append(f'{path}: Invalid value: "{JSON_TYPES[type(value)]}": must be of type object')
            return
        for key in list(value):
            inner = f"{path}.{key}" if path else key
            if key in schema:
                _prune(value[key], schema[key][0], inner, problems)
            else:
                problems.unknown.append(inner)
                del value[key]
        for key, (_, required) in schema.items():
            if required and value.get(key) is None:
                problems.missing.append(f"{path}.{key}: Required value" if path else f"{key}: Required value")


def webhook_pytorchjob(job: Object) -> list[str]:
    """What the training operator's admission webhook refuses and its schema lets pass."""
    found = []
    spec = job["spec"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]) or len(job["metadata"]["name"]) > 63:
        found.append("metadata.name: Invalid value: must be a DNS-1035 label")
    replicas = spec.get("pytorchReplicaSpecs") or {}
    if not replicas:
        found.append("spec.pytorchReplicaSpecs: Required value: must be specified")
    for role, replica in replicas.items():
        path = f"spec.pytorchReplicaSpecs[{role}]"
        if role not in ("Master", "Worker"):
            found.append(f'{path}: Unsupported value: "{role}": supported values: "Master", "Worker"')
        count = replica.get("replicas")
        if role == "Master" and count != 1:
            found.append(f"{path}.replicas: Forbidden: must be 1")
        if role == "Worker" and count is not None and count < 1:
            found.append(f"{path}.replicas: Forbidden: must be at least 1")
        containers = ((replica.get("template") or {}).get("spec") or {}).get("containers") or []
        if not containers:
            found.append(f"{path}.template.spec.containers: Required value: must be specified")
        found += [
            f"{path}.template.spec.containers[{index}].image: Required value: must be required"
            for index, container in enumerate(containers)
            if not container.get("image")
        ]
        if containers and not any(container.get("name") == "pytorch" for container in containers):
            found.append(f"{path}.template.spec.containers: Required value: must have at least one pytorch container")
    elastic = spec.get("elasticPolicy")
    if elastic is not None and "Worker" not in replicas:
        found.append("spec.elasticPolicy: Invalid value: must be used with Worker")
    if elastic and elastic.get("nProcPerNode") is not None and spec.get("nprocPerNode") is not None:
        found.append("spec.elasticPolicy.nProcPerNode: Forbidden: must not be used with spec.nprocPerNode")
    manager = (spec.get("runPolicy") or {}).get("managedBy")
    if manager not in (None, "kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue"):
        found.append(f'spec.runPolicy.managedBy: Unsupported value: "{manager}"')
    return found


def webhook_trainjob(job: Object) -> list[str]:
    trainer = job["spec"].get("trainer") or {}
    return [
        f"spec.trainer.env[{index}].name: Invalid value: {item['name']!r}: must not have the reserved name"
        for index, item in enumerate(trainer.get("env") or [])
        if str(item.get("name", "")).startswith("PET_")
    ]


WEBHOOKS: dict[str, tuple[str, Callable[[Object], list[str]]]] = {
    "PyTorchJob": ("validator.pytorchjob.training-operator.kubeflow.org", webhook_pytorchjob),
    "TrainJob": ("validator.trainjob.trainer.kubeflow.org", webhook_trainjob),
}
IMMUTABLE = {"TrainJob": ("runtimeRef", "trainer", "initializer"), "Job": ("template",)}


def pod_security_violations(spec: Object, level: str = "restricted") -> list[str]:
    """What Pod Security admission of this level says against a pod."""
    found = []
    shared = spec.get("securityContext") or {}
    if level not in ("baseline", "restricted"):
        return found
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            found.append(f"host namespaces ({key}=true)")
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
    for volume in spec.get("volumes") or []:
        kinds = set(volume) - {"name"}
        if "hostPath" in kinds:
            found.append(f'hostPath volumes (volume "{volume["name"]}")')
        elif level == "restricted" and kinds - allowed - {"secret"}:
            found.append(f'restricted volume types (volume "{volume["name"]}" uses {", ".join(sorted(kinds))})')
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        name, own = container["name"], container.get("securityContext") or {}
        capabilities = own.get("capabilities") or {}
        if own.get("privileged"):
            found.append(f'privileged (container "{name}" must not set securityContext.privileged=true)')
        if any(port.get("hostPort") for port in container.get("ports") or []):
            found.append(f'hostPort (container "{name}" uses a hostPort)')
        if level == "baseline":
            continue
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(
                f'allowPrivilegeEscalation != false (container "{name}" must set '
                "securityContext.allowPrivilegeEscalation=false)"
            )
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
            found.append(
                f'unrestricted capabilities (container "{name}" must set securityContext.capabilities.drop=["ALL"])'
            )
        if own.get("runAsNonRoot", shared.get("runAsNonRoot")) is not True:
            found.append(f'runAsNonRoot != true (pod or container "{name}" must set securityContext.runAsNonRoot=true)')
        if own.get("runAsUser", shared.get("runAsUser")) == 0:
            found.append(f'runAsUser=0 (pod or container "{name}" must not set runAsUser=0)')
        profile = own.get("seccompProfile") or shared.get("seccompProfile") or {}
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(
                f'seccompProfile (pod or container "{name}" must set securityContext.seccompProfile.type to '
                '"RuntimeDefault" or "Localhost")'
            )
    return found


# -- selectors and patches -------------------------------------------------------------------------------------------


def matches_labels(obj: Object, selector: str) -> bool:
    labels = obj["metadata"].get("labels") or {}
    for term in re.findall(r"[^,(]+(?:\([^)]*\))?", selector):
        if match := re.fullmatch(r"\s*(\S+)\s+(in|notin)\s+\(([^)]*)\)\s*", term):
            values = {value.strip() for value in match[3].split(",")}
            if (labels.get(match[1]) in values) != (match[2] == "in"):
                return False
        elif match := re.fullmatch(r"\s*([^!=\s]+)\s*(!=|==|=)\s*(\S*)\s*", term):
            if (labels.get(match[1]) == match[3]) != (match[2] != "!="):
                return False
        elif term.strip():
            key = term.strip()
            if (key.lstrip("!") in labels) != (not key.startswith("!")):
                return False
    return True


def matches_fields(obj: Object, selector: str) -> bool:
    for term in filter(None, selector.split(",")):
        path, operator, wanted = re.fullmatch(r"([^!=]+)(!=|==|=)(.*)", term).groups()  # type: ignore[union-attr]
        found: Any = obj
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if (str(found if found is not None else "") == wanted) != (operator != "!="):
            return False
    return True


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


# What tells the items of a list apart, where a strategic merge patch merges them; other lists are replaced whole.
MERGE_KEYS = {
    "containers": ("name",), "initContainers": ("name",), "volumes": ("name",), "env": ("name",), "secrets": ("name",),
    "imagePullSecrets": ("name",), "volumeMounts": ("mountPath",), "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "port"), "hostAliases": ("ip",), "topologySpreadConstraints": ("topologyKey",),
    "ownerReferences": ("uid",), "conditions": ("type",),
}  # fmt: skip


def strategic_patch(target: Any, patch: Any) -> Any:
    """As a merge patch, but the items of some lists merge with those that they name, however deep."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) and patch.get("$patch") != "replace" else {}
    if "$retainKeys" in patch:
        merged = {key: value for key, value in merged.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, list) and key in MERGE_KEYS:
            merged[key] = _merged_items(merged.get(key) or [], value, MERGE_KEYS[key])
        else:
            merged[key] = strategic_patch(merged.get(key), value)
    return merged


def _merged_items(items: list[Object], patches: list[Object], keys: tuple[str, ...]) -> list[Object]:
    if {"$patch": "replace"} in patches:
        return [item for item in patches if item != {"$patch": "replace"}]

    def identity(item: Object) -> Any:
        return next(item[key] for key in keys if key in item)

    found = {identity(item): item for item in items}
    for item in patches:
        if item.get("$patch") == "delete":
            found.pop(identity(item), None)
        else:
            found[identity(item)] = strategic_patch(found.get(identity(item)), item)
    return list(found.values())


def json_patch(target: Any, operations: list[Object]) -> Any:
    """RFC 6902 without copy and move."""
    document = copy.deepcopy(target)
    for operation in operations:
        *parents, last = [
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].lstrip("/").split("/")
        ]
        place = document
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        index: Any = last
        if isinstance(place, list):
            index = len(place) if last == "-" else int(last)
        if operation["op"] == "remove":
            del place[index]
        elif operation["op"] == "test":
            found = place[index] if isinstance(place, list) else place.get(index)
            if found != operation["value"]:
                raise ValueError(f"testing value {operation['path']} failed")
        elif operation["op"] == "add" and isinstance(place, list):
            place.insert(index, operation["value"])
        elif operation["op"] in ("add", "replace"):
            place[index] = operation["value"]
        else:
            raise ValueError(f"unsupported operation {operation['op']!r}")
    return document


def without_dropped(applied: Any, before: Any, now: Any) -> Any:
    """``applied`` without what a manager applied ``before`` and leaves out ``now``."""
    if not (isinstance(applied, dict) and isinstance(before, dict) and isinstance(now, dict)):
        return applied
    return {
        key: without_dropped(value, before.get(key), now.get(key)) if key in now else value
        for key, value in applied.items()
        if key in now or key not in before or isinstance(before[key], dict)
    }


# -- state -----------------------------------------------------------------------------------------------------------


class ApiError(Exception):
    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


class Request(NamedTuple):
    """One authorised question to the API, in RBAC's words."""

    verb: str
    group: str
    resource: str  # with its subresource: pods/log
    namespace: str
    name: str
    at: float  # time.monotonic()


@dataclass
class Fault:
    status: int  # 0 drops the connection without an answer
    count: int
    verb: str | None
    resource: str | None
    message: str
    retry_after: int | None


class Change(NamedTuple):
    version: int
    type: str  # ADDED, MODIFIED, DELETED
    key: Key
    object: Object
    before: Object | None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class FakeApiServer:
    """``with FakeApiServer() as server: ... server.url``.

    Args:
        namespaces: That exist from the start; name -> labels or a plain sequence of names.
        without: Plurals of custom resources whose CRD is not installed.
        port: 0 takes a free one.
        kubelet: True when something follows the pods: they then end gracefully instead of at once.
    """

    def __init__(
        self,
        *,
        namespaces: Mapping[str, Mapping[str, str]] | tuple[str, ...] = ("default", "training"),
        without: tuple[str, ...] = (),
        port: int = 0,
        kubelet: bool = False,
    ):
        self.resources = [r for r in (*CORE, *CUSTOM) if r.plural not in without]
        self.kubelet = kubelet
        self.requests: list[Request] = []
        self.paths: list[str] = []  # "METHOD path?query" of everything, in order
        self.token: str | None = None  # what a client must show, or 401
        self.users: dict[str, str] = {}  # token -> name of one whose rights come from the stored roles
        self.denied: set[tuple[str, str, str]] = set()  # (verb, group, resource), on top of the roles
        self.logs: dict[tuple[str, str, str], list[tuple[str, str]]] = {}  # pod's container -> (timestamp, line)
        self.webhook_down = False
        self._faults: list[Fault] = []
        self._objects: dict[Key, Object] = {}
        self._history: list[Change] = []
        self._applied: dict[tuple[Key, str], Object] = {}
        self._version = 1000
        self._oldest = 0  # watches from before this version get 410
        self._watch_round = 0  # a change of it ends all open streams without a word
        self._changed = threading.Condition(threading.RLock())
        self._port = port
        self._server: _Server | None = None
        for name in namespaces:
            labels = dict(namespaces[name]) if isinstance(namespaces, Mapping) else {}
            self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        for resource in self.resources:
            if resource in CUSTOM:
                self.create(_definition(resource))

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> FakeApiServer:
        handler = type("BoundHandler", (_Handler,), {"api": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port and cut all connections; what is stored stays."""
        server, self._server = self._server, None
        if server is not None:
            with self._changed:
                self._watch_round += 1
                self._changed.notify_all()
            server.shutdown()
            server.server_close()
            server.cut()

    def __enter__(self) -> FakeApiServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def write_kubeconfig(self, path: Path, *, namespace: str = "training", token: str | None = None) -> Path:
        """``token`` is written to a file beside it, which can be changed later."""
        user: Object = {}
        if token is not None:
            secret = path.with_suffix(".token")
            secret.write_text(token)
            user = {"tokenFile": str(secret)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": user}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": namespace}}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # -- faults -------------------------------------------------------------------------------------------------------

    def fail(
        self,
        status: int,
        *,
        count: int = 1,
        verb: str | None = None,
        resource: str | None = None,
        message: str = "injected by the test",
        retry_after: int | None = None,
    ) -> None:
        """Answer the next ``count`` requests of this kind with ``status``; 0 drops the connection."""
        with self._changed:
            self._faults.append(Fault(status, count, verb, resource, message, retry_after))

    def outage(self, seconds: float) -> None:
        """Refuse every connection for a while; returns at once."""
        self.stop()
        threading.Timer(seconds, self.start).start()

    def drop_streams(self) -> None:
        """Cut every open watch and log stream in the middle."""
        with self._changed:
            self._watch_round += 1
            self._changed.notify_all()

    def forget_history(self) -> None:
        """Compaction: whoever watches from an older version gets 410."""
        with self._changed:
            self._version += 1
            self._oldest = self._version
            self._history.clear()
            self._changed.notify_all()

    def deny(self, verb: str, group: str, resource: str) -> None:
        self.denied.add((verb, group, resource))

    # -- what tests look at -------------------------------------------------------------------------------------------

    def permissions_used(self) -> set[tuple[str, str, str]]:
        """(verb, group, resource/subresource) of everything that was asked: what a Role has to allow."""
        return {(r.verb, r.group, r.resource) for r in self.requests}

    def resource(self, kind: str) -> Resource:
        return next(r for r in self.resources if kind in (r.kind, r.plural))

    def find(self, kind: str, namespace: str = "training", *, labels: str = "") -> list[Object]:
        resource = self.resource(kind)
        with self._changed:
            return [
                copy.deepcopy(obj)
                for key, obj in self._objects.items()
                if (key.group, key.plural) == (resource.group, resource.plural)
                and (not resource.namespaced or not namespace or key.namespace == namespace)
                and matches_labels(obj, labels)
            ]

    def get(self, kind: str, name: str, namespace: str = "training") -> Object | None:
        with self._changed:
            found = self._objects.get(self._key(self.resource(kind), namespace, name))
            return copy.deepcopy(found) if found else None

    # -- what controllers and tests do, past authorisation and faults -------------------------------------------------

    def create(self, obj: Object, namespace: str = "training") -> Object:
        resource = next(r for r in self.resources if (r.kind, r.api_version) == (obj["kind"], obj["apiVersion"]))
        obj = copy.deepcopy(obj)
        status = obj.get("status")
        made = self.add(resource, obj["metadata"].get("namespace") or namespace, obj, strict=True)
        if status:
            return self.set_status(resource.kind, made["metadata"]["name"], status, made["metadata"].get("namespace"))
        return made

    def set_status(self, kind: str, name: str, status: Object, namespace: str | None = "training") -> Object:
        """Replace the status."""
        return self.update(kind, name, lambda obj: obj.update(status=copy.deepcopy(status)), namespace)

    def update(
        self, kind: str, name: str, change: Callable[[Object], Any], namespace: str | None = "training"
    ) -> Object:
        """Change an object in place, as its controller would."""
        with self._changed:
            key = self._key(self.resource(kind), namespace or "", name)
            before = self._objects[key]
            obj = copy.deepcopy(before)
            change(obj)
            self._commit("MODIFIED", key, obj, before)
            return copy.deepcopy(obj)

    def delete(self, kind: str, name: str, namespace: str = "training", *, force: bool = False) -> None:
        with self._changed:
            self.remove(self.resource(kind), namespace, name, {"gracePeriodSeconds": 0} if force else {})

    def event(self, obj: Object, reason: str, message: str, *, type: str = "Warning") -> None:
        metadata = obj["metadata"]
        self.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:12]}"},
                "involvedObject": {
                    "apiVersion": obj["apiVersion"],
                    "kind": obj["kind"],
                    "name": metadata["name"],
                    "namespace": metadata.get("namespace"),
                    "uid": metadata["uid"],
                },
                "reason": reason,
                "message": message,
                "type": type,
                "count": 1,
                "firstTimestamp": now(),
                "lastTimestamp": now(),
            },
            metadata.get("namespace") or "default",
        )

    def log(self, pod: str, line: str, *, container: str, namespace: str = "training") -> None:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"
        with self._changed:
            self.logs.setdefault((namespace, pod, container), []).append((stamp, line))
            self._changed.notify_all()

    def wait_for(self, happened: Callable[[], Any], seconds: float = 20.0) -> Any:
        """The first true value of ``happened``, asked at every change."""
        end = time.monotonic() + seconds
        with self._changed:
            while not (found := happened()):
                if time.monotonic() > end:
                    raise TimeoutError("what the test waits for did not happen")
                self._changed.wait(0.05)
            return found

    # -- the store ----------------------------------------------------------------------------------------------------

    def _key(self, resource: Resource, namespace: str, name: str) -> Key:
        return Key(resource.group, resource.plural, namespace if resource.namespaced else "", name)

    def _commit(self, type: str, key: Key, obj: Object, before: Object | None) -> None:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        if before is not None and before.get("spec") != obj.get("spec"):
            obj["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
        if type == "DELETED":
            self._objects.pop(key, None)
        else:
            self._objects[key] = obj
        self._history.append(Change(self._version, type, key, copy.deepcopy(obj), before))
        self._changed.notify_all()

    def not_found(self, resource: Resource, name: str) -> ApiError:
        return ApiError(404, "NotFound", f'{resource.qualified} "{name}" not found')

    def load(self, resource: Resource, namespace: str, name: str) -> Object:
        found = self._objects.get(self._key(resource, namespace, name))
        if found is None:
            raise self.not_found(resource, name)
        return found

    def validate(self, resource: Resource, obj: Object, *, strict: bool, before: Object | None = None) -> list[str]:
        """Prunes what the schema does not have; the warnings, or the error that the real server would give."""
        name = (obj.get("metadata") or {}).get("name", "")
        problems = Problems()
        _prune(obj, resource.kind if resource.kind in SCHEMAS else f"V1{resource.kind}", "", problems)
        if problems.unknown and strict:
            message = ", ".join(f'unknown field "{path}"' for path in problems.unknown)
            raise ApiError(400, "BadRequest", f"strict decoding error: {message}")
        kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
        if problems.types and resource in CORE:
            raise ApiError(400, "BadRequest", f"{resource.kind} in version {resource.version!r} cannot be handled as a "
                           f"{resource.kind}: {'; '.join(problems.types)}")  # fmt: skip
        wrong = [*problems.types, *problems.missing]
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.:]*[a-z0-9])?", name) or len(name) > 253:
            wrong.append(
                f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
                "alphanumeric characters, '-' or '.'"
            )
        if before is not None:
            wrong += [
                f"spec.{key}: Invalid value: field is immutable"
                for key in IMMUTABLE.get(resource.kind, ())
                if before.get("spec", {}).get(key) != obj.get("spec", {}).get(key)
            ]
        if wrong:
            raise ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {"; ".join(wrong)}')
        if resource.kind in WEBHOOKS:
            webhook, check = WEBHOOKS[resource.kind]
            if self.webhook_down:
                raise ApiError(500, "InternalError", f'Internal error occurred: failed calling webhook "{webhook}": '
                               "failed to call webhook: no endpoints available for service")  # fmt: skip
            if refused := check(obj):
                text = refused[0] if len(refused) == 1 else f"[{', '.join(refused)}]"
                raise ApiError(403, "Forbidden", f'admission webhook "{webhook}" denied the request: {text}')
        return [f'unknown field "{path}"' for path in problems.unknown]

    def add(
        self, resource: Resource, namespace: str, obj: Object, *, strict: bool = False, dry_run: bool = False
    ) -> Object:
        metadata = obj.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
        if (obj.get("kind"), obj.get("apiVersion")) != (resource.kind, resource.api_version):
            raise ApiError(400, "BadRequest", f"the API version in the data ({obj.get('apiVersion')}) does not match "
                           f"the expected API version ({resource.api_version})")  # fmt: skip
        if metadata.get("resourceVersion"):
            raise ApiError(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        self.warnings = self.validate(resource, obj, strict=strict)
        with self._changed:
            key = self._key(resource, namespace, metadata["name"])
            if resource.namespaced and self._key(self.resource("Namespace"), "", namespace) not in self._objects:
                raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
            if key in self._objects:
                message = f'{resource.qualified} "{metadata["name"]}" already exists'
                raise ApiError(409, "AlreadyExists", message)
            if resource.kind == "Pod":
                self._admit_pod(namespace, obj)
            if resource.status:
                obj.pop("status", None)
            if resource.kind == "Pod":
                obj["status"] = {"phase": "Pending"}
            elif resource.kind == "Secret":
                plain = obj.pop("stringData", None) or {}
                encoded = {k: base64.b64encode(v.encode()).decode() for k, v in plain.items()}
                obj["data"] = {**(obj.get("data") or {}), **encoded}
            metadata.pop("managedFields", None)
            metadata.update(uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
            if resource.namespaced:
                metadata["namespace"] = namespace
            if dry_run:
                return obj
            self._commit("ADDED", key, obj, None)
            owners = {reference["uid"] for reference in metadata.get("ownerReferences") or []}
            if (
                resource.kind == "Pod"
                and owners
                and not owners & {o["metadata"]["uid"] for o in self._objects.values()}
            ):
                self._drop(key, obj)  # its owner went while it was made
            return copy.deepcopy(obj)

    def _admit_pod(self, namespace: str, pod: Object) -> None:
        labels = self.load(self.resource("Namespace"), "", namespace)["metadata"].get("labels") or {}
        level = labels.get("pod-security.kubernetes.io/enforce", "privileged")
        if violations := pod_security_violations(pod["spec"], level):
            raise ApiError(403, "Forbidden", f'pods "{pod["metadata"]["name"]}" is forbidden: violates PodSecurity '
                           f'"{level}:latest": {", ".join(violations)}')  # fmt: skip

    def replace(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Callable[[Object], Object],
        *,
        subresource: str = "",
        strict: bool = False,
        dry_run: bool = False,
    ) -> Object:
        """Store what ``change`` makes of the object, with the rules of an update."""
        with self._changed:
            before = self.load(resource, namespace, name)
            obj = change(copy.deepcopy(before))
            wanted = obj.get("metadata", {}).get("resourceVersion")
            if wanted and wanted != before["metadata"]["resourceVersion"]:
                raise ApiError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {resource.qualified} "{name}": the object has been modified; '
                    "please apply your changes to the latest version and try again",
                )
            if subresource == "status":
                obj = {**copy.deepcopy(before), "status": obj.get("status", {})}
            else:
                if resource.status:
                    obj.pop("status", None)
                    if "status" in before:
                        obj["status"] = copy.deepcopy(before["status"])
                self.warnings = self.validate(resource, obj, strict=strict, before=before)
            for fixed in ("uid", "creationTimestamp", "name", "namespace", "generation", "deletionTimestamp"):
                if fixed in before["metadata"]:
                    obj["metadata"][fixed] = before["metadata"][fixed]
            if dry_run:
                return obj
            obj["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
            if obj == before:
                return copy.deepcopy(obj)
            key = self._key(resource, namespace, name)
            if obj["metadata"].get("deletionTimestamp") and not obj["metadata"].get("finalizers"):
                self._drop(key, obj)
            else:
                self._commit("MODIFIED", key, obj, before)
            return copy.deepcopy(obj)

    def apply(
        self, resource: Resource, namespace: str, name: str, obj: Object, manager: str, *, strict: bool, dry_run: bool
    ) -> Object:
        """Server-side apply: what this manager applied before and leaves out now goes."""
        with self._changed:
            key = self._key(resource, namespace, name)
            before = self._applied.get((key, manager), {})
            if not dry_run:
                self._applied[key, manager] = copy.deepcopy(obj)
            if key not in self._objects:
                return self.add(resource, namespace, obj, strict=strict, dry_run=dry_run)
            return self.replace(
                resource,
                namespace,
                name,
                lambda current: merge_patch(without_dropped(current, before, obj), obj),
                strict=strict,
                dry_run=dry_run,
            )

    def remove(self, resource: Resource, namespace: str, name: str, options: Object) -> Object:
        """Delete, or mark as being deleted what has finalizers, a grace period or, in foreground, dependents."""
        with self._changed:
            obj = self.load(resource, namespace, name)
            wanted = (options.get("preconditions") or {}).get("uid")
            if wanted and wanted != obj["metadata"]["uid"]:
                raise ApiError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {resource.qualified} "{name}": Precondition failed: UID in '
                    f"precondition: {wanted}, UID in object meta: {obj['metadata']['uid']}",
                )
            key = self._key(resource, namespace, name)
            grace = options.get("gracePeriodSeconds")
            if resource.kind == "Pod" and self.kubelet and grace != 0:
                if "deletionTimestamp" not in obj["metadata"]:
                    grace = grace if grace is not None else obj["spec"].get("terminationGracePeriodSeconds", 30)
                    self._mark(key, deletionTimestamp=now(), deletionGracePeriodSeconds=grace)
            elif options.get("propagationPolicy") == "Foreground" and self._dependents(obj):
                finalizers = [*(obj["metadata"].get("finalizers") or []), "foregroundDeletion"]
                self._mark(key, deletionTimestamp=now(), finalizers=finalizers)
                self._collect(obj)
            elif obj["metadata"].get("finalizers"):
                self._mark(key, deletionTimestamp=now())
            else:
                self._drop(key, obj)
            return self._objects.get(key, obj)

    def _mark(self, key: Key, **metadata: Any) -> None:
        before = self._objects[key]
        obj = copy.deepcopy(before)
        obj["metadata"].update(metadata)
        self._commit("MODIFIED", key, obj, before)

    def _drop(self, key: Key, obj: Object) -> None:
        before = self._objects.get(key)
        self._commit("DELETED", key, copy.deepcopy(obj), before)
        if key.plural == "namespaces":
            for other in [k for k in self._objects if k.namespace == key.name]:
                self._drop(other, self._objects[other])
        self._collect(obj)
        for owner in obj["metadata"].get("ownerReferences") or []:  # an owner that waits for its last dependent
            for owner_key, candidate in list(self._objects.items()):
                finalizers = candidate["metadata"].get("finalizers") or []
                if (
                    candidate["metadata"]["uid"] == owner["uid"]
                    and "foregroundDeletion" in finalizers
                    and not self._dependents(candidate)
                ):
                    left = [name for name in finalizers if name != "foregroundDeletion"]
                    self._mark(owner_key, finalizers=left)
                    if not left:
                        self._drop(owner_key, self._objects[owner_key])

    def _dependents(self, obj: Object) -> list[Key]:
        return [
            key
            for key, other in self._objects.items()
            if any(owner["uid"] == obj["metadata"]["uid"] for owner in other["metadata"].get("ownerReferences") or [])
        ]

    def _collect(self, owner: Object) -> None:
        """Garbage collection: dependents whose every owner is gone or going."""
        for key in self._dependents(owner):
            obj = self._objects.get(key)
            if obj is None:
                continue
            owners = {reference["uid"] for reference in obj["metadata"]["ownerReferences"]}
            alive = {
                other["metadata"]["uid"]
                for other in self._objects.values()
                if not other["metadata"].get("deletionTimestamp")
            }
            if owners & alive:
                continue
            resource = next(r for r in self.resources if (r.group, r.plural) == (key.group, key.plural))
            self.remove(resource, key.namespace, key.name, {"propagationPolicy": "Background"})

    # -- reading ------------------------------------------------------------------------------------------------------

    def selects(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> Callable[[Key, Object], bool]:
        labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")

        def selected(key: Key, obj: Object) -> bool:
            return (
                (key.group, key.plural) == (resource.group, resource.plural)
                and (not namespace or key.namespace == namespace)
                and matches_labels(obj, labels)
                and matches_fields(obj, fields)
            )

        return selected

    def listing(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> Object:
        with self._changed:
            selected = self.selects(resource, namespace, query)
            items = [copy.deepcopy(obj) for key, obj in sorted(self._objects.items()) if selected(key, obj)]
            metadata: Object = {"resourceVersion": str(self._version)}
            limit, start = int(query.get("limit") or 0), int(query.get("continue") or 0)
            if limit and len(items) > start + limit:
                metadata["continue"] = str(start + limit)
            items = items[start : start + limit] if limit else items[start:]
        return {
            "kind": f"{resource.kind}List",
            "apiVersion": resource.api_version,
            "metadata": metadata,
            "items": items,
        }

    def watch(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> Iterator[Object]:
        """Events until ``timeoutSeconds``; stops without one when the streams are dropped (then raises)."""
        selected = self.selects(resource, namespace, query)
        end = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        started = query.get("resourceVersion") or "0"
        with self._changed:
            watch_round = self._watch_round
            version = int(started)
            if version == 0:
                version = self._version
                present = [copy.deepcopy(o) for k, o in sorted(self._objects.items()) if selected(k, o)]
            else:
                present = []
        yield from ({"type": "ADDED", "object": obj} for obj in present)
        while True:
            with self._changed:
                if watch_round != self._watch_round:
                    raise ConnectionAbortedError
                if version < self._oldest:
                    message = f"too old resource version: {version} ({self._oldest})"
                    yield {"type": "ERROR", "object": _status(410, "Expired", message)}
                    return
                events = []
                for change in self._history[self._first_after(version) :]:
                    is_in = change.type != "DELETED" and selected(change.key, change.object)
                    was_in = change.before is not None and selected(change.key, change.before)
                    if is_in:
                        events.append({"type": "MODIFIED" if was_in else "ADDED", "object": change.object})
                    elif was_in:
                        events.append({"type": "DELETED", "object": change.object})
                version = max(version, self._version)
                if not events:
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(min(left, 1.0))
            yield from events
        if query.get("allowWatchBookmarks", "").lower() in ("true", "1"):
            bookmark = {
                "kind": resource.kind,
                "apiVersion": resource.api_version,
                "metadata": {"resourceVersion": str(version)},
            }
            yield {"type": "BOOKMARK", "object": bookmark}

    def _first_after(self, version: int) -> int:
        low, high = 0, len(self._history)
        while low < high:
            middle = (low + high) // 2
            if self._history[middle].version > version:
                high = middle
            else:
                low = middle + 1
        return low

    def pod_log(self, namespace: str, name: str, query: Mapping[str, str]) -> Iterator[str]:
        pod = self.load(self.resource("Pod"), namespace, name)
        containers = [container["name"] for container in pod["spec"]["containers"]]
        container = query.get("container") or containers[0]
        if container not in containers:
            raise ApiError(400, "BadRequest", f"container {container} is not valid for pod {name}")
        states = {s["name"]: s.get("state", {}) for s in pod.get("status", {}).get("containerStatuses") or []}
        state = states.get(container, {})
        if "waiting" in state or (not state and pod["status"]["phase"] == "Pending"):
            reason = state.get("waiting", {}).get("reason", "ContainerCreating")
            raise ApiError(400, "BadRequest", f'container "{container}" in pod "{name}" is waiting to start: {reason}')
        return self._log_lines(pod, container, query)

    def _log_lines(self, pod: Object, container: str, query: Mapping[str, str]) -> Iterator[str]:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        resource = self.resource("Pod")
        follow = query.get("follow", "").lower() in ("true", "1")
        stamps = query.get("timestamps", "").lower() in ("true", "1")
        since = query.get("sinceTime", "")
        lines = self.logs.get((namespace, name, container), [])
        position = max(0, len(lines) - int(query["tailLines"])) if query.get("tailLines") else 0
        with self._changed:
            stream_round = self._watch_round
        while True:
            with self._changed:
                if stream_round != self._watch_round:
                    raise ConnectionAbortedError
                lines = self.logs.get((namespace, name, container), [])
                fresh = [(stamp, line) for stamp, line in lines[position:] if stamp[:19] >= since[:19]]
                position = len(lines)
                if not fresh:
                    current = self._objects.get(self._key(resource, namespace, name))
                    ended = (
                        current is None
                        or current["metadata"]["uid"] != pod["metadata"]["uid"]
                        or current.get("status", {}).get("phase") in ("Succeeded", "Failed")
                    )
                    if not follow or ended:
                        return
                    self._changed.wait(0.5)
            yield from (f"{stamp} {line}\n" if stamps else f"{line}\n" for stamp, line in fresh)

    # -- access -------------------------------------------------------------------------------------------------------

    def allows(self, user: str | None, verb: str, group: str, resource: str, namespace: str, name: str = "") -> bool:
        if (verb, group, resource) in self.denied:
            return False
        if user is None:
            return True
        with self._changed:
            for rule in self._rules(user, namespace):
                if (
                    {verb, "*"} & set(rule.get("verbs") or [])
                    and {group, "*"} & set(rule.get("apiGroups") or [])
                    and {resource, "*"} & set(rule.get("resources") or [])
                    and (not rule.get("resourceNames") or name in rule["resourceNames"])
                ):
                    return True
        return False

    def _rules(self, user: str, namespace: str) -> Iterator[Object]:
        _, _, account_namespace, account = [*user.split(":"), "", "", "", ""][:4]
        for binding in [*self.find("RoleBinding", namespace), *self.find("ClusterRoleBinding")]:
            for subject in binding.get("subjects") or []:
                subject_namespace = subject.get("namespace") or binding["metadata"].get("namespace")
                if subject["kind"] == "ServiceAccount":
                    bound = (subject_namespace, subject["name"]) == (account_namespace, account)
                else:
                    bound = subject["name"] == user
                if bound:
                    role = self.get(binding["roleRef"]["kind"], binding["roleRef"]["name"], namespace)
                    yield from (role or {}).get("rules") or []

    def take_fault(self, verb: str, resource: str) -> Fault | None:
        with self._changed:
            for fault in self._faults:
                if fault.verb in (None, verb) and fault.resource in (None, resource):
                    fault.count -= 1
                    if fault.count <= 0:
                        self._faults.remove(fault)
                    return fault
        return None


def _status(code: int, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _definition(resource: Resource) -> Object:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": resource.qualified},
        "spec": {
            "group": resource.group,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "names": {"plural": resource.plural, "singular": resource.kind.lower(), "kind": resource.kind},
            "versions": [{"name": resource.version, "served": True, "storage": True}],
        },
        "status": {
            "conditions": [
                {"type": "Established", "status": "True", "reason": "InitialNamesAccepted", "lastTransitionTime": now()}
            ]
        },
    }


# -- HTTP ------------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any):
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class Route(NamedTuple):
    resource: Resource
    namespace: str
    name: str
    subresource: str


class _Handler(BaseHTTPRequestHandler):
    api: ClassVar[FakeApiServer]
    protocol_version = "HTTP/1.1"
    timeout = 120
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        self._answer("get")

    def do_POST(self) -> None:
        self._answer("create")

    def do_PUT(self) -> None:
        self._answer("update")

    def do_PATCH(self) -> None:
        self._answer("patch")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.api.paths.append(f"{self.command} {self.path}")
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            user = self._authenticate()
            if self.command == "GET" and (found := self._discover(parts.path)) is not None:
                return self._send(found)
            if parts.path.startswith("/apis/authorization.k8s.io/v1/selfsubject") and self.command == "POST":
                return self._send(self._review(parts.path, self._parse(raw), user), 201)
            route = self._route(parts.path)
            return self._serve(verb, route, raw, user)
        except ApiError as error:
            self._send(_status(error.status, error.reason, str(error)), error.status, error.headers)
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True
        return None

    def _send(self, value: Object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)

    def _authenticate(self) -> str | None:
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if shown in self.api.users:
            return self.api.users[shown]
        if self.api.token is not None and shown != self.api.token:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return None

    def _discover(self, path: str) -> Object | None:
        resources = self.api.resources
        groups = sorted({(r.group, r.version) for r in resources if r.group})
        if path in ("/healthz", "/livez", "/readyz"):
            return {"status": "ok"}
        if path == "/version":
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g, v) for g, v in groups]}
        if path == "/openapi/v3":
            names = ["api/v1", *(f"apis/{group}/{version}" for group, version in groups)]
            return {"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in names}}
        if match := re.fullmatch(r"/openapi/v3/(?:api/v1|apis/([^/]+)/([^/]+))", path):
            here = [r for r in resources if (r.group, r.version) == (match[1] or "", match[2] or "v1")]
            return _openapi(here)
        if (match := re.fullmatch(r"/apis/([^/]+)", path)) and any(g == match[1] for g, _ in groups):
            return {"kind": "APIGroup", "apiVersion": "v1"} | next(_group(g, v) for g, v in groups if g == match[1])
        if match := re.fullmatch(r"/(?:api/(v1)|apis/([^/]+)/([^/]+))", path):
            here = [r for r in resources if (r.group, r.version) == (match[2] or "", match[1] or match[3])]
            return _resource_list(here) if here else None
        return None

    def _route(self, path: str) -> Route:
        match = re.fullmatch(
            r"/(?:api/(v1)|apis/([^/]+)/([^/]+))(?:/namespaces/([^/]+)(?=/))?/([^/]+)(?:/([^/]+))?(?:/([^/]+))?", path
        )
        if match and match[4] and match[1] and match[5] in ("status", "finalize"):  # namespaces/x/status
            match = re.fullmatch(r"/api/(v1)()()()/(namespaces)/([^/]+)/([^/]+)", path)
        if match:
            group, version = match[2] or "", match[1] or match[3]
            for resource in self.api.resources:
                if (resource.group, resource.version, resource.plural) == (group, version, match[5]):
                    return Route(resource, match[4] or "", match[6] or "", match[7] or "")
        raise ApiError(404, "NotFound", "the server could not find the requested resource")

    def _review(self, path: str, review: Object, user: str | None) -> Object:
        if not path.endswith("selfsubjectaccessreviews"):
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        asked = review["spec"].get("resourceAttributes") or {}
        resource = asked.get("resource", "")
        if asked.get("subresource"):
            resource += f"/{asked['subresource']}"
        namespace, name = asked.get("namespace", ""), asked.get("name", "")
        allowed = self.api.allows(user, asked.get("verb", ""), asked.get("group", ""), resource, namespace, name)
        return review | {"status": {"allowed": allowed, "denied": not allowed and user is None}}

    def _serve(self, verb: str, route: Route, raw: bytes, user: str | None) -> None:
        api, query = self.api, self.query
        resource, namespace, name, subresource = route
        if verb == "get" and not name:
            verb = "watch" if query.get("watch", "").lower() in ("true", "1") else "list"
        if verb == "delete" and not name:
            verb = "deletecollection"
        plural = f"{resource.plural}/{subresource}" if subresource else resource.plural
        api.requests.append(Request(verb, resource.group, plural, namespace, name, time.monotonic()))
        fault = api.take_fault(verb, plural)
        if fault is not None:
            if fault.status == 0:
                raise ConnectionAbortedError
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            reasons = {410: "Expired", 422: "Invalid", 429: "TooManyRequests", 403: "Forbidden"}
            raise ApiError(fault.status, reasons.get(fault.status, "InternalError"), fault.message, headers)
        if not api.allows(user, verb, resource.group, plural, namespace, name):
            subject = f'{resource.qualified} "{name}"' if name else resource.qualified
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            who = user or "system:serviceaccount:training:pipeline-runner"
            raise ApiError(403, "Forbidden", f'{subject} is forbidden: User "{who}" cannot {verb} resource "{plural}" '
                           f'in API group "{resource.group}" {where}')  # fmt: skip
        if subresource == "log":
            return self._stream_text(api.pod_log(namespace, name, query))
        if subresource not in ("", "status") or (subresource == "status" and not resource.status):
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        if verb == "watch":
            if query.get("sendInitialEvents"):  # as a server without WatchList: kubectl falls back to list and watch
                raise ApiError(422, "Invalid", "sendInitialEvents is forbidden for watch unless the WatchList feature "
                               "gate is enabled")  # fmt: skip
            return self._stream_events(api.watch(resource, namespace, query))
        if verb == "list":
            return self._send(api.listing(resource, namespace, query))
        if verb == "get":
            with api._changed:
                found = copy.deepcopy(api.load(resource, namespace, name))
            return self._send(found)
        body = self._parse(raw)
        strict, dry_run = query.get("fieldValidation") == "Strict", bool(query.get("dryRun"))
        api.warnings: list[str] = []  # type: ignore[misc]
        if verb == "create":
            made = api.add(resource, namespace, body, strict=strict, dry_run=dry_run)
            return self._send(made, 201, self._warned(api.warnings))
        if verb == "update":
            options: Any = {"subresource": subresource, "strict": strict, "dry_run": dry_run}
            made = api.replace(resource, namespace, name, lambda _: body, **options)
            return self._send(made, 200, self._warned(api.warnings))
        if verb == "patch":
            return self._patch(route, body, strict=strict, dry_run=dry_run)
        if verb == "deletecollection":
            for item in api.listing(resource, namespace, query)["items"]:
                api.remove(resource, item["metadata"].get("namespace", ""), item["metadata"]["name"], body)
            return self._send({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
        options = {key: query[key] for key in ("propagationPolicy",) if key in query} | body
        if "gracePeriodSeconds" in query:
            options["gracePeriodSeconds"] = int(query["gracePeriodSeconds"])
        left = api.remove(resource, namespace, name, options)
        if api.get(resource.kind, name, namespace) is not None:
            return self._send(left)
        details = {"name": name, "group": resource.group, "kind": resource.plural, "uid": left["metadata"]["uid"]}
        return self._send(
            {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        )

    def _patch(self, route: Route, body: Any, *, strict: bool, dry_run: bool) -> None:
        api = self.api
        resource, namespace, name, subresource = route
        content = self.headers.get("Content-Type", "").split(";")[0]
        if content == "application/apply-patch+yaml" and not subresource:
            manager = self.query.get("fieldManager", "")
            made = api.apply(resource, namespace, name, body, manager, strict=strict, dry_run=dry_run)
            return self._send(made, 200, self._warned(api.warnings))
        patches: dict[str, Callable[[Any, Any], Any]] = {
            "application/json-patch+json": json_patch,
            "application/merge-patch+json": merge_patch,
            "application/apply-patch+yaml": merge_patch,
            "application/strategic-merge-patch+json": strategic_patch,
        }
        if content not in patches or (content.startswith("application/strategic") and resource in CUSTOM):
            raise ApiError(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {content}")

        def change(current: Object) -> Object:
            try:
                changed: Object = patches[content](current, body)
            except (KeyError, IndexError, ValueError, TypeError, StopIteration) as error:
                text = f"the server rejected our request due to an error in our request: {error}"
                raise ApiError(422, "Invalid", text) from error
            return changed

        options: Any = {"subresource": subresource, "strict": strict, "dry_run": dry_run}
        made = api.replace(resource, namespace, name, change, **options)
        return self._send(made, 200, self._warned(api.warnings))

    def _parse(self, raw: bytes) -> Any:
        if "protobuf" in self.headers.get("Content-Type", ""):
            raise ApiError(415, "UnsupportedMediaType", "the body of the request was in an unknown format: protobuf; "
                           "this server of tests reads JSON and YAML: kubectl create ... --dry-run=client -o yaml | "
                           "kubectl apply -f -")  # fmt: skip
        if not raw:
            return {}
        try:
            return json.loads(raw)
        except ValueError:
            return yaml.safe_load(raw)

    @staticmethod
    def _warned(warnings: list[str]) -> dict[str, str]:
        return {"Warning": ", ".join(f'299 - "{json.dumps(text)[1:-1]}"' for text in warnings)} if warnings else {}

    def _start_stream(self, content: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _stream_events(self, events: Iterator[Object]) -> None:
        self._start_stream("application/json")
        for event in events:
            self._chunk(json.dumps(event).encode() + b"\n")
        self._chunk(b"")

    def _stream_text(self, lines: Iterator[str]) -> None:
        self._start_stream("text/plain")
        for line in lines:
            self._chunk(line.encode())
        self._chunk(b"")


def _group(group: str, version: str) -> Object:
    this = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [this], "preferredVersion": this}


def _resource_list(resources: list[Resource]) -> Object:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    found: list[Object] = []
    for resource in resources:
        common = {"kind": resource.kind, "namespaced": resource.namespaced}
        names = {"singularName": resource.kind.lower(), "shortNames": SHORT_NAMES.get(resource.plural, [])}
        found.append({"name": resource.plural, "verbs": verbs} | names | common)
        if resource.status:
            found.append(
                {"name": f"{resource.plural}/status", "singularName": "", "verbs": ["get", "patch", "update"]} | common
            )
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": resources[0].api_version,
        "resources": found,
    }


def _openapi(resources: list[Resource]) -> Object:
    """As much as kubectl needs to leave the validation of fields to the server."""
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    paths = {
        f"/{resource.plural}/{{name}}": {
            "patch": {
                "parameters": parameters,
                "responses": {},
                "x-kubernetes-group-version-kind": {
                    "group": resource.group,
                    "version": resource.version,
                    "kind": resource.kind,
                },
            }
        }
        for resource in resources
    }
    return {"openapi": "3.0.0", "info": {"title": "fake", "version": "1"}, "paths": paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--namespace", action="append", default=["default", "training"])
    arguments = parser.parse_args()
    with FakeApiServer(port=arguments.port, namespaces=tuple(arguments.namespace)) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
