"""The way to the Kubernetes API: what is a mistake and told at once, what is an outage and waited out."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_apiserver import FakeApiServer

from hjepa.adapters.cluster import client
from hjepa.adapters.cluster.client import PODS, AccessError, ApiError, Cluster, StreamLostError, UnreachableError
from hjepa.errors import HjepaError, UserError

PERSON = 15.0  # the budget of the doctor
PAGE = "<html><title>Log in</title></html>"


class WaitedError(Exception):
    """The client would have waited."""


def refuse_to_wait(seconds: float) -> None:
    raise WaitedError


Answer = tuple[int, str, dict[str, str]]


@contextmanager
def answering(*answers: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that gives these answers in turn, and the last one for ever."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body, headers = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the kubeconfig that the client will find."""

    def write(server: str | None, *, user: Any = None, **context: Any) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "a", "cluster": {} if server is None else {"server": server}}],
            "users": [{"name": "a", "user": user or {}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a", **context}}],
            "current-context": "a",
        }
        path = tmp_path / "config"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(path))
        return path

    return write


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApiServer]:
    with FakeApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        yield server


# -- a server that is no Kubernetes API ------------------------------------------------------------------------------

GARBAGE: list[Answer] = [
    (200, PAGE, {"Content-Type": "text/html"}),
    (302, "", {"Location": "https://login.example.com/"}),
    (200, "[]", {}),
    (200, "{}", {}),
    (200, "null", {}),
    (200, '"kind"', {}),
    (200, "[" * 100_000, {}),
]
garbage = pytest.mark.parametrize("answer", GARBAGE, ids=["page", "302", "list", "empty", "null", "text", "deep"])

POD = {"metadata": {"name": "a"}, "kind": "Pod"}
CALLS: list[Callable[[Cluster], object]] = [
    lambda cluster: cluster.get(PODS, "a"),
    lambda cluster: cluster.list(PODS),
    lambda cluster: cluster.create(PODS, POD),
    lambda cluster: cluster.patch(PODS, "a", {}),
    lambda cluster: cluster.delete(PODS, "a"),
    lambda cluster: cluster.training_groups(),
    lambda cluster: cluster.allowed("get", "", "pods"),
]


@garbage
def test_garbage__is_told_to_a_person_at_once(configure: Callable[..., Path], answer: Answer) -> None:
    with answering(answer) as url:
        configure(url)
        for call in CALLS:
            with pytest.raises(HjepaError, match=rf"{url} does not answer like a Kubernetes API: .*server") as told:
                call(Cluster(budget_seconds=PERSON, patience=refuse_to_wait))
            assert (answer[2].get("Location") or answer[1][:30]) in str(told.value)
            assert len(str(told.value)) < 500


@garbage
def test_garbage__is_an_outage_to_the_launcher(configure: Callable[..., Path], answer: Answer) -> None:
    waits: list[float] = []
    good = (200, json.dumps({"kind": "PodList", "items": []}), {})
    with answering(answer, answer, good) as url:
        configure(url)
        assert Cluster(patience=waits.append).list(PODS) == []
    assert len(waits) == 2


@pytest.mark.parametrize("kind", ["PodList", "Status"])
def test_garbage__is_an_answer_without_what_was_asked_for(configure: Callable[..., Path], kind: str) -> None:
    with answering((200, json.dumps({"kind": kind}), {})) as url:
        configure(url)
        with pytest.raises(HjepaError, match="does not answer like"):
            Cluster(budget_seconds=PERSON).list(PODS)


@pytest.mark.parametrize(
    "line", ["[]", "{}", "null", "7", PAGE, '{"type": "ERROR", "object": null}', '{"type": "ADDED']
)
def test_watch__of_garbage_is_lost(configure: Callable[..., Path], line: str) -> None:
    with answering((200, line + "\n", {})) as url:
        configure(url)
        with pytest.raises(StreamLostError, match="watch of pods"):
            list(Cluster().watch(PODS, "a", "1", 5))


def test_log__that_is_a_redirection_is_lost(configure: Callable[..., Path]) -> None:
    with answering(GARBAGE[1]) as url:
        configure(url)
        with pytest.raises(StreamLostError, match="does not answer like a Kubernetes API: '302 https://login"):
            list(Cluster().log("a", "main"))


def test_command__of_a_login_page_ends_in_a_message(configure: Callable[..., Path]) -> None:
    with answering(GARBAGE[0]) as url:
        configure(url)
        command = [sys.executable, "-m", "hjepa.cli", "doctor", "--cluster"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == HjepaError.exit_code
    assert "does not answer like a Kubernetes API" in done.stderr
    assert "Traceback" not in done.stderr


# -- a kubeconfig that leads nowhere ---------------------------------------------------------------------------------


_CONTEXT = "current-context: a\ncontexts: [{name: a, context: {cluster: a}}]\nclusters: "


@pytest.mark.parametrize(
    "text",
    [
        b"{{{:",
        b"hello",
        b"[1, 2]",
        b"current-context: a\ncontexts: 7\n",
        f"{_CONTEXT}[{{name: a, cluster: 7}}]\n".encode(),
        f"{_CONTEXT}[{{name: a, cluster: {{server: 7}}}}]\n".encode(),
        f"{_CONTEXT}[{{name: a, cluster: {{server: 'https://a', certificate-authority-data: a}}}}]\n".encode(),
        b"\xff\xfe\x00",
    ],
)
def test_kubeconfig__that_is_malformed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    path = tmp_path / "config"
    path.write_bytes(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(UserError, match=rf"kubeconfig {path} cannot be used: .*; correct it, or KUBECONFIG"):
        Cluster()


def test_kubeconfig__that_is_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path))
    with pytest.raises(UserError, match=f"kubeconfig {tmp_path} cannot be used: IsADirectoryError"):
        Cluster()


def test_kubeconfig__without_a_namespace_means_default(configure: Callable[..., Path]) -> None:
    configure("http://127.0.0.1:1", namespace=None)
    assert Cluster().namespace == "default"
    configure("http://127.0.0.1:1", namespace=7)
    assert Cluster().namespace == "7"


@pytest.mark.parametrize("server", [None, ""])
def test_server__that_is_not_named_is_not_this_machine(configure: Callable[..., Path], server: str | None) -> None:
    path = configure(server)
    with pytest.raises(UserError, match=f"{path} names no server"):
        Cluster()


@pytest.mark.parametrize("server", ["ftp://x", "http://", "http://127.0.0.1:99999"])
def test_server__that_is_no_address_is_told_at_once(configure: Callable[..., Path], server: str) -> None:
    path = configure(server)
    with pytest.raises(UnreachableError, match=f"{path} names: expected a server like https://HOST:PORT"):
        Cluster(patience=refuse_to_wait).list(PODS)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://nowhere.invalid"])
def test_server__that_is_not_there(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """To a person soon a mistake; a launcher may have come before the network of its pod."""
    configure(address)
    with pytest.raises(WaitedError):
        Cluster(budget_seconds=PERSON, patience=refuse_to_wait).list(PODS)
    monkeypatch.setattr(client, "_ABSENT_SECONDS", 0.0)
    with pytest.raises(UnreachableError, match="correct the cluster's server"):
        Cluster(budget_seconds=PERSON, patience=refuse_to_wait).list(PODS)
    with pytest.raises(WaitedError):
        Cluster(patience=refuse_to_wait).list(PODS)


def test_server__that_has_answered_is_waited_for(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ABSENT_SECONDS", 0.0)
    cluster = Cluster(budget_seconds=PERSON, patience=refuse_to_wait)
    cluster.list(PODS)
    server.stop()
    with pytest.raises(WaitedError):
        cluster.list(PODS)
    other = cluster.another()
    other.patience = refuse_to_wait
    with pytest.raises(WaitedError):
        other.list(PODS)


def test_certificate__that_is_not_trusted_is_told_at_once(configure: Callable[..., Path], tmp_path: Path) -> None:
    with answering((200, "{}", {}), tls=_self_signed(tmp_path)) as url:
        configure(url)
        with pytest.raises(UnreachableError, match=r"certificate is not trusted, correct .*certificate-authority"):
            Cluster(patience=refuse_to_wait).list(PODS)


def _self_signed(folder: Path) -> ssl.SSLContext:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    now = datetime.now(UTC)
    certificate = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(private + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    return context


# -- credentials -----------------------------------------------------------------------------------------------------


def _plugin(code: str) -> dict[str, Any]:
    version = "client.authentication.k8s.io/v1"
    return {
        "exec": {"apiVersion": version, "command": sys.executable, "args": ["-c", code], "interactiveMode": "Never"}
    }


def test_plugin__that_gives_no_credentials_is_named(configure: Callable[..., Path]) -> None:
    path = configure("http://127.0.0.1:1", user=_plugin("raise SystemExit(1)"))
    with pytest.raises(UserError, match=f"{path}: the program '{sys.executable}', .* gives none"):
        Cluster()


def test_plugin__that_gives_a_token_is_used(server: FakeApiServer, configure: Callable[..., Path]) -> None:
    server.token = "right"
    answer = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "right"},
    }
    configure(server.url, user=_plugin(f"print({json.dumps(answer)!r})"), namespace="training")
    assert Cluster(budget_seconds=PERSON).list(PODS) == []


def test_token__may_end_in_a_line_break(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "right"
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "with-token", token="right\n")))
    assert Cluster(budget_seconds=PERSON).list(PODS) == []


def test_token__that_can_be_none_is_not_shown(configure: Callable[..., Path]) -> None:
    configure("http://127.0.0.1:1", user={"token": "secret\nsecret"})
    with pytest.raises(UserError, match="the token holds a character") as told:
        Cluster().list(PODS)
    assert "secret" not in str(told.value)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ('pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "n"', AccessError),
        ('pods "a" is forbidden: User "x" cannot get resource "pods" in API group ""', AccessError),
        ('forbidden: User "system:anonymous" cannot get path "/apis"', AccessError),
        ('admission webhook "policy" denied the request: images from x cannot be pulled', ApiError),
        ('admission webhook "policy" denied the request: pods is forbidden: User "x" cannot', ApiError),
        ('pods "a" is forbidden: exceeded quota: gpus, cannot be met', ApiError),
    ],
)
def test_forbidden__names_the_role_only_where_a_right_would_help(
    server: FakeApiServer, message: str, kind: type[HjepaError]
) -> None:
    server.fail(403, message=message)
    with pytest.raises(kind) as told:
        Cluster(budget_seconds=PERSON).list(PODS)
    assert ("Its Role needs this verb" in str(told.value)) == (kind is AccessError)
    assert message in str(told.value)


def test_retry_after__beyond_the_budget_leaves_one_more_try(server: FakeApiServer) -> None:
    waits: list[float] = []
    server.fail(429, retry_after=100_000)
    assert Cluster(patience=waits.append).list(PODS) == []
    assert len(waits) == 1
    assert 590 < waits[0] < 600
    server.fail(429, count=100, retry_after=100_000)
    start = time.monotonic()
    with pytest.raises(HjepaError, match=r"no answer to 'list pods' for 0\.?\d* s: 429"):
        Cluster(budget_seconds=0.4).list(PODS)
    assert 0.3 < time.monotonic() - start < 5
    assert len(server.requests) == 4
