"""Training as a PyTorchJob of the Kubeflow training operator (kubeflow.org/v1).

Workers only: beside a Master, the operator gives every worker an init container that Pod Security ``restricted``
refuses. Without a Master it sets no rank and no address either, so the pods read theirs from the operator's labels and
meet by a static rendezvous. A node that comes back has the rank that it had.
"""

from __future__ import annotations

from typing import Any

from hjepa.adapters.cluster.render import Manifest, metadata, pod_template, signed, whole_seconds
from hjepa.adapters.cluster.spec import TrainSpec
from hjepa.config import ClusterConfig

GROUP = "kubeflow.org"
VERSION = "v1"
PLURAL = "pytorchjobs"
KIND = "PyTorchJob"
CONTAINER = "pytorch"  # the operator's webhook refuses a job without a container of this name

_PORT = "23456"
_FINISHED_SECONDS = 24 * 3600
_RENDEZVOUS: list[Manifest] = [
    {
        "name": "JOB_NAME",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/job-name']"}},
    },
    {
        "name": "PET_NODE_RANK",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}},
    },
    {"name": "PET_MASTER_ADDR", "value": "$(JOB_NAME)-worker-0"},
    {"name": "PET_MASTER_PORT", "value": _PORT},
]


def render(spec: TrainSpec) -> list[Manifest]:
    """[PyTorchJob], without a namespace.

    Raises:
        UserError: if ``spec.env`` holds a credential, or a variable that the rendezvous depends on.
    """
    cluster: ClusterConfig = spec.cluster
    policy: dict[str, Any] = {
        # The default keeps the other nodes' pods, and their GPUs, when one is done.
        "cleanPodPolicy": "Running",
        # Compared (>=) with the restarts summed over all pods. One incident restarts the pods of all nodes, and once
        # more those that came back before the first node did.
        "backoffLimit": cluster.max_restarts * (2 * cluster.nodes - 1) + 1,
    }
    if cluster.cleanup != "keep":
        policy["ttlSecondsAfterFinished"] = _FINISHED_SECONDS
    if cluster.total_timeout_seconds is not None:
        # The operator looks only when something else happens to the job: a backstop for a launcher that died.
        policy["activeDeadlineSeconds"] = whole_seconds(cluster.total_timeout_seconds)
    worker = {
        "replicas": cluster.nodes,
        "restartPolicy": "OnFailure" if cluster.max_restarts else "Never",
        "template": pod_template(spec, container=CONTAINER, env=_RENDEZVOUS),
    }
    job: Manifest = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": metadata(spec, queue=True),
        "spec": {
            "nprocPerNode": str(spec.processes),  # a string; "auto" would start a process per CPU of the node
            "runPolicy": policy,
            "pytorchReplicaSpecs": {"Worker": worker},
        },
    }
    return signed([job])
