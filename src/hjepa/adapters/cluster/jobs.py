"""A training job seen from outside: is it still at work, and what does it say."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hjepa.adapters.cluster.client import PERSONAL_SECONDS, PODS, Cluster, Object, StreamLostError
from hjepa.adapters.cluster.launcher import BACKENDS, Backend
from hjepa.adapters.cluster.view import JobView, PodView
from hjepa.errors import UserError
from hjepa.utils.logging import warn

_TRIES = 5  # of reading a log that breaks off at once
_LONGEST_PAUSE_SECONDS = 10.0


def is_active(name: str, *, backend: str = "auto", namespace: str | None = None) -> bool:
    """Whether a job of this name exists and has not ended."""
    cluster = Cluster(namespace, budget_seconds=PERSONAL_SECONDS)
    return any(not found.observe(job, []).ended for found, job in _jobs(cluster, name, backend))


def log(
    name: str, *, run: str = "", backend: str = "auto", namespace: str | None = None, follow: bool = False
) -> Iterator[str]:
    """Lines of the job's first node, of its newest pod.

    Args:
        run: Whose job it is, for messages.
        follow: Wait for that pod, and go on with it and with those that replace it until the job has ended.

    Raises:
        UserError: there is no such job, or it has no pod yet; or a job that has ended has no log.
    """
    cluster = Cluster(namespace, budget_seconds=PERSONAL_SECONDS)
    found = next(iter(_jobs(cluster, name, backend)), None)
    if found is None:
        of_run = f" (of run {run})" if run else ""
        raise UserError(
            f"there is no job {name} in namespace {cluster.namespace}{of_run}; name the run with --config and --run. "
            "`hjepa job submit` starts its job; one that succeeded is deleted unless cluster.cleanup=keep, and its "
            "metrics are in MLflow"
        )
    kind, job = found
    if follow:
        yield from _follow(cluster, kind, name)
        return
    pod = _first_pod(_observe(cluster, kind, job))
    if pod is None:
        raise UserError(
            f"job {name} has no pod yet: kubectl -n {cluster.namespace} get events --sort-by=.lastTimestamp"
        )
    try:
        yield from cluster.log(pod.name, kind.module.CONTAINER)
    except StreamLostError as error:
        raise UserError(f"no log of pod {pod.name}: {error}") from None


def _jobs(cluster: Cluster, name: str, backend: str) -> Iterator[tuple[Backend, Object]]:
    present = cluster.training_groups()
    for key, kind in BACKENDS.items():
        if kind.module.GROUP in present and backend in ("auto", key):
            job = cluster.get(kind.api, name)
            if job is not None:
                yield kind, job


def _observe(cluster: Cluster, kind: Backend, job: Object) -> JobView:
    return kind.observe(job, cluster.list(PODS, labels=kind.pods.format(name=job["metadata"]["name"])))


def _first_pod(seen: JobView) -> PodView | None:
    return min(seen.pods, key=lambda pod: pod.index, default=None)


def _follow(cluster: Cluster, kind: Backend, name: str) -> Iterator[str]:
    """The first node's log, of one container after another, until nothing more can come."""
    followed = since = shown = ""
    tries = 0
    # Gone is a job that succeeded and was cleaned up, or that was cancelled: no error of whoever reads its log.
    while (job := cluster.get(kind.api, name)) is not None:
        # The state before the log is read: what was said up to that end is in the log.
        seen = _observe(cluster, kind, job)
        pod = _first_pod(seen)
        over = seen.ended or (pod is not None and pod.phase == "Succeeded")
        lost = ""
        if pod is not None:
            if pod.name != followed:
                followed, since = pod.name, ""
            try:
                for line in cluster.log(
                    pod.name,
                    kind.module.CONTAINER,
                    follow="true",
                    timestamps="true",
                    **({"sinceTime": since} if since else {}),
                ):
                    stamp, _, text = line.partition(" ")
                    if stamp > since:  # sinceTime counts in seconds
                        since, tries = stamp, 0
                        yield text
            except StreamLostError as error:  # its container does not run yet, or the connection broke
                lost = str(error)
        if over and not followed:
            raise UserError(f"job {name} has ended, and its pods are gone; its metrics are in MLflow")
        if over and not lost:
            return
        tries += 1
        if over and tries >= _TRIES:
            raise UserError(f"no log of pod {followed}: {lost}")
        if (lost or pod is None) and seen.summary() != shown:
            shown = seen.summary()
            warn(f"job {name}: {shown}")
        time.sleep(min(_LONGEST_PAUSE_SECONDS, 0.2 * 2 ** min(tries, 10)))
