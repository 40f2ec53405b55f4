"""Training as a TrainJob of Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1), which is a JobSet underneath.

Each job brings its own TrainingRuntime. The fields by which a TrainJob changes its pods have another name in every
minor version of the operator, and the runtime that comes with it is refused by Pod Security ``restricted``; a runtime
of our own needs neither.
"""

from __future__ import annotations

from typing import Any

from hjepa.adapters.cluster.render import FATAL_EXIT_CODES, Manifest, metadata, pod_template, signed, whole_seconds
from hjepa.adapters.cluster.spec import TrainSpec
from hjepa.config import ClusterConfig

GROUP = "trainer.kubeflow.org"
VERSION = "v1alpha1"
PLURAL = "trainjobs"
KIND = "TrainJob"
CONTAINER = "node"  # what the operator sets up for torchrun
RUNTIME_PLURAL = "trainingruntimes"
RUNTIME_KIND = "TrainingRuntime"


def render(spec: TrainSpec) -> list[Manifest]:
    """[TrainingRuntime, TrainJob] of the same name, without a namespace.

    Raises:
        UserError: if ``spec.env`` holds a credential, or a variable that the rendezvous depends on.
    """
    cluster: ClusterConfig = spec.cluster
    codes = list(FATAL_EXIT_CODES)
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {
                "backoffLimit": 0,  # the JobSet restarts all nodes at once; one alone would wait for its peers
                "podFailurePolicy": {
                    "rules": [
                        {
                            "action": "FailJob",
                            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes},
                        },
                        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    ]
                },
                # podFailurePolicy asks for Never.
                "template": pod_template(spec, container=CONTAINER, restartPolicy="Never"),
            },
        },
    }
    runtime: Manifest = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": RUNTIME_KIND,
        "metadata": metadata(spec, labels={"trainer.kubeflow.org/framework": "torch"}),
        "spec": {
            "mlPolicy": {"numNodes": cluster.nodes, "torch": {}},
            # No ttlSecondsAfterFinished: a failed TrainJob whose JobSet is gone is run again by Trainer up to 2.3.
            "template": {"spec": {"failurePolicy": _failure_policy(cluster.max_restarts), "replicatedJobs": [node]}},
        },
    }
    trainer = {
        "numNodes": cluster.nodes,
        "numProcPerNode": spec.processes,
    }
    body: dict[str, Any] = {
        "runtimeRef": {"apiGroup": GROUP, "kind": RUNTIME_KIND, "name": spec.name},
        "trainer": trainer,
    }
    if cluster.total_timeout_seconds is not None:
        body["activeDeadlineSeconds"] = whole_seconds(cluster.total_timeout_seconds)  # from Trainer 2.2
    job: Manifest = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": metadata(spec, queue=True),
        "spec": body,
    }
    return signed([runtime, job])


def _failure_policy(max_restarts: int) -> Manifest:
    fatal = "|".join(str(code) for code in FATAL_EXIT_CODES)
    return {
        "maxRestarts": max_restarts,
        "restartStrategy": "BlockingRecreate",  # the new pods start when the old ones have given their GPUs back
        # The first rule that fits: what podFailurePolicy failed was either a fatal code or a disruption.
        "rules": [
            {
                "name": "fatalExitCode",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [rf"exit code ({fatal})\b"],
            },
            {
                "name": "disruption",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
        ],
    }
