"""What is read from the objects of the API: the states of pods and jobs, and the one cause worth telling."""

from __future__ import annotations

from typing import Any

import pytest

from hjepa.adapters.cluster.view import JobView, PodView, explain_failure, fatal, observe_trainjob

Object = dict[str, Any]


def pod(index: int = 0, **ends: Any) -> PodView:
    return PodView(f"pod-{index}", index, "Failed", "", **ends)


def failed(*pods: PodView, reason: str = "") -> JobView:
    return JobView("Failed", reason, len(pods), 0, pods)


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (failed(pod(exit_code=143)), "preempted"),
        (failed(pod(exit_code=143), pod(1, exit_code=143)), "preempted"),
        # The operator stops the peers of a node that crashed.
        (failed(pod(exit_code=143), pod(1, exit_code=1)), "other"),
        (failed(pod(exit_code=143), pod(1, exit_code=137)), "memory"),
        (failed(pod(exit_code=143), pod(1, exit_code=13)), "futile"),
        (failed(pod(exit_code=143), reason="DeadlineExceeded: it ran too long"), "other"),
        (failed(pod(exit_code=1, disrupted="NodeLost"), pod(1, exit_code=1)), "preempted"),
    ],
)
def test_explain_failure__names_what_came_first(job: JobView, kind: str) -> None:
    assert explain_failure(job).kind == kind


def container(name: str, **state: Any) -> Object:
    return {"name": name, "restartCount": 1, "state": {"running": {}}, **state}


def test_observe__the_exit_code_of_a_sidecar_is_not_trainings() -> None:
    over = {"lastState": {"terminated": {"exitCode": 2, "message": "permission denied"}}}
    status = {
        "phase": "Running",
        "initContainerStatuses": [container("vault-agent-init", **over)],
        "containerStatuses": [container("log-shipper", **over), container("node") | {"restartCount": 0}],
    }
    containers = [{"name": "log-shipper", "image": "shipper:1"}, {"name": "node", "image": "hjepa-train:1"}]
    found = {"metadata": {"name": "p", "labels": {}}, "spec": {"containers": containers}, "status": status}
    seen = observe_trainjob({"metadata": {"uid": "1"}, "spec": {"trainer": {"numNodes": 1}}}, [found])
    assert fatal(seen) is None
    assert (seen.pods[0].exit_code, seen.pods[0].restarts, seen.pods[0].image) == (None, 0, "hjepa-train:1")
    status["containerStatuses"][1] |= over
    again = observe_trainjob({"metadata": {"uid": "1"}, "spec": {"trainer": {"numNodes": 1}}}, [found])
    cause = fatal(again)
    assert cause is not None
    assert cause.kind == "user"
