"""What the jobs of all operators have in common: the pod that trains, its safety, and how it is written as YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from hjepa.adapters.cluster.spec import LABELS, SPEC_HASH, TrainSpec, spec_hash
from hjepa.config import ClusterConfig, misplaced_variables
from hjepa.errors import UserError

Manifest = dict[str, Any]

USER_ID = 10001  # without an entry in /etc/passwd: the images run under any
FATAL_EXIT_CODES = (2, 13)  # the user's mistake, and a failure that a retry would repeat
_WRITABLE = "/tmp"  # beside /dev/shm
# The user id has neither a name nor a home.
_HOME = {
    "HOME": _WRITABLE,
    "HJEPA_HOME": f"{_WRITABLE}/hjepa",
    "USER": "hjepa",
    "XDG_CACHE_HOME": f"{_WRITABLE}/.cache",
    "TORCHINDUCTOR_CACHE_DIR": f"{_WRITABLE}/.cache/inductor",
    "TRITON_CACHE_DIR": f"{_WRITABLE}/.cache/triton",
    "MPLCONFIGDIR": f"{_WRITABLE}/.cache/matplotlib",
    "PYTHONUNBUFFERED": "1",
}
_UNITS: dict[str, float] = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)
}


def pod_template(spec: TrainSpec, *, container: str, env: Sequence[Manifest] = (), **pod: Any) -> Manifest:
    """One node of the job.

    Args:
        container: The name by which the operator knows the training container.
        env: Variables of the rendezvous, as Kubernetes writes them.
        pod: More fields of the pod's spec.

    Raises:
        UserError: if ``spec.env`` holds a credential, or a variable that the rendezvous depends on; or if /dev/shm
            is as large as the node's memory, of which it is a part.
    """
    cluster: ClusterConfig = spec.cluster
    if found := misplaced_variables(spec.env):
        raise UserError("; ".join(found))
    if amount(cluster.shm) >= amount(cluster.memory):
        raise UserError(
            f"cluster.shm is {cluster.shm} and cluster.memory {cluster.memory}: what lies in /dev/shm counts as "
            "memory, so the pod would be killed before it is full. Raise memory, or lower shm"
        )
    requests = {"cpu": cluster.cpu, "memory": cluster.memory}
    limits: dict[str, Any] = {"memory": cluster.memory}
    if cluster.gpus_per_node:
        limits[cluster.gpu_resource] = cluster.gpus_per_node
    plain = {**_HOME, "OMP_NUM_THREADS": str(threads(spec)), **dict(sorted(spec.env.items()))}
    plain |= {
        # A dead peer is not waited for: the platform restarts all nodes of the job.
        "PET_MAX_RESTARTS": "0",
        "PET_SHUTDOWN_TIMEOUT": str(shutdown_timeout(cluster.grace_seconds)),
    }
    main = {
        "name": container,
        "image": spec.image,
        "args": list(spec.args),
        "workingDir": _WRITABLE,  # where relative folders of a configuration can be made
        "env": [*env, *({"name": name, "value": value} for name, value in plain.items())],
        "envFrom": [
            {"secretRef": {"name": cluster.s3_secret, "optional": False}},
            {"secretRef": {"name": cluster.mlflow_secret, "optional": True}},
        ],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": _WRITABLE}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    template: Manifest = {
        "metadata": {"labels": pod_labels(spec)},
        "spec": {
            **pod,
            "serviceAccountName": cluster.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": cluster.grace_seconds,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [main],
            "volumes": [
                {"name": "tmp", "emptyDir": {"sizeLimit": cluster.scratch}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shm}},
            ],
        },
    }
    placement: Manifest = {
        "nodeSelector": dict(sorted(cluster.node_selector.items())),
        "tolerations": [
            {key: value for key, value in toleration.model_dump().items() if value is not None}
            for toleration in cluster.tolerations
            # Without a GPU, a pod that tolerates their taint would take a node from those that need one.
            if cluster.gpus_per_node or toleration.key != cluster.gpu_resource
        ],
        "priorityClassName": cluster.priority_class,
        "imagePullSecrets": [{"name": name} for name in cluster.image_pull_secrets],
    }
    template["spec"] |= {key: value for key, value in placement.items() if value}
    return template


def pod_labels(spec: TrainSpec) -> dict[str, str]:
    # A mesh's sidecar never ends, and so the job never would.
    return LABELS | {"sidecar.istio.io/inject": "false"} | dict(sorted(spec.labels.items()))


def metadata(spec: TrainSpec, *, queue: bool = False, labels: Mapping[str, str] | None = None) -> Manifest:
    """Of the job and of what comes with it.

    Args:
        queue: Whether it is the object that Kueue admits. Its webhook suspends the job, and only Kueue may write
            ``suspend``: in the manifest, a second ``kubectl apply`` would stop or start the job behind its back.
    """
    cluster: ClusterConfig = spec.cluster
    described: Manifest = {
        "name": spec.name,
        "labels": LABELS | dict(labels or {}) | dict(sorted(spec.labels.items())),
        "annotations": {},
    }
    if queue and cluster.queue:
        described["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
    if spec.owner is not None:
        described["ownerReferences"] = [
            {
                "apiVersion": spec.owner.api_version,
                "kind": spec.owner.kind,
                "name": spec.owner.name,
                "uid": spec.owner.uid,
                "controller": False,
                "blockOwnerDeletion": False,  # true needs a right on the owner's finalizers
            }
        ]
    return described


def signed(manifests: list[Manifest]) -> list[Manifest]:
    """The manifests with the hash of them all on each of them; their pods do not carry it.

    Args:
        manifests: Without a value that changes from one try to the next, the owner apart.
    """
    digest = spec_hash(manifests)
    for manifest in manifests:
        manifest["metadata"]["annotations"][SPEC_HASH] = digest
    return manifests


def shutdown_timeout(grace_seconds: int) -> int:
    """Seconds that torchrun gives its ranks to save, which leaves it time to report their exit code."""
    return grace_seconds - max(1, min(30, grace_seconds // 2)) if grace_seconds > 1 else 0


def whole_seconds(seconds: float) -> int:
    """A limit as Kubernetes takes it: whole, at least 1, and never below what was asked for."""
    return max(1, math.ceil(seconds))


def threads(spec: TrainSpec) -> int:
    """Per rank. Without the variable, torch takes as many as the node has CPUs, whatever the pod may use."""
    return max(1, int(amount(spec.cluster.cpu) / spec.processes))


def amount(quantity: str) -> float:
    """What Kubernetes writes as "500m" or "64Gi", in cores or bytes."""
    number = quantity.rstrip("mkKMGTi")
    return float(number) * _UNITS[quantity.removeprefix(number)]


def to_yaml(manifests: Iterable[Mapping[str, Any]]) -> str:
    """For ``kubectl apply -f -``; the same text for the same manifests."""
    return "---\n".join(
        yaml.safe_dump(dict(manifest), sort_keys=False, default_flow_style=False, width=120, allow_unicode=True)
        for manifest in manifests
    )
