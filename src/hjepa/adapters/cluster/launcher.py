"""Start a training job, or adopt the one that is there, and follow it to its end.

The job's name is a function of the run, so a launcher that comes back after its pod died finds the job again, and the
owner is the Workflow, not the launcher's pod, so the job outlives it. What a killed launcher leaves, janitor.py ends.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType, ModuleType, TracebackType
from typing import Any, NoReturn

from hjepa.adapters.cluster import local, pytorchjob, trainjob, view
from hjepa.adapters.cluster.client import (
    EVENTS,
    PERSONAL_SECONDS,
    PODS,
    WORKFLOWS,
    AccessError,
    Api,
    ApiError,
    Cluster,
    Object,
    StreamLostError,
)
from hjepa.adapters.cluster.spec import SPEC_HASH, Owner, TrainSpec
from hjepa.adapters.cluster.view import Cause, JobView, PodView
from hjepa.config import ClusterConfig
from hjepa.errors import FutileRetryError, HjepaError, PreemptedError, UserError
from hjepa.utils.logging import say, warn

# A node that is taken away is nobody's fault, but a job that is never left alone for long gets nowhere either.
PREEMPTIONS = 100
_CANCEL_SECONDS = 0.3  # for one request of the cancellation; the process may be killed a second after SIGTERM
_LOG_LINES_PER_SECOND = 100
_LOG_PAUSE_SECONDS = 30.0  # between two tries to read it, at most
_LAST_LINES = 50


@dataclass(frozen=True)
class Backend:
    """One operator's kind of job."""

    module: ModuleType  # render(spec) -> manifests, the job last
    observe: Callable[[Object, Sequence[Object]], JobView]
    pods: str  # label selector of a job's pods; {name} stands for the job
    companions: tuple[Api, ...] = ()  # of the same name, deleted after the job
    children: tuple[str, ...] = ()  # names of objects whose events tell about it; {name} stands for the job

    @property
    def api(self) -> Api:
        return Api(self.module.GROUP, self.module.VERSION, self.module.PLURAL)


BACKENDS = {
    "trainjob": Backend(
        trainjob,
        view.observe_trainjob,
        "jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name=node",
        companions=(Api(trainjob.GROUP, trainjob.VERSION, trainjob.RUNTIME_PLURAL),),
        children=("{name}", "{name}-node-0"),
    ),
    "pytorchjob": Backend(
        pytorchjob,
        view.observe_pytorchjob,
        "training.kubeflow.org/job-name={name}",
        children=("{name}",),
    ),
}


@dataclass(frozen=True)
class Pace:
    """How often to look, in seconds."""

    poll: float = 15.0  # between two looks at the pods, if the job itself does not change
    unnoticed: float = 120.0  # until a job without a pod is looked into
    workflow: float = 15.0  # between two looks at the pipeline run
    recreate: float = 5.0  # before a job that was preempted starts again
    budget: float = 600.0  # without an answer of the API server


def launch(
    spec: TrainSpec,
    *,
    backend: str = "auto",
    namespace: str | None = None,
    result: Callable[[], dict[str, Any] | None],
    run: str = "",
    pace: Pace = Pace(),
) -> dict[str, Any]:
    """Start or adopt the job of ``spec`` and follow it until it has ended; returns ``result()``.

    Args:
        backend: A key of ``BACKENDS``, local, or auto: what the cluster has installed.
        result: What training left behind; None if there is nothing.
        run: Its name, for messages.

    Raises:
        UserError: the cluster refuses the job or can never run it, or training found a mistake of the user (2).
        FutileRetryError: training collapsed or diverged (13).
        PreemptedError: SIGTERM; the message says whether the job was stopped or goes on.
        HjepaError: the job failed, with its cause; or it took too long; or it succeeded without a result.
    """
    if backend == "local":
        return local.launch(spec, result=result, run=run)
    cluster = Cluster(namespace, budget_seconds=pace.budget)
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"cluster.backend={backend}: expected auto, local or one of {', '.join(BACKENDS)}")
    name = _kind_of(cluster, spec.name, backend) or (choose_backend(cluster) if backend == "auto" else backend)
    if spec.owner is None:
        spec = replace(spec, owner=find_owner(cluster))
    return _Launch(cluster, BACKENDS[name], spec, result, run, pace).follow()


def _kind_of(cluster: Cluster, name: str, wanted: str) -> str | None:
    """The backend whose job of this name is there already; two of them would write the same checkpoints.

    Raises:
        UserError: it is another one than ``wanted``.
    """
    present = cluster.training_groups()
    for key, backend in BACKENDS.items():
        if backend.module.GROUP not in present:
            continue
        try:
            found = cluster.get(backend.api, name)
        except AccessError:
            if key == wanted:
                raise
            continue  # who may not see such jobs has made none
        if found is not None and wanted not in ("auto", key):
            raise UserError(
                f"this run already has a {backend.module.KIND} {name} in namespace {cluster.namespace}; follow it "
                f"with cluster.backend={key}, or delete it first"
            )
        if found is not None:
            return key
    return None


def choose_backend(cluster: Cluster) -> str:
    """trainjob where Kubeflow Trainer 2 is installed, else pytorchjob.

    Raises:
        UserError: the cluster has neither.
    """
    present = cluster.training_groups()
    for name, backend in BACKENDS.items():
        if backend.module.GROUP in present:
            return name
    raise UserError(
        "this cluster has neither PyTorchJob (kubeflow.org) nor TrainJob (trainer.kubeflow.org); install Kubeflow "
        "Trainer, or train in the step's own pod with the pipeline pretrain"
    )


def find_owner(cluster: Cluster) -> Owner | None:
    """The Workflow that this pod belongs to; None outside a pipeline."""
    pod_name = os.environ.get("KFP_POD_NAME")
    pod = cluster.get(PODS, pod_name) if pod_name else None
    for owner in ((pod or {}).get("metadata") or {}).get("ownerReferences") or []:
        if owner["kind"] == "Workflow":
            return Owner(owner["apiVersion"], owner["kind"], owner["name"], owner["uid"])
    if pod_name and pod is None:  # nobody can own across namespaces
        warn(
            f"pod {pod_name} is not in namespace {cluster.namespace}, so the job belongs to no pipeline run: it stops "
            "with this launcher, and if that is killed, stop it with hjepa job cancel; or leave cluster.namespace null"
        )
    return None


def cancel(name: str, *, backend: str = "auto", namespace: str | None = None) -> list[str]:
    """Stop the job of this name, wherever it may be; returns what was deleted, as "kind name"."""
    cluster = Cluster(namespace, budget_seconds=PERSONAL_SECONDS)
    present = cluster.training_groups()
    deleted = []
    for key, candidate in BACKENDS.items():
        if candidate.module.GROUP in present and backend in ("auto", key):
            deleted += _delete(cluster, candidate, name)
    return deleted


def stopped_by_hand(workflow: Object) -> bool:
    """Whether somebody ended the pipeline run, as opposed to its pods being moved."""
    body = workflow.get("spec") or {}
    return body.get("activeDeadlineSeconds") == 0 or bool(body.get("shutdown"))


def _delete(cluster: Cluster, backend: Backend, name: str, *, foreground: bool = False) -> list[str]:
    """The job first: its operator holds on to a runtime that is in use."""
    return [
        f"{api.plural} {name}"
        for api in (backend.api, *backend.companions)
        if cluster.delete(api, name, foreground=foreground)
    ]


class _Launch:
    """One job, from its creation to its end."""

    def __init__(
        self,
        cluster: Cluster,
        backend: Backend,
        spec: TrainSpec,
        result: Callable[[], dict[str, Any] | None],
        run: str,
        pace: Pace,
    ):
        self.cluster, self.backend, self.spec, self.result, self.pace = cluster, backend, spec, result, pace
        self.label = f"{backend.module.KIND} {spec.name}" + (f" (run {run})" if run else "")
        self.limits = _Limits(spec, pace)
        self.guard = _Guard(cluster, backend, spec, pace)
        cluster.patience = self.guard.sleep
        self.log = _RankZeroLog(cluster, backend.module.CONTAINER)
        self.shown = ""

    def follow(self) -> dict[str, Any]:
        try:
            with self.guard, self.log:
                return self._follow()
        except _TerminatedError:
            raise PreemptedError(self.guard.outcome) from None

    def _follow(self) -> dict[str, Any]:
        preemptions = 0
        uid = self._create_or_adopt()
        while True:
            seen = self._wait(uid)
            if seen.phase == "Succeeded":
                found = self.result()
                if found is None:
                    raise HjepaError(
                        f"{self.label} succeeded but left no result; its log should say why. The job is kept: "
                        f"kubectl -n {self.cluster.namespace} logs {seen.pods[0].name if seen.pods else '...'}"
                    )
                self._clean_up(succeeded=True)
                return found
            cause = view.explain_failure(seen)
            if cause.kind != "preempted" or preemptions >= PREEMPTIONS:
                self._fail(cause)
            preemptions += 1
            say(f"{self.label}: preempted ({cause.text}); it starts again from its last checkpoint")
            self._remove(uid)
            self.guard.sleep(self.pace.recreate)
            uid = self._create_or_adopt()

    # -- start --------------------------------------------------------------------------------------------------------

    def _create_or_adopt(self) -> str:
        """The uid of the job to follow: new, or the same that is there already."""
        manifests = self.backend.module.render(self.spec)
        *companions, job = manifests
        while True:
            self.guard.check()
            current = self.cluster.get(self.backend.api, self.spec.name)
            if current is not None:
                if current["metadata"].get("deletionTimestamp"):
                    self._wait_until_gone(current["metadata"]["uid"])
                    continue
                seen = self._observe(current)
                if seen.phase != "Failed":  # one that failed makes way for one that was given more memory
                    self._check_same(current, job)
                if seen.phase != "Failed":
                    if not self._own(current, job):
                        continue
                    say(f"{self.label}: adopted, {seen.summary()}")
                    self.guard.armed = True
                    return seen.uid
                cause = view.explain_failure(seen)
                if cause.kind == "futile":
                    self._fail(cause)
                say(f"{self.label}: had failed ({cause.text}); it starts again from its last checkpoint")
                self._remove(seen.uid)
                continue
            self.guard.armed = True
            for manifest, api in zip(companions, self.backend.companions, strict=True):
                self._create_companion(api, manifest)
            try:
                made = self.cluster.create(self.backend.api, job)
            except ApiError as error:
                if error.status != 409:
                    raise
                continue  # another launcher was faster, or the answer to our own request was lost
            say(f"{self.label}: created in namespace {self.cluster.namespace}")
            return str(made["metadata"]["uid"])

    def _own(self, current: Object, wanted: Object) -> bool:
        """Add our pipeline run to the owners of an adopted job, so that it does not go with the run that started it.

        Returns:
            False if the job has changed meanwhile; look at it again.
        """
        ours = wanted["metadata"].get("ownerReferences") or []
        for api, name in ((api, self.spec.name) for api in (self.backend.api, *self.backend.companions)):
            found = current if api is self.backend.api else self.cluster.get(api, name)
            owners = (found or {}).get("metadata", {}).get("ownerReferences") or []
            missing = [owner for owner in ours if owner["uid"] not in {other["uid"] for other in owners}]
            if found is None or not owners or not missing:
                continue  # without any owner it belongs to whoever started it by hand, and stays
            version = found["metadata"]["resourceVersion"]
            patch = {"metadata": {"resourceVersion": version, "ownerReferences": [*owners, *missing]}}
            try:
                self.cluster.patch(api, name, patch)
            except ApiError as error:
                if error.status not in (404, 409):
                    raise
                return False
        return True

    def _create_companion(self, api: Api, manifest: Object) -> None:
        """A runtime; a leftover of another specification is of no use to anybody, for its job is gone."""
        while True:
            try:
                self.cluster.create(api, manifest)
            except ApiError as error:
                if error.status != 409:
                    raise
                current = self.cluster.get(api, manifest["metadata"]["name"])
                if current is not None and not current["metadata"].get("deletionTimestamp"):
                    if _hash_of(current) == _hash_of(manifest):
                        return
                    self.cluster.delete(api, manifest["metadata"]["name"], uid=current["metadata"]["uid"])
                self.guard.sleep(0.2)
            else:
                return

    def _check_same(self, current: Object, wanted: Object) -> None:
        if _hash_of(current) != _hash_of(wanted):
            raise UserError(
                f"{self.label} exists with another specification (got {_hash_of(current) or 'none'}, expected "
                f"{_hash_of(wanted)}): the settings of section cluster, or the image, have changed. Delete it (kubectl "
                f"-n {self.cluster.namespace} delete {self.backend.api.plural} {self.spec.name}) or take a new run"
            )

    def _remove(self, uid: str) -> None:
        """Delete the job and wait until its pods are gone, which would fight the new ones for GPUs."""
        companions = [(api, self.cluster.get(api, self.spec.name)) for api in self.backend.companions]
        if not self.cluster.delete(self.backend.api, self.spec.name, uid=uid, foreground=True):
            return  # another launcher was faster, and what is there now is its own
        for api, companion in companions:
            if companion is not None:
                self.cluster.delete(api, self.spec.name, uid=companion["metadata"]["uid"])
        self._wait_until_gone(uid)

    def _wait_until_gone(self, uid: str) -> None:
        limit = 2 * self.spec.cluster.grace_seconds + 60.0
        end = time.monotonic() + limit
        while True:
            current = self.cluster.get(self.backend.api, self.spec.name)
            if current is not None and current["metadata"]["uid"] != uid:
                return  # another launcher has made it anew, and the pods are those of the new one
            if current is None and not self._pods():
                return
            if time.monotonic() > end:
                raise HjepaError(f"{self.label}: its pods are still there {limit:.0f} s after it was deleted")
            self.guard.sleep(min(1.0, self.pace.poll))

    # -- wait ---------------------------------------------------------------------------------------------------------

    def _pods(self) -> list[Object]:
        return self.cluster.list(PODS, labels=self.backend.pods.format(name=self.spec.name))

    def _observe(self, job: Object) -> JobView:
        return self.backend.observe(job, self._pods())

    def _wait(self, uid: str) -> JobView:
        """Look until the job has ended.

        Raises:
            HjepaError: it is gone, or a limit has passed; then it is stopped.
        """
        self.limits.start()
        while True:
            self.guard.check()
            job = self.cluster.get(self.backend.api, self.spec.name)
            if job is None or job["metadata"]["uid"] != uid:
                what = "was deleted" if job is None else "was replaced by another job of this name"
                raise HjepaError(f"{self.label} {what} while it was followed; run this step again to start it anew")
            seen = self._observe(job)
            self._show(seen)
            if seen.ended:
                self.log.drain()
                return seen
            if (cause := view.fatal(seen)) is not None:
                self._end_at_once(cause)
            problem = self.limits.exceeded(seen, self._blocked)
            if problem is not None:
                self._stop(problem)
            self._watch(seen.version)

    def _watch(self, version: str) -> None:
        """Return when the job changes, or after ``pace.poll`` seconds: the pods may have."""
        began = time.monotonic()
        try:
            for _ in self.cluster.watch(self.backend.api, self.spec.name, version, self.pace.poll):
                return
        except StreamLostError:
            pass  # the next look tells what was missed
        left = min(1.0, self.pace.poll) - (time.monotonic() - began)
        if left > 0:
            self.guard.sleep(left)

    def _blocked(self) -> str:
        names = [child.format(name=self.spec.name) for child in self.backend.children]
        events = [event for name in names for event in self.cluster.list(EVENTS, fields=f"involvedObject.name={name}")]
        return view.blocked_by(events)

    def _show(self, seen: JobView) -> None:
        pod = next((pod for pod in seen.pods if pod.waiting or pod.message), None)
        text = seen.summary()
        if seen.phase not in ("Running", "Succeeded") and (detail := seen.reason or _waits(pod)):
            text += f" ({detail})"
        if text != self.shown:
            say(f"{self.label}: {text}")
            self.shown = text
        if seen.pods and seen.pods[0].index == 0 and (seen.pods[0].ready or seen.ended):
            self.log.follow(seen.pods[0].name)

    # -- end ----------------------------------------------------------------------------------------------------------

    def _stop(self, problem: HjepaError) -> NoReturn:
        """A job that will not come to anything must not wait for GPUs."""
        _delete(self.cluster, self.backend, self.spec.name)
        raise type(problem)(f"{self.label}: {problem}. The job has been deleted")

    def _end_at_once(self, cause: Cause) -> NoReturn:
        """Its operator would start the container again, which would only fail again."""
        lines = self._last_lines(cause.pod)
        _delete(self.cluster, self.backend, self.spec.name)
        kind = UserError if cause.kind == "user" else FutileRetryError
        raise kind(f"training failed: {cause.text}; {self.label} has been deleted, a retry would fail again{lines}")

    def _fail(self, cause: Cause) -> NoReturn:
        lines = self._last_lines(cause.pod)
        kept = "" if self.spec.cluster.cleanup == "delete-always" else f"; {self.label} is kept for a look"
        self._clean_up(succeeded=False)
        kinds: Mapping[str, type[HjepaError]] = {"user": UserError, "futile": FutileRetryError}
        raise kinds.get(cause.kind, HjepaError)(f"training failed: {cause.text}{kept}{lines}")

    def _last_lines(self, pod: PodView | None) -> str:
        if pod is None:
            return ""
        try:
            lines = list(self.cluster.log(pod.name, self.backend.module.CONTAINER, tailLines=_LAST_LINES))
        except HjepaError as error:
            return f"\n(no log of pod {pod.name}: {error})"
        return f"\nlast lines of pod {pod.name}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    def _clean_up(self, *, succeeded: bool) -> None:
        cleanup = self.spec.cluster.cleanup
        if cleanup == "delete-always" or (cleanup == "delete-on-success" and succeeded):
            try:
                _delete(self.cluster, self.backend, self.spec.name)
            except HjepaError as error:  # it holds no GPU any more, and its result is safe
                warn(f"{self.label} could not be deleted: {error}")


def _hash_of(obj: Object) -> str:
    return str((obj["metadata"].get("annotations") or {}).get(SPEC_HASH, ""))


def _waits(pod: PodView | None) -> str:
    return "" if pod is None else ": ".join(text for text in (pod.waiting, pod.message) if text)


class _Limits:
    """How long each part of the way may take; the time in the queue counts for nothing else."""

    def __init__(self, spec: TrainSpec, pace: Pace):
        self.wanted: ClusterConfig = spec.cluster
        self.pace = pace
        self._since: dict[str, float] = {}
        self._queued = 0.0  # seconds spent in the queue before this moment's wait
        self._started = time.monotonic()
        self._ran = False

    def start(self) -> None:
        """A new job begins."""
        self._since.clear()
        self._queued, self._started, self._ran = 0.0, time.monotonic(), False

    def exceeded(self, seen: JobView, blocked: Callable[[], str]) -> HjepaError | None:
        """The error of the first limit that has passed."""
        now, limits = time.monotonic(), self.wanted
        if seen.phase == "Queued":
            self._since = {what: since for what, since in self._since.items() if what == "queue"}
            waited = self._lasting("queue", True)
            if limits.queue_timeout_seconds is not None and waited > limits.queue_timeout_seconds:
                queue = f"queue {limits.queue}" if limits.queue else "its queue"
                return HjepaError(
                    f"not admitted by {queue} within cluster.queue_timeout_seconds={limits.queue_timeout_seconds:g} "
                    f"({seen.reason or 'no reason given'}); ask for less, or wait longer"
                )
            return None
        if "queue" in self._since:
            self._queued += now - self._since.pop("queue")
        elapsed = now - self._started - self._queued
        self._ran = self._ran or seen.phase == "Running"
        if limits.total_timeout_seconds is not None and elapsed > limits.total_timeout_seconds:
            return HjepaError(
                f"not done within cluster.total_timeout_seconds={limits.total_timeout_seconds:g}; its checkpoints are "
                "in S3, and the same run goes on with them"
            )
        if (pod := view.never_starts(seen)) is not None and self._lasting("broken", True) > min(
            60.0, limits.image_timeout_seconds
        ):
            return UserError(view.explain_no_start(pod))
        pod = view.pulling(seen)
        if self._lasting("pull", pod is not None) > limits.image_timeout_seconds and pod is not None:
            return UserError(view.explain_pull(pod))
        pod = view.unscheduled(seen)
        if self._lasting("schedule", pod is not None) > limits.schedule_timeout_seconds and pod is not None:
            return HjepaError(
                f"no node for pod {pod.name} within cluster.schedule_timeout_seconds="
                f"{limits.schedule_timeout_seconds:g}: {pod.message}; ask for less (cluster.gpus_per_node, cpu, "
                "memory), change cluster.node_selector or cluster.tolerations, or wait longer"
            )
        if self._lasting("no pods", not seen.pods) > self.pace.unnoticed:
            why = blocked()
            if why and not view.heals(why):
                return UserError(f"no pod may be made: {why}")
            if not why and not seen.known:
                return HjepaError(
                    f"nobody has taken notice of it for {self.pace.unnoticed:g} s: is the operator of "
                    "this kind of job running? kubectl get pods -A | grep -e trainer -e training-operator"
                )
            if elapsed > limits.start_timeout_seconds:
                return HjepaError(f"{self._late()}: {why or seen.reason or 'it has no pods'}")
        if not self._ran and elapsed > limits.start_timeout_seconds:
            waiting = [f"pod {pod.name}: {_waits(pod) or pod.phase}" for pod in seen.pods if not pod.ready]
            return HjepaError(f"{self._late()}: {'; '.join(waiting) or seen.reason or seen.summary()}")
        return None

    def _late(self) -> str:
        return f"not running on all nodes within cluster.start_timeout_seconds={self.wanted.start_timeout_seconds:g}"

    def _lasting(self, what: str, holds: bool) -> float:
        """Seconds for which it has been so, at every look."""
        if not holds:
            self._since.pop(what, None)
            return 0.0
        return time.monotonic() - self._since.setdefault(what, time.monotonic())


class _TerminatedError(BaseException):
    """SIGTERM has been dealt with; leaves whatever was going on."""


class _Guard:
    """Stops the job within a second of SIGTERM, if the pipeline run was cancelled.

    Under Kubeflow Pipelines this process is killed up to a second after SIGTERM, whatever the pod's grace period says.
    So a thread with a warm connection of its own waits for the signal: it needs no import, no name look-up, no TLS
    handshake and not the main thread, which may be in the middle of anything. Looking at the Workflow now and then
    keeps the connection warm.
    """

    def __init__(self, cluster: Cluster, backend: Backend, spec: TrainSpec, pace: Pace):
        self.cluster = cluster.another()
        self.backend, self.spec, self.pace = backend, spec, pace
        self.armed = False  # there is, or may be, a job of ours
        self.outcome = ""
        self._workflow: Object | None = None
        self._workflow_hidden = spec.owner is None
        self._handled = threading.Event()
        self._told = False
        self._previous: Any = None
        self._previous_fd = -1
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Guard:
        self._look()
        if threading.current_thread() is not threading.main_thread():
            return self  # whoever called us there deals with signals
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._stand_by, args=(self._pipe[0],), name="cancel", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None or self._thread is None:
            return
        signal.signal(signal.SIGTERM, self._previous)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._pipe[1])
        self._thread.join(5)
        os.close(self._pipe[0])
        self._pipe = None

    def sleep(self, seconds: float) -> None:
        self.check()
        time.sleep(seconds)
        self.check()

    def check(self) -> None:
        """Leave if SIGTERM has come: Python loses an exception that a handler raises in a finalizer."""
        if self._told:
            raise _TerminatedError

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        self._handled.wait(3.0)
        raise _TerminatedError

    def _stand_by(self, reader: int) -> None:
        while True:
            ready, _, _ = select.select([reader], [], [], self.pace.workflow)
            if not ready:
                self._look()
                continue
            received = os.read(reader, 64)
            if not received:
                return
            if signal.SIGTERM in received:
                try:
                    self._act()
                finally:
                    self._handled.set()
                return

    def _look(self) -> None:
        """Refresh what is known of the pipeline run; a failure says nothing."""
        if self.spec.owner is None:
            path = self.backend.api.path(self.cluster.namespace, self.spec.name)
        else:
            path = WORKFLOWS.path(self.cluster.namespace, self.spec.owner.name)
        try:
            found = self._once("GET", path)
        except ApiError as error:
            if error.status == 401:
                with suppress(UserError):  # a kubeconfig that is being replaced
                    self.cluster.reload()
            elif self.spec.owner is not None:
                self._workflow_hidden = error.status == 403
            return
        except OSError:
            return
        if self.spec.owner is not None:
            self._workflow = found

    def _once(self, method: str, path: str, body: Any = None) -> Any:
        """One request in a hurry.

        Raises:
            ApiError: refused.
            OSError: no answer.
        """
        import urllib3

        try:
            return self.cluster.once(method, path, body=body, seconds=_CANCEL_SECONDS)
        except ApiError:
            raise
        except (
            urllib3.exceptions.HTTPError,
            HjepaError,
            ValueError,
        ) as error:  # the latter two: no answer of Kubernetes
            raise OSError(str(error)) from error

    def _act(self) -> None:
        job = f"{self.backend.module.KIND} {self.spec.name}"
        if not self.armed:
            self.outcome = f"told to stop before {job} was created"
            return
        if not self._should_stop():
            self.outcome = f"told to stop; {job} goes on, and the next try of this step adopts it"
            return
        self.outcome = (
            f"cancelled: {job} could not be deleted in time; the janitor will"
            if self.spec.owner
            else f"told to stop: {job} could not be deleted in time and goes on; stop it with: hjepa job cancel"
        )
        for api in (self.backend.api, *self.backend.companions):
            path = api.path(self.cluster.namespace, self.spec.name)
            for _ in range(3):
                try:
                    self._once("DELETE", path, {"propagationPolicy": "Background"})
                except ApiError as error:
                    if error.status not in (404, 409) and error.status < 500 and error.status != 429:
                        self.outcome = f"cancelled, but {job} could not be deleted: {error}"
                        return
                    if error.status in (404, 409):
                        break
                except OSError:
                    continue
                else:
                    break
            else:
                return
        self.outcome = f"cancelled: {job} is deleted; the run goes on from its last checkpoint when it is started again"

    def _should_stop(self) -> bool:
        wanted: ClusterConfig = self.spec.cluster
        if wanted.on_sigterm != "auto":
            return wanted.on_sigterm == "stop"
        if self._workflow_hidden:
            return True  # a cancellation cannot be told from an eviction, and stopping loses the least
        if self._workflow is None or not stopped_by_hand(self._workflow):
            self._look()
        return self._workflow_hidden or (self._workflow is not None and stopped_by_hand(self._workflow))


class _RankZeroLog:
    """Prints what the first node logs, from a thread; it holds nothing up and fails nothing."""

    def __init__(self, cluster: Cluster, container: str):
        self.cluster, self.container = cluster.another(), container
        self._pods: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._pod = ""
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def __enter__(self) -> _RankZeroLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._pods.put(None)

    def follow(self, pod: str) -> None:
        if pod != self._pod:
            self._pod = pod
            self._idle.clear()
            self._pods.put(pod)

    def drain(self, seconds: float = 5.0) -> None:
        """Wait for the lines of a pod that has ended."""
        self._idle.wait(seconds)

    def _run(self) -> None:
        while (pod := self._pods.get()) is not None:
            self._idle.clear()
            self._print(pod)
            if self._pods.empty():
                self._idle.set()

    def _print(self, pod: str) -> None:
        since = ""  # the time stamp of the last line shown
        second, printed, left_out = 0, 0, 0
        failures = 0
        while not self._closing.is_set() and self._pods.empty():
            query = {"follow": "true", "timestamps": "true"} | ({"sinceTime": since} if since else {})
            try:
                for line in self.cluster.log(pod, self.container, **query):
                    stamp, _, text = line.partition(" ")
                    if stamp <= since:
                        continue  # sinceTime counts in seconds
                    since, failures = stamp, 0
                    if int(time.monotonic()) != second:
                        if left_out:
                            say(f"[{pod}] ... {left_out} lines left out")
                        second, printed, left_out = int(time.monotonic()), 0, 0
                    printed += 1
                    if printed > _LOG_LINES_PER_SECOND:
                        left_out += 1
                    else:
                        say(f"[{pod}] {text}")
                    if self._closing.is_set():
                        return
            except AccessError as error:
                warn(f"no log of pod {pod}: {error}")
                return
            except HjepaError as error:
                failures += 1
                if failures == 10:
                    warn(f"no log of pod {pod} for now: {error}")
                if failures > 5 and self._ended(pod):
                    return
                self._closing.wait(min(_LOG_PAUSE_SECONDS, 0.2 * 2**failures))
            else:
                if left_out:
                    say(f"[{pod}] ... {left_out} lines left out")
                if self._ended(pod):
                    return
                failures += 1
                self._closing.wait(min(_LOG_PAUSE_SECONDS, 0.2 * 2**failures))

    def _ended(self, pod: str) -> bool:
        """Whether there is nothing more to come; a container may start again in the same pod."""
        with suppress(HjepaError, OSError):
            found = self.cluster.get(PODS, pod)
            return found is None or (found.get("status") or {}).get("phase") in ("Succeeded", "Failed")
        return False
