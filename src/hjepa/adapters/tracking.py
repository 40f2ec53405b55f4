"""MLflow, kept at arm's length: a run is recorded when the server answers, and goes on when it does not.

``Tracker`` writes what a run is (parameters, tags, tables, end state) with short patience. ``MetricStream`` writes
what it does: every record goes to a local journal first, and one background thread sends the journal on. The journal
is the queue, so a killed process loses nothing: the next stream on the same journal goes on where the server stopped
listening, and ``replay`` sends a whole journal again. Sending twice is harmless, since the server keeps one row per
(metric, step, time, value).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hjepa.config import TrackingConfig, flatten_tree
from hjepa.errors import HjepaError, UserError

if TYPE_CHECKING:  # importing mlflow takes three seconds, which every `hjepa --help` would pay
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)

RUN_TAG = "hjepa.run"

# MLflow reads it when it is imported, which every function here leaves to its first call. What the user has set wins.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_METRICS_PER_REQUEST = 1000  # the server's limits
_PARAMS_PER_REQUEST = 100
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_DIGEST_CHARACTERS = 36
_NAME_CHARACTERS = 250
_RETRY_AFTER_SECONDS = 30.0

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingError(HjepaError):
    """The MLflow server could not be reached, or refused what it was asked."""


class ArtifactStoreError(TrackingError):
    """The server answers, but the place where it keeps files cannot be used from here."""


# -- talking to the server ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def http_patience(*, timeout_seconds: int, retries: int) -> Iterator[None]:
    """How long MLflow's client waits and how often it asks again, inside the block; what the user has set wins.

    The client reads these from the environment at each request. ``MetricStream`` does not, so it may run meanwhile.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints a link that lacks the query of run_url
    }
    ours = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def server_errors(uri: str, action: str) -> Iterator[None]:
    """Turns what MLflow's client raises into one TrackingError that says what could not be done, and why."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise TrackingError(
            f"MLflow at {uri} could not {action}: {_first_line(error)}. "
            "Check that the server runs and that MLFLOW_TRACKING_URI (or tracking.uri) names it; `hjepa doctor` tells."
        ) from error
    except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
        # A server that does not pass files on sends its clients to the store itself: S3, or a folder.
        raise ArtifactStoreError(
            f"MLflow at {uri} could not {action}: {_first_line(error)}. If it was started with --no-serve-artifacts or "
            "the experiment has a location of its own, files go there directly, and this machine needs access to it."
        ) from error


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if "Connection refused" in text:
        return "connection refused"
    return text if len(text) <= 300 else f"{text[:300]}..."


def _client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def tracking_uri(configured: str | None = None) -> str:
    """The MLflow server to use: the configured one, else ``MLFLOW_TRACKING_URI``.

    Raises:
        UserError: if neither is set, or it is not the address of a server.
    """
    uri = (configured or os.environ.get("MLFLOW_TRACKING_URI", "")).strip().rstrip("/")
    if not uri:
        raise UserError(
            "no MLflow server is named: set tracking.uri or MLFLOW_TRACKING_URI to its address, such as "
            "http://127.0.0.1:5000 (`hjepa stack up` starts one and prints its address)"
        )
    if not uri.startswith(("http://", "https://")):
        raise UserError(f"the MLflow server must be an http:// or https:// address, got {uri!r}")
    return uri


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    # Without the query MLflow 3 opens its page for language-model traces, which is empty here.
    return f"{uri}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


# -- one run -----------------------------------------------------------------------------------------------------------


class Tracker:
    """One MLflow run. Creating it fails loudly; recording in it never does: what the server does not take within
    seconds is warned about and given up, and a server that did not answer is left alone for half a minute.
    """

    def __init__(self, uri: str, run_id: str):
        self.uri = uri
        self.run_id = run_id
        self.client = _client(uri)
        self._experiment_id: str | None = None
        self._silent_until = 0.0  # time.monotonic()

    @classmethod
    def create_or_resume(
        cls,
        tracking: TrackingConfig,
        *,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        injected: bool = True,
        anew: bool = False,
    ) -> Tracker:
        """The run that ``MLFLOW_RUN_ID`` names, else the one tagged with ``run_name``, else a new one.

        Parameters are written once; nested mappings become dotted names, numbers stay numbers.

        Args:
            injected: Whether ``MLFLOW_RUN_ID`` counts. It names one run; the branches of a sweep have one each.
            anew: Whether a tagged run is left behind, under another name: its parameters are no longer true.

        Raises:
            UserError: if no server is named, or the experiment was deleted.
            TrackingError: if the server does not answer.
        """
        uri = tracking_uri(tracking.uri)
        client = _client(uri)
        with http_patience(timeout_seconds=10, retries=3), server_errors(uri, f"open the run {run_name!r}"):
            given = os.environ.get("MLFLOW_RUN_ID", "").strip() if injected else ""
            if given:
                run = client.get_run(given)
            else:
                experiment_id = _experiment(client, experiment)
                run = _find_run(client, experiment_id, run_name)
                if run is not None and anew:
                    _leave_behind(client, run, run_name)
                    run = None
                if run is None:
                    client.create_run(experiment_id, run_name=run_name, tags={RUN_TAG: run_name})
                    # A request that was retried may have made two; every process takes the first of them.
                    run = _find_run(client, experiment_id, run_name)
            if run is None:
                raise TrackingError(f"MLflow at {uri} does not list the run {run_name!r} that it has just created")
            run_id = run.info.run_id
            if run.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            _write_tags(client, run_id, {**tags, RUN_TAG: run_name})
            _write_params(client, run, flatten_tree(params))
        tracker = cls(uri, run_id)
        tracker._experiment_id = run.info.experiment_id
        return tracker

    @classmethod
    def attach(cls, uri: str, run_id: str) -> Tracker:
        """The run of that id. Asks the server nothing."""
        return cls(tracking_uri(uri), run_id)

    @property
    def experiment_id(self) -> str:
        """Raises TrackingError if the server must be asked and does not answer."""
        if self._experiment_id is None:
            with http_patience(timeout_seconds=10, retries=1), server_errors(self.uri, f"find the run {self.run_id}"):
                self._experiment_id = str(self.client.get_run(self.run_id).info.experiment_id)
        return self._experiment_id

    @property
    def url(self) -> str:
        """The page of this run."""
        return run_url(self.uri, self.experiment_id, self.run_id)

    def compare_url(self, run_ids: Sequence[str]) -> str:
        """The page that shows these runs of this experiment side by side."""
        runs = urllib.parse.quote(json.dumps(list(run_ids), separators=(",", ":")))
        experiments = urllib.parse.quote(json.dumps([self.experiment_id]))
        return f"{self.uri}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"

    def set_tags(self, tags: Mapping[str, str]) -> bool:
        """True if the server has taken them; so for every method below."""
        return self._attempt("write the tags", lambda: _write_tags(self.client, self.run_id, tags))

    def log_metrics_now(self, metrics: Mapping[str, float], step: int) -> bool:
        return self._attempt("write the metrics", lambda: log_metrics(self.client, self.run_id, metrics, step))

    def log_artifact(self, path: Path) -> bool:
        """A file at the run's root, which is where MLflow's compare page looks."""
        return self._attempt(
            f"store {path.name}", lambda: self.client.log_artifact(self.run_id, str(path)), timeout_seconds=60
        )

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> bool:
        """A table ``name`` (such as evaluation.json) at the root; runs are joined by the first column.

        Writing it again replaces it.
        """
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        entry = {"path": f"{name.removesuffix('.json')}.json", "type": "table"}

        def write() -> None:
            self.client.log_dict(self.run_id, {"columns": list(columns), "data": rows}, entry["path"])
            known = json.loads(self.client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
            if entry not in known:
                self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps([*known, entry]))

        return self._attempt(f"store the table {entry['path']}", write)

    def log_dataset(self, name: str, digest: str, uri: str, context: str) -> bool:
        """Fills the Dataset column; ``context`` is such as "training". Digests are cut to 36 characters."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:_DIGEST_CHARACTERS],
            source_type="s3" if uri.startswith("s3://") else "local",
            source=json.dumps({"uri": uri}),
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        return self._attempt("record the dataset", lambda: self.client.log_inputs(self.run_id, inputs))

    def finish(self, status: RunStatus = "FINISHED") -> bool:
        return self._attempt(f"mark the run {status}", lambda: self.client.set_terminated(self.run_id, status=status))

    def finish_if_running(self, status: RunStatus = "FINISHED") -> bool:
        """Mark the run as ended, unless it has ended already."""

        def write() -> None:
            if self.client.get_run(self.run_id).info.status == "RUNNING":
                self.client.set_terminated(self.run_id, status=status)

        return self._attempt(f"mark the run {status}", write)

    def _attempt(self, action: str, write: Callable[[], object], *, timeout_seconds: int = 10) -> bool:
        if time.monotonic() < self._silent_until:
            log.warning("MLflow at %s did not answer a moment ago; did not try to %s", self.uri, action)
            return False
        try:
            with http_patience(timeout_seconds=timeout_seconds, retries=1), server_errors(self.uri, action):
                write()
        except ArtifactStoreError as error:  # the server itself can still be told the rest
            log.warning("%s", error)
            return False
        except TrackingError as error:
            log.warning("%s", error)
            self._silent_until = time.monotonic() + _RETRY_AFTER_SECONDS
            return False
        return True


def log_metrics(
    client: MlflowClient, run_id: str, metrics: Mapping[str, float], step: int, *, model_id: str | None = None
) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    rows: list[Metric] = [
        Metric(_metric_name(name), float(value), now, step, model_id=model_id) for name, value in metrics.items()
    ]
    for start in range(0, len(rows), _METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=rows[start : start + _METRICS_PER_REQUEST], synchronous=True)


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run made it meanwhile
    if found is None or found.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} was deleted: restore it there, or set logging.experiment_name to another"
        )
    return str(found.experiment_id)


def _find_run(client: MlflowClient, experiment_id: str, run_name: str) -> Run | None:
    quote = '"' if "'" in run_name else "'"  # MLflow's filter language has no escapes
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{RUN_TAG}` = {quote}{run_name}{quote}",
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        max_results=1,
    )
    return runs[0] if runs else None


def _leave_behind(client: MlflowClient, run: Run, run_name: str) -> None:
    name = f"{run_name} (before its settings changed)"
    client.update_run(run.info.run_id, status="KILLED", name=name)
    _write_tags(client, run.info.run_id, {RUN_TAG: name})


def _write_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    rows = [RunTag(key, str(value)[:_TAG_CHARACTERS]) for key, value in tags.items()]
    for start in range(0, len(rows), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, tags=rows[start : start + _PARAMS_PER_REQUEST], synchronous=True)


def _write_params(client: MlflowClient, run: Run, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    known = run.data.params
    rows = []
    for key, value in params.items():
        text = _param_text(value)
        if key not in known:
            rows.append(Param(key, text))
        elif known[key] != text:
            log.warning("MLflow keeps the parameter %s=%s of this run; it is %s now", key, known[key], text)
    for start in range(0, len(rows), _PARAMS_PER_REQUEST):
        client.log_batch(run.info.run_id, params=rows[start : start + _PARAMS_PER_REQUEST], synchronous=True)


def _param_text(value: Any) -> str:
    """Numbers as the shortest text that reads back the same; null, true and lists as JSON; cut to what MLflow takes."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _PARAM_CHARACTERS else f"{text[: _PARAM_CHARACTERS - 3]}..."


def _metric_name(name: str) -> str:
    """``name`` as MLflow accepts it: one refused name would block all that waits behind it."""
    parts = (re.sub(r"[^A-Za-z0-9_\-. ]", "_", part) for part in name.split("/"))
    return "/".join(part for part in parts if part.strip("."))[:_NAME_CHARACTERS] or "_"


# -- many metrics ------------------------------------------------------------------------------------------------------


class MetricStream:
    """Metrics of a training run, on their way to MLflow by way of a journal.

    ``log`` appends a line and returns; it waits for no server. One daemon thread reads the journal from where the
    server last took it and sends it in batches, with its own short time limits and back-off.
    """

    _interval_seconds = 2.0
    _request_seconds = 10.0

    def __init__(self, uri: str, run_id: str, journal: Path):
        self._sender = _Sender(tracking_uri(uri), run_id)
        self._journal = _Journal(journal, run_id)
        self._closing = threading.Event()
        self._deadline = math.inf  # time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records ``metrics`` at ``step`` (images seen). Raises TypeError for a value that is no number."""
        self._journal.append(metrics, step)

    def close(self, timeout_seconds: float = 20) -> int:
        """Sends what is left, for at most that long; returns the number of records the server does not have.

        They stay in the journal: the next stream on it, or ``replay``, sends them.
        """
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join(timeout_seconds)
        undelivered = self._journal.undelivered()
        self._journal.close()
        return undelivered

    def _run(self) -> None:
        failures = 0
        pause = self._interval_seconds
        while True:
            closing = self._closing.wait(pause)
            try:
                for batch in self._journal.batches():
                    limit = min(self._request_seconds, self._deadline - time.monotonic())
                    if limit <= 0:
                        return
                    self._sender.send(batch.metrics, timeout_seconds=limit)
                    self._journal.acknowledge(batch.end)
                if failures:
                    log.warning("MLflow at %s answers again; every metric has arrived", self._sender.uri)
                failures = 0
            except TrackingError as error:
                failures += 1
                if failures == 1:
                    log.warning("%s. Training goes on; metrics wait in %s", error, self._journal.path)
            if closing and (not failures or time.monotonic() >= self._deadline):
                return
            if closing:
                pause = 0.0
                time.sleep(min(1.0, max(0.0, self._deadline - time.monotonic())))
            else:
                pause = min(_RETRY_AFTER_SECONDS, self._interval_seconds * 2**failures)


def replay(journal: Path, uri: str, run_id: str) -> int:
    """Sends a whole journal to a run; returns its number of records. Doing so twice changes nothing.

    Raises:
        UserError: if there is no such journal.
        TrackingError: if the server does not take it all.
    """
    if not journal.is_file():
        raise UserError(f"there is no metric journal {journal}: give the path of a metrics .jsonl file that a run left")
    sender = _Sender(tracking_uri(uri), run_id)
    reader = _Journal(journal, run_id)
    records = 0
    for batch in reader.batches(start=0):
        sender.send(batch.metrics, timeout_seconds=60)
        reader.acknowledge(batch.end)
        records += batch.records
    return records


class _Sender:
    """Posts metrics to one run with explicit limits, so that no other client's patience applies to them."""

    def __init__(self, uri: str, run_id: str):
        self.uri = uri
        self.run_id = run_id

    def send(self, metrics: Sequence[Mapping[str, Any]], *, timeout_seconds: float) -> None:
        """Raises TrackingError if the server did not take them all."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        credentials = get_default_host_creds(self.uri)
        for start in range(0, len(metrics), _METRICS_PER_REQUEST):
            body = {"run_id": self.run_id, "metrics": metrics[start : start + _METRICS_PER_REQUEST]}
            with server_errors(self.uri, "take metrics"):
                response = http_request(
                    credentials,
                    "/api/2.0/mlflow/runs/log-batch",
                    "POST",
                    max_retries=0,
                    timeout=timeout_seconds,
                    raise_on_status=False,
                    json=body,
                )
            if response.status_code != 200:
                answer = " ".join(response.text.split())[:300]
                raise TrackingError(f"MLflow at {self.uri} refused metrics: HTTP {response.status_code} {answer}")


@dataclass(frozen=True)
class _Batch:
    metrics: list[dict[str, Any]]  # as MLflow's REST API takes them
    records: int
    end: int  # byte offset behind the last record


class _Journal:
    """Lines of {"t": milliseconds, "s": step, "m": {name: value}}, and beside them how far the server has read.

    Appending is one ``write`` to a file opened for appending: whole lines whatever kills the process.
    """

    def __init__(self, path: Path, run_id: str):
        self.path = path
        self._run_id = run_id
        self._mark = path.with_name(f"{path.name}.sent")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        self._broken = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"  # the last line was cut short
        self._lost = 0
        self._sent = self._read_mark(size)

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        values = {_metric_name(name): _json_number(float(value)) for name, value in metrics.items()}
        record = {"t": int(time.time() * 1000), "s": int(step), "m": values}
        line = (b"\n" if self._broken else b"") + json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, line)
        except OSError as error:
            written = 0
            reason = str(error)
        else:
            reason = "the disk is full"
        self._broken = self._broken if written == 0 else written < len(line)
        if written < len(line):
            self._lost += 1
            if self._lost == 1:
                log.error("metrics are lost: cannot write %s: %s. Free some space there", self.path, reason)

    def batches(self, start: int | None = None) -> Iterator[_Batch]:
        """What is not acknowledged yet (or all from byte ``start``), about 1000 metrics at a time."""
        with self.path.open("rb") as file:
            offset = self._sent if start is None else start
            file.seek(offset)
            metrics: list[dict[str, Any]] = []
            records = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                rows = _metrics_of(line)
                records += rows is not None
                metrics += rows or []
                if len(metrics) >= _METRICS_PER_REQUEST:
                    yield _Batch(metrics, records, offset)
                    metrics, records = [], 0
            if metrics:
                yield _Batch(metrics, records, offset)

    def acknowledge(self, end: int) -> None:
        self._sent = end
        temporary = self._mark.with_name(f"{self._mark.name}.tmp")
        try:
            temporary.write_text(json.dumps({"run_id": self._run_id, "bytes": end}))
            temporary.replace(self._mark)
        except OSError as error:  # only costs sending some records a second time
            log.debug("cannot write %s: %s", self._mark, error)

    def undelivered(self) -> int:
        """Records that the server has not taken, those that could not even be journaled included."""
        return sum(batch.records for batch in self.batches()) + self._lost

    def close(self) -> None:
        os.close(self._file)
        self._file = -1  # a late append fails instead of writing to whatever file has this number by then

    def _read_mark(self, size: int) -> int:
        try:
            mark = json.loads(self._mark.read_text())
            run_id, sent = str(mark["run_id"]), int(mark["bytes"])
        except (OSError, ValueError, TypeError, KeyError):
            return 0
        # Another run has seen none of this; a shorter file is another journal.
        return sent if run_id == self._run_id and sent <= size else 0


def _json_number(value: float) -> float | str:
    """JSON has no NaN; both ``float`` and MLflow's REST API read these texts."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _metrics_of(line: bytes) -> list[dict[str, Any]] | None:
    """The metrics of one journal line; None for a line that a crash cut short."""
    try:
        record = json.loads(line)
        return [
            {"key": name, "value": value, "timestamp": record["t"], "step": record["s"]}
            for name, value in record["m"].items()
        ]
    except (ValueError, TypeError, KeyError):
        return None
