"""Tracking against a real MLflow server that is killed, frozen and restarted under it."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hjepa.adapters.tracking import MetricStream, Tracker, TrackingError, replay, tracking_uri
from hjepa.config import TrackingConfig, flatten_tree
from hjepa.errors import UserError

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


class Server:
    """One `mlflow server` in a process group of its own, always on the same port and database."""

    def __init__(self, home: Path):
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.home / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.home / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.home / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return
        raise AssertionError("MLflow did not start")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.start()  # the test before may have killed it
    return one_server


@pytest.fixture
def tracker(server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return open_run(server, request.node.name)


def open_run(server: Server, name: str, params: dict[str, object] | None = None) -> Tracker:
    return Tracker.create_or_resume(
        TrackingConfig(uri=server.uri), experiment="tests", run_name=name, tags={"code": "1"}, params=params or {}
    )


def history(tracker: Tracker, metric: str) -> list[tuple[int, float]]:
    return sorted((item.step, item.value) for item in tracker.client.get_metric_history(tracker.run_id, metric))


# -- one run -----------------------------------------------------------------------------------------------------------


def test_create_or_resume__twice_is_one_run(server: Server, tracker: Tracker, request: pytest.FixtureRequest) -> None:
    again = open_run(server, request.node.name)
    assert again.run_id == tracker.run_id
    found = tracker.client.search_runs([tracker.experiment_id], f"tags.`hjepa.run` = '{request.node.name}'")
    assert len(found) == 1


def test_create_or_resume__finished_run_runs_again(server: Server, tracker: Tracker) -> None:
    assert tracker.finish("FAILED")
    assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"
    name = tracker.client.get_run(tracker.run_id).data.tags["hjepa.run"]
    assert open_run(server, name).client.get_run(tracker.run_id).info.status == "RUNNING"


def test_create_or_resume__name_with_a_quote(server: Server) -> None:
    assert open_run(server, "it's here").run_id == open_run(server, "it's here").run_id


def test_create_or_resume__run_id_of_the_platform_is_used(
    server: Server, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", tracker.run_id)
    assert open_run(server, "another name").run_id == tracker.run_id


def test_create_or_resume__params_are_numbers_and_written_once(
    server: Server, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    name = tracker.client.get_run(tracker.run_id).data.tags["hjepa.run"]
    many = {f"many.{i}": i for i in range(250)}  # more than one request takes
    params = {"seed": 3, "training": {"lr": 1e-3, "min_lr": 1e-7, "clip": None, "use_amp": True}, "text": "x" * 9000}
    open_run(server, name, params | many)
    written = tracker.client.get_run(tracker.run_id).data.params
    assert written["seed"] == "3"
    assert (float(written["training.lr"]), float(written["training.min_lr"])) == (1e-3, 1e-7)
    assert (written["training.clip"], written["training.use_amp"]) == ("null", "true")
    assert len(written["text"]) == 6000
    assert len(written) == 6 + 250

    open_run(server, name, {"seed": 4})
    assert tracker.client.get_run(tracker.run_id).data.params["seed"] == "3"
    assert "seed=3" in caplog.text


def test_create_or_resume__deleted_experiment_says_so(server: Server, tracker: Tracker) -> None:
    name = "deleted experiment"
    tracker.client.delete_experiment(tracker.client.create_experiment(name))
    with pytest.raises(UserError, match=r"was deleted.*logging\.experiment_name"):
        Tracker.create_or_resume(TrackingConfig(uri=server.uri), experiment=name, run_name="r", tags={}, params={})


def test_create_or_resume__server_down_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9 could not open.*connection refused"):
        Tracker.create_or_resume(TrackingConfig(uri=NOBODY), experiment="e", run_name="r", tags={}, params={})


def test_tracker__what_it_writes_can_be_read_at_the_root(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    table = {"encoder": ["trained", "random init"], "linear_top1": [0.8, 0.6]}
    assert tracker.set_tags({"data": "abc"})
    assert tracker.log_metrics_now({"eval/linear_top1": 0.8}, step=1000)
    assert tracker.log_artifact(tmp_path / "config.yaml")
    assert tracker.log_table("evaluation", table)
    assert tracker.log_table("evaluation.json", table)
    assert tracker.log_dataset("fashion", "f" * 64, "s3://hjepa/datasets/fashion", "training")

    run = tracker.client.get_run(tracker.run_id)
    assert (run.data.tags["data"], run.data.tags["code"]) == ("abc", "1")
    assert history(tracker, "eval/linear_top1") == [(1000, 0.8)]
    assert {item.path for item in tracker.client.list_artifacts(tracker.run_id)} == {"config.yaml", "evaluation.json"}
    stored = Path(tracker.client.download_artifacts(tracker.run_id, "evaluation.json", str(tmp_path)))
    assert json.loads(stored.read_text()) == {
        "columns": ["encoder", "linear_top1"],
        "data": [["trained", 0.8], ["random init", 0.6]],
    }
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "evaluation.json", "type": "table"}]
    [dataset] = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("fashion", "f" * 36)


def test_tracker__links_open_the_training_pages(server: Server, tracker: Tracker) -> None:
    page = f"{server.uri}/#/experiments/{tracker.experiment_id}/runs/{tracker.run_id}"
    assert tracker.url == f"{page}?workflowType=machine_learning"
    compare = tracker.compare_url(["a", "b"])
    assert "/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%22" in compare
    assert compare.endswith("&workflowType=machine_learning")


def test_tracker__server_down_costs_one_short_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker.attach(NOBODY, "0" * 32)
    assert not tracker.set_tags({"a": "b"})
    start = time.monotonic()
    assert not tracker.log_metrics_now({"m": 1.0}, step=1)
    assert not tracker.log_table("t", {"a": [1]})
    assert not tracker.finish()
    assert time.monotonic() - start < 0.5
    assert "connection refused" in caplog.text
    assert "did not try to mark the run FINISHED" in caplog.text


@pytest.mark.parametrize("location", ["s3://elsewhere/artifacts", "file:///proc/no-folder"])
def test_tracker__file_store_out_of_reach_is_a_warning_and_the_rest_is_written(
    server: Server, location: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, NOBODY)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    client = Tracker.attach(server.uri, "").client
    experiment = f"direct {location.partition(':')[0]}"
    client.create_experiment(experiment, artifact_location=location)
    tracker = Tracker.create_or_resume(
        TrackingConfig(uri=server.uri), experiment=experiment, run_name="direct", tags={}, params={}
    )
    (tmp_path / "note.txt").write_text("x")
    assert not tracker.log_artifact(tmp_path / "note.txt")
    assert not tracker.log_table("t", {"a": [1]})
    assert "could not store note.txt" in caplog.text
    assert "could not store the table t.json" in caplog.text
    assert "files go there directly" in caplog.text
    assert tracker.finish()
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_tracking_uri__configuration_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000/")
    assert tracking_uri("https://configured") == "https://configured"
    assert tracking_uri() == "http://environment:5000"


@pytest.mark.parametrize(("uri", "message"), [("", "MLFLOW_TRACKING_URI"), ("sqlite:///x.db", "http://")])
def test_tracking_uri__no_server_says_what_to_set(uri: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=message):
        tracking_uri()


def test_flatten__nested_sections_become_dotted_names() -> None:
    assert flatten_tree({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


def test_import__loads_neither_mlflow_nor_torch() -> None:
    code = "import sys, hjepa.adapters.tracking; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(("given", "disabled"), [(None, "True"), ("false", "False")])
def test_import__mlflow_sends_no_telemetry_unless_the_user_wants_it(given: str | None, disabled: str) -> None:
    code = (
        "from hjepa.adapters.tracking import Tracker; Tracker.attach('http://127.0.0.1:9', 'run')\n"
        "from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY; print(MLFLOW_DISABLE_TELEMETRY.get())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_DISABLE_TELEMETRY"}
    environment["DO_NOT_TRACK"] = "true"  # the test itself sends none either way
    if given is not None:
        environment["MLFLOW_DISABLE_TELEMETRY"] = given
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == disabled


# -- many metrics ------------------------------------------------------------------------------------------------------


def test_stream__every_record_arrives(tracker: Tracker, tmp_path: Path) -> None:
    stream = MetricStream(tracker.uri, tracker.run_id, tmp_path / "metrics.jsonl")
    for step in range(1500):
        stream.log({"train/loss": step / 7, "optim/lr": 1e-3}, step)
    assert stream.close() == 0
    assert history(tracker, "train/loss") == [(step, step / 7) for step in range(1500)]
    assert len(history(tracker, "optim/lr")) == 1500


def test_stream__odd_values_and_names_do_not_block_the_rest(tracker: Tracker, tmp_path: Path) -> None:
    stream = MetricStream(tracker.uri, tracker.run_id, tmp_path / "metrics.jsonl")
    stream.log({"nan": float("nan"), "infinity": float("inf"), "percent %//../é": 1.0, "x" * 300: 2.0}, 1)
    stream.log({"after": 3.0}, 2)
    assert stream.close() == 0
    metrics = tracker.client.get_run(tracker.run_id).data.metrics
    assert metrics["nan"] != metrics["nan"]
    assert metrics["infinity"] > 1e300
    assert (metrics["percent _/_"], metrics["x" * 250], metrics["after"]) == (1.0, 2.0, 3.0)


def test_stream__server_killed_and_back_stores_every_record(server: Server, tracker: Tracker, tmp_path: Path) -> None:
    stream = MetricStream(tracker.uri, tracker.run_id, tmp_path / "metrics.jsonl")
    for step in range(300):
        if step == 100:
            time.sleep(MetricStream._interval_seconds + 0.5)  # the first hundred are on their way
            server.kill()
        if step == 200:
            time.sleep(MetricStream._interval_seconds + 0.5)  # the sender has met the dead server
            server.start()
        stream.log({"train/loss": float(step)}, step)
    assert stream.close() == 0
    assert history(tracker, "train/loss") == [(step, float(step)) for step in range(300)]


def test_stream__server_never_back_leaves_a_journal_to_replay(
    server: Server, tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = tmp_path / "metrics.jsonl"
    stream = MetricStream(tracker.uri, tracker.run_id, journal)
    for step in range(40):
        stream.log({"train/loss": float(step)}, step)
    time.sleep(MetricStream._interval_seconds + 2)
    server.kill()
    for step in range(40, 100):
        stream.log({"train/loss": float(step)}, step)
    start = time.monotonic()
    assert stream.close(timeout_seconds=3) == 60
    assert time.monotonic() - start < 4
    assert "metrics wait in" in caplog.text
    with pytest.raises(TrackingError, match="connection refused"):
        replay(journal, tracker.uri, tracker.run_id)

    server.start()
    assert replay(journal, tracker.uri, tracker.run_id) == 100
    assert replay(journal, tracker.uri, tracker.run_id) == 100
    assert history(tracker, "train/loss") == [(step, float(step)) for step in range(100)]


def test_stream__frozen_server_delays_neither_log_nor_close_and_the_next_stream_goes_on(
    server: Server, tracker: Tracker, tmp_path: Path
) -> None:
    journal = tmp_path / "metrics.jsonl"
    stream = MetricStream(tracker.uri, tracker.run_id, journal)
    server.send(signal.SIGSTOP)
    try:
        slowest = []
        for part in range(3):
            stream.log({"train/loss": 0.0}, part * 201)
            time.sleep(MetricStream._interval_seconds + 0.2)  # the sender waits for an answer now
            durations = []
            for step in range(part * 201 + 1, part * 201 + 201):
                start = time.perf_counter()
                stream.log({"train/loss": float(step)}, step)
                durations.append(time.perf_counter() - start)
            slowest.append(max(durations))
        start = time.monotonic()
        assert stream.close(timeout_seconds=2) == 603
        assert time.monotonic() - start < 3
    finally:
        server.send(signal.SIGCONT)
    assert min(slowest) < 0.05  # seconds; a busy machine may pause any one round, a blocking log would slow all three

    assert MetricStream(tracker.uri, tracker.run_id, journal).close() == 0
    assert {step for step, _ in history(tracker, "train/loss")} == set(range(603))


def test_stream__killed_process_leaves_its_records_to_the_next(tracker: Tracker, tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    code = (
        "import os, pathlib, signal, sys\n"
        "from hjepa.adapters.tracking import MetricStream\n"
        "stream = MetricStream(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))\n"
        "for step in range(50): stream.log({'loss': step}, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tracker.uri, tracker.run_id, str(journal)], check=False)
    assert killed.returncode == -signal.SIGKILL
    stream = MetricStream(tracker.uri, tracker.run_id, journal)
    stream.log({"loss": 50}, 50)
    assert stream.close() == 0
    assert [step for step, _ in history(tracker, "loss")] == list(range(51))


def test_stream__line_cut_short_by_a_crash_is_skipped(tracker: Tracker, tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    whole = json.dumps({"t": 1_700_000_000_000, "s": 1, "m": {"loss": 1.0}})
    journal.write_text(f"{whole}\n{whole[:-5]}")
    stream = MetricStream(tracker.uri, tracker.run_id, journal)
    stream.log({"loss": 2.0}, 2)
    assert stream.close() == 0
    assert history(tracker, "loss") == [(1, 1.0), (2, 2.0)]


def test_stream__journal_of_another_run_is_sent_from_the_start(server: Server, tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    first, second = open_run(server, "journal 1"), open_run(server, "journal 2")
    stream = MetricStream(first.uri, first.run_id, journal)
    stream.log({"loss": 1.0}, 1)
    assert stream.close() == 0
    assert MetricStream(second.uri, second.run_id, journal).close() == 0
    assert history(second, "loss") == [(1, 1.0)]


def test_stream__full_disk_is_said_and_counted_but_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = MetricStream(NOBODY, "0" * 32, tmp_path / "metrics.jsonl")
    stream.log({"loss": 1.0}, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, hard))
    try:
        stream.log({"loss": 2.0}, 2)  # written in part
        stream.log({"loss": 3.0}, 3)  # not written at all
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    stream.log({"loss": 4.0}, 4)
    assert "metrics are lost" in caplog.text
    assert stream.close(timeout_seconds=0) == 4
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(records[0])["s"], json.loads(records[-1])["s"]] == [1, 4]


def test_stream__value_that_is_no_number_is_refused_at_once(tmp_path: Path) -> None:
    stream = MetricStream(NOBODY, "0" * 32, tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError):
        stream.log({"loss": None}, 1)  # type: ignore[dict-item]
    assert stream.close(timeout_seconds=0) == 0


def test_replay__no_journal_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metric journal"):
        replay(tmp_path / "none.jsonl", NOBODY, "0" * 32)
