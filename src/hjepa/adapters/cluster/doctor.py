"""What a cluster lacks for a training job: every finding names what was asked, what was found, and a remedy.

Nothing is changed there; only ``pod=True`` starts one short-lived pod, which looks at S3 and MLflow from inside.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hjepa import __version__
from hjepa.adapters.cluster.client import (
    PODS,
    WORKFLOWS,
    AccessError,
    Api,
    ApiError,
    Cluster,
    Object,
    StreamLostError,
    UnreachableError,
)
from hjepa.adapters.cluster.spec import LABELS
from hjepa.config import ClusterConfig, Config, Toleration
from hjepa.errors import HjepaError, UserError

_BUDGET_SECONDS = 15.0  # a person waits
_SERVICE_ACCOUNTS = Api("", "v1", "serviceaccounts")
_SECRETS = Api("", "v1", "secrets")
_LEVEL = "pod-security.kubernetes.io/enforce"
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MLFLOW_KEYS = (("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), ("MLFLOW_TRACKING_TOKEN",))

# (group, version, plural) -> what it is and how to get it.
KINDS = {
    "trainjob": (
        ("trainer.kubeflow.org", "v1alpha1", "trainjobs", "Kubeflow Trainer 2"),
        ("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "Kubeflow Trainer 2"),
        ("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet, which Kubeflow Trainer 2 needs"),
    ),
    "pytorchjob": (("kubeflow.org", "v1", "pytorchjobs", "the Kubeflow training operator 1.9"),),
}
# What the launcher asks of the API server, (group, resource) -> verbs.
RIGHTS: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "trainjob": {
        ("trainer.kubeflow.org", "trainjobs"): ("create", "delete", "get", "patch", "watch"),
        ("trainer.kubeflow.org", "trainingruntimes"): ("create", "delete", "get", "patch"),
    },
    "pytorchjob": {("kubeflow.org", "pytorchjobs"): ("create", "delete", "get", "patch", "watch")},
}
COMMON_RIGHTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("", "pods"): ("get", "list"),
    ("", "pods/log"): ("get",),
    ("", "events"): ("list",),
}


_OTHERWISE = {
    "KFP": "correct --endpoint or KF_PIPELINES_ENDPOINT; from outside, port-forward the service ml-pipeline-ui",
    "pod": "give these credentials the right to create pods, or leave out --pod",
}


@dataclass(frozen=True)
class Row:
    name: str
    ok: bool | None  # None: it could not be looked at, or need not be there
    detail: str
    remedy: str = ""


def check(config: Config, *, pod: bool = False, kfp: Callable[[], str] | None = None) -> list[Row]:
    """Every check of the cluster that the kubeconfig (or this pod's service account) leads to.

    Args:
        pod: Start a pod of the tools image that looks at S3 and MLflow.
        kfp: Returns the version of the KFP API, or raises UserError.

    Raises:
        UserError: there is no way to the cluster.
        HjepaError: it does not answer, or not like a cluster.
    """
    return _Doctor(config).rows(pod=pod, kfp=kfp)


def render(rows: Iterable[Row]) -> list[str]:
    """Lines of a table: state, name, what was found, and below a failing row what to do."""
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=0)
    states = {True: "ok", False: "FAIL", None: "?"}
    lines = []
    for row in rows:
        lines.append(f"{states[row.ok]:<4}  {row.name:<{width}}  {row.detail}")
        if row.remedy and row.ok is not True:
            lines.append(f"{'':<4}  {'':<{width}}  -> {row.remedy}")
    return lines


class _Doctor:
    def __init__(self, config: Config):
        self.config = config
        self.wanted: ClusterConfig = config.cluster
        self.cluster = Cluster(config.cluster.namespace, budget_seconds=_BUDGET_SECONDS)
        self.namespace = self.cluster.namespace
        self._served: dict[tuple[str, str], set[str]] = {}

    def rows(self, *, pod: bool, kfp: Callable[[], str] | None) -> list[Row]:
        checks: list[tuple[str, Callable[[], Iterable[Row]]]] = [
            ("API server", self._version),
            ("namespace", self._namespace),
            ("operator", self._operators),
            ("rights", self._rights),
            ("service account", self._service_account),
            ("secrets", self._secrets),
            ("nodes", self._nodes),
            ("queue", self._queue),
        ]
        rows: list[Row] = []
        for name, run in checks:
            rows += self._guarded(name, run)
        if kfp is not None:
            rows += self._guarded("KFP", lambda: [Row("KFP", True, kfp())])
        if pod:
            rows += self._guarded("pod", self._pod)
        return rows

    def _guarded(self, name: str, run: Callable[[], Iterable[Row]]) -> list[Row]:
        """A check that may not look is a row too; a server that does not answer ends them all.

        But for the pod: it comes last, after minutes, and what was found before is worth telling.
        """
        try:
            return list(run())
        except UnreachableError:
            raise
        except AccessError as error:
            if getattr(error.__cause__, "status", None) == 401:
                raise
            return [Row(name, None, f"may not look: {error.__cause__}", "ask for this right, or look by hand")]
        except ApiError as error:
            return [
                Row(name, False, f"{error.status}: {error}", "the message is the cluster's own; mend what it names")
            ]
        except UserError as error:
            return [Row(name, False, str(error), _OTHERWISE.get(name, "mend what the message names"))]
        except HjepaError as error:
            if name != "pod":
                raise
            return [Row(name, False, str(error), f"try again; a pod that is left ends within {self._pod_seconds()} s")]

    # -- the checks ----------------------------------------------------------------------------------------------------

    def _version(self) -> Iterator[Row]:
        version = self._get("/version", needs="gitVersion")["gitVersion"]
        yield Row("API server", True, f"{self.cluster.host}, Kubernetes {version}")

    def _namespace(self) -> Iterator[Row]:
        found = self._find(f"/api/v1/namespaces/{self.namespace}", needs="metadata")
        if found is None:
            yield Row(
                "namespace",
                False,
                f"there is no namespace {self.namespace!r}",
                f"kubectl create namespace {self.namespace}, or set cluster.namespace",
            )
            return
        level = (found["metadata"].get("labels") or {}).get(_LEVEL)
        # The pods of a job meet the strictest level.
        yield Row("namespace", True, f"{self.namespace}, Pod Security {level or 'not enforced'}")

    def _operators(self) -> Iterator[Row]:
        wanted = self.wanted.backend
        found = {backend: self._missing(backend) for backend in KINDS}
        for backend, missing in found.items():
            needed = wanted == backend or (wanted == "auto" and all(found.values()))
            what = {name for *_, name in missing}
            if not missing:
                versions = sorted({f"{group}/{version}" for group, version, *_ in KINDS[backend]})
                yield Row(f"operator {backend}", True, ", ".join(versions))
            else:
                kinds = ", ".join(f"{plural}.{group}/{version}" for group, version, plural, _ in missing)
                other = next((name for name, lacks in found.items() if not lacks), None)
                hint = f", or use cluster.backend={other}" if other else ""
                yield Row(
                    f"operator {backend}",
                    False if needed else None,
                    f"the cluster does not serve {kinds}",
                    f"install {' and '.join(sorted(what))}{hint}" if needed else "not needed",
                )
        if not self._serves_workflows():
            yield Row("Argo Workflows", None, "not served", "needed only where KFP runs in this cluster")

    def _serves_workflows(self) -> bool:
        return WORKFLOWS.plural in self._resources(WORKFLOWS.group, WORKFLOWS.version)

    def _missing(self, backend: str) -> list[tuple[str, str, str, str]]:
        return [kind for kind in KINDS[backend] if kind[2] not in self._resources(kind[0], kind[1])]

    def _backends(self) -> list[str]:
        """Those that a job can use here, as far as they are installed."""
        if self.wanted.backend in KINDS:
            return [self.wanted.backend]
        return [backend for backend in KINDS if not self._missing(backend)]

    def _rights(self) -> Iterator[Row]:
        needed = dict(COMMON_RIGHTS)
        for backend in self._backends():
            needed |= RIGHTS[backend]
        denied = {
            kind: [verb for verb in verbs if not self.cluster.allowed(verb, *kind)] for kind, verbs in needed.items()
        }
        asked = sum(len(verbs) for verbs in needed.values())
        lacking = {kind: verbs for kind, verbs in denied.items() if verbs}
        pipelines = self._serves_workflows()
        sees_run = pipelines and self.cluster.allowed("get", WORKFLOWS.group, WORKFLOWS.plural)
        if not lacking:
            uses = "needs" if pipelines and not sees_run else "uses"
            yield Row("rights", True, f"all {asked + sees_run} that the launcher {uses} in {self.namespace}")
        for (group, resource), verbs in lacking.items():
            qualified = f"{resource}.{group}" if group else resource
            yield Row(
                "rights",
                False,
                f"may not {', '.join(verbs)} {qualified} in {self.namespace}",
                self._bind(),
            )
        if pipelines and not sees_run:
            yield Row(
                "rights workflows",
                None,
                f"may not get workflows.argoproj.io in {self.namespace}: a pipeline's launcher cannot tell an eviction "
                "from a cancellation, and stops the job at either",
                self._bind(),
            )

    def _accounts(self) -> str:
        return f"apply manifests/overlays/accounts with its namespace set to {self.namespace}"

    def _bind(self) -> str:
        whoami = f"kubectl -n {self.namespace} auth whoami"
        return f"{self._accounts()}, and bind its Role hjepa-launcher to whom `{whoami}` names"

    def _service_account(self) -> Iterator[Row]:
        name = self.wanted.service_account
        if self.cluster.get(_SERVICE_ACCOUNTS, name) is None:
            yield Row(
                "service account",
                False,
                f"there is no service account {name!r} in {self.namespace}; no training pod could start",
                f"{self._accounts()}, or set cluster.service_account",
            )
        else:
            yield Row("service account", True, name)

    def _secrets(self) -> Iterator[Row]:
        yield from self._guarded("secret S3", lambda: self._secret("secret S3", self.wanted.s3_secret, (S3_KEYS,)))
        yield from self._guarded(
            "secret MLflow",
            lambda: self._secret("secret MLflow", self.wanted.mlflow_secret, MLFLOW_KEYS, optional=True),
        )
        for name in self.wanted.image_pull_secrets:
            yield from self._guarded(f"secret {name}", functools.partial(self._secret, f"secret {name}", name, ()))

    def _secret(self, row: str, name: str, either: Sequence[Sequence[str]], *, optional: bool = False) -> Iterator[Row]:
        """
        Args:
            either: Sets of keys, of which one must be there in full.
        """
        found = self.cluster.get(_SECRETS, name)
        keys = {key for key, value in ((found or {}).get("data") or {}).items() if value}
        lacking = [[key for key in wanted if key not in keys] for wanted in either]
        literals = " ".join(f"--from-literal={key}=..." for key in (either[0] if either else ()))
        create = f"kubectl -n {self.namespace} create secret generic {name} {literals}".strip()
        if found is None and optional:
            yield Row(row, None, f"{name} does not exist; right where the server asks for no login", create)
        elif found is None:
            yield Row(row, False, f"there is no Secret {name!r} in {self.namespace}", create)
        elif lacking and all(lacking):
            has = ", ".join(sorted(keys)) or "nothing"
            yield Row(row, False, f"Secret {name!r} lacks {', '.join(lacking[0])}; it has {has}", create)
        else:
            yield Row(row, True, f"{name}: {', '.join(sorted(keys))}")

    def _nodes(self) -> Iterator[Row]:
        cluster = self.wanted
        nodes = self._get("/api/v1/nodes", needs="items")["items"]
        reasons = {node["metadata"]["name"]: list(_unfit(node, cluster)) for node in nodes}
        fit = [node for node in nodes if not reasons[node["metadata"]["name"]]]
        each = f"{cluster.gpus_per_node} x {cluster.gpu_resource}, " if cluster.gpus_per_node else ""
        wanted = f"{cluster.nodes} with {each}{cluster.cpu} CPU, {cluster.memory} memory"
        if len(fit) >= cluster.nodes:
            products = sorted({_product(node) for node in fit} - {""})
            kinds = f" ({', '.join(products)})" if products else ""
            yield Row("nodes", True, f"{len(fit)} of {len(nodes)} fit{kinds}; wanted {wanted}")
            return
        told = "; ".join(f"{name}: {', '.join(why)}" for name, why in sorted(reasons.items()) if why)
        yield Row(
            "nodes",
            False,
            f"{len(fit)} of {len(nodes)} fit; wanted {wanted}. {told[:1000]}",
            "lower cluster.nodes, cluster.gpus_per_node, cluster.cpu or cluster.memory, correct cluster.node_selector "
            "and cluster.tolerations, or install the GPU operator (its device plug-in makes GPUs countable)",
        )

    def _queue(self) -> Iterator[Row]:
        if self.wanted.priority_class:
            found = self._find(f"/apis/scheduling.k8s.io/v1/priorityclasses/{self.wanted.priority_class}")
            yield Row(
                "priority class",
                found is not None,
                self.wanted.priority_class if found else f"there is no PriorityClass {self.wanted.priority_class!r}",
                "create it, or correct cluster.priority_class",
            )
        if self.wanted.queue:
            names: list[str] = []
            for version in self._versions("kueue.x-k8s.io"):
                if "localqueues" in self._resources("kueue.x-k8s.io", version):
                    queues = self.cluster.list(Api("kueue.x-k8s.io", version, "localqueues"))
                    names = [item["metadata"]["name"] for item in queues]
                    break
            has = (
                f"there is no LocalQueue {self.wanted.queue!r} in {self.namespace}; it has {', '.join(names) or 'none'}"
            )
            there = self.wanted.queue in names
            yield Row("queue", there, self.wanted.queue if there else has, "create it, or correct cluster.queue")

    # -- a look from inside --------------------------------------------------------------------------------------------

    def _pod(self) -> Iterator[Row]:
        name = f"hjepa-doctor-{uuid.uuid4().hex[:8]}"
        self.cluster.create(PODS, self._pod_manifest(name))
        try:
            yield from self._followed(name)
        finally:
            self.cluster.delete(PODS, name)

    def _pod_manifest(self, name: str) -> dict[str, Any]:
        cluster = self.wanted
        image = f"hjepa-tools:{__version__}"
        asked = self.config.model_dump(mode="json", include={"storage", "tracking"})
        plain = {
            "HOME": "/tmp",
            "AWS_ENDPOINT_URL": self.config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL", ""),
            "MLFLOW_TRACKING_URI": self.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", ""),
            **cluster.env,
        }
        container = {
            "name": "doctor",
            "image": f"{cluster.registry.rstrip('/')}/{image}" if cluster.registry else image,
            "args": ["doctor", "--servers", "--config", yaml.safe_dump(asked)],
            "env": [{"name": key, "value": value} for key, value in plain.items() if value],
            "envFrom": [
                {"secretRef": {"name": cluster.s3_secret, "optional": False}},
                {"secretRef": {"name": cluster.mlflow_secret, "optional": True}},
            ],
            "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        # Labelled as a training pod, so that the same network policies apply.
        labels = LABELS | {"sidecar.istio.io/inject": "false"}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "restartPolicy": "Never",
                "activeDeadlineSeconds": self._pod_seconds(),  # if nobody is left to delete it
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "serviceAccountName": cluster.service_account,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 10001,
                    "runAsGroup": 10001,
                    "fsGroup": 10001,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "imagePullSecrets": [{"name": item} for item in cluster.image_pull_secrets],
                "containers": [container],
                "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
            },
        }

    def _pod_seconds(self) -> int:
        """What the pod may take, its image included."""
        return math.ceil(self.wanted.image_timeout_seconds) + 60

    def _followed(self, name: str, poll_seconds: float = 1.0) -> Iterator[Row]:
        deadline = time.monotonic() + self._pod_seconds()
        why = "the pod was not scheduled"
        while time.monotonic() < deadline:
            status = (self.cluster.get(PODS, name) or {}).get("status") or {}
            if status.get("phase") in {"Succeeded", "Failed"}:
                try:
                    log = "\n".join(self.cluster.log(name, "doctor"))
                except StreamLostError as error:
                    yield self._silent(status, error)
                    return
                yield from _rows_of(log) or [
                    Row(
                        "pod",
                        False,
                        f"it {status['phase'].lower()} without a word: {log[-500:]}",
                        "look at the image of hjepa-tools",
                    )
                ]
                return
            why = _waiting(status) or why
            if re.match(r"InvalidImageName|CreateContainerConfigError|ErrImageNeverPull", why):
                break
            time.sleep(poll_seconds)
        image = self._pod_manifest(name)["spec"]["containers"][0]["image"]
        yield Row(
            "pod",
            False,
            f"{image}: {why}",
            "correct cluster.registry and cluster.image_pull_secrets, or push the image",
        )

    def _silent(self, status: Object, error: StreamLostError) -> Row:
        """The row of a pod that has ended and whose log cannot be read."""
        why = ": ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
        return Row(
            "pod",
            # What succeeded has found nothing wrong.
            None if status["phase"] == "Succeeded" else False,
            f"it {status['phase'].lower()}{f' ({why})' if why else ''}, and its log cannot be read: {error}",
            "mend what the message names, and look again",
        )

    # -- asking --------------------------------------------------------------------------------------------------------

    def _get(self, path: str, needs: str = "kind") -> Object:
        answer: Object = self.cluster.request("GET", path, doing=f"get {path}", needs=needs)
        return answer

    def _find(self, path: str, needs: str = "kind") -> Object | None:
        """An object that belongs to no namespace; None if it does not exist."""
        try:
            return self._get(path, needs)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _resources(self, group: str, version: str) -> set[str]:
        """Plural names that the server serves in this version of a group."""
        if (group, version) not in self._served:
            found = self._find(f"/apis/{group}/{version}", needs="resources")
            self._served[group, version] = {item["name"] for item in found["resources"]} if found else set()
        return self._served[group, version]

    def _versions(self, group: str) -> list[str]:
        groups = self._get("/apis", needs="groups")["groups"]
        return [item["version"] for found in groups if found["name"] == group for item in found["versions"]]


def _unfit(node: Object, cluster: ClusterConfig) -> Iterator[str]:
    """Why no pod of the job would run on a node."""
    from kubernetes.utils.quantity import parse_quantity

    labels, has = node["metadata"].get("labels") or {}, node.get("status", {}).get("allocatable") or {}
    spec = node.get("spec") or {}
    if spec.get("unschedulable"):
        yield "cordoned"
    for key, value in cluster.node_selector.items():
        if labels.get(key) != value:
            yield f"label {key}={labels.get(key, 'none')}, not {value}"
    wanted: list[tuple[str, str]] = [("cpu", cluster.cpu), ("memory", cluster.memory)]
    if cluster.gpus_per_node:
        wanted.insert(0, (cluster.gpu_resource, str(cluster.gpus_per_node)))
    for resource, amount in wanted:
        if parse_quantity(has.get(resource, "0")) < parse_quantity(amount):
            yield f"{has.get(resource, '0')} {resource} of {amount}"
    for taint in spec.get("taints") or []:
        known = any(_tolerates(item, taint) for item in cluster.tolerations)
        if taint["effect"] != "PreferNoSchedule" and not known:
            yield f"taint {taint['key']}={taint.get('value', '')}:{taint['effect']}"


def _tolerates(toleration: Toleration, taint: Object) -> bool:
    return (
        toleration.key == taint["key"]
        and toleration.effect in (None, taint["effect"])
        and (toleration.operator == "Exists" or (toleration.value or "") == taint.get("value", ""))
    )


def _product(node: Object) -> str:
    return str((node["metadata"].get("labels") or {}).get("nvidia.com/gpu.product", ""))


def _waiting(status: Object) -> str:
    """What keeps a pod from running, in the words of scheduler and kubelet."""
    for container in status.get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in {None, "ContainerCreating", "PodInitializing"}:
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason')}: {condition.get('message', '')}".rstrip(": ")
    return ""


def _rows_of(log: str) -> list[Row]:
    """The findings that `hjepa doctor --servers` printed."""
    found = [re.match(r"(ok  |FAIL)  ([^:]+): (.*)", line) for line in log.splitlines()]
    remedy = "mend what the message names: address, Secret, or a NetworkPolicy that keeps training pods from the server"
    return [Row(f"{item[2]} from a pod", item[1] != "FAIL", item[3], remedy) for item in found if item]
