"""S3Store against the real embedded server; a scripted one answers what the real one cannot be made to answer."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from hjepa.adapters.s3 import ObjectNotFoundError, S3Store
from hjepa.config import StorageConfig
from hjepa.errors import HjepaError, UserError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> tuple[Path, str]:
    path.write_bytes(data)
    return path, sha256(data)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- small objects -----------------------------------------------------------------------------------------------------


def test_put_bytes__comes_back_with_size_and_digest(store: S3Store) -> None:
    assert store.put_bytes("a/b.bin", b"hello")
    assert store.get_bytes("a/b.bin") == b"hello"
    info = store.head("a/b.bin")
    assert info is not None
    assert (info.key, info.size, info.sha256) == ("a/b.bin", 5, sha256(b"hello"))
    assert store.bytes_sent == 5


def test_put_bytes__again_overwrites(store: S3Store) -> None:
    store.put_bytes("k", b"one")
    assert store.put_bytes("k", b"two")
    assert store.get_bytes("k") == b"two"


@pytest.mark.parametrize("key", ["sp ace/ü+%25.pt", "x=1,y=2/step=0001.bin", "a//b"])
def test_put_bytes__odd_key(store: S3Store, key: str) -> None:
    store.put_bytes(key, b"odd")
    assert store.get_bytes(key) == b"odd"
    assert [item.key for item in store.list(key)] == [key]


def test_put_json__comes_back_equal(store: S3Store) -> None:
    value = {"schema": 1, "classes": ["T-shirt/top", "Stiefelette ü"], "mean": [0.2861], "nothing": None}
    assert store.put_json("dataset.json", value)
    assert store.get_json("dataset.json") == value


def test_get_json__not_json_names_the_object(store: S3Store) -> None:
    store.put_bytes("broken.json", b'{"half":')
    with pytest.raises(HjepaError, match=r"broken\.json is not valid JSON"):
        store.get_json("broken.json")


def test_if_absent__second_write_changes_nothing(store: S3Store) -> None:
    assert store.put_bytes("lock", b"first", if_absent=True)
    assert not store.put_bytes("lock", b"second", if_absent=True)
    assert not store.put_json("lock", {"third": 3}, if_absent=True)
    assert store.get_bytes("lock") == b"first"
    assert store.bytes_sent == 5


def test_if_absent__sixteen_racing_writers_have_one_winner(store: S3Store) -> None:
    def attempt(key: str, writer: int, start: threading.Barrier) -> bool:
        start.wait()
        return store.put_bytes(key, str(writer).encode(), if_absent=True)

    with ThreadPoolExecutor(16) as pool:
        for key in ("race/0", "race/1", "race/2"):
            start = threading.Barrier(16)
            won = list(pool.map(lambda writer, key=key, start=start: attempt(key, writer, start), range(16)))
            assert sum(won) == 1
            assert store.get_bytes(key) == str(won.index(True)).encode()


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(None, None, b"0123456789"), (3, 4, b"3456"), (None, 2, b"01"), (7, None, b"789"), (8, 99, b"89"), (4, 0, b"")],
)
def test_get_bytes__ranges_are_slices(store: S3Store, start: int | None, length: int | None, expected: bytes) -> None:
    store.put_bytes("digits", b"0123456789")
    assert store.get_bytes("digits", start=start, length=length) == expected


def test_get_bytes__start_past_the_end_is_empty(store: S3Store) -> None:
    store.put_bytes("digits", b"0123456789")
    assert store.get_bytes("digits", start=10, length=4) == b""


def test_get_bytes__missing_object(store: S3Store) -> None:
    with pytest.raises(ObjectNotFoundError, match=r"no object s3://hjepa/tests/.*/nothing"):
        store.get_bytes("nothing")


def test_head__missing_object_is_none(store: S3Store) -> None:
    assert store.head("nothing") is None


def test_delete__object_is_gone_and_again_is_no_error(store: S3Store) -> None:
    store.put_bytes("k", b"x")
    store.delete("k")
    store.delete("k")
    assert store.head("k") is None


def test_list__more_than_one_page_in_order(store: S3Store) -> None:
    keys = [f"many/{i:04d}" for i in range(1001)]  # a page holds 1000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put_bytes(key, b"x"), keys))
    store.put_bytes("manyfold", b"x")
    assert [item.key for item in store.list("many/")] == keys
    assert [item.size for item in store.list("manyf")] == [1]


def test_list__nothing_there(store: S3Store) -> None:
    assert list(store.list("none/")) == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_put_file__second_time_sends_nothing(store: S3Store, tmp_path: Path) -> None:
    path, digest = write(tmp_path / "shard.tar", os.urandom(100_000))
    assert store.put_file("shard.tar", path, sha256=digest) == 100_000
    assert store.put_file("shard.tar", path, sha256=digest) == 0
    assert store.bytes_sent == 100_000


def test_put_file__same_size_other_content_is_sent(store: S3Store, tmp_path: Path) -> None:
    for data in (b"a" * 1000, b"b" * 1000):
        path, digest = write(tmp_path / "file", data)
        assert store.put_file("file", path, sha256=digest) == 1000
    assert store.get_bytes("file") == b"b" * 1000


def test_put_file__multipart_comes_back_equal(store: S3Store, tmp_path: Path) -> None:
    size = 33 * 2**20 + 17  # a whole part and a ragged one
    path, digest = write(tmp_path / "big", os.urandom(size))
    sent: list[int] = []
    assert store.put_file("big", path, sha256=digest, progress=sent.append) == size
    assert sum(sent) == size
    assert store.put_file("big", path, sha256=digest) == 0
    got: list[int] = []
    store.download("big", tmp_path / "copy", sha256=digest, progress=got.append)
    assert sum(got) == size
    assert sha256((tmp_path / "copy").read_bytes()) == digest


def test_put_file__empty_file(store: S3Store, tmp_path: Path) -> None:
    path, digest = write(tmp_path / "empty", b"")
    store.put_file("empty", path, sha256=digest)
    store.download("empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_put_file__file_that_changed_is_not_sent(store: S3Store, tmp_path: Path) -> None:
    path, _ = write(tmp_path / "file", b"new content")
    with pytest.raises(HjepaError, match="changed after it was hashed"):
        store.put_file("file", path, sha256=sha256(b"old content"))
    assert store.head("file") is None


def test_download__makes_folders_and_replaces_a_file(store: S3Store, tmp_path: Path) -> None:
    store.put_bytes("k", b"new")
    target = tmp_path / "deep" / "er" / "file"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"old")
    store.download("k", target, sha256=sha256(b"new"))
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_download__damaged_object_leaves_the_old_file_and_no_part(store: S3Store, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.write_bytes(b"old")
    raw = boto3.client("s3")  # an object whose bytes are not those that its digest promises
    raw.put_object(
        Bucket=store.bucket, Key=f"{store.prefix}weights", Body=b"rotten", Metadata={"sha256": sha256(b"sound!")}
    )
    with pytest.raises(HjepaError, match=r"damaged.*expected sha256"):
        store.download("weights", target)
    with pytest.raises(HjepaError, match=r"damaged.*expected sha256"):
        store.download("weights", target, sha256=sha256(b"other!"))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_download__missing_object_leaves_nothing(store: S3Store, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFoundError):
        store.download("nothing", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_download__full_local_disk(store: S3Store, tmp_path: Path, small_disk: Path) -> None:
    store.put_bytes("big", os.urandom(2 * 2**20))
    with pytest.raises(UserError, match="local disk is full"):
        store.download("big", small_disk / "file")
    assert list(small_disk.iterdir()) == []


# -- names -------------------------------------------------------------------------------------------------------------


def test_uri__and_key_of_are_inverse() -> None:
    store = S3Store("s3://bucket/some/prefix/")
    assert store.uri("a/b") == "s3://bucket/some/prefix/a/b"
    assert store.key_of("s3://bucket/some/prefix/a/b") == "a/b"
    assert S3Store("s3://bucket").uri("a") == "s3://bucket/a"
    assert S3Store("s3://bucket").key_of("s3://bucket/a") == "a"


@pytest.mark.parametrize("uri", ["s3://other/some/a", "s3://bucket/somewhere/a", "s3://bucket/some", "/local/file"])
def test_key_of__outside_the_store(uri: str) -> None:
    with pytest.raises(UserError, match="outside the storage s3://bucket/some"):
        S3Store("s3://bucket/some").key_of(uri)


@pytest.mark.parametrize("uri", ["bucket/prefix", "s3://", "https://bucket"])
def test_store__not_an_s3_uri(uri: str) -> None:
    with pytest.raises(UserError, match="expected s3://bucket"):
        S3Store(uri)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8333", "http://:bad:"])
def test_store__not_an_endpoint(endpoint: str) -> None:
    with pytest.raises(UserError, match="S3 endpoint"):
        S3Store("s3://bucket", endpoint_url=endpoint).get_bytes("k")


# -- several processes -------------------------------------------------------------------------------------------------


def _read(store: S3Store, key: str) -> bytes:
    return store.get_bytes(key)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_store__used_in_child_processes(store: S3Store, method: str) -> None:
    store.put_bytes("shared", b"from the parent")
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(_read, [(store, "shared")] * 4) == [b"from the parent"] * 4


def test_store__pickles(store: S3Store) -> None:
    store.put_bytes("k", b"x")
    assert pickle.loads(pickle.dumps(store)).get_bytes("k") == b"x"  # noqa: S301 - made a moment ago


# -- what goes wrong ---------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[S3Store, Path], object]] = {
    "put_bytes": lambda store, _: store.put_bytes("k", b"x"),
    "put_file": lambda store, path: store.put_file("k", path, sha256=sha256(b"x" * 9_000_000)),
    "get_bytes": lambda store, _: store.get_bytes("k"),
    "download": lambda store, path: store.download("k", path.with_name("copy"), sha256="0"),
    "head": lambda store, _: store.head("k"),
    "list": lambda store, _: list(store.list()),
    "delete": lambda store, _: store.delete("k"),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[S3Store], object]:
    path, _ = write(tmp_path / "file", b"x" * 9_000_000)  # large enough for the multipart way
    return lambda store: CALLS[request.param](store, path)


def test_wrong_secret__names_the_variables(
    store: S3Store, call: Callable[[S3Store], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"refuses the credentials.*AWS_ACCESS_KEY_ID") as caught:
        call(S3Store("s3://hjepa"))
    assert store.endpoint in str(caught.value)


def test_unknown_key__names_the_variables(stack_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(UserError, match=r"refuses the credentials \(403 InvalidAccessKeyId\)"):
        S3Store("s3://hjepa").put_bytes("k", b"x")


def test_no_credentials__names_the_variables(
    stack_environment: dict[str, str], call: Callable[[S3Store], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="no S3 credentials"):
        call(S3Store("s3://hjepa"))


def test_half_of_the_credentials__names_the_missing_one(
    stack_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
        S3Store("s3://hjepa").put_bytes("k", b"x")


def test_missing_bucket__is_named(stack_environment: dict[str, str], call: Callable[[S3Store], object]) -> None:
    with pytest.raises(UserError, match="has no bucket 'hjepaa'; create it"):
        call(S3Store("s3://hjepaa/prefix"))


def test_unreachable_endpoint__is_named_soon(
    stack_environment: dict[str, str], call: Callable[[S3Store], object]
) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    store = S3Store("s3://hjepa", endpoint_url=endpoint, attempts=1)
    begin = time.monotonic()
    with pytest.raises(HjepaError, match=f"S3 server at {endpoint} does not answer"):
        call(store)
    assert time.monotonic() - begin < 5


def test_from_config__takes_the_endpoint(stack_environment: dict[str, str]) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    store = S3Store.from_config(StorageConfig(uri="s3://hjepa/a", endpoint_url=endpoint))
    assert (store.endpoint, store.uri("k")) == (endpoint, "s3://hjepa/a/k")


@contextmanager
def scripted_server(*answers: tuple[int, str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Gives one (status, headers, body) per request, in order, and the list of requests it got.

    A body that is shorter than its Content-Length breaks off.
    """
    waiting, requests = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = waiting.pop(0)
            self.send_response(status)
            for line in filter(None, headers.split("\n")):
                self.send_header(*line.split(": "))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        do_GET = do_PUT = do_HEAD = answer  # noqa: N815 - the names that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def some_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.usefixtures("some_keys")
def test_get_bytes__body_that_breaks_off_is_read_again() -> None:
    with scripted_server((200, "Content-Length: 8", b"half"), (200, "Content-Length: 8", b"complete")) as (url, _):
        assert S3Store("s3://b12", endpoint_url=url).get_bytes("k") == b"complete"


@pytest.mark.usefixtures("some_keys")
def test_get_bytes__body_that_always_breaks_off_is_an_error() -> None:
    broken = (200, "Content-Length: 8", b"half")
    with (
        scripted_server(broken, broken) as (url, requests),
        pytest.raises(HjepaError, match="cannot read s3://b12/k"),
    ):
        S3Store("s3://b12", endpoint_url=url, attempts=2).get_bytes("k")
    assert requests == ["GET", "GET"]


@pytest.mark.usefixtures("some_keys")
def test_download__body_that_always_breaks_off_is_an_error(tmp_path: Path) -> None:
    size = (200, "Content-Length: 8", b"")
    broken = (200, "Content-Length: 8", b"half")
    with (
        scripted_server(size, size, *[broken] * 5) as (url, requests),
        pytest.raises(HjepaError, match=r"cannot download s3://b12/k .* broke off each of several answers"),
    ):
        S3Store("s3://b12", endpoint_url=url).download("k", tmp_path / "k")
    assert requests == ["HEAD", "HEAD", *["GET"] * 5]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("some_keys")
def test_if_absent__undecided_conflict_is_tried_again() -> None:
    body = b"<Error><Code>ConditionalRequestConflict</Code></Error>"
    conflict = (409, f"Content-Length: {len(body)}", body)
    with scripted_server(conflict, (200, "Content-Length: 0", b"")) as (url, requests):
        assert S3Store("s3://b12", endpoint_url=url).put_bytes("k", b"x", if_absent=True)
    assert requests == ["PUT", "PUT"]


@pytest.mark.usefixtures("some_keys")
def test_full_server__names_the_disk() -> None:
    body = b"<Error><Code>InternalError</Code></Error>"
    full = (500, f"Content-Length: {len(body)}", body)
    with scripted_server(full) as (url, _), pytest.raises(HjepaError, match=r"500 InternalError.*full disk") as caught:
        S3Store("s3://b12", endpoint_url=url, attempts=1).put_bytes("k", b"x")
    assert not isinstance(caught.value, UserError)


@pytest.mark.usefixtures("some_keys")
def test_right_missing__names_the_rights() -> None:
    body = b"<Error><Code>AccessDenied</Code></Error>"
    denied = (403, f"Content-Length: {len(body)}", body)
    with scripted_server(denied) as (url, _), pytest.raises(UserError, match="read, write, list and delete rights"):
        S3Store("s3://b12", endpoint_url=url).put_bytes("k", b"x")
