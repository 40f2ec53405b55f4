"""A Kubeflow Pipelines API server for tests: real HTTP, the v2beta1 routes that uploading and running need.

State is kept in memory. What a real server refuses is refused: invalid pipelines, unknown ids, wrong parameters, a
name taken twice, a missing token. A run goes PENDING -> RUNNING -> SUCCEEDED or FAILED, task by task; it moves on each
time a client looks at it, so that no test depends on the clock.
By hand: ``python tests/fake_kfp_server.py --port 8899``.
"""

from __future__ import annotations

import argparse
import email.parser
import email.policy
import json
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

API = "/apis/v2beta1"
PYTHON_TYPES = {
    "STRING": str,
    "NUMBER_INTEGER": (int, float),  # JSON knows no difference; a fraction is refused below
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


class ApiError(Exception):
    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class State:
    token: str | None
    task_looks: int
    fail_task: str | None
    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "METHOD path", in order
    outage: HTTPStatus | None = None  # answer everything with this until it is None again
    lock: threading.Lock = field(default_factory=threading.Lock)


class FakeKfpServer:
    """``with FakeKfpServer() as server: ... server.url``; ``server.state`` holds what the clients made."""

    def __init__(
        self,
        *,
        token: str | None = None,
        task_looks: int = 2,
        fail_task: str | None = None,
        port: int = 0,
    ):
        self.state = State(token=token, task_looks=task_looks, fail_task=fail_task)
        handler = type("BoundHandler", (_Handler,), {"state": self.state})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeKfpServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# -- what is stored --------------------------------------------------------------------------------------------------


def parse_pipeline(data: bytes) -> dict[str, Any]:
    """The stored form of an uploaded pipeline; ApiError 400 if a cluster could not run it."""
    try:
        documents = [document for document in yaml.load_all(data, yaml.CSafeLoader) if document]
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        for executor in documents[0]["deploymentSpec"]["executors"].values():
            json_format.ParseDict(executor, pipeline_spec_pb2.PipelineDeploymentConfig.ExecutorSpec())
        for platform in documents[1:]:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
            for config in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
                json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    except (yaml.YAMLError, json_format.ParseError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"invalid pipeline spec: {error}") from None
    if not spec.pipeline_info.name or not spec.root.dag.tasks:
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid pipeline spec: no pipelineInfo.name or no root.dag.tasks")
    for name, task in spec.root.dag.tasks.items():
        if task.component_ref.name not in spec.components:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"invalid pipeline spec: task {name} has no component")
    if len(documents) > 1:
        return {"pipeline_spec": documents[0], "platform_spec": documents[1]}
    return documents[0]


def check_parameters(spec: dict[str, Any], given: dict[str, Any]) -> None:
    spec = spec.get("pipeline_spec", spec)
    definitions = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, value in given.items():
        if name not in definitions:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"parameter {name} is not defined in the pipeline")
        kind = definitions[name]["parameterType"]
        is_right = isinstance(value, PYTHON_TYPES[kind]) and (kind == "BOOLEAN" or not isinstance(value, bool))
        if not is_right or (kind == "NUMBER_INTEGER" and value != int(value)):
            raise ApiError(HTTPStatus.BAD_REQUEST, f"parameter {name} should be {kind}, got {value!r}")
    for name, definition in definitions.items():
        if name not in given and "defaultValue" not in definition and not definition.get("isOptional"):
            raise ApiError(HTTPStatus.BAD_REQUEST, f"parameter {name} has no value")


def in_containers(spec: dict[str, Any], tasks: dict[str, Any]) -> list[str]:
    """The tasks that become pods, in order; groups (exit handlers) are opened."""
    names: list[str] = []
    for name in topological(tasks):
        component = spec["components"][tasks[name]["componentRef"]["name"]]
        names += in_containers(spec, component["dag"]["tasks"]) if "dag" in component else [name]
    return names


def topological(tasks: dict[str, Any]) -> list[str]:
    order: list[str] = []
    while len(order) < len(tasks):
        order += [
            name
            for name, task in sorted(tasks.items())
            if name not in order and all(needed in order for needed in task.get("dependentTasks", []))
        ][:1]
    return order


def run_view(run: dict[str, Any], state: State) -> dict[str, Any]:
    """The run as it is now: each task takes ``task_looks`` looks at the run, after the first one in PENDING."""
    looks = run["_looks"]
    spec = run["_spec"].get("pipeline_spec", run["_spec"])
    tasks = [
        {"display_name": name, "state": "SUCCEEDED"} for name in ("root-driver", "root")
    ]  # what Argo adds, as a real server lists it
    overall = "PENDING" if looks < 1 else "RUNNING"
    for index, name in enumerate(in_containers(spec, spec["root"]["dag"]["tasks"])):
        begins = 1 + index * state.task_looks
        ends = begins + state.task_looks
        if run["_terminated"] and looks < ends:
            overall = "CANCELED"
            break
        if looks < begins:
            break
        task: dict[str, Any] = {"display_name": name, "state": "RUNNING" if looks < ends else "SUCCEEDED"}
        tasks += [{"display_name": f"{name}-driver", "state": "SUCCEEDED"}, task]
        if looks >= ends and name == state.fail_task:
            task |= {"state": "FAILED", "error": {"code": 2, "message": f"{name}: exit code 13"}}
            overall = "FAILED"
            break
    else:
        overall = "SUCCEEDED" if looks >= ends else overall
    for position, task in enumerate(tasks):
        stamp = datetime.fromtimestamp(run["_created"] + position, UTC).isoformat()
        task |= {"task_id": f"{run['run_id']}-{position}", "run_id": run["run_id"], "create_time": stamp}
    public = {key: value for key, value in run.items() if not key.startswith("_")}
    return {**public, "state": overall, "run_details": {"task_details": tasks}}


# -- HTTP ------------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    state: ClassVar[State]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        with self.state.lock:
            self.state.requests.append(f"{method} {url.path}")
            try:
                status, value = HTTPStatus.OK, self._route(method, url.path, query, body)
            except ApiError as error:
                status = error.status
                is_upload = "/upload" in url.path  # not behind the gRPC gateway, so another shape
                value = {"error_message" if is_upload else "message": str(error), "code": 3, "details": []}
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _route(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        if self.state.outage is not None:
            raise ApiError(self.state.outage, "upstream connect error")
        if self.state.token is not None and self.headers.get("Authorization") != f"Bearer {self.state.token}":
            raise ApiError(HTTPStatus.UNAUTHORIZED, "Request header error: there is no valid user identity")
        for route_method, pattern, function in _ROUTES:
            match = re.fullmatch(API + pattern, path)
            if match and method == route_method:
                return function(self, *match.groups(), query=query, body=body)
        raise ApiError(HTTPStatus.NOT_FOUND, f"no route {method} {path}")

    def healthz(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return {"multi_user": False}

    def list_pipelines(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return {"pipelines": _filtered(self.state.pipelines.values(), query)}

    def create_pipeline(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        request = json.loads(body)
        name = request.get("name") or request.get("display_name")
        if not name:
            raise ApiError(HTTPStatus.BAD_REQUEST, "pipeline name cannot be empty")
        if any(pipeline["name"] == name for pipeline in self.state.pipelines.values()):
            raise ApiError(HTTPStatus.CONFLICT, f"the name {name} already exists")
        pipeline = {"name": name, "display_name": name, **_identity("pipeline_id")}
        if request.get("description"):
            pipeline["description"] = request["description"]
        self.state.pipelines[pipeline["pipeline_id"]] = pipeline
        return pipeline

    def upload_pipeline(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        spec = parse_pipeline(self._uploaded_file(body))
        pipeline = self.create_pipeline(query={}, body=json.dumps(query).encode())
        self._add_version(pipeline["pipeline_id"], pipeline["name"], spec)
        return pipeline

    def upload_version(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        self.get_pipeline(query.get("pipelineid", ""), query={}, body=b"")
        return self._add_version(query["pipelineid"], query["name"], parse_pipeline(self._uploaded_file(body)))

    def get_pipeline(self, pipeline_id: str, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return _found(self.state.pipelines, pipeline_id, "pipeline")

    def list_versions(self, pipeline_id: str, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        self.get_pipeline(pipeline_id, query={}, body=b"")
        versions = [version for version in self.state.versions.values() if version["pipeline_id"] == pipeline_id]
        # Pages of two, so that a client that reads only the first one is found out.
        start = int(query.get("page_token") or 0)
        page = {"pipeline_versions": _filtered(versions[start : start + 2], query)}
        return page if start + 2 >= len(versions) else {**page, "next_page_token": str(start + 2)}

    def get_version(self, pipeline_id: str, version_id: str, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return _found(self.state.versions, version_id, "pipeline version")

    def list_experiments(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return {"experiments": _filtered(self.state.experiments.values(), query)}

    def create_experiment(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        name = json.loads(body)["display_name"]
        if any(experiment["display_name"] == name for experiment in self.state.experiments.values()):
            raise ApiError(HTTPStatus.CONFLICT, f"experiment {name} already exists")
        experiment = {"display_name": name, **_identity("experiment_id")}
        self.state.experiments[experiment["experiment_id"]] = experiment
        return experiment

    def get_experiment(self, experiment_id: str, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return _found(self.state.experiments, experiment_id, "experiment")

    def create_run(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        request = json.loads(body)
        _found(self.state.experiments, request.get("experiment_id", ""), "experiment")
        reference = request.get("pipeline_version_reference")
        if reference:
            version = _found(self.state.versions, reference["pipeline_version_id"], "pipeline version")
            if version["pipeline_id"] != reference["pipeline_id"]:
                raise ApiError(HTTPStatus.BAD_REQUEST, "the version belongs to another pipeline")
            spec = version["pipeline_spec"]
        else:
            spec = parse_pipeline(yaml.safe_dump_all(_documents(request.get("pipeline_spec") or {})).encode())
        check_parameters(spec, (request.get("runtime_config") or {}).get("parameters") or {})
        run = {**request, **_identity("run_id")}
        run |= {"_spec": spec, "_created": time.time(), "_looks": 0, "_terminated": False}
        self.state.runs[run["run_id"]] = run
        return run_view(run, self.state)

    def list_runs(self, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        return {"runs": [run_view(run, self.state) for run in self.state.runs.values()]}

    def get_run(self, run_id: str, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        run = _found(self.state.runs, run_id, "run")
        run["_looks"] += 1
        return run_view(run, self.state)

    def terminate_run(self, run_id: str, *, query: dict[str, str], body: bytes) -> dict[str, Any]:
        _found(self.state.runs, run_id, "run")["_terminated"] = True
        return {}

    def _uploaded_file(self, body: bytes) -> bytes:
        header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.default).parsebytes(header + body)
        for part in message.iter_parts() if message.is_multipart() else ():
            if part.get_param("name", header="content-disposition") == "uploadfile":
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                return content
        raise ApiError(HTTPStatus.BAD_REQUEST, "Failed to read pipeline from file")

    def _add_version(self, pipeline_id: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        for version in self.state.versions.values():
            if (version["pipeline_id"], version["name"]) == (pipeline_id, name):
                raise ApiError(HTTPStatus.CONFLICT, "Failed to create a pipeline version")
        version = {
            "name": name,
            "display_name": name,
            "pipeline_id": pipeline_id,
            "pipeline_spec": spec,
            **_identity("pipeline_version_id"),
        }
        self.state.versions[version["pipeline_version_id"]] = version
        return version


def _identity(key: str) -> dict[str, Any]:
    return {key: str(uuid.uuid4()), "created_at": datetime.now(UTC).isoformat()}


def _found(items: dict[str, dict[str, Any]], key: str, kind: str) -> dict[str, Any]:
    if key not in items:
        raise ApiError(HTTPStatus.NOT_FOUND, f"{kind} {key} not found")
    return items[key]


def _filtered(items: Any, query: dict[str, str]) -> list[dict[str, Any]]:
    predicates = json.loads(query["filter"])["predicates"] if query.get("filter") else []
    return [
        item for item in items if all(item[predicate["key"]] == predicate["stringValue"] for predicate in predicates)
    ]


def _documents(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["pipeline_spec"], spec["platform_spec"]] if "platform_spec" in spec else [spec]


_ID = "/([^/:]+)"
_ROUTES: list[tuple[str, str, Callable[..., dict[str, Any]]]] = [
    ("GET", "/healthz", _Handler.healthz),
    ("GET", "/pipelines", _Handler.list_pipelines),
    ("POST", "/pipelines", _Handler.create_pipeline),
    ("POST", "/pipelines/upload", _Handler.upload_pipeline),
    ("POST", "/pipelines/upload_version", _Handler.upload_version),
    ("GET", f"/pipelines{_ID}", _Handler.get_pipeline),
    ("GET", f"/pipelines{_ID}/versions", _Handler.list_versions),
    ("GET", f"/pipelines{_ID}/versions{_ID}", _Handler.get_version),
    ("GET", "/experiments", _Handler.list_experiments),
    ("POST", "/experiments", _Handler.create_experiment),
    ("GET", f"/experiments{_ID}", _Handler.get_experiment),
    ("GET", "/runs", _Handler.list_runs),
    ("POST", "/runs", _Handler.create_run),
    ("GET", f"/runs{_ID}", _Handler.get_run),
    ("POST", f"/runs{_ID}:terminate", _Handler.terminate_run),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--token")
    parser.add_argument("--task-looks", type=int, default=2)
    parser.add_argument("--fail-task")
    options = parser.parse_args()
    server = FakeKfpServer(
        token=options.token, task_looks=options.task_looks, fail_task=options.fail_task, port=options.port
    )
    with server:
        print(f"KFP API on {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
