"""Preflight against real servers and real faults."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hjepa.adapters.preflight import Finding, check, require
from hjepa.adapters.s3 import S3Store
from hjepa.config import Config, load_config, validate
from hjepa.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), (60 * i, 20, 90)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def config(tmp_path: Path, **changes: Any) -> Config:
    """A configuration that passes; changes are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "data": {"root": str(tmp_path / "images"), "cache_dir": str(tmp_path / "cache"), "num_workers": 0},
        "checkpoint": {"checkpoint_dir": str(tmp_path / "checkpoints")},
        "training": {"device": "cpu"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return validate(tree, source="test")


def found(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.mark.usefixtures("stack_environment", "images")
def test_check__everything_fine(tmp_path: Path) -> None:
    findings = check(config(tmp_path, storage__uri="s3://hjepa/preflight-fine"))
    local = ["device", "export", "checkpoint disk", "cache disk", "logs"]
    names = ["masks", "S3", "MLflow", *local, "images"]
    assert [finding.name for finding in findings] == names
    assert [finding for finding in findings if not finding.ok] == []
    assert all(finding.detail for finding in findings)
    require(findings)
    assert list(S3Store("s3://hjepa/preflight-fine").list()) == []
    assert not (tmp_path / "cache").exists()  # it looks, it makes nothing
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("stack_environment")
def test_check__machine_that_does_not_train(tmp_path: Path) -> None:
    findings = check(config(tmp_path, training__device="cuda:63"), source=False, trains_here=False)
    assert [(finding.name, finding.ok) for finding in findings] == [("masks", True), ("S3", True), ("MLflow", True)]


def test_check__both_servers_away_is_known_soon(
    tmp_path: Path, stack_environment: dict[str, str], silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    begin = time.monotonic()
    findings = check(config(tmp_path, storage__endpoint_url=nobody, tracking__uri=silent_server), source=False)
    assert time.monotonic() - begin < 20
    s3, tracking = found(findings, "S3"), found(findings, "MLflow")
    assert not s3.ok
    assert f"the S3 server at {nobody} does not answer" in s3.detail
    assert not tracking.ok
    assert silent_server in tracking.detail
    assert "MLFLOW_TRACKING_URI" in tracking.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__wrong_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    finding = found(check(config(tmp_path), source=False), "S3")
    assert not finding.ok
    assert "refuses the credentials" in finding.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__missing_bucket(tmp_path: Path) -> None:
    finding = found(check(config(tmp_path, storage__uri="s3://hjepaa/x"), source=False), "S3")
    assert not finding.ok
    assert "no bucket 'hjepaa'" in finding.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__no_tracking_server_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    finding = found(check(config(tmp_path), source=False), "MLflow")
    assert not finding.ok
    assert "MLFLOW_TRACKING_URI" in finding.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__gpu_that_is_not_there(tmp_path: Path) -> None:
    finding = found(check(config(tmp_path, training__device="cuda:63"), source=False), "device")
    assert not finding.ok
    assert "training.device=cuda:63" in finding.detail
    assert "training.device=auto" in finding.remedy


@pytest.mark.usefixtures("stack_environment")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_check__gpu_that_is_there(tmp_path: Path) -> None:
    finding = found(check(config(tmp_path, training__device="cuda:0"), source=False), "device")
    assert finding.ok
    assert "GiB" in finding.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__device_misspelt(tmp_path: Path) -> None:
    finding = found(check(config(tmp_path, training__device="gpu"), source=False), "device")
    assert not finding.ok
    assert "'gpu': expected auto, cpu, cuda or cuda:N" in finding.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__disks_too_small(tmp_path: Path, small_disk: Path) -> None:
    findings = check(
        config(tmp_path, data__cache_dir=str(small_disk), checkpoint__checkpoint_dir=str(small_disk / "new" / "dir")),
        source=False,
    )
    for name, key in (("cache disk", "data.cache_dir"), ("checkpoint disk", "checkpoint.checkpoint_dir")):
        finding = found(findings, name)
        assert not finding.ok
        assert f"{key}={small_disk}" in finding.detail
        assert "only 0.0 GiB free" in finding.detail
        assert key in finding.remedy


@pytest.mark.usefixtures("stack_environment")
def test_check__checkpoint_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = str(tmp_path / "file" / "checkpoints")
    finding = found(check(config(tmp_path, checkpoint__checkpoint_dir=path), source=False), "checkpoint disk")
    assert not finding.ok
    assert f"{tmp_path / 'file'} is not a folder" in finding.detail


@pytest.mark.usefixtures("stack_environment")
def test_check__images_missing(tmp_path: Path) -> None:
    finding = found(check(config(tmp_path, data__root=str(tmp_path / "nowhere"))), "images")
    assert not finding.ok
    assert "nowhere" in finding.detail


def test_require__names_every_failure_and_no_success() -> None:
    findings = [
        Finding("S3", False, "the server does not answer.", "Start it."),
        Finding("MLflow", True, "answered"),
        Finding("device", False, "no GPU."),
    ]
    expected = "2 checks failed before any long work:\n  S3: the server does not answer. Start it.\n  device: no GPU."
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        require(findings)
    require([findings[1]])


class Refusing(BaseHTTPRequestHandler):
    """Answers everything as ``server.answer`` says: status, content type, body."""

    def do_GET(self) -> None:
        status, content_type, body = self.server.answer  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def refusing(status: int, content_type: str, body: bytes) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.answer = (status, content_type, body)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def asked(name: str, *settings: str) -> Finding:
    return found(check(load_config("demo", settings), source=False, trains_here=False), name)


def test_storage__in_another_region_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>expecting 'eu-central-1'</Message></Error>"
    with refusing(400, "application/xml", body) as url:
        finding = asked("S3", f"storage.endpoint_url={url}", "tracking.uri=http://127.0.0.1:9")
    assert not finding.ok
    assert "expecting 'eu-central-1'" in finding.detail
    assert "storage.region=us-east-1" in finding.remedy


def test_tracking__behind_host_checking_names_the_servers_setting() -> None:
    body = b"Invalid Host header - possible DNS rebinding attack detected"
    with refusing(403, "text/plain", body) as url:
        finding = asked("MLflow", f"tracking.uri={url}", "storage.endpoint_url=http://127.0.0.1:9")
    assert not finding.ok
    assert f"MLFLOW_SERVER_ALLOWED_HOSTS containing {url.removeprefix('http://')}" in finding.remedy
