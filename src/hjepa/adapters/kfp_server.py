"""Upload a compiled pipeline to a Kubeflow Pipelines server, run it there, and follow the run to its end."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from hjepa.adapters import pipeline_spec
from hjepa.adapters.pipeline_view import format_seconds
from hjepa.errors import HjepaError, UserError

ENDPOINT = "KF_PIPELINES_ENDPOINT"  # the name that KFP's own tools use
TOKEN = "HJEPA_KFP_TOKEN"

_CONNECT_SECONDS = 10.0
_REQUEST_SECONDS = (_CONNECT_SECONDS, 60.0)  # to connect, to answer
_ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})

Report = Callable[[str], None]


@dataclass(frozen=True)
class Server:
    """Where the KFP API is and how to get in. The token is kept out of ``repr``."""

    endpoint: str
    token: str | None = field(default=None, repr=False)
    namespace: str | None = None  # where the deployment serves many users
    ca_file: Path | None = None

    @classmethod
    def from_environment(
        cls, endpoint: str | None = None, *, namespace: str | None = None, ca_file: Path | None = None
    ) -> Server:
        """The endpoint given, or ``KF_PIPELINES_ENDPOINT``; the token of ``HJEPA_KFP_TOKEN``, if it is set."""
        chosen = endpoint or os.environ.get(ENDPOINT)
        if not chosen:
            raise UserError(f"no KFP server: pass --endpoint http://HOST:PORT or set {ENDPOINT}")
        return cls(chosen, token=os.environ.get(TOKEN), namespace=namespace, ca_file=ca_file)

    @property
    def url(self) -> str:
        return self.endpoint.rstrip("/")


@dataclass(frozen=True)
class Uploaded:
    pipeline_id: str
    version_id: str
    version: str
    created: bool  # False: the server had this version already
    url: str


@dataclass(frozen=True)
class Submitted:
    run_id: str
    experiment_id: str
    url: str


def upload(
    server: Server,
    compiled_yaml: Path,
    *,
    pipeline: str | None = None,
    version: str | None = None,
    registry: str | None = None,
    report: Report = print,
) -> Uploaded:
    """Put a compiled pipeline on the server: a new pipeline, or a new version of the one with this name.

    Args:
        pipeline: Its name on the server; the compiled one by default.
        version: Name of the version; by default it contains the digest of the YAML. A version that is there already
            is used if it is the same pipeline.
        registry: ``HOST/NAMESPACE`` of the images.

    Raises:
        UserError: no valid pipeline, server out of reach, access denied, or the version's name is taken by
            another pipeline.
    """
    compiled = pipeline_spec.load(compiled_yaml)
    if registry:
        compiled = compiled.with_registry(registry)
    text = compiled.to_yaml()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = pipeline or compiled.name
    client = _connect(server)
    with _explained(server):
        pipeline_id = _find_pipeline(client, server, name)
        if pipeline_id is None:
            # Not kfp's upload_pipeline: that names the first version after the pipeline.
            description = compiled.spec["pipelineInfo"].get("description")
            created = client.pipelines.pipeline_service_create_pipeline(
                pipeline=kfp_server_api.V2beta1Pipeline(
                    name=name, display_name=name, description=description, namespace=server.namespace
                )
            )
            pipeline_id = str(created.pipeline_id)
            report(f"pipeline {name}: created")
        version_name = version or f"{name}-{digest}"
        version_id = _find_version(client, pipeline_id, version_name)
        if version_id is None:
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                package = Path(folder) / f"{name}.yaml"
                package.write_text(text, "utf-8")
                version_id = str(
                    client.upload_pipeline_version(
                        str(package), pipeline_version_name=version_name, pipeline_id=pipeline_id
                    ).pipeline_version_id
                )
            report(f"version {version_name}: uploaded")
            is_new = True
        elif version is None or _is_same(compiled, client.get_pipeline_version(pipeline_id, version_id).pipeline_spec):
            report(f"version {version_name}: already there, nothing uploaded")
            is_new = False
        else:
            raise UserError(
                f"pipeline {name} has a version {version!r} already, and it is another pipeline than {compiled_yaml} "
                f"{f'with images of {registry} ' if registry else ''}makes; choose another --pipeline-version"
            )
    url = f"{server.url}/#/pipelines/details/{pipeline_id}/version/{version_id}"
    report(url)
    return Uploaded(pipeline_id, version_id, version_name, created=is_new, url=url)


def run(
    server: Server,
    compiled_yaml: Path,
    arguments: Mapping[str, Any],
    *,
    experiment: str = "hjepa",
    run_name: str | None = None,
    pipeline: str | None = None,
    version: str | None = None,
    registry: str | None = None,
    report: Report = print,
) -> Submitted:
    """Upload a compiled pipeline where needed and start a run of that very version.

    Raises:
        UserError: as ``upload``, or arguments that the pipeline does not take; those are found before anything is sent.
    """
    pipeline_spec.load(compiled_yaml).check_arguments(arguments)
    uploaded = upload(server, compiled_yaml, pipeline=pipeline, version=version, registry=registry, report=report)
    client = _connect(server)
    with _explained(server), redirect_stdout(io.StringIO()):
        experiment_id = str(client.create_experiment(experiment, namespace=server.namespace).experiment_id)
        started = client.run_pipeline(
            experiment_id,
            job_name=run_name or f"{uploaded.version} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            pipeline_id=uploaded.pipeline_id,
            version_id=uploaded.version_id,
            params=dict(arguments),
        )
    submitted = Submitted(str(started.run_id), experiment_id, f"{server.url}/#/runs/details/{started.run_id}")
    report(f"run {started.display_name}: submitted\n{submitted.url}")
    return submitted


def follow(
    server: Server,
    run_id: str,
    *,
    poll_seconds: float = 5.0,
    patience_seconds: float = 120.0,
    report: Report = print,
) -> None:
    """Report each change of state until the run has ended; returns if it succeeded.

    Args:
        poll_seconds: Between two looks.
        patience_seconds: How long the server may be out of reach before we give up; the run itself goes on.

    Raises:
        HjepaError: the run failed or was cancelled; the message names the failed tasks and their reasons.
        UserError: there is no such run, access is denied, or the server stays out of reach.
    """
    client = _connect(server)
    with _explained(server):
        steps = _step_names(client, client.get_run(run_id))
    began = last_answer = time.monotonic()
    seen: dict[str, str] = {}
    while True:
        try:
            current = client.runs.run_service_get_run(run_id=run_id, _request_timeout=_REQUEST_SECONDS)
        except (urllib3.exceptions.HTTPError, kfp_server_api.ApiException) as error:
            # An API server that restarts, or a proxy with a hiccup, does not end a run of days.
            passing = not isinstance(error, kfp_server_api.ApiException) or (error.status or 0) >= 500
            if not passing or time.monotonic() - last_answer > patience_seconds:
                with _explained(server):
                    raise
            time.sleep(poll_seconds)
            continue
        last_answer = time.monotonic()
        tasks = _tasks(current, steps)
        for name, task in tasks.items():
            if seen.get(name) != task.state:
                seen[name] = task.state
                report(f"{format_seconds(last_answer - began):>8}  {name}: {task.state}")
        if current.state in _ENDED:
            break
        time.sleep(poll_seconds)
    if current.state == "SUCCEEDED":
        report(f"run {current.display_name}: SUCCEEDED")
        return
    failed = [f"  {name}: {_reason(task)}" for name, task in tasks.items() if task.state == "FAILED"]
    if not failed and current.error is not None:
        failed = [f"  {current.error.message}"]
    url = f"{server.url}/#/runs/details/{run_id}"
    raise HjepaError("\n".join([f"run {current.display_name}: {current.state}", *failed, f"logs: {url}"]))


def version(server: Server) -> str:
    """What the API says of itself.

    Raises:
        UserError: out of reach, or access denied.
        HjepaError: the server failed.
    """
    health = _connect(server).get_kfp_healthz()
    told = health.to_dict() if hasattr(health, "to_dict") else dict(health)
    known = ", ".join(f"{key} {value}" for key, value in told.items() if value not in (None, ""))
    return f"{server.url}, API v2beta1" + (f" ({known})" if known else "")


def _connect(server: Server) -> Any:
    """A ``kfp.Client``, after one request that tells an unreachable server from a refusing one.

    The client's constructor talks to the server too, but retries at length and does not say which of the two it was.
    """
    if not server.url.startswith(("http://", "https://")):
        raise UserError(f"endpoint {server.endpoint!r}: expected http://HOST[:PORT] or https://HOST[:PORT]")
    headers = {"Authorization": f"Bearer {server.token}"} if server.token else {}
    pool = urllib3.PoolManager(ca_certs=str(server.ca_file) if server.ca_file else None)
    with _explained(server):
        answer = pool.request(
            "GET",
            f"{server.url}/apis/v2beta1/healthz",
            headers=headers,
            timeout=urllib3.Timeout(_CONNECT_SECONDS),
            retries=False,
            redirect=False,
        )
        if answer.status in (301, 302, 303, 307, 308):
            raise UserError(
                f"KFP at {server.url} sends us to a login page ({answer.headers.get('location')}); "
                f"set {TOKEN} to a token that it accepts, or use a port-forward to its API"
            )
        if answer.status != 200:
            raise kfp_server_api.ApiException(status=answer.status, reason=answer.reason)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "only works with v2.0.0-beta.2 and later"
            return kfp.Client(
                host=server.url,
                existing_token=server.token,
                namespace=server.namespace or "kubeflow",  # the default means: none chosen
                ssl_ca_cert=str(server.ca_file) if server.ca_file else None,
            )


@contextmanager
def _explained(server: Server) -> Iterator[None]:
    """Turn what the HTTP client raises into one message that names cause and remedy."""
    try:
        yield
    except kfp_server_api.ApiException as error:
        said = _server_message(error)
        if error.status in (401, 403):
            raise UserError(
                f"KFP at {server.url} refuses access ({error.status}); set {TOKEN} to a valid token"
                + (f", and check the rights in namespace {server.namespace}" if server.namespace else "")
                + f". It said: {said}"
            ) from None
        if error.status == 404:
            raise UserError(f"KFP at {server.url} does not know that ({error.status}): {said}") from None
        if (error.status or 0) < 500:
            raise UserError(f"KFP at {server.url} refuses the request ({error.status}): {said}") from None
        raise HjepaError(f"KFP at {server.url} failed ({error.status}): {said}; try again later") from None
    except urllib3.exceptions.HTTPError as error:
        cause = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot reach KFP at {server.url}: {cause}. Check the address and that the server is up; "
            "from outside the cluster, port-forward the service ml-pipeline-ui"
        ) from None


def _server_message(error: Any) -> str:
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        return str(error.body or error.reason)
    if not isinstance(body, dict):
        return str(body)
    return str(body.get("message") or body.get("error_message") or body.get("error") or error.reason)


def _find_pipeline(client: Any, server: Server, name: str) -> str | None:
    wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
    found = client.list_pipelines(filter=json.dumps(wanted), namespace=server.namespace).pipelines or []
    if len(found) > 1:
        raise UserError(
            f"{len(found)} pipelines on {server.url} are called {name!r}, so it is not clear which one is meant; "
            "delete all but one of them there"
        )
    return str(found[0].pipeline_id) if found else None


def _find_version(client: Any, pipeline_id: str, name: str) -> str | None:
    token = ""
    while True:
        page = client.list_pipeline_versions(pipeline_id, page_token=token, page_size=100)
        for version in page.pipeline_versions or []:
            if name in (version.display_name, version.name):
                return str(version.pipeline_version_id)
        token = page.next_page_token
        if not token:
            return None


def _is_same(compiled: pipeline_spec.CompiledPipeline, stored: Any) -> bool:
    """Compared as KFP's own messages: a server leaves defaults out and gives whole numbers back as floats."""
    stored = stored or {}
    spec, platforms = stored.get("pipeline_spec", stored), stored.get("platform_spec", {})
    pairs = (
        (compiled.spec, spec, pipeline_spec_pb2.PipelineSpec),
        (compiled.platforms, platforms, pipeline_spec_pb2.PlatformSpec),
    )
    try:
        return all(
            json_format.ParseDict(ours, message()) == json_format.ParseDict(theirs, message())
            for ours, theirs, message in pairs
        )
    except json_format.ParseError:  # the server holds something that this version of KFP does not know
        return False


def _step_names(client: Any, run: Any) -> set[str]:
    """The tasks of the pipeline; a server also lists drivers, executors and the root as tasks."""
    spec = run.pipeline_spec
    reference = run.pipeline_version_reference
    if spec is None and reference is not None:
        spec = client.get_pipeline_version(reference.pipeline_id, reference.pipeline_version_id).pipeline_spec
    spec = (spec or {}).get("pipeline_spec", spec or {})
    return set(pipeline_spec.CompiledPipeline(spec, {}).tasks) if "root" in spec else set()


def _tasks(run: Any, steps: set[str]) -> dict[str, Any]:
    details = (run.run_details.task_details or []) if run.run_details is not None else []
    tasks = [task for task in details if task.state is not None and (not steps or task.display_name in steps)]
    return {task.display_name: task for task in sorted(tasks, key=lambda task: str(task.create_time))}


def _reason(task: Any) -> str:
    return str(task.error.message) if task.error is not None and task.error.message else "no reason given; see its log"
