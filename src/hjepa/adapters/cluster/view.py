"""What state a training job is in and why, whichever operator runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]
Phase = Literal["Queued", "Pending", "Running", "Restarting", "Succeeded", "Failed"]

# Why a pod went without fault of its own: the node was drained, lost or needed for something more important.
_DISRUPTIONS = ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Shutdown", "Terminated")
_TRAINING = ("pytorch", "node")  # the names that the operators know the training container by
_PULL_PROBLEMS = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable")
_NEVER_STARTS = ("InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_NO_HEALING = ("violates PodSecurity", "denied the request", "is forbidden: error looking up service account")


@dataclass(frozen=True)
class PodView:
    """The newest pod of one node of the job."""

    name: str
    index: int  # node rank
    phase: str
    created: str
    ready: bool = False
    node: str = ""
    image: str = ""
    waiting: str = ""  # why its container does not run
    message: str = ""  # about the wait, or the scheduler's
    unschedulable: bool = False
    gated: bool = False
    exit_code: int | None = None
    exit_reason: str = ""  # OOMKilled, Error, Evicted ...
    termination: str = ""  # what the container said last
    disrupted: str = ""  # by what
    restarts: int = 0

    @property
    def died(self) -> bool:
        return bool(self.disrupted) or self.exit_code not in (None, 0) or self.phase == "Failed"


@dataclass(frozen=True)
class JobView:
    phase: Phase
    reason: str  # the operator's, or ""
    nodes: int
    nodes_ready: int
    pods: tuple[PodView, ...]
    uid: str = ""
    version: str = ""  # of the job object
    restarts: int = 0
    known: bool = True  # whether its operator has taken notice of it

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    def summary(self) -> str:
        text = self.phase.lower()
        if not self.ended:
            text += f", {self.nodes_ready}/{self.nodes} nodes ready"
        return f"{text}, {self.restarts} restarts" if self.restarts else text


@dataclass(frozen=True)
class Cause:
    """Why a job failed, and so what is to be done.

    ``kind``: user (2), futile (13), preempted (try again), memory or other (the platform may retry).
    """

    kind: Literal["user", "futile", "preempted", "memory", "other"]
    text: str
    pod: PodView | None = None


def observe_pytorchjob(job: Object, pods: Sequence[Object]) -> JobView:
    """Of a kubeflow.org/v1 PyTorchJob; conditions stay in the list when they no longer hold."""
    status = job.get("status") or {}
    holding = _holding(status)
    replicas = job["spec"].get("pytorchReplicaSpecs") or {}
    nodes = sum(int(replica.get("replicas") or 1) for replica in replicas.values())
    counts = status.get("replicaStatuses") or {}
    active = sum(int(count.get("active") or 0) for count in counts.values())
    views = _newest(pods, "training.kubeflow.org/replica-index")
    suspended = bool((job["spec"].get("runPolicy") or {}).get("suspend"))
    phase: Phase = "Pending"
    reason = ""
    if "Succeeded" in holding or "Failed" in holding:
        phase = "Succeeded" if "Succeeded" in holding else "Failed"
        reason = _said(holding[phase])
    elif "Suspended" in holding or (suspended and not views):
        phase, reason = "Queued", _said(holding.get("Suspended", {}))
    elif "Restarting" in holding:
        phase, reason = "Restarting", _said(holding["Restarting"])
    elif "Running" in holding and active >= nodes:
        phase = "Running"
    ready = sum(pod.ready for pod in views)
    restarts = sum(pod.restarts for pod in views)
    return _view(job, phase, reason, nodes, ready, views, restarts, known=bool(status.get("conditions")))


def observe_trainjob(job: Object, pods: Sequence[Object]) -> JobView:
    """Of a trainer.kubeflow.org/v1alpha1 TrainJob, which has no condition for running."""
    status = job.get("status") or {}
    holding = _holding(status)
    nodes = int((job["spec"].get("trainer") or {}).get("numNodes") or 1)
    child: Object = next((item for item in status.get("jobsStatus") or [] if item.get("name") == "node"), {})
    views = _newest(pods, "batch.kubernetes.io/job-completion-index")
    ready = sum(pod.ready for pod in views)
    attempts = {
        (pod["metadata"].get("labels") or {}).get("jobset.sigs.k8s.io/restart-attempt", "0") for pod in pods
    } - {""}
    restarts = max((int(attempt) for attempt in attempts), default=0)
    phase: Phase = "Pending"
    reason = ""
    if "Complete" in holding or "Failed" in holding:
        phase = "Succeeded" if "Complete" in holding else "Failed"
        reason = _said(holding.get("Complete") or holding["Failed"])
    elif "Suspended" in holding or (job["spec"].get("suspend") and not views):
        phase, reason = "Queued", _said(holding.get("Suspended", {}))
    elif int(child.get("ready") or 0) >= 1 or (views and ready >= nodes):
        phase = "Running"
    elif restarts:
        phase = "Restarting"
    return _view(job, phase, reason, nodes, ready, views, restarts, known=bool(holding or child or views))


def _view(
    job: Object, phase: Phase, reason: str, nodes: int, ready: int, pods: list[PodView], restarts: int, *, known: bool
) -> JobView:
    metadata = job["metadata"]
    version = str(metadata.get("resourceVersion", ""))
    return JobView(phase, reason, nodes, ready, tuple(pods), metadata.get("uid", ""), version, restarts, known)


def _holding(status: Mapping[str, Any]) -> dict[str, Object]:
    return {item["type"]: item for item in status.get("conditions") or [] if item.get("status") == "True"}


def _said(condition: Mapping[str, Any]) -> str:
    return ": ".join(str(condition[key]) for key in ("reason", "message") if condition.get(key))


def _newest(pods: Sequence[Object], index_label: str) -> list[PodView]:
    """One pod per node rank, by rank: a restart leaves its predecessor for a while."""
    found: dict[int, PodView] = {}
    for pod in pods:
        view = _pod_view(pod, index_label)
        if view.index not in found or view.created >= found[view.index].created:
            found[view.index] = view
    return [found[index] for index in sorted(found)]


def _pod_view(pod: Object, index_label: str) -> PodView:
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    unschedulable = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    gated = scheduled.get("reason") == "SchedulingGated"
    disruption = conditions.get("DisruptionTarget", {})
    disrupted = ""
    if disruption.get("status") == "True":
        disrupted = _said(disruption)
    elif status.get("reason") in _DISRUPTIONS:
        disrupted = _said(status)
    every = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    waiting: Object = next((c["state"]["waiting"] for c in every if (c.get("state") or {}).get("waiting")), {})
    # What a mesh or an agent adds to the pod has exit codes of its own.
    containers = [item for item in status.get("containerStatuses") or [] if item.get("name") in _TRAINING]
    ended = [
        state["terminated"]
        for container in containers
        for state in (container.get("state") or {}, container.get("lastState") or {})
        if state.get("terminated")
    ]
    # The last failure, also of a container that runs again; without one, the success.
    last = next((end for end in ended if end.get("exitCode")), ended[0] if ended else {})
    specs = (pod.get("spec") or {}).get("containers") or [{}]
    main = next((item for item in specs if item.get("name") in _TRAINING), specs[0])
    label = (metadata.get("labels") or {}).get(index_label, "0")
    return PodView(
        name=metadata["name"],
        index=int(label) if label.isdigit() else 0,
        phase=status.get("phase", "Unknown"),
        created=metadata.get("creationTimestamp", ""),
        ready=conditions.get("Ready", {}).get("status") == "True" and not metadata.get("deletionTimestamp"),
        node=(pod.get("spec") or {}).get("nodeName", ""),
        image=main.get("image", ""),
        waiting=waiting.get("reason", ""),
        message=waiting.get("message", "") or (scheduled.get("message", "") if unschedulable or gated else ""),
        unschedulable=unschedulable,
        gated=gated,
        exit_code=last.get("exitCode"),
        exit_reason=last.get("reason", "") or status.get("reason", ""),
        termination=last.get("message", "") or status.get("message", ""),
        disrupted=disrupted,
        restarts=sum(int(container.get("restartCount") or 0) for container in containers),
    )


# -- what is wrong ---------------------------------------------------------------------------------------------------


def pulling(view: JobView) -> PodView | None:
    """A pod whose image does not come."""
    return next((pod for pod in view.pods if pod.waiting in _PULL_PROBLEMS), None)


def unscheduled(view: JobView) -> PodView | None:
    return next((pod for pod in view.pods if pod.unschedulable), None)


def never_starts(view: JobView) -> PodView | None:
    """A pod whose container cannot be made: a Secret or one of its keys is missing, or the image's name is none."""
    return next((pod for pod in view.pods if pod.waiting in _NEVER_STARTS), None)


def explain_pull(pod: PodView) -> str:
    return (
        f"the image {pod.image} cannot be pulled ({pod.waiting}: {pod.message or 'no message'}); check cluster.image, "
        "cluster.registry and cluster.image_pull_secrets"
    )


def explain_no_start(pod: PodView) -> str:
    advice = "check cluster.image" if pod.waiting == "InvalidImageName" else "check cluster.s3_secret and its keys"
    return f"pod {pod.name} cannot start ({pod.waiting}: {pod.message}); {advice}"


def fatal(view: JobView) -> Cause | None:
    """The death of a rank by a code that no retry mends, while the operator still tries."""
    kinds: dict[int | None, Literal["user", "futile"]] = {13: "futile", 2: "user"}
    for code, kind in kinds.items():
        for pod in view.pods:
            if pod.died and not pod.disrupted and exit_code(pod) == code:
                return Cause(kind, f"{_reported(pod) or 'no reason given'} (pod {pod.name}, exit code {code})", pod)
    return None


def explain_failure(view: JobView) -> Cause:
    """The one cause that is worth telling: the death of one node makes the others fail somehow."""
    if (cause := fatal(view)) is not None:
        return cause
    if code := re.search(r"exit code (2|13)\b", view.reason):  # all that is left once the operator has taken the pods
        return Cause("futile" if code[1] == "13" else "user", view.reason)
    if "DeadlineExceeded" in view.reason:  # told by everything stopping at once, which would look like a preemption
        return Cause("other", f"{view.reason}; cluster.total_timeout_seconds is over")
    dead = [pod for pod in view.pods if pod.died]
    for pod in dead:
        if pod.disrupted:
            return Cause("preempted", f"pod {pod.name} on node {pod.node or '?'}: {pod.disrupted}", pod)
    for pod in dead:
        if pod.exit_reason == "OOMKilled" or exit_code(pod) == 137:
            why = "was killed for want of memory" if pod.exit_reason == "OOMKilled" else "was killed (exit code 137)"
            text = (
                f"pod {pod.name} {why}; raise cluster.memory (what lies in /dev/shm counts), or lower "
                "data.num_workers or training.batch_size"
            )
            return Cause("memory", text, pod)
    # The operator stops the peers of a node that crashed, so 143 says something only where there is nothing else.
    crashed = [pod for pod in dead if exit_code(pod) != 143]
    if dead and not crashed:
        return Cause("preempted", f"pod {dead[0].name} was told to stop: {_reported(dead[0])}", dead[0])
    if crashed:
        pod = crashed[0]
        told = _reported(pod)
        text = f"pod {pod.name}: exit code {exit_code(pod)}{f' ({pod.exit_reason})' if pod.exit_reason else ''}"
        return Cause("other", f"{text}: {told}" if told else text, pod)
    return Cause("other", view.reason or "its operator gives no reason")


def exit_code(pod: PodView) -> int | None:
    """The entrypoint's own word goes before the container's."""
    code = _told(pod).get("rc")
    return code if isinstance(code, int) and not isinstance(code, bool) else pod.exit_code


def _reported(pod: PodView) -> str:
    told = _told(pod).get("reason")
    return str(told) if told else pod.termination.strip()[-1000:]


def _told(pod: PodView) -> Object:
    """The entrypoint's termination message, {"rc", "reason"}."""
    try:
        told = json.loads(pod.termination)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def blocked_by(events: Sequence[Object]) -> str:
    """Why there are no pods, from the warnings about the job; "" if nothing is said."""
    reasons = ("FailedCreatePod", "FailedCreate", "TrainJobResourcesCreationFailed", "FailedCreateService")
    told = [event for event in events if event.get("type") == "Warning" and event.get("reason") in reasons]
    told.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    return f"{told[-1]['reason']}: {told[-1].get('message', '')}" if told else ""


def heals(blocked: str) -> bool:
    """Whether waiting may help: a quota frees up, a policy does not change."""
    return not any(text in blocked for text in _NO_HEALING)
