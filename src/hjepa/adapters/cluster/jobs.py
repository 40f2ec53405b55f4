"""A training job seen from outside: is it still at work, and what does it say."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hjepa.adapters.cluster.client import PODS, Cluster, Object, StreamLostError
from hjepa.adapters.cluster.launcher import BACKENDS, Backend
from hjepa.adapters.cluster.view import PodView
from hjepa.errors import UserError

_BUDGET_SECONDS = 60.0
_TRIES = 5  # of reading a log that breaks off at once


def is_active(name: str, *, backend: str = "auto", namespace: str | None = None) -> bool:
    """Whether a job of this name exists and has not ended."""
    cluster = Cluster(namespace, budget_seconds=_BUDGET_SECONDS)
    return any(not found.observe(job, []).ended for found, job in _jobs(cluster, name, backend))


def log(name: str, *, backend: str = "auto", namespace: str | None = None, follow: bool = False) -> Iterator[str]:
    """Lines of the job's first node, of its newest pod.

    Raises:
        UserError: there is no such job, or it has no pod yet.
    """
    cluster = Cluster(namespace, budget_seconds=_BUDGET_SECONDS)
    found = next(iter(_jobs(cluster, name, backend)), None)
    if found is None:
        raise UserError(
            f"there is no job {name} in namespace {cluster.namespace}; `hjepa job submit` starts it, and one that "
            "succeeded is deleted unless cluster.cleanup=keep: its metrics are in MLflow"
        )
    kind, _ = found
    pod = _first_pod(cluster, *found)
    if pod is None:
        raise UserError(
            f"job {name} has no pod yet: kubectl -n {cluster.namespace} get events --sort-by=.lastTimestamp"
        )
    yield from _lines(cluster, pod.name, kind.module.CONTAINER, follow)


def _jobs(cluster: Cluster, name: str, backend: str) -> Iterator[tuple[Backend, Object]]:
    present = cluster.training_groups()
    for key, kind in BACKENDS.items():
        if kind.module.GROUP in present and backend in ("auto", key):
            job = cluster.get(kind.api, name)
            if job is not None:
                yield kind, job


def _first_pod(cluster: Cluster, kind: Backend, job: Object) -> PodView | None:
    pods = cluster.list(PODS, labels=kind.pods.format(name=job["metadata"]["name"]))
    return min(kind.observe(job, pods).pods, key=lambda pod: pod.index, default=None)


def _lines(cluster: Cluster, pod: str, container: str, follow: bool) -> Iterator[str]:
    """The log from its beginning, taken up again where the connection broke off."""
    since, tries = "", 0
    while True:
        query = (
            {"timestamps": "true"} | ({"follow": "true"} if follow else {}) | ({"sinceTime": since} if since else {})
        )
        try:
            for line in cluster.log(pod, container, **query):
                stamp, _, text = line.partition(" ")
                if stamp > since:  # sinceTime counts in seconds
                    since, tries = stamp, 0
                    yield text
            return
        except StreamLostError as error:
            tries += 1
            if not follow or tries == _TRIES:
                raise UserError(f"no log of pod {pod}: {error}") from None
            time.sleep(0.2 * 2**tries)
