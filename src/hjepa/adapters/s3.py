"""One bucket and prefix of an S3 server, with verified writes and errors that say what to do.

Keys are relative to the store's prefix. Credentials come from the environment (``AWS_*``) or the platform's identity,
never from a configuration. A store may be shared by threads, pickled, and used after a fork: every process opens its
own connections.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config as ClientConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from hjepa.config import StorageConfig
from hjepa.errors import HjepaError, UserError
from hjepa.files import file_sha256, sync

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

_MIB = 2**20
# Measured best of eleven settings against the embedded server; more threads only contend for its CPU.
_TRANSFER = TransferConfig(multipart_threshold=8 * _MIB, multipart_chunksize=32 * _MIB, max_concurrency=4)
_SHA256 = "sha256"  # user metadata that makes an upload recognisable without reading it back
_CHUNK_BYTES = 64 * 2**10
_SLOW_SECONDS, _SLOW_BYTES_PER_SECOND, _FAST_BYTES_PER_SECOND = 10.0, 20_000, 1_000_000
_BROKEN_BODY = (ReadTimeoutError, ResponseStreamingError, IncompleteReadError)


class ObjectNotFoundError(HjepaError, FileNotFoundError):
    """No object has this key."""


class ObjectArchivedError(HjepaError, PermissionError):
    """The object is in an archive, from which the server does not read at once."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str  # relative to the store
    size: int  # bytes
    sha256: str | None  # hex; None where the writer stored none, and in listings
    etag: str | None = None  # the server's mark of this content


class S3Store:
    """Objects below ``s3://bucket/prefix``.

    Every method raises UserError for what the caller can mend (credentials, bucket), HjepaError for the server's
    failures (unreachable, full), and ObjectNotFoundError where a key is read that does not exist.
    """

    def __init__(
        self,
        uri: str,
        *,
        endpoint_url: str | None = None,
        region: str = "us-east-1",
        attempts: int = 5,
        connect_timeout_seconds: float = 5.0,
        read_timeout_seconds: float = 60.0,
        named: str = "storage.uri",
    ):
        """
        Args:
            uri: ``s3://bucket`` or ``s3://bucket/prefix``.
            endpoint_url: The server; None takes ``AWS_ENDPOINT_URL``, then AWS itself.
            attempts: Tries per request, the first included.
            named: What a message asks the user to correct if there is no such bucket.
        """
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise UserError(f"expected s3://bucket or s3://bucket/prefix, got {uri!r}")
        if endpoint_url is not None and not endpoint_url.startswith(("http://", "https://")):
            raise UserError(f"expected an S3 endpoint such as https://s3.example.com, got {endpoint_url!r}")
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._endpoint_url = endpoint_url
        self._region = region
        self._attempts = attempts
        self._named = named
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._lock = threading.Lock()
        self._clients: dict[int, S3Client] = {}
        self._bytes_sent = 0
        self._bucket_seen = False

    @classmethod
    def from_config(cls, storage: StorageConfig, uri: str | None = None, **options: Any) -> S3Store:
        """The configured storage, or another prefix or bucket at the same server.

        Args:
            options: Others of the constructor, such as ``read_timeout_seconds``.
        """
        return cls(
            uri or storage.uri,
            endpoint_url=storage.endpoint_url,
            region=storage.region,
            named=uri or "storage.uri",
            **options,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in {"_lock", "_clients"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _clients={})

    # -- names -------------------------------------------------------------------------------------------------------

    @property
    def bytes_sent(self) -> int:
        """Bytes of objects uploaded by this store so far."""
        return self._bytes_sent

    @property
    def endpoint(self) -> str:
        """The server this store talks to, as a URL."""
        return str(self._client.meta.endpoint_url)

    def uri(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}".rstrip("/")

    def key_of(self, uri: str) -> str:
        """The key of a URI that ``uri`` made; UserError for one outside this store."""
        base = f"s3://{self.bucket}/{self.prefix}"
        if not uri.startswith(base) or uri == base:
            raise UserError(f"{uri} lies outside the storage {self.uri()}; point storage.uri at the one that holds it")
        return uri.removeprefix(base)

    # -- writing -----------------------------------------------------------------------------------------------------

    def put_bytes(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        content_type: str = "application/octet-stream",
    ) -> bool:
        """Write a small object; the server refuses it if it does not hash to the digest sent along.

        Args:
            if_absent: Write only if the key is free: of any number of racing writers exactly one wins.

        Returns:
            False if the key was taken (only with ``if_absent``).
        """
        digest = hashlib.sha256(data)
        conditions: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        tries = 0
        while True:
            tries += 1
            try:
                with self._explained(f"cannot write {self.uri(key)}", key):
                    self._client.put_object(
                        Bucket=self.bucket,
                        Key=self.prefix + key,
                        Body=data,
                        ContentType=content_type,
                        ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
                        Metadata={_SHA256: digest.hexdigest()},
                        **conditions,
                    )
            except _ConditionError as error:
                if error.decided:
                    return False
                if tries == self._attempts:
                    raise
                time.sleep(0.1 * 2**tries)  # AWS answers 409 while two conditional writes are in flight
            else:
                self._count(len(data))
                return True

    def put_json(self, key: str, value: Any, *, if_absent: bool = False) -> bool:
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        return self.put_bytes(key, text.encode(), if_absent=if_absent, content_type="application/json")

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Upload a file unless it is there already, and verify it.

        Args:
            sha256: Hex digest of the file, as its manifest states it.
            progress: Called with the number of bytes just sent, from several threads.

        Returns:
            Bytes sent: 0 if an object of that size and digest has this key.
        """
        size = path.stat().st_size
        present = self.head(key)
        if present is not None and (present.size, present.sha256) == (size, sha256):
            return 0
        actual = file_sha256(path)
        if actual != sha256:
            raise HjepaError(
                f"{path} changed after it was hashed: expected sha256 {sha256}, got {actual}; make it again"
            )
        with self._explained(f"cannot upload {path} to {self.uri(key)}", key):
            # Each part travels with a checksum that the server verifies before it accepts the part.
            self._client.upload_file(
                str(path),
                self.bucket,
                self.prefix + key,
                ExtraArgs={"Metadata": {_SHA256: sha256}},
                Config=_TRANSFER,
                Callback=progress,
            )
        self._count(size)
        stored = self.head(key)
        if stored is None or (stored.size, stored.sha256) != (size, sha256):
            raise HjepaError(
                f"{self.uri(key)} is not what was uploaded: expected {size} bytes, sha256 {sha256}; got {stored}"
            )
        return size

    def copy(self, source: str, key: str, *, sha256: str) -> bool:
        """Copy an object within the store without its bytes passing through here; False if it is there already.

        Args:
            sha256: Of the source, by which a copy is recognised.
        """
        found = self.head(key)
        if found is not None and found.sha256 == sha256:
            return False
        with self._explained(f"cannot copy {self.uri(source)} to {self.uri(key)}", source):
            self._client.copy_object(
                Bucket=self.bucket,
                Key=self.prefix + key,
                CopySource={"Bucket": self.bucket, "Key": self.prefix + source},
                Metadata={_SHA256: sha256},
                MetadataDirective="REPLACE",
            )
        return True

    def delete(self, key: str) -> None:
        """Remove an object; one that does not exist is no error."""
        with self._explained(f"cannot delete {self.uri(key)}", key):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    # -- reading -----------------------------------------------------------------------------------------------------

    def get_bytes(self, key: str, *, start: int | None = None, length: int | None = None) -> bytes:
        """An object, or ``length`` bytes from ``start``; like a slice, shorter where the object ends."""
        if length == 0:
            return b""
        request: dict[str, Any] = {}
        if start is not None or length is not None:
            first = start or 0
            request["Range"] = f"bytes={first}-{'' if length is None else first + length - 1}"
        with self._explained(f"cannot read {self.uri(key)}", key):
            tries = 0
            while True:
                tries += 1
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **request)
                    return _read_body(answer["Body"])
                except _BROKEN_BODY:  # the client retries requests, but not a body that breaks off
                    if tries == self._attempts:
                        raise
                    time.sleep(random.uniform(0.5, 1) * 0.1 * 2**tries)  # not all of many readers at the same moment
                except ClientError as error:
                    if error.response["Error"]["Code"] == "InvalidRange":
                        return b""
                    raise

    def get_json(self, key: str) -> Any:
        data = self.get_bytes(key)
        try:
            return json.loads(data)
        except ValueError as error:
            raise HjepaError(f"{self.uri(key)} is not valid JSON: {error}") from error

    def download(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Fetch an object into a file that appears only when it is complete, verified and on disk.

        Args:
            sha256: Expected hex digest; None takes the one stored with the object, if any.

        Raises:
            HjepaError: if the bytes do not hash to the digest; nothing is left behind.
        """
        info = self.head(key)
        if info is None:
            raise self._not_found(key)
        sha256 = sha256 or info.sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with self._explained(f"cannot download {self.uri(key)} to {path}", key):
                self._client.download_file(
                    self.bucket, self.prefix + key, str(partial), Config=_TRANSFER, Callback=progress
                )
            actual = file_sha256(partial)
            if sha256 is not None and actual != sha256:
                raise HjepaError(
                    f"{self.uri(key)} is damaged: expected sha256 {sha256}, got {actual}. "
                    "Delete it and run the step that made it again."
                )
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)

    def head(self, key: str) -> ObjectInfo | None:
        """Size and digest of an object; None if there is none."""
        with self._explained(f"cannot look at {self.uri(key)}", key):
            try:
                answer = self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except ClientError as error:
                if _status(error) != 404:
                    raise
                self._require_bucket()
                return None
        self._bucket_seen = True
        return ObjectInfo(
            key=key, size=answer["ContentLength"], sha256=answer["Metadata"].get(_SHA256), etag=answer.get("ETag")
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in order of their keys; without their digests."""
        with self._explained(f"cannot list {self.uri(prefix)}", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"].removeprefix(self.prefix), item["Size"], None, item.get("ETag"))

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> S3Client:
        with self._lock:
            client = self._clients.get(os.getpid())
            if client is None:
                client = self._clients[os.getpid()] = self._connect()
            return client

    def _connect(self) -> S3Client:
        own_server = self._endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = ClientConfig(
            s3={"addressing_style": "path" if own_server else "auto"},
            retries={"total_max_attempts": self._attempts, "mode": "standard"},
            connect_timeout=self._connect_timeout_seconds,
            read_timeout=self._read_timeout_seconds,
            max_pool_connections=32,
        )
        try:
            session = boto3.Session(region_name=self._region)
            return session.client("s3", endpoint_url=self._endpoint_url, config=config)
        except ValueError as error:  # what botocore raises for a malformed URL
            raise UserError(f"cannot use the S3 endpoint {own_server}: {error}") from error
        except BotoCoreError as error:
            raise UserError(f"cannot set up the S3 client: {error}; check the AWS_* environment variables") from error

    def _count(self, size: int) -> None:
        with self._lock:
            self._bytes_sent += size

    def _require_bucket(self) -> None:
        """A HEAD has no body, so a missing bucket looks like a missing key: ask once."""
        if not self._bucket_seen:
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _status(error) == 404:
                    raise self._no_bucket() from error
                raise
            self._bucket_seen = True

    def _not_found(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError(f"there is no object {self.uri(key)} at {self.endpoint}")

    def _no_bucket(self) -> UserError:
        return UserError(
            f"the S3 server at {self.endpoint} has no bucket {self.bucket!r}; create it, or correct {self._named}"
        )

    @contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except S3UploadFailedError as error:
            cause = error.__cause__ or error.__context__
            if not isinstance(cause, ClientError):
                raise
            raise self._explain(doing, key, cause) from error
        except RetriesExceededError as error:
            last = error.last_exception  # type: ignore[attr-defined]  # missing in the stubs
            raise HjepaError(
                f"{doing}: the S3 server at {self.endpoint} broke off each of several answers ({last}). "
                "Check the server and the network, and run again."
            ) from error
        except ClientError as error:
            raise self._explain(doing, key, error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(
                f"{doing}: no S3 credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({error})."
            ) from error
        except (NoConnectionError, HTTPClientError) as error:
            raise HjepaError(
                f"{doing}: the S3 server at {self.endpoint} does not answer ({error}). Start it, or correct "
                "storage.endpoint_url or AWS_ENDPOINT_URL; `hjepa stack up` starts the embedded one."
            ) from error
        except BotoCoreError as error:
            raise HjepaError(f"{doing}: {error}") from error
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise UserError(f"{doing}: the local disk is full; free some space and run again") from error
            raise

    def _explain(self, doing: str, key: str, error: ClientError) -> HjepaError:
        status, code = _status(error), error.response["Error"]["Code"]
        detail = f"{status} {code}" if code != str(status) else code
        if code == "NoSuchBucket":
            return UserError(f"{doing}: {self._no_bucket()}")
        if code in {"NoSuchKey", "404"}:
            return self._not_found(key)
        if status == 412 or code == "ConditionalRequestConflict":
            return _ConditionError(f"{doing}: {detail}", decided=status == 412)
        if code == "InvalidObjectState":
            return ObjectArchivedError(f"{doing}: the object is archived; restore it first")
        if code == "RequestTimeTooSkewed":
            return UserError(f"{doing}: the clock of this machine and that of {self.endpoint} differ; set it right")
        if code == "AccessDenied":
            return UserError(
                f"{doing}: the access key may not do this in bucket {self.bucket!r} at {self.endpoint} ({detail}). "
                "Use a key with read, write, list and delete rights there."
            )
        if status in {401, 403}:
            return UserError(
                f"{doing}: the S3 server at {self.endpoint} refuses the credentials ({detail}). "
                "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the endpoint they belong to."
            )
        if status in {500, 507}:
            return HjepaError(
                f"{doing}: the S3 server at {self.endpoint} failed ({detail}). The usual cause is a full disk "
                "on the server: free some space there and run again; what was stored before is kept."
            )
        message = error.response["Error"].get("Message", "")
        return HjepaError(f"{doing}: the S3 server at {self.endpoint} answered {detail}: {message}")


class _ConditionError(HjepaError):
    """A conditional write that did not happen; ``decided`` if it is because the key is taken."""

    def __init__(self, message: str, *, decided: bool):
        super().__init__(message)
        self.decided = decided


def _read_body(body: StreamingBody) -> bytes:
    """
    Raises:
        ReadTimeoutError: it does not break off, but comes so slowly that a new connection is worth a try.
    """
    started, size, chunks = time.monotonic(), 0, []
    wanted: int | None = _CHUNK_BYTES
    while chunk := body.read(wanted):
        chunks.append(chunk)
        size += len(chunk)
        seconds = time.monotonic() - started
        # The rest of a fast one at once: to read by chunks takes thrice the CPU time.
        wanted = None if size > seconds * _FAST_BYTES_PER_SECOND else _CHUNK_BYTES
        if seconds > _SLOW_SECONDS and size < seconds * _SLOW_BYTES_PER_SECOND:
            body.close()
            raise ReadTimeoutError(endpoint_url="S3", error=f"{size} bytes in {seconds:.0f} s")
    return b"".join(chunks)


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
