"""Ends the jobs that a killed launcher left: those whose pipeline run is gone or over. Run it every few minutes."""

from __future__ import annotations

import time
from calendar import timegm
from dataclasses import dataclass

from hjepa.adapters.cluster.client import WORKFLOWS, Cluster, Object
from hjepa.adapters.cluster.launcher import BACKENDS, Backend, stopped_by_hand
from hjepa.adapters.cluster.spec import MANAGED_BY
from hjepa.utils.logging import say

_OVER = ("Succeeded", "Failed", "Error")
_NEW_SECONDS = 600.0  # a runtime stands alone until its job is created


@dataclass(frozen=True)
class Removed:
    kind: str
    name: str
    why: str


def sweep(cluster: Cluster, *, max_age_seconds: float | None = None, dry_run: bool = False) -> list[Removed]:
    """Delete the jobs of hjepa in this namespace that nobody waits for; returns what went, and why.

    A job without an owner was started by hand and stays, unless it is too old. A finished job stays for a look: it
    holds nothing, and goes with its Workflow.

    Args:
        max_age_seconds: From a job's creation; None: no limit.
        dry_run: Say what would go.

    Raises:
        UserError: a right is missing.
        HjepaError: the API server does not answer.
    """
    removed = []
    present = cluster.training_groups()
    workflows: dict[str, Object | None] = {}
    for backend in BACKENDS.values():
        if backend.module.GROUP not in present:
            continue
        jobs = cluster.list(backend.api, labels=f"{MANAGED_BY}=hjepa")
        kind = backend.module.KIND
        for job in jobs:
            if why := _why(cluster, backend, job, max_age_seconds, workflows):
                removed.append(Removed(kind, job["metadata"]["name"], why))
                if not dry_run:
                    cluster.delete(backend.api, job["metadata"]["name"], uid=job["metadata"]["uid"])
        removed += _lone_companions(cluster, backend, {job["metadata"]["name"] for job in jobs}, dry_run=dry_run)
    for item in removed:
        say(f"{item.kind} {item.name}: {'would be' if dry_run else 'is'} deleted ({item.why})")
    return removed


def _why(
    cluster: Cluster,
    backend: Backend,
    job: Object,
    max_age_seconds: float | None,
    workflows: dict[str, Object | None],
) -> str:
    """Why it has to go; "" if it stays."""
    metadata = job["metadata"]
    if metadata.get("deletionTimestamp") or backend.observe(job, []).ended:
        return ""
    if max_age_seconds is not None and _age(job) > max_age_seconds:
        return f"older than {max_age_seconds:.0f} s"
    owners = [owner for owner in metadata.get("ownerReferences") or [] if owner["kind"] == "Workflow"]
    reasons = [_over(cluster, owner, workflows) for owner in owners]
    return reasons[-1] if reasons and all(reasons) else ""  # a job that was adopted has several


def _over(cluster: Cluster, owner: Object, workflows: dict[str, Object | None]) -> str:
    """Why a pipeline run waits for nothing any more; "" if it does."""
    name = owner["name"]
    if name not in workflows:
        workflows[name] = cluster.get(WORKFLOWS, name)
    workflow = workflows[name]
    if workflow is None or workflow["metadata"]["uid"] != owner["uid"]:
        return f"workflow {name} is gone"
    phase = (workflow.get("status") or {}).get("phase")
    if phase in _OVER:
        return f"workflow {name} is over: {phase}"
    return f"workflow {name} was cancelled" if stopped_by_hand(workflow) else ""


def _lone_companions(cluster: Cluster, backend: Backend, jobs: set[str], *, dry_run: bool) -> list[Removed]:
    """Runtimes whose job is gone."""
    removed = []
    for api in backend.companions:
        for companion in cluster.list(api, labels=f"{MANAGED_BY}=hjepa"):
            name = companion["metadata"]["name"]
            if name not in jobs and _age(companion) > _NEW_SECONDS and "ownerReferences" in companion["metadata"]:
                removed.append(Removed(companion["kind"], name, "its job is gone"))
                if not dry_run:
                    cluster.delete(api, name, uid=companion["metadata"]["uid"])
    return removed


def _age(obj: Object) -> float:
    """Seconds since it was created, by this machine's clock."""
    return time.time() - timegm(time.strptime(obj["metadata"]["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ"))
