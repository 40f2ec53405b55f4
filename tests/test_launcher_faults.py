"""What goes wrong between a launcher and its job: each case over HTTP, and what the person is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hjepa.adapters.cluster.client import PODS, Api, Cluster, StreamLostError
from hjepa.adapters.cluster.launcher import BACKENDS, _Guard
from hjepa.adapters.cluster.spec import Owner
from hjepa.errors import FutileRetryError, HjepaError, UserError
from tests.fake_apiserver import FakeApiServer
from tests.job_controller import JobController, Life, make_workflow
from tests.test_launcher import BOTH, KINDS, PACE, Pace, in_background, launch, make_spec, server

__all__ = ["server"]

JOBS = Api("kubeflow.org", "v1", "pytorchjobs")


def explained(
    server: FakeApiServer, life: Life, match: str, kind: type[HjepaError] = HjepaError, **cluster: Any
) -> str:
    """Both operators' jobs end with this error, in words that ``match``."""
    text = ""
    for backend in KINDS:
        spec = make_spec(nodes=1, max_restarts=0, **cluster)
        with JobController(server, lambda index, attempt: life):
            with pytest.raises(kind, match=match) as failed:
                launch(backend, spec)
            text = str(failed.value)
            assert type(failed.value).exit_code == kind.exit_code
        for name in (KINDS[backend], "TrainingRuntime"):
            for obj in server.find(name):
                server.delete(name, obj["metadata"]["name"])
    return text


# -- pods ------------------------------------------------------------------------------------------------------------


def test_unschedulable__quotes_the_scheduler(server: FakeApiServer) -> None:
    told = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    life = Life(unschedulable=told)
    text = explained(server, life, r"cluster\.schedule_timeout_seconds=0\.5", schedule_timeout_seconds=0.5)
    assert told in text
    assert "cluster.gpus_per_node" in text
    assert not server.find("PyTorchJob")  # nothing is left to wait for a GPU


def test_image__that_does_not_exist_is_named(server: FakeApiServer) -> None:
    life = Life(waiting=("ImagePullBackOff", 'Back-off pulling image "hjepa-train:1": not found'))
    text = explained(server, life, "hjepa-train:1 cannot be pulled", UserError, image_timeout_seconds=0.5)
    assert "not found" in text
    assert "cluster.image" in text


def test_secret__without_the_key_is_told(server: FakeApiServer) -> None:
    life = Life(waiting=("CreateContainerConfigError", "couldn't find key AWS_ACCESS_KEY_ID in Secret hjepa-s3"))
    text = explained(server, life, "cannot start", UserError, image_timeout_seconds=0.5)
    assert "couldn't find key AWS_ACCESS_KEY_ID" in text
    assert "cluster.s3_secret" in text


def test_memory__says_what_to_raise_and_shows_the_last_lines(server: FakeApiServer) -> None:
    life = Life(exit_code=137, reason="OOMKilled", lines=tuple(f"line {n}" for n in range(80)))
    text = explained(server, life, r"killed for want of memory; raise cluster\.memory")
    assert "  line 79" in text
    assert "line 29\n" not in text  # the last 50


def test_start__late_names_what_is_missing(server: FakeApiServer) -> None:
    life = Life(waiting=("ContainerCreating", "mounting volumes"))
    text = explained(server, life, r"cluster\.start_timeout_seconds=0\.5", start_timeout_seconds=0.5)
    assert "mounting volumes" in text


def test_total__is_a_limit_on_running(server: FakeApiServer) -> None:
    explained(server, Life(exit_code=None), r"cluster\.total_timeout_seconds=1\b", total_timeout_seconds=1.0)
    assert not server.find("PyTorchJob")


@BOTH
def test_eviction__starts_again_from_the_checkpoint(server: FakeApiServer, backend: str) -> None:
    """However often: a node that is drained is no failure."""

    def lives(index: int, attempt: int) -> Life:
        return Life(exit_code=143, disrupted="EvictionByEvictionAPI", seconds=0.1) if attempt < 3 else Life()

    with JobController(server, lives) as controller:
        assert launch(backend, make_spec(nodes=1, max_restarts=0)) == {"step": 7}
    assert len(controller.pods_made) == 4


@BOTH
def test_node_loss__is_a_preemption(server: FakeApiServer, backend: str) -> None:
    """One node goes; its peer fails with an error of its own, which is not the cause."""

    def lives(index: int, attempt: int) -> Life:
        if attempt:
            return Life()
        if index == 0:
            return Life(exit_code=1, message="connection closed by peer", seconds=0.5)
        return Life(exit_code=137, disrupted="DeletionByTaintManager", seconds=0.1)

    with JobController(server, lives) as controller:
        assert launch(backend, make_spec(max_restarts=0)) == {"step": 7}
    assert len(controller.pods_made) == 4


@BOTH
def test_nan_stop__is_not_tried_again(server: FakeApiServer, backend: str) -> None:
    """Also where the operator would: v1 starts a container again whatever its exit code."""
    told = '{"rc": 13, "reason": "the loss is NaN since step 40"}'

    def lives(index: int, attempt: int) -> Life:
        if index == 0:
            return Life(exit_code=13, message=told, seconds=0.3)
        return Life(exit_code=1, message='{"rc": 1, "reason": "peer is gone"}', seconds=0.35)

    with JobController(server, lives) as controller:
        with pytest.raises(FutileRetryError, match="the loss is NaN since step 40"):
            launch(backend, make_spec(max_restarts=5))
        assert len(controller.pods_made) == 2
        server.wait_for(lambda: not any(pod["status"]["phase"] == "Running" for pod in server.find("Pod")))


def test_mistake__found_by_training_is_the_users(server: FakeApiServer) -> None:
    told = '{"rc": 2, "reason": "training.batch_size: 64 does not divide by 3 ranks"}'
    explained(server, Life(exit_code=2, message=told), "does not divide by 3 ranks", UserError)


# -- the operator ----------------------------------------------------------------------------------------------------


@BOTH
def test_operator__that_does_not_run_is_suspected(server: FakeApiServer, backend: str) -> None:
    with pytest.raises(HjepaError, match="is the operator of this kind of job running"):
        launch(backend)
    assert not server.find(KINDS[backend])


def test_pod_security__that_refuses_the_pods_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake server's own admission says no: the pods are without a seccomp profile."""
    from hjepa.adapters.cluster import pytorchjob

    render = pytorchjob.render

    def careless(spec: Any) -> Any:
        manifests = render(spec)
        template = manifests[-1]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        del template["spec"]["securityContext"]["seccompProfile"]
        return manifests

    monkeypatch.setattr(pytorchjob, "render", careless)
    labels = {"training": {"pod-security.kubernetes.io/enforce": "restricted"}}
    with FakeApiServer(namespaces=labels) as server, JobController(server):
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        with pytest.raises(UserError, match=r'violates PodSecurity "restricted:latest": seccompProfile'):
            launch("pytorchjob")
        monkeypatch.undo()
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        assert launch("pytorchjob") == {"step": 7}


def test_quota__is_waited_for_until_the_start_is_late(server: FakeApiServer) -> None:
    spec = make_spec(start_timeout_seconds=1.5)
    join = in_background(lambda: launch("pytorchjob", spec))
    job = server.wait_for(lambda: server.find("PyTorchJob"))[0]
    server.event(job, "FailedCreatePod", 'pods "x" is forbidden: exceeded quota: gpus, requested: 8, used: 8')
    with pytest.raises(HjepaError, match=r"start_timeout_seconds=1\.5: FailedCreatePod.*exceeded quota") as failed:
        join()
    assert not isinstance(failed.value, UserError)


def test_webhook__that_refuses_is_quoted(server: FakeApiServer) -> None:
    """A name that the schema lets pass and the operator does not."""
    cluster = Cluster()
    template = {"spec": {"containers": [{"name": "main", "image": "x"}]}}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "a"},
        "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 1, "template": template}}},
    }
    with pytest.raises(UserError, match=r"denied the request: .*must have at least one pytorch container"):
        cluster.create(JOBS, job)
    job["spec"]["nprocPerNode"] = 2  # type: ignore[index]
    with pytest.raises(UserError, match=r"nprocPerNode.*must be of type string"):
        cluster.create(JOBS, job)


def test_namespace__that_does_not_exist_is_named(server: FakeApiServer) -> None:
    with pytest.raises(UserError, match="there is no namespace nowhere"):
        Cluster("nowhere").create(JOBS, {**_minimal_job(), "metadata": {"name": "a"}})


def _minimal_job() -> dict[str, Any]:
    from hjepa.adapters.cluster import pytorchjob

    return pytorchjob.render(make_spec())[-1]


# -- the API server --------------------------------------------------------------------------------------------------


def test_watch__survives_drops_and_410(server: FakeApiServer) -> None:
    with JobController(server, lambda index, attempt: Life(seconds=3.0)):
        join = in_background(lambda: launch("pytorchjob"))
        for _ in range(8):
            time.sleep(0.3)
            server.drop_streams()
            server.forget_history()
            server.fail(410, verb="watch")
        assert join() == {"step": 7}
    watches = [request for request in server.requests if request.verb == "watch"]
    assert 8 <= len(watches) < 60  # it comes back, and not in a frenzy


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_errors__429_and_5xx_are_waited_out(server: FakeApiServer, status: int) -> None:
    """Before the job is there, and while it is followed."""
    with JobController(server, lambda index, attempt: Life(seconds=0.5)) as controller:
        server.fail(status, count=3, retry_after=1 if status == 429 else None)
        join = in_background(lambda: launch("trainjob"))
        server.wait_for(lambda: len(controller.pods_made) == 2)
        server.fail(status, count=3, retry_after=1 if status == 429 else None)
        assert join() == {"step": 7}
    assert server._faults == []


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_outage__is_waited_out(server: FakeApiServer, when: str) -> None:
    """The port is closed for some seconds; a minute is the slow test."""
    with JobController(server, lambda index, attempt: Life(seconds=1.0)):
        if when == "before":
            server.outage(2.0)
            assert launch("pytorchjob") == {"step": 7}
        else:
            join = in_background(lambda: launch("pytorchjob"))
            server.wait_for(lambda: server.find("Pod"))
            server.outage(2.0)
            assert join() == {"step": 7}


@pytest.mark.slow
def test_outage__of_a_minute(server: FakeApiServer) -> None:
    with JobController(server, lambda index, attempt: Life(seconds=70.0)):
        spec = make_spec()
        thread = in_background(lambda: launch("trainjob", spec, pace=Pace(poll=5.0, workflow=5.0)))
        server.wait_for(lambda: server.find("Pod"))
        server.outage(60.0)
        time.sleep(75)
        assert thread() == {"step": 7}


def test_outage__longer_than_the_budget_is_an_error_that_leaves_the_job(server: FakeApiServer) -> None:
    pace = Pace(poll=0.3, workflow=0.2, budget=1.0)
    with JobController(server, lambda index, attempt: Life(exit_code=None)):
        join = in_background(lambda: launch("pytorchjob", pace=pace))
        server.wait_for(lambda: server.find("Pod"))
        server.stop()
        with pytest.raises(HjepaError, match=r"gave no answer to 'get pytorchjobs.*goes on; run this step again"):
            join()
    assert server.find("PyTorchJob")


def test_answer_lost__to_a_create_is_no_second_job(server: FakeApiServer) -> None:
    """The server makes the job and the answer does not arrive: the next try finds it."""
    add = server.add
    lost = threading.Event()

    def add_and_lose(resource: Any, *arguments: Any, **options: Any) -> Any:
        made = add(resource, *arguments, **options)
        if resource.kind == "PyTorchJob" and not lost.is_set():
            lost.set()
            raise ConnectionAbortedError
        return made

    server.add = add_and_lose  # type: ignore[method-assign]
    with JobController(server) as controller:
        assert launch("pytorchjob") == {"step": 7}
    assert lost.is_set()
    assert len(controller.pods_made) == 2


def test_token__that_has_run_out_is_read_anew(
    server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "first"
    path = server.write_kubeconfig(tmp_path / "with-token", token="first")
    monkeypatch.setenv("KUBECONFIG", str(path))
    cluster = Cluster(budget_seconds=5)
    assert cluster.list(PODS) == []
    server.token = "second"
    path.with_suffix(".token").write_text("second")
    assert cluster.list(PODS) == []
    server.token = "third"
    with pytest.raises(UserError, match="does not accept these credentials"):
        cluster.list(PODS)


@pytest.mark.parametrize(
    ("verb", "group", "resource"),
    [
        ("create", "kubeflow.org", "pytorchjobs"),
        ("get", "kubeflow.org", "pytorchjobs"),
        ("watch", "kubeflow.org", "pytorchjobs"),
        ("list", "", "pods"),
        ("delete", "kubeflow.org", "pytorchjobs"),
    ],
)
def test_rbac__names_the_missing_verb_and_the_role(server: FakeApiServer, verb: str, group: str, resource: str) -> None:
    server.deny(verb, group, resource)
    name = f"{resource}.{group}" if group else resource
    spec = make_spec(total_timeout_seconds=1.0) if verb == "delete" else make_spec()
    seconds = 5.0 if verb == "delete" else 0.1
    with (
        JobController(server, lambda index, attempt: Life(seconds=seconds)),
        pytest.raises(UserError, match=rf"not allowed in namespace training: {verb} {name}\b.*role\.yaml"),
    ):
        launch("pytorchjob", spec)


def test_rbac__without_the_log_training_goes_on(server: FakeApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.deny("get", "", "pods/log")
    with JobController(server, lambda index, attempt: Life(seconds=1.0)):
        assert launch("pytorchjob") == {"step": 7}
    assert "get pods/log" in capsys.readouterr().err


def test_log__goes_on_after_a_drop_without_a_line_twice(
    server: FakeApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with JobController(server, lambda index, attempt: Life(seconds=3.0)):
        join = in_background(lambda: launch("trainjob"))
        pod = server.wait_for(
            lambda: next(
                (
                    p
                    for p in server.find("Pod", labels="batch.kubernetes.io/job-completion-index=0")
                    if p["status"]["phase"] == "Running"
                ),
                None,
            )
        )["metadata"]["name"]
        for number in range(20):
            server.log(pod, f"step {number:03d}", container="node")
            time.sleep(0.05)
            if number % 5 == 4:
                server.drop_streams()
        join()
    shown = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines() if "step " in line and "] " in line]
    assert shown == [f"step {number:03d}" for number in range(20)]


def test_watch__that_is_cut_says_so(server: FakeApiServer) -> None:
    cluster = Cluster()
    made = cluster.create(JOBS, _minimal_job())
    name, version = made["metadata"]["name"], made["metadata"]["resourceVersion"]
    threading.Timer(0.3, server.drop_streams).start()
    with pytest.raises(StreamLostError):
        list(cluster.watch(JOBS, name, version, 20))
    server.forget_history()
    with pytest.raises(StreamLostError, match="too old resource version"):
        list(cluster.watch(JOBS, name, version, 20))


# -- SIGTERM ---------------------------------------------------------------------------------------------------------

# Imports once and forks a launcher for each name on its standard input: "NAME on_sigterm".
_FORKING = """
import os, sys
sys.path.insert(0, os.getcwd())
import kubernetes.client, kubernetes.config, urllib3
from hjepa.adapters.cluster import launcher
from hjepa.errors import HjepaError
from tests.test_launcher import make_spec
for line in sys.stdin:
    name, choice, pod = line.split()
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        os.environ["KFP_POD_NAME"] = pod
        try:
            launcher.launch(make_spec(name, on_sigterm=choice), backend="pytorchjob", result=lambda: None)
        except HjepaError as error:
            print(name, error.exit_code, error, file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        os._exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Launchers:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self, name: str, choice: str = "auto", pod: str = "launcher-1") -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {choice} {pod}\n")
        return int(self.process.stdout.readline())

    def end(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def test_cancel__the_delete_leaves_within_a_second_20_of_20(server: FakeApiServer) -> None:
    """As Kubeflow Pipelines does it: the Workflow is marked, SIGTERM, and SIGKILL a second later."""
    launchers = Launchers()
    late: list[float] = []
    try:
        with JobController(server, lambda index, attempt: Life(exit_code=None)):
            for number in range(20):
                make_workflow(server, f"run-{number}", f"launcher-{number}")
                name = f"hjepa-{number}"
                pid = launchers.start(name, pod=f"launcher-{number}")
                server.wait_for(lambda name=name: server.get("PyTorchJob", name))
                time.sleep(0.03 * number)  # in the middle of one thing or another
                server.update("Workflow", f"run-{number}", lambda w: w.update(spec={"activeDeadlineSeconds": 0}))
                sent = time.monotonic()
                os.kill(pid, signal.SIGTERM)
                killer = threading.Timer(1.0, _kill, [pid])
                killer.start()
                code = launchers.end()
                killer.cancel()
                deletes = [r.at - sent for r in server.requests if (r.verb, r.name) == ("delete", name)]
                late.append(min(deletes, default=99.0))
                assert code in (143, -signal.SIGKILL)
                assert server.get("PyTorchJob", name) is None
    finally:
        launchers.close()
    assert len([seconds for seconds in late if seconds < 1.0]) == 20, late
    print(f"DELETE after SIGTERM: median {sorted(late)[10] * 1000:.0f} ms, worst {max(late) * 1000:.0f} ms")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("choice", "cancelled", "hidden", "stays"),
    [
        ("auto", False, False, True),  # the pod is evicted: the next try adopts the job
        ("auto", True, False, False),
        ("auto", False, True, False),  # who cannot see the Workflow cannot tell
        ("stop", False, False, False),
        ("leave", True, False, True),
    ],
)
def test_sigterm__cancellation_is_told_from_eviction(
    server: FakeApiServer, choice: str, cancelled: bool, hidden: bool, stays: bool
) -> None:
    make_workflow(server)
    if hidden:
        server.deny("get", "argoproj.io", "workflows")
    launchers = Launchers()
    try:
        with JobController(server, lambda index, attempt: Life(exit_code=None)):
            pid = launchers.start("hjepa-a", choice)
            server.wait_for(lambda: server.find("Pod", labels="training.kubeflow.org/job-name=hjepa-a"))
            if cancelled:
                server.update("Workflow", "pretrain-1", lambda w: w.update(spec={"shutdown": "Terminate"}))
            os.kill(pid, signal.SIGTERM)
            assert launchers.end() == 143
            assert (server.get("PyTorchJob", "hjepa-a") is not None) == stays
    finally:
        launchers.close()


def test_cancel__survives_an_answer_that_is_none(server: FakeApiServer, tmp_path: Path) -> None:
    """A proxy's page instead of the Workflow: the thread that waits for SIGTERM goes on."""
    workflow = make_workflow(server)["metadata"]
    owner = Owner("argoproj.io/v1alpha1", "Workflow", workflow["name"], workflow["uid"])
    guard = _Guard(Cluster(), BACKENDS["pytorchjob"], replace(make_spec(), owner=owner), PACE)
    guard._look()
    real = guard.cluster.host

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>sign in</html>")

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        guard.cluster.host = f"http://127.0.0.1:{proxy.server_port}"
        guard._look()
        proxy.shutdown()
    guard.cluster.host = real
    server.update("Workflow", workflow["name"], lambda w: w.update(spec={"activeDeadlineSeconds": 0}))
    guard.armed = True
    guard._act()
    assert "cancelled" in guard.outcome


def test_killed__launcher_is_replaced_and_the_job_adopted(server: FakeApiServer) -> None:
    """SIGKILL in the middle: the job lives, and the next try follows the same one."""
    make_workflow(server)
    launchers = Launchers()
    try:
        with JobController(server, lambda index, attempt: Life(seconds=2.5)) as controller:
            pid = launchers.start("hjepa-0123456789")
            server.wait_for(lambda: len(controller.pods_made) == 2)
            os.kill(pid, signal.SIGKILL)
            assert launchers.end() == -signal.SIGKILL
            uid = server.find("PyTorchJob")[0]["metadata"]["uid"]
            join = in_background(lambda: launch("pytorchjob", pace=PACE))
            time.sleep(0.5)
            assert server.find("PyTorchJob")[0]["metadata"]["uid"] == uid
            assert join() == {"step": 7}
            assert len(controller.pods_made) == 2
    finally:
        launchers.close()
