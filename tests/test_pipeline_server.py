"""Uploading to, running on and following a KFP server: real HTTP against a server that refuses what KFP refuses."""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import kfp
import kfp_server_api
import pytest
import yaml
from fake_kfp_server import FakeKfpServer
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from hjepa.adapters import kfp_server
from hjepa.adapters.kfp_server import Server
from hjepa.errors import HjepaError, UserError

COMPILED = Path(__file__).parents[1] / "pipelines" / "compiled" / "pretrain.yaml"
STEPS = ["resolve-config", "prepare-data", "train", "export-checkpoint", "evaluate", "register-model", "report"]


@pytest.fixture
def fake() -> Iterator[FakeKfpServer]:
    with FakeKfpServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_server_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (kfp_server.ENDPOINT, kfp_server.TOKEN):
        monkeypatch.delenv(name, raising=False)


def kfp_client(fake: FakeKfpServer) -> kfp.Client:
    """KFP's own client, which shows that the fake is not made to fit ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return kfp.Client(host=fake.url)


def test_upload__creates_pipeline_and_version(fake: FakeKfpServer) -> None:
    uploaded = kfp_server.upload(Server(fake.url), COMPILED, report=lambda _: None)
    assert uploaded.created
    (pipeline,) = fake.state.pipelines.values()
    (version,) = fake.state.versions.values()
    assert pipeline["name"] == "hjepa-pretrain"
    assert version["name"] == uploaded.version
    assert version["pipeline_id"] == uploaded.pipeline_id
    assert set(version["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}


def test_upload__same_pipeline_again_sends_nothing(fake: FakeKfpServer) -> None:
    first = kfp_server.upload(Server(fake.url), COMPILED)
    again = kfp_server.upload(Server(fake.url), COMPILED)
    assert (again.version_id, again.created) == (first.version_id, False)
    assert sum("upload" in request for request in fake.state.requests) == 1


def test_upload__changed_pipeline_becomes_a_new_version_of_the_same_pipeline(
    fake: FakeKfpServer, tmp_path: Path
) -> None:
    first = kfp_server.upload(Server(fake.url), COMPILED)
    changed = tmp_path / "changed.yaml"
    changed.write_text(COMPILED.read_text("utf-8").replace("maxRetryCount: 5", "maxRetryCount: 6"), "utf-8")
    second = kfp_server.upload(Server(fake.url), changed)
    assert second.created
    assert second.pipeline_id == first.pipeline_id
    assert second.version != first.version


def test_upload__finds_a_version_beyond_the_first_page(fake: FakeKfpServer) -> None:
    uploaded = [kfp_server.upload(Server(fake.url), COMPILED, version=f"v{number}") for number in range(1, 6)]
    again = kfp_server.upload(Server(fake.url), COMPILED, version="v5")
    assert (again.version_id, again.created) == (uploaded[-1].version_id, False)


@pytest.mark.parametrize("registry", [None, "registry.example.com/team"])
def test_version__taken_by_another_pipeline_is_refused(
    fake: FakeKfpServer, tmp_path: Path, registry: str | None
) -> None:
    server = Server(fake.url)
    kfp_server.upload(server, COMPILED, version="v1")
    changed = COMPILED
    if registry is None:
        changed = tmp_path / "changed.yaml"
        changed.write_text(COMPILED.read_text("utf-8").replace("maxRetryCount: 5", "maxRetryCount: 6"), "utf-8")
    for start in (kfp_server.upload, lambda *given, **named: kfp_server.run(*given, {}, **named)):
        with pytest.raises(UserError, match=r"has a version 'v1' already.* choose another --pipeline-version"):
            start(server, changed, version="v1", registry=registry)
    assert (len(fake.state.versions), len(fake.state.runs)) == (1, 0)


def test_version__same_pipeline_without_settings_for_kubernetes(fake: FakeKfpServer, tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(next(yaml.safe_load_all(COMPILED.read_text("utf-8")))), "utf-8")
    assert kfp_server.upload(Server(fake.url), plain, version="v1").created
    assert not kfp_server.upload(Server(fake.url), plain, version="v1").created
    with pytest.raises(UserError, match="another pipeline"):  # the same steps, but with settings
        kfp_server.upload(Server(fake.url), COMPILED, version="v1")


def test_version__run_of_an_uploaded_one_uses_it(fake: FakeKfpServer) -> None:
    uploaded = kfp_server.upload(Server(fake.url), COMPILED, version="v1")
    (version,) = fake.state.versions.values()
    # A real server parses what it is given: defaults vanish, and numbers come back as floats.
    message = json_format.ParseDict(version["pipeline_spec"]["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
    version["pipeline_spec"]["pipeline_spec"] = json_format.MessageToDict(message)
    for _ in range(2):
        kfp_server.run(Server(fake.url), COMPILED, {}, version="v1")
    assert len(fake.state.versions) == 1
    used = {run["pipeline_version_reference"]["pipeline_version_id"] for run in fake.state.runs.values()}
    assert used == {uploaded.version_id}


def test_upload__two_pipelines_of_that_name_say_what_to_do(fake: FakeKfpServer) -> None:
    kfp_server.upload(Server(fake.url), COMPILED)
    (pipeline,) = fake.state.pipelines.values()
    fake.state.pipelines["twin"] = {**pipeline, "pipeline_id": "twin"}
    with pytest.raises(UserError, match=r"2 pipelines on .* delete all but one of them there"):
        kfp_server.upload(Server(fake.url), COMPILED)


def test_upload__registry_is_put_in_front_of_every_image(fake: FakeKfpServer) -> None:
    kfp_server.upload(Server(fake.url), COMPILED, registry="registry.example.com:5000/team/")
    (version,) = fake.state.versions.values()
    executors = version["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    images = {executor["container"]["image"] for executor in executors.values()}
    assert all(image.startswith("registry.example.com:5000/team/hjepa-") for image in images)


def test_upload__bad_registry_is_refused_before_anything_is_sent(fake: FakeKfpServer) -> None:
    with pytest.raises(UserError, match="expected HOST/NAMESPACE"):
        kfp_server.upload(Server(fake.url), COMPILED, registry="https://registry.example.com/team")
    assert fake.state.requests == []


def test_upload__invalid_pipeline_is_refused_before_anything_is_sent(fake: FakeKfpServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(COMPILED.read_text("utf-8").replace("dependentTasks:", "dependentTaskz:"), "utf-8")
    with pytest.raises(UserError, match="dependentTaskz"):
        kfp_server.upload(Server(fake.url), broken)
    assert fake.state.requests == []


def test_fake_server__refuses_an_invalid_pipeline(fake: FakeKfpServer, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(COMPILED.read_text("utf-8")))
    documents[0]["deploymentSpec"]["executors"]["exec-train"]["container"]["imagee"] = "x"
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump_all(documents), "utf-8")
    with pytest.raises(kfp_server_api.ApiException) as caught:
        kfp_client(fake).upload_pipeline(str(broken), pipeline_name="broken")
    assert caught.value.status == HTTPStatus.BAD_REQUEST
    assert "imagee" in caught.value.body
    assert fake.state.pipelines == {}


def test_run__is_followed_to_its_end(fake: FakeKfpServer) -> None:
    lines: list[str] = []
    server = Server(fake.url)
    arguments = {"config": "demo", "overrides": ["training.epochs=1"], "gpus": "0"}
    submitted = kfp_server.run(server, COMPILED, arguments, experiment="trial", report=lines.append)
    kfp_server.follow(server, submitted.run_id, poll_seconds=0.02, report=lines.append)
    (experiment,) = fake.state.experiments.values()
    (run,) = fake.state.runs.values()
    assert experiment["display_name"] == "trial"
    assert run["runtime_config"]["parameters"] == arguments
    changes = [line.split(" s  ")[1] for line in lines if " s  " in line]
    assert changes == [f"{step}: {state}" for step in STEPS for state in ("RUNNING", "SUCCEEDED")]
    assert lines[-1].endswith("SUCCEEDED")


def test_run__second_one_reuses_experiment_and_version(fake: FakeKfpServer) -> None:
    for _ in range(2):
        kfp_server.run(Server(fake.url), COMPILED, {}, experiment="trial")
    assert (len(fake.state.experiments), len(fake.state.versions), len(fake.state.runs)) == (1, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confg": "demo"}, "confg: no such parameter. Did you mean config?"),
        ({"gpus": 8}, "gpus: got 8, expected a text."),
        ({"overrides": "training.epochs=1"}, "overrides: got 'training.epochs=1', expected a list."),
    ],
)
def test_run__bad_argument_is_refused_before_anything_is_sent(
    fake: FakeKfpServer, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        kfp_server.run(Server(fake.url), COMPILED, arguments)
    assert message in str(caught.value)
    assert fake.state.requests == []


def test_follow__failed_run_names_the_failing_task() -> None:
    with FakeKfpServer(fail_task="train") as fake:
        server = Server(fake.url)
        submitted = kfp_server.run(server, COMPILED, {})
        with pytest.raises(HjepaError) as caught:
            kfp_server.follow(server, submitted.run_id, poll_seconds=0.02)
    assert caught.value.exit_code == 1
    assert "FAILED\n  train: train: exit code 13" in str(caught.value)
    assert submitted.url in str(caught.value)


def test_follow__cancelled_run_is_an_error() -> None:
    with FakeKfpServer(task_looks=1_000_000) as fake:
        server = Server(fake.url)
        submitted = kfp_server.run(server, COMPILED, {})
        kfp_client(fake).terminate_run(submitted.run_id)
        with pytest.raises(HjepaError, match="CANCELED"):
            kfp_server.follow(server, submitted.run_id, poll_seconds=0.02)


def test_follow__outlives_a_restart_of_the_api_server() -> None:
    with FakeKfpServer() as fake:
        server = Server(fake.url)
        submitted = kfp_server.run(server, COMPILED, {})
        timer = threading.Timer(0.8, setattr, (fake.state, "outage", None))

        def break_down(line: str) -> None:
            if line.endswith("resolve-config: RUNNING"):
                fake.state.outage = HTTPStatus.SERVICE_UNAVAILABLE
                timer.start()

        kfp_server.follow(server, submitted.run_id, poll_seconds=0.05, report=break_down)
        assert timer.finished.is_set()


def test_follow__gives_up_on_a_server_that_stays_away() -> None:
    with FakeKfpServer(task_looks=1_000_000) as fake:
        server = Server(fake.url)
        submitted = kfp_server.run(server, COMPILED, {})
        timer = threading.Timer(0.2, setattr, (fake.state, "outage", HTTPStatus.SERVICE_UNAVAILABLE))
        timer.start()
        began = time.monotonic()
        with pytest.raises(HjepaError, match=r"failed \(503\): upstream connect error"):
            kfp_server.follow(server, submitted.run_id, poll_seconds=0.05, patience_seconds=0.5)
    assert time.monotonic() - began < 10


def test_follow__unknown_run_is_said(fake: FakeKfpServer) -> None:
    with pytest.raises(UserError, match="run 1234 not found"):
        kfp_server.follow(Server(fake.url), "1234")


def test_token__right_one_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeKfpServer(token="s3cret") as fake:
        monkeypatch.setenv(kfp_server.TOKEN, "s3cret")
        server = Server.from_environment(fake.url)
        kfp_server.upload(server, COMPILED)
        assert len(fake.state.versions) == 1
    assert "s3cret" not in repr(server)


@pytest.mark.parametrize("token", [None, "wrong"])
def test_token__missing_or_wrong_is_said(token: str | None) -> None:
    with (
        FakeKfpServer(token="s3cret") as fake,
        pytest.raises(UserError, match=r"refuses access \(401\); set HJEPA_KFP_TOKEN to a valid token"),
    ):
        kfp_server.upload(Server(fake.url, token=token), COMPILED)


def test_endpoint__from_the_environment(fake: FakeKfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kfp_server.ENDPOINT, fake.url + "/")
    assert Server.from_environment().url == fake.url


def test_endpoint__none_given_is_said() -> None:
    with pytest.raises(UserError, match="pass --endpoint http://HOST:PORT or set KF_PIPELINES_ENDPOINT"):
        Server.from_environment()


def test_endpoint__without_a_scheme_is_said() -> None:
    with pytest.raises(UserError, match="expected http://HOST"):
        kfp_server.upload(Server("localhost:8888"), COMPILED)


def test_endpoint__nobody_there_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        port = taken.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"cannot reach KFP at http://127.0.0.1:{port}") as caught:
            kfp_server.upload(Server(f"http://127.0.0.1:{port}"), COMPILED)
    assert "Connection refused" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


def test_endpoint__some_other_web_server_is_said() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    other = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
    thread = threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        with pytest.raises(HjepaError, match=r"failed \(501\)"):
            kfp_server.upload(Server(f"http://127.0.0.1:{other.server_port}"), COMPILED)
    finally:
        other.shutdown()
        other.server_close()
        thread.join()
