"""The launcher against tests/fake_apiserver.py over HTTP, with the operators of tests/job_controller.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hjepa.adapters.cluster import janitor, launcher
from hjepa.adapters.cluster.client import Cluster
from hjepa.adapters.cluster.launcher import Pace
from hjepa.adapters.cluster.spec import TrainSpec
from hjepa.adapters.cluster.view import JobView, PodView
from hjepa.config import ClusterConfig
from hjepa.errors import FutileRetryError, HjepaError, UserError
from tests.fake_apiserver import FakeApiServer
from tests.job_controller import JobController, Life, make_workflow

PACE = Pace(poll=0.3, unnoticed=0.6, workflow=0.2, recreate=0.05, budget=20.0)
KINDS = {"pytorchjob": "PyTorchJob", "trainjob": "TrainJob"}
BOTH = pytest.mark.parametrize("backend", list(KINDS))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApiServer]:
    with FakeApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        yield server


def make_spec(name: str = "hjepa-0123456789", **cluster: Any) -> TrainSpec:
    settings = {"nodes": 2, "gpus_per_node": 0, "cpu": "1", "grace_seconds": 2, "max_restarts": 2} | cluster
    return TrainSpec(name, "hjepa-train:1", ("train", "--run-uri", "s3://b/r"), ClusterConfig(**settings))


def launch(backend: str, spec: TrainSpec | None = None, *, result: Any = {"step": 7}, pace: Pace = PACE) -> Any:  # noqa: B006
    return launcher.launch(spec or make_spec(), backend=backend, result=lambda: result, run="r", pace=pace)


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts it; the function returned waits for its value, or raises its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised again below
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(30)
        assert found, "still at work"
        value, error = found[0]
        if error is not None:
            raise error
        return value

    return join


@BOTH
def test_launch__returns_the_result_and_leaves_nothing(
    server: FakeApiServer, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def lives(index: int, attempt: int) -> Life:
        return Life(lines=(f"hello of {index}",), seconds=0.5)

    with JobController(server, lives) as controller:
        assert launch(backend) == {"step": 7}
        server.wait_for(lambda: not server.find("Pod"))
    assert len(controller.pods_made) == 2
    shown = capsys.readouterr().out
    assert "hello of 0" in shown  # rank 0 alone
    assert "hello of 1" not in shown
    assert not server.find(KINDS[backend])
    assert not server.find("TrainingRuntime")


@pytest.mark.parametrize(
    ("missing", "chosen"), [((), "trainjob"), (("trainjobs",), "pytorchjob"), (("pytorchjobs",), "trainjob")]
)
def test_backend__is_what_the_cluster_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], chosen: str
) -> None:
    with FakeApiServer(without=missing) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        assert launcher.choose_backend(Cluster()) == chosen


def test_backend__a_cluster_with_neither_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeApiServer(without=("pytorchjobs", "trainjobs")) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        with pytest.raises(UserError, match="neither PyTorchJob"):
            launch("auto")
        with pytest.raises(UserError, match=r"no pytorchjobs\.kubeflow\.org.*no training operator"):
            launch("pytorchjob")


def test_owner__is_the_workflow_of_the_own_pod(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = make_workflow(server)
    monkeypatch.setenv("KFP_POD_NAME", "launcher-1")
    with JobController(server, lambda index, attempt: Life(exit_code=None)):
        join = in_background(lambda: launch("trainjob"))
        server.wait_for(lambda: server.find("Pod", labels="jobset.sigs.k8s.io/jobset-name"))
        for kind in ("TrainJob", "TrainingRuntime"):
            (owner,) = server.find(kind)[0]["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["uid"]) == ("Workflow", workflow["metadata"]["uid"])
            assert owner["controller"] is False
            assert owner["blockOwnerDeletion"] is False
        server.delete("Pod", "launcher-1")  # evicted: the job lives on
        assert server.find("TrainJob")
        server.delete("Workflow", "pretrain-1")  # deleted: everything goes with it
        with pytest.raises(HjepaError, match="was deleted while it was followed"):
            join()
        server.wait_for(lambda: not server.find("Pod"))


def test_owner__of_another_namespace_is_none_and_that_is_said(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "launcher-elsewhere")
    with JobController(server):
        assert launch("trainjob") == {"step": 7}
    assert "belongs to no pipeline run" in capsys.readouterr().err


@BOTH
def test_adopt__a_second_launcher_follows_the_same_job(server: FakeApiServer, backend: str) -> None:
    spec = make_spec(cleanup="keep")
    with JobController(server, lambda index, attempt: Life(seconds=1.5)) as controller:
        first = in_background(lambda: launch(backend, spec))
        server.wait_for(lambda: len(controller.pods_made) == 2)
        uid = server.find(KINDS[backend])[0]["metadata"]["uid"]
        assert launch(backend, spec) == {"step": 7}
        assert first() == {"step": 7}
    assert len(controller.pods_made) == 2
    assert server.find(KINDS[backend])[0]["metadata"]["uid"] == uid


@BOTH
def test_adopt__a_job_that_succeeded_gives_its_result_at_once(server: FakeApiServer, backend: str) -> None:
    spec = make_spec(cleanup="keep")
    with JobController(server) as controller:
        launch(backend, spec)
        made = len(controller.pods_made)
        before = [request.verb for request in server.requests].count("create")
        assert launch(backend, spec) == {"step": 7}
        assert len(controller.pods_made) == made
        assert [request.verb for request in server.requests].count("create") == before


@BOTH
def test_adopt__another_specification_is_refused_and_left_alone(server: FakeApiServer, backend: str) -> None:
    with JobController(server, lambda index, attempt: Life(seconds=1.0)):
        first = in_background(lambda: launch(backend))
        server.wait_for(lambda: server.find(KINDS[backend]))
        with pytest.raises(UserError, match="exists with another specification"):
            launch(backend, make_spec(nodes=3))
        assert first() == {"step": 7}


@BOTH
def test_adopt__the_job_belongs_to_both_pipeline_runs_from_then_on(
    server: FakeApiServer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go with the run that started it, under the hands of the one that follows it now."""
    spec = make_spec(cleanup="keep")
    kinds = [KINDS[backend], *(["TrainingRuntime"] if backend == "trainjob" else [])]
    with JobController(server, lambda index, attempt: Life(seconds=2.0)):
        followers = []
        for name in ("first", "second"):
            make_workflow(server, f"run-{name}", f"pod-{name}")
            monkeypatch.setenv("KFP_POD_NAME", f"pod-{name}")
            followers.append(in_background(lambda: launch(backend, spec)))
            server.wait_for(
                lambda name=name: all(
                    any(owner["name"] == f"run-{name}" for owner in found["metadata"]["ownerReferences"])
                    for kind in kinds
                    for found in server.find(kind) or [{"metadata": {"ownerReferences": []}}]
                )
            )
        server.update("Workflow", "run-first", lambda w: w.update(status={"phase": "Failed"}))
        assert janitor.sweep(Cluster()) == []
        server.delete("Workflow", "run-first")
        assert [follow() for follow in followers] == [{"step": 7}] * 2
    server.update("Workflow", "run-second", lambda w: w.update(status={"phase": "Failed"}))
    server.set_status(KINDS[backend], spec.name, {})
    assert [item.name for item in janitor.sweep(Cluster())] == [spec.name]


@BOTH
def test_adopt__a_run_has_one_job_whatever_its_kind(server: FakeApiServer, backend: str) -> None:
    spec = make_spec(cleanup="keep")
    other = next(name for name in KINDS if name != backend)
    with JobController(server, lambda index, attempt: Life(seconds=1.0)) as controller:
        first = in_background(lambda: launch(backend, spec))
        server.wait_for(lambda: len(controller.pods_made) == 2)
        with pytest.raises(UserError, match=f"already has a {KINDS[backend]}.*cluster.backend={backend}"):
            launch(other, spec)
        assert launch("auto", spec) == first() == {"step": 7}
    assert len(controller.pods_made) == 2
    assert not server.find(KINDS[other])


@BOTH
def test_retry__a_failed_job_makes_way_for_one_with_more_memory(server: FakeApiServer, backend: str) -> None:
    lives = iter([Life(exit_code=137, reason="OOMKilled"), Life()])
    with JobController(server, lambda index, attempt: next(lives)):
        with pytest.raises(HjepaError, match=r"raise cluster\.memory"):
            launch(backend, make_spec(nodes=1, max_restarts=0))
        assert launch(backend, make_spec(nodes=1, max_restarts=0, memory="128Gi")) == {"step": 7}


def test_retry__two_launchers_at_one_failed_job_do_not_destroy_each_others(server: FakeApiServer) -> None:
    spec = make_spec(max_restarts=0, cleanup="keep")
    with JobController(server, lambda index, attempt: Life(exit_code=1, seconds=0.1)), pytest.raises(HjepaError):
        launch("trainjob", spec)
    uid = server.find("TrainJob")[0]["metadata"]["uid"]
    with JobController(server, lambda index, attempt: Life(seconds=1.0)) as controller:
        slow = launcher._Launch(Cluster(), launcher.BACKENDS["trainjob"], spec, lambda: {"step": 7}, "r", PACE)
        fast = in_background(lambda: launch("trainjob", spec))
        server.wait_for(lambda: len(controller.pods_made) == 2)
        slow._remove(uid)  # it has seen the failed job, and is late
        assert slow.follow() == fast() == {"step": 7}
        assert len(controller.pods_made) == 2


@BOTH
def test_retry__a_failed_job_is_made_anew(server: FakeApiServer, backend: str) -> None:
    spec = make_spec(max_restarts=0)

    def lives(index: int, attempt: int) -> Life:
        return Life(exit_code=1 if attempt == 0 and index == 1 else 0, message="a rank died", seconds=0.1)

    with JobController(server, lives):
        with pytest.raises(HjepaError, match="a rank died") as failed:
            launch(backend, spec)
        assert failed.value.exit_code == 1
        uid = server.find(KINDS[backend])[0]["metadata"]["uid"]  # kept for a look
        kept = make_spec(max_restarts=0, cleanup="keep")
        assert launch(backend, kept if backend == "trainjob" else spec) == {"step": 7}
        jobs = server.find(KINDS[backend])
        assert all(job["metadata"]["uid"] != uid for job in jobs)


@BOTH
def test_restart__the_operators_own_are_not_the_launchers_business(server: FakeApiServer, backend: str) -> None:
    def lives(index: int, attempt: int) -> Life:
        return Life(exit_code=0 if attempt else 1, seconds=0.1)

    with JobController(server, lives):
        assert launch(backend) == {"step": 7}
    created = [r for r in server.requests if r.verb == "create" and r.resource == f"{backend}s"]
    assert len(created) == 1


def test_result__success_without_one_is_a_failure(server: FakeApiServer) -> None:
    with JobController(server), pytest.raises(HjepaError, match="succeeded but left no result"):
        launch("pytorchjob", result=None)
    assert server.find("PyTorchJob")  # kept for a look


@pytest.mark.parametrize(
    ("cleanup", "left"), [("keep", (1, 1)), ("delete-on-success", (0, 1)), ("delete-always", (0, 0))]
)
def test_cleanup__as_configured(server: FakeApiServer, cleanup: str, left: tuple[int, int]) -> None:
    for exit_code, count in zip((0, 1), left, strict=True):
        spec = make_spec(f"hjepa-{exit_code}", cleanup=cleanup, max_restarts=0, nodes=1)
        with JobController(server, lambda index, attempt, code=exit_code: Life(exit_code=code)):
            if exit_code:
                with pytest.raises(HjepaError):
                    launch("trainjob", spec)
            else:
                launch("trainjob", spec)
        assert len(server.find("TrainJob", labels="app.kubernetes.io/name=hjepa")) == sum(left[:exit_code]) + count
    assert len(server.find("TrainingRuntime")) == sum(left)


def test_queue__the_time_in_it_counts_for_nothing_else(server: FakeApiServer) -> None:
    """Kueue suspends the job on its way in, and lets it go later."""
    spec = make_spec(start_timeout_seconds=1.0, schedule_timeout_seconds=0.5, nodes=1)
    with JobController(server, lambda index, attempt: Life(seconds=0.1), slow_seconds=0.3):
        join = in_background(lambda: launch("trainjob", spec))
        server.wait_for(lambda: server.find("TrainJob"))
        server.update("TrainJob", spec.name, lambda job: job["spec"].update(suspend=True))
        time.sleep(1.8)  # longer than it may take to start

        def resume(job: dict[str, Any]) -> None:
            job["spec"]["suspend"] = False
            for condition in job["status"]["conditions"]:
                condition["status"] = "False"

        server.update("TrainJob", spec.name, resume)
        assert join() == {"step": 7}


def test_queue__ends_every_other_wait() -> None:
    """Kueue takes a job back whose pods find no node; admitted again, its search begins anew."""
    limits = launcher._Limits(make_spec(schedule_timeout_seconds=0.3, nodes=1), PACE)
    pod = PodView("p", 0, "Pending", "", unschedulable=True, message="0/3 nodes")
    looks = [JobView("Pending", "", 1, 0, (pod,)), JobView("Queued", "", 1, 0, ())]
    for seen in looks:
        assert limits.exceeded(seen, str) is None
    time.sleep(0.4)
    assert limits.exceeded(looks[0], str) is None
    time.sleep(0.4)
    assert "schedule_timeout_seconds" in str(limits.exceeded(looks[0], str))


def test_queue__has_a_limit_of_its_own(server: FakeApiServer) -> None:
    spec = make_spec(queue_timeout_seconds=0.5, queue="gpus")
    with JobController(server, slow_seconds=0.3):
        join = in_background(lambda: launch("pytorchjob", spec))
        server.wait_for(lambda: server.find("PyTorchJob"))
        server.update("PyTorchJob", spec.name, lambda job: job["spec"]["runPolicy"].update(suspend=True))
        with pytest.raises(HjepaError, match=r"not admitted by queue gpus within cluster\.queue_timeout_seconds=0\.5"):
            join()
    assert not server.find("PyTorchJob")


def test_cancel__by_name_takes_the_job_and_its_runtime(server: FakeApiServer) -> None:
    with JobController(server, lambda index, attempt: Life(exit_code=None)):
        join = in_background(lambda: launch("trainjob"))
        server.wait_for(lambda: server.find("Pod"))
        assert launcher.cancel("hjepa-0123456789") == [
            "trainjobs hjepa-0123456789",
            "trainingruntimes hjepa-0123456789",
        ]
        assert launcher.cancel("hjepa-0123456789") == []
        with pytest.raises(HjepaError, match="was deleted"):
            join()
        server.wait_for(lambda: not server.find("Pod"))


def _suspended_job(server: FakeApiServer, name: str, workflow: dict[str, Any] | None) -> None:
    from hjepa.adapters.cluster import trainjob
    from hjepa.adapters.cluster.spec import Owner

    spec = make_spec(name)
    if workflow is not None:
        metadata = workflow["metadata"]
        owner = Owner(workflow["apiVersion"], "Workflow", metadata["name"], metadata["uid"])
        spec = TrainSpec(spec.name, spec.image, spec.args, spec.cluster, owner=owner)
    for manifest in trainjob.render(spec):
        server.create(manifest)


def test_janitor__ends_what_nobody_waits_for(server: FakeApiServer) -> None:
    ends = {"running": {}, "failed": {"status": {"phase": "Failed"}}, "ended": {"spec": {"activeDeadlineSeconds": 0}}}
    for name, change in ends.items():
        workflow = make_workflow(server, f"run-{name}", f"pod-{name}")
        server.update("Workflow", f"run-{name}", lambda w, change=change: w.update(change))
        _suspended_job(server, f"job-{name}", workflow)
    gone = {"apiVersion": "argoproj.io/v1alpha1", "metadata": {"name": "run-gone", "uid": "1-2-3"}}
    _suspended_job(server, "job-gone", gone)
    _suspended_job(server, "job-by-hand", None)
    finished = make_workflow(server, "run-finished", "pod-finished")
    server.update("Workflow", "run-finished", lambda w: w.update(status={"phase": "Succeeded"}))
    _suspended_job(server, "job-finished", finished)
    server.set_status("TrainJob", "job-finished", {"conditions": [{"type": "Complete", "status": "True"}]})
    kept = {"job-running", "job-by-hand", "job-finished"}
    assert {item.name for item in janitor.sweep(Cluster(), dry_run=True)} == {"job-failed", "job-ended", "job-gone"}
    assert len(server.find("TrainJob")) == 6
    removed = {item.name: item.why for item in janitor.sweep(Cluster())}
    assert removed == {
        "job-failed": "workflow run-failed is over: Failed",
        "job-ended": "workflow run-ended was cancelled",
        "job-gone": "workflow run-gone is gone",
    }
    assert {job["metadata"]["name"] for job in server.find("TrainJob")} == kept
    assert janitor.sweep(Cluster()) == []
    assert {item.name for item in janitor.sweep(Cluster(), max_age_seconds=-1)} == {"job-running", "job-by-hand"}


def test_local__gives_back_the_codes_of_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The entrypoint refuses a configuration that does not exist: exit code 2 comes back as the user's mistake."""
    spec = TrainSpec(
        "hjepa-local",
        "",
        ("train", "--config", str(tmp_path / "none.yaml")),
        ClusterConfig(gpus_per_node=0, grace_seconds=2),
    )
    with pytest.raises(UserError, match=r"none\.yaml"):
        launcher.launch(spec, backend="local", result=lambda: {"step": 1})
    with pytest.raises(UserError, match="this machine alone"):
        launch("local")
    del monkeypatch


def test_launch__a_stop_of_training_is_told_as_such(server: FakeApiServer) -> None:
    """13 comes back as 13 and is not tried again, by either operator."""
    told = '{"rc": 13, "reason": "loss is NaN at step 40"}'
    for backend in KINDS:
        with JobController(server, lambda index, attempt: Life(exit_code=13, message=told, seconds=0.3)) as controller:
            with pytest.raises(FutileRetryError, match=r"loss is NaN at step 40.*exit code 13"):
                launch(backend)
            assert len(controller.pods_made) == 2
            server.wait_for(lambda: not any(pod["status"]["phase"] == "Running" for pod in server.find("Pod")))
