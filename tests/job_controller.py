"""The training operators and a kubelet, as far as tests need them, beside tests/fake_apiserver.py.

Pods are made with the labels and the environment that each operator gives them. What runs in them is either told by
the test (``Life``), or real processes: the containers' own command line, on this machine. The names of pods, which only
a cluster's DNS knows, become 127.0.0.1, and the rendezvous' port a free one.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fake_apiserver import ApiError, FakeApiServer, Object, now

WORKFLOW = "argoproj.io/v1alpha1"


@dataclass(frozen=True)
class Life:
    """What becomes of one pod."""

    exit_code: int | None = 0  # None: it runs until it is deleted
    seconds: float = 0.05  # of running
    lines: tuple[str, ...] = ()  # of its log
    message: str = ""  # its termination message
    reason: str = ""  # OOMKilled ...
    waiting: tuple[str, str] | None = None  # never runs: (ImagePullBackOff, message)
    unschedulable: str = ""  # the scheduler's message
    disrupted: str = ""  # EvictionByEvictionAPI: it fails after ``seconds``


Lives = Callable[[int, int], Life]  # (node rank, how many pods of this rank there were before) -> its life


@dataclass
class Running:
    process: subprocess.Popen[str]
    message: Path
    reader: threading.Thread


@dataclass
class JobController:
    """``with JobController(server, ...) as controller``: runs every PyTorchJob and TrainJob of the server.

    Args:
        lives: What the pods do; None: they are real processes.
        folder: Of termination messages, for real processes.
        environment: Of real processes, below what their manifest says.
        slow_seconds: Before the operator takes notice of a new job.
    """

    server: FakeApiServer
    lives: Lives | None = lambda index, attempt: Life()
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    slow_seconds: float = 0.0
    pods_made: list[Object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._running: dict[str, Running] = {}  # by the pod's uid
        self._ports: dict[str, int] = {}  # by the uid of the job
        self._seen: dict[str, int] = {}  # "job/rank" -> pods so far
        self._attempts: dict[str, int] = {}  # by the uid of the job: restarts of all its pods
        self._deadlines: dict[str, float] = {}
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.failure: BaseException | None = None

    def __enter__(self) -> JobController:
        self.server.kubelet = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        for running in self._running.values():
            if running.process.poll() is None:
                _kill(running.process)
                running.process.wait()
        if self.failure is not None:
            raise self.failure

    def _loop(self) -> None:
        try:
            while not self._stop.wait(0.01):
                self._kubelet()
                for kind in ("PyTorchJob", "TrainJob"):
                    if any(resource.kind == kind for resource in self.server.resources):
                        for job in self.server.find(kind, ""):
                            self._reconcile(job)
        except BaseException as error:  # noqa: BLE001 - shown when the test ends
            self.failure = error

    # -- the operators ------------------------------------------------------------------------------------------------

    def _reconcile(self, job: Object) -> None:
        if job["metadata"].get("deletionTimestamp") or _ended(job):
            return
        uid = job["metadata"]["uid"]
        if time.monotonic() < self._deadlines.setdefault(uid, time.monotonic() + self.slow_seconds):
            return
        if job["kind"] == "PyTorchJob":
            self._reconcile_pytorchjob(job)
        else:
            self._reconcile_trainjob(job)

    def _pods(self, job: Object) -> list[Object]:
        namespace = job["metadata"]["namespace"]
        return [
            pod
            for pod in self.server.find("Pod", namespace)
            if any(o["uid"] == job["metadata"]["uid"] for o in pod["metadata"].get("ownerReferences") or [])
        ]

    def _reconcile_pytorchjob(self, job: Object) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        policy = spec.get("runPolicy") or {}
        if policy.get("suspend"):
            self._condition(job, "Suspended", "PyTorchJobSuspended", "PyTorchJob is suspended")
            return
        worker = spec["pytorchReplicaSpecs"]["Worker"]
        pods = {pod["metadata"]["labels"]["training.kubeflow.org/replica-index"]: pod for pod in self._pods(job)}
        if not (job.get("status") or {}).get("conditions"):
            self._condition(job, "Created", "PyTorchJobCreated", f"PyTorchJob {name} is created.")
        for index in range(worker["replicas"]):
            if str(index) not in pods:
                labels = {
                    "training.kubeflow.org/job-name": name,
                    "training.kubeflow.org/replica-type": "worker",
                    "training.kubeflow.org/replica-index": str(index),
                    "training.kubeflow.org/operator-name": "pytorchjob-controller",
                } | ({"training.kubeflow.org/job-role": "master"} if index == 0 else {})
                injected = {
                    "PYTHONUNBUFFERED": "1",
                    "PET_NPROC_PER_NODE": spec["nprocPerNode"],
                    "PET_NNODES": str(worker["replicas"]),
                }
                template = worker["template"] | {"restart": worker["restartPolicy"]}
                self._make_pod(job, f"{name}-worker-{index}", index, template, labels, injected)
        phases = [pod["status"]["phase"] for pod in pods.values()]
        failed = [pod for pod in pods.values() if pod["status"]["phase"] == "Failed"]
        restarts = sum(_restarts(pod) for pod in pods.values() if pod["status"]["phase"] == "Running")
        counts = {
            "active": phases.count("Running"),
            "succeeded": phases.count("Succeeded"),
            "failed": phases.count("Failed"),
        }
        limit = policy.get("backoffLimit")
        exhausted = limit is not None and restarts >= limit
        if failed or exhausted:
            why = "it has reached the specified backoff limit" if exhausted else "1 Worker replica(s) failed"
            text = f"PyTorchJob {name} is failing because {why}."
            self._condition(job, "Failed", "PyTorchJobFailed", text, replicas=counts)
            self._clean(job, policy)
        elif pods and phases.count("Succeeded") == worker["replicas"]:
            text = f"PyTorchJob {name} is successfully completed."
            self._condition(job, "Succeeded", "PyTorchJobSucceeded", text, replicas=counts)
        elif "Running" in phases:
            text = f"PyTorchJob {name} is running."
            self._condition(job, "Running", "PyTorchJobRunning", text, replicas=counts)

    def _reconcile_trainjob(self, job: Object) -> None:
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        if job["spec"].get("suspend"):
            self._condition(job, "Suspended", "Suspended", "TrainJob is suspended")
            return
        runtime = self.server.get("TrainingRuntime", job["spec"]["runtimeRef"]["name"], namespace)
        if runtime is None:
            self._condition(job, "Failed", "TrainingRuntimeNotSupported", "the runtime does not exist")
            return
        job_set = runtime["spec"]["template"]["spec"]
        child = job_set["replicatedJobs"][0]["template"]["spec"]
        nodes = job["spec"]["trainer"].get("numNodes") or runtime["spec"]["mlPolicy"]["numNodes"]
        attempt = self._attempts.setdefault(job["metadata"]["uid"], 0)
        pods = [
            pod
            for pod in self._pods(job)
            if pod["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] == str(attempt)
        ]
        if len(self._pods(job)) > len(pods):
            return  # BlockingRecreate: the old ones have to be gone
        present = {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods}
        for index in range(nodes):
            if str(index) not in present:
                labels = {
                    "jobset.sigs.k8s.io/jobset-name": name,
                    "jobset.sigs.k8s.io/replicatedjob-name": "node",
                    "jobset.sigs.k8s.io/restart-attempt": str(attempt),
                    "batch.kubernetes.io/job-completion-index": str(index),
                }
                injected = {
                    "PET_NNODES": str(nodes),
                    "PET_NPROC_PER_NODE": str(job["spec"]["trainer"]["numProcPerNode"]),
                    "PET_NODE_RANK": str(index),
                    "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
                    "PET_MASTER_PORT": "29500",
                }
                pod_name = f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}"
                template = child["template"] | {"restart": child["template"]["spec"]["restartPolicy"]}
                self._make_pod(job, pod_name, index, template, labels, injected)
        phases = [pod["status"]["phase"] for pod in pods]
        ready = int(bool(phases) and all(phase in ("Running", "Succeeded") for phase in phases) and len(pods) == nodes)
        counts = [{"name": "node", "ready": ready, "active": int("Running" in phases), "succeeded": 0, "failed": 0}]
        failed = next((pod for pod in pods if pod["status"]["phase"] == "Failed"), None)
        if failed is not None:
            self._job_set_failed(job, job_set, child, failed, counts)
        elif len(pods) == nodes and phases.count("Succeeded") == nodes:
            self._condition(job, "Complete", "AllJobsCompleted", "jobset completed successfully", jobs=counts)
        elif phases:
            self._status(job, {"jobsStatus": counts})

    def _job_set_failed(
        self, job: Object, job_set: Object, child: Object, pod: Object, counts: list[dict[str, Any]]
    ) -> None:
        """One failed pod fails its Job at once (backoffLimit 0); the JobSet's policy says what follows."""
        uid = job["metadata"]["uid"]
        status = pod["status"]
        code = status["containerStatuses"][0]["state"]["terminated"]["exitCode"]
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for rule in child["podFailurePolicy"]["rules"]:
            conditions = [condition["type"] for condition in status.get("conditions") or []]
            if code in rule.get("onExitCodes", {}).get("values", []):
                reason = "PodFailurePolicy"
                message = (
                    f"Container {pod['spec']['containers'][0]['name']} for pod "
                    f"{pod['metadata']['namespace']}/{pod['metadata']['name']} failed with exit code {code} "
                    "matching FailJob rule at index 0"
                )
                break
            if any(item["type"] in conditions for item in rule.get("onPodConditions") or []):
                reason, message = "PodFailurePolicy", "Pod has condition DisruptionTarget matching FailJob rule"
                break
        action = "RestartJobSet"
        for rule in job_set["failurePolicy"].get("rules") or []:
            patterns = rule.get("onJobFailureMessagePatterns")
            if reason in (rule.get("onJobFailureReasons") or [reason]) and (
                not patterns or any(re.search(pattern, message) for pattern in patterns)
            ):
                action = rule["action"]
                break
        counted = self._attempts[uid] >= job_set["failurePolicy"]["maxRestarts"]
        if action == "FailJobSet" or (action == "RestartJobSet" and counted):
            why = "FailJobSetFailurePolicyAction" if action == "FailJobSet" else "ReachedMaxRestarts"
            text = f"jobset failed due to {reason}: {message}"
            self._condition(job, "Failed", why, text, jobs=counts)
            self._clean(job, {"cleanPodPolicy": "Running"})
            return
        self._attempts[uid] += 1
        for other in self._pods(job):
            self.server.delete("Pod", other["metadata"]["name"], other["metadata"]["namespace"])

    def _clean(self, job: Object, policy: Object) -> None:
        for pod in self._pods(job):
            policy_name = policy.get("cleanPodPolicy", "None")
            if policy_name == "All" or (policy_name == "Running" and pod["status"]["phase"] in ("Running", "Pending")):
                self.server.delete("Pod", pod["metadata"]["name"], pod["metadata"]["namespace"])

    def _make_pod(
        self, job: Object, name: str, index: int, template: Object, labels: dict[str, str], injected: dict[str, str]
    ) -> None:
        pod: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": (template["metadata"].get("labels") or {}) | labels,
                "ownerReferences": [
                    {
                        "apiVersion": job["apiVersion"],
                        "kind": job["kind"],
                        "name": job["metadata"]["name"],
                        "uid": job["metadata"]["uid"],
                        "controller": True,
                        "blockOwnerDeletion": True,
                    }
                ],
            },
            "spec": template["spec"] | {"restartPolicy": template["restart"]},
        }
        for container in pod["spec"]["containers"]:
            extra = [{"name": key, "value": value} for key, value in injected.items()]
            container["env"] = [*(container.get("env") or []), *extra]
        try:
            made = self.server.create(pod, job["metadata"]["namespace"])
        except ApiError as error:
            if error.status == 409 or self.server.get(job["kind"], job["metadata"]["name"]) is None:
                return
            if not any(job["metadata"]["uid"] == e["involvedObject"]["uid"] for e in self.server.find("Event")):
                self.server.event(job, "FailedCreatePod", f"Error creating: {error}")
            return
        self.pods_made.append(made)
        key = f"{job['metadata']['name']}/{index}"
        attempt = self._seen.get(key, 0)
        self._seen[key] = attempt + 1
        if self.lives is not None:
            life = self.lives(index, attempt)
            threading.Thread(target=self._live, args=(made, life), daemon=True).start()
        else:
            self._spawn(made)

    # -- status -------------------------------------------------------------------------------------------------------

    def _condition(
        self,
        job: Object,
        type: str,
        reason: str,
        message: str,
        *,
        replicas: dict[str, int] | None = None,
        jobs: list[dict[str, Any]] | None = None,
    ) -> None:
        """Add a condition that holds; the ones it rules out stay in the list with status False."""
        status: Object = {}
        if replicas is not None:
            status["replicaStatuses"] = {"Worker": replicas}
        if jobs is not None:
            status["jobsStatus"] = jobs
        conditions = [dict(item) for item in (job.get("status") or {}).get("conditions") or []]
        for item in conditions:
            if item["type"] != "Created" and item["type"] != type:
                item["status"] = "False"
        if not any(item["type"] == type and item["status"] == "True" for item in conditions):
            conditions = [item for item in conditions if item["type"] != type]
            added = {"type": type, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()}
            conditions.append(added)
        status["conditions"] = conditions
        if type in ("Succeeded", "Complete"):
            status["completionTime"] = now()
        self._status(job, status)

    def _status(self, job: Object, status: Object) -> None:
        merged = {**(job.get("status") or {}), **status}
        if merged != job.get("status"):
            try:
                self.server.set_status(job["kind"], job["metadata"]["name"], merged, job["metadata"]["namespace"])
            except KeyError:
                return  # deleted in the meantime
            job["status"] = merged

    # -- pods by the book ---------------------------------------------------------------------------------------------

    def _pod_status(self, pod: Object, phase: str, state: Object | None = None, **more: Any) -> bool:
        """False if this pod is there no more."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]

        def change(current: Object) -> None:
            if current["metadata"]["uid"] != pod["metadata"]["uid"]:
                raise KeyError(name)
            more.setdefault("restarts", _restarts(current))
            conditions = list(more.get("conditions") or [])
            conditions.append({"type": "Ready", "status": "True" if phase == "Running" else "False"})
            status: Object = {"phase": phase, "conditions": conditions, "startTime": now()}
            if state is not None:
                container = pod["spec"]["containers"][0]["name"]
                entry = {"name": container, "state": state, "restartCount": more["restarts"]}
                if more.get("last"):
                    entry["lastState"] = more["last"]
                status["containerStatuses"] = [entry]
            if more.get("reason"):
                status["reason"] = more["reason"]
            if phase == "Running":
                current["spec"]["nodeName"] = "node-0"
            current["status"] = status

        try:
            self.server.update("Pod", name, change, namespace)
        except KeyError:
            return False
        return True

    def _live(self, pod: Object, life: Life) -> None:
        if life.unschedulable:
            scheduled = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": life.unschedulable,
            }
            self._pod_status(pod, "Pending", None, conditions=[scheduled])
            return
        if life.waiting:
            waiting = {"waiting": {"reason": life.waiting[0], "message": life.waiting[1]}}
            self._pod_status(pod, "Pending", waiting)
            return
        self._pod_status(pod, "Running", {"running": {"startedAt": now()}})
        container = pod["spec"]["containers"][0]["name"]
        for line in life.lines:
            self.server.log(pod["metadata"]["name"], line, container=container, namespace=pod["metadata"]["namespace"])
        if life.exit_code is None:
            return
        if self._stop.wait(life.seconds):
            return
        self._finish(pod, life.exit_code, life.message, life.reason, life.disrupted)

    def _finish(self, pod: Object, code: int, message: str, reason: str = "", disrupted: str = "") -> None:
        ended = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "message": message,
            "finishedAt": now(),
        }
        conditions = []
        if disrupted:
            text = {"type": "DisruptionTarget", "status": "True", "reason": disrupted, "message": "the node is drained"}
            conditions.append(text)
        if code != 0 and not disrupted and pod["spec"]["restartPolicy"] == "OnFailure":
            self._restart(pod, ended)
            return
        phase = "Succeeded" if code == 0 else "Failed"
        self._pod_status(pod, phase, {"terminated": ended}, conditions=conditions)

    def _restart(self, pod: Object, ended: Object) -> None:
        """The container again in the same pod, as its kubelet does."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        current = self.server.get("Pod", name, namespace)
        if current is None or current["metadata"].get("deletionTimestamp"):
            self._pod_status(pod, "Failed", {"terminated": ended})
            return
        restarts = _restarts(current) + 1
        last = {"terminated": ended}
        waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}}
        self._pod_status(pod, "Running", waiting, restarts=restarts, last=last)
        if self._stop.wait(0.2) or not self._pod_status(
            pod, "Running", {"running": {"startedAt": now()}}, restarts=restarts, last=last
        ):
            return
        if self.lives is None:
            self._spawn(pod)
            return
        key = f"{self._job_of(pod)}/{pod['metadata']['labels']['training.kubeflow.org/replica-index']}"
        attempt = self._seen[key]
        self._seen[key] = attempt + 1
        life = self.lives(int(pod["metadata"]["labels"]["training.kubeflow.org/replica-index"]), attempt)
        if life.exit_code is not None and not self._stop.wait(life.seconds):
            self._finish(pod, life.exit_code, life.message, life.reason, life.disrupted)

    @staticmethod
    def _job_of(pod: Object) -> str:
        return str(pod["metadata"]["ownerReferences"][0]["name"])

    def _kubelet(self) -> None:
        """Pods that are to go: SIGTERM, grace, SIGKILL, gone."""
        for pod in self.server.find("Pod", ""):
            metadata = pod["metadata"]
            if not metadata.get("deletionTimestamp"):
                continue
            running = self._running.get(metadata["uid"])
            if running is not None and running.process.poll() is None:
                begun = self._deadlines.get(metadata["uid"])
                if begun is None:
                    self._deadlines[metadata["uid"]] = time.monotonic() + metadata["deletionGracePeriodSeconds"]
                    running.process.terminate()
                elif time.monotonic() > begun:
                    _kill(running.process)
                continue
            if running is not None:
                running.reader.join(5)
            try:
                self.server.delete("Pod", metadata["name"], metadata["namespace"], force=True)
            except ApiError:
                continue

    # -- pods with processes ------------------------------------------------------------------------------------------

    def kill(self, index: int) -> None:
        """Take a node's process away as the OOM killer does."""
        for pod in self.server.find("Pod"):
            labels = pod["metadata"]["labels"]
            rank = labels.get("training.kubeflow.org/replica-index") or labels.get(
                "batch.kubernetes.io/job-completion-index"
            )
            if rank == str(index) and pod["metadata"]["uid"] in self._running:
                _kill(self._running[pod["metadata"]["uid"]].process)

    def _spawn(self, pod: Object) -> None:
        assert self.folder is not None
        container = pod["spec"]["containers"][0]
        variables = self._variables(pod, container)
        # Stand-in for DNS: every pod is on this machine.
        port = self._ports.setdefault(pod["metadata"]["ownerReferences"][0]["uid"], _free_port())
        variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        message = self.folder / f"{pod['metadata']['uid']}.message"
        home = self.folder / pod["metadata"]["uid"]
        home.mkdir(exist_ok=True)
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "OMP_NUM_THREADS") if key in os.environ}
        environment = {
            **kept, **self.environment, **variables, "TERMINATION_LOG": str(message), "HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "hjepa.entrypoint", *container["args"]],
            env=environment,
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._follow, args=(pod, container["name"], process, message), daemon=True)
        self._running[pod["metadata"]["uid"]] = Running(process, message, reader)
        self._pod_status(pod, "Running", {"running": {"startedAt": now()}})
        reader.start()

    def _follow(self, pod: Object, container: str, process: subprocess.Popen[str], message: Path) -> None:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        assert process.stdout is not None
        for line in process.stdout:
            self.server.log(name, line.rstrip("\n"), container=container, namespace=namespace)
        code = process.wait()
        told = message.read_text() if message.exists() else ""
        self._finish(pod, 128 - code if code < 0 else code, told, "OOMKilled" if code == -9 else "")

    def _variables(self, pod: Object, container: Object) -> dict[str, str]:
        """As the kubelet makes them: Secrets first, then in order, later ones win, $(NAME) is replaced."""
        found: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            reference = source["secretRef"]
            secret = self.server.get("Secret", reference["name"], pod["metadata"]["namespace"])
            if secret is None and not reference.get("optional"):
                raise AssertionError(f"secret {reference['name']} does not exist")
            for key, value in ((secret or {}).get("data") or {}).items():
                found[key] = base64.b64decode(value).decode()
        for item in container.get("env") or []:
            value = item.get("value", "")
            if "valueFrom" in item:
                path = item["valueFrom"]["fieldRef"]["fieldPath"]
                match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
                assert match is not None, path
                value = pod["metadata"]["labels"][match[1]]
            found[item["name"]] = re.sub(r"\$\((\w+)\)", lambda m: found.get(m[1], m[0]), value)
        return found


def _kill(container: subprocess.Popen[str]) -> None:
    """All of a container's processes go at once, those with sessions of their own too."""
    found = psutil.Process(container.pid)
    for process in [found, *found.children(recursive=True)]:
        process.kill()


def _ended(job: Object) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(c["type"] in ("Succeeded", "Failed", "Complete") and c["status"] == "True" for c in conditions)


def _restarts(pod: Object) -> int:
    return sum(status["restartCount"] for status in pod.get("status", {}).get("containerStatuses") or [])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_workflow(server: FakeApiServer, name: str = "pretrain-1", pod: str = "launcher-1") -> Object:
    """A pipeline run with the pod of its launcher; returns the Workflow."""
    workflow = server.create(
        {"apiVersion": WORKFLOW, "kind": "Workflow", "metadata": {"name": name}, "spec": {}, "status": {}}
    )
    metadata = {
        "name": pod,
        "ownerReferences": [
            {"apiVersion": WORKFLOW, "kind": "Workflow", "name": name, "uid": workflow["metadata"]["uid"]}
        ],
    }
    containers = [{"name": "main", "image": "launcher"}]
    server.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": containers}})
    return workflow
