"""The steps of the pipeline, each a function from JSON manifests to a JSON manifest.

A KFP component, a CLI subcommand and a test call the same function. Bulk bytes live in S3; what passes between steps is
small and local. A step that has already been done for a run finds its result in S3 and returns it at once, so a retry,
a resumed run and a re-created pod redo nothing that is finished.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import yaml

from hjepa import __version__, sweep
from hjepa.adapters import datasets, preflight
from hjepa.adapters.lifeline import die_with_parent
from hjepa.adapters.s3 import ObjectNotFoundError, S3Store
from hjepa.adapters.tracking import MetricStream, Tracker, tracking_uri
from hjepa.config import (
    Config,
    differences,
    dump_yaml,
    flatten,
    lineage,
    load_config,
    parse_yaml,
    prepares,
    read_source,
    sha256_json,
    validate,
)
from hjepa.errors import FutileRetryError, HjepaError, PreemptedError, UserError
from hjepa.files import file_sha256
from hjepa.utils.logging import append_json_line, say, warn
from hjepa.words import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hjepa.adapters.cluster.spec import TrainSpec
    from hjepa.data.cache import BlockCache
    from hjepa.data.loader import ShardDataset
    from hjepa.data.parts import Part
    from hjepa.data.shards import StoredFile
    from hjepa.data.sources import Source
    from hjepa.distributed import World
    from hjepa.utils.checkpoint import SavedCheckpoint

P = ParamSpec("P")
T = TypeVar("T")
Json = dict[str, Any]

SCHEMA = 1
MANIFESTS = {  # kind -> the command that writes it
    "resolved": "resolve-config",
    "dataset": "prepare-data",
    "checkpoint": "train",
    "model": "export",
    "evaluation": "evaluate",
    "registration": "register",
    "sweep": "run --sweep",
}
MLFLOW_FORWARDED = ("MLFLOW_EXPERIMENT_ID", "MLFLOW_WORKSPACE", "MLFLOW_TRACKING_AUTH")
JOB = "job.json"  # the training job that was launched for the run
ERROR = "error.json"  # why the run's last try failed
DECISIVE = ("knn_top1", "linear_top1", "rankme")
REPORT = "report.html"
CARD = "MODEL_CARD.md"  # with the figures; the README.md of an export was written before they were known
JOURNAL = "metrics.jsonl"
UPLOADS = 4  # at the same time, each of them in several pieces
IMAGE_TIMEOUT_SECONDS = 20.0  # without a byte; a block is small, and training waits for it


def step(function: Callable[P, T]) -> Callable[P, T]:
    """Time a step and, inside a pipeline task, turn an error into its message, its exit code and ``error.json``."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        in_task = os.environ.get("_KFP_RUNTIME") == "true"
        if in_task:
            die_with_parent()
            # KFP sets the root logger to INFO, which turns libraries' chatter into the step's log.
            for library in ("botocore", "boto3", "urllib3", "alembic"):
                logging.getLogger(library).setLevel(logging.WARNING)
        started = time.monotonic()
        try:
            return function(*args, **kwargs)
        except (HjepaError, OSError) as problem:
            error = as_hjepa_error(problem)
            if os.environ.get("RANK", "0") == "0":  # one report for all of torchrun's ranks
                report_error(function.__name__, error)
                _close_run(kwargs.get("resolved_path"), function.__name__, error)
            if not in_task:
                raise error from (None if error is not problem else problem.__cause__)
            say(f"{function.__name__} {'was stopped' if isinstance(error, PreemptedError) else 'failed'}: {error}")
            raise SystemExit(error.exit_code) from None
        finally:
            if timings := os.environ.get("HJEPA_TIMINGS_FILE"):
                seconds = round(time.monotonic() - started, 3)
                append_json_line(Path(timings), {"step": function.__name__, "seconds": seconds})
            if in_task and "triton" not in sys.modules:
                # Python's last garbage collection walks all of torch and mlflow: most of a second per step. Triton's
                # bindings take what it leaves for leaks, and say so at length.
                gc.freeze()

    return wrapper


def as_hjepa_error(problem: HjepaError | OSError) -> HjepaError:
    """What the operating system refuses, in words: a full disk, a folder that cannot be written."""
    if isinstance(problem, HjepaError):
        return problem
    name = problem.filename or "the file system"
    if problem.errno in {errno.ENOSPC, errno.EDQUOT}:
        return UserError(f"{name}: the disk is full; free some space there and start the same command again")
    if problem.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}:
        return UserError(f"{name}: {problem.strerror}; choose a folder that this user may write")
    return HjepaError(f"{name}: {problem}")


def _close_run(resolved_path: object, name: str, error: HjepaError) -> None:
    """Mark the MLflow run as ended, so that it does not seem to run for ever; resuming opens it again.

    The reason goes to S3 too, where ``report`` finds it: KFP itself only knows that a task failed.
    """
    if not isinstance(resolved_path, str) or not Path(resolved_path).exists():
        return
    run = Run.read(resolved_path)
    status: Literal["KILLED", "FAILED"] = "KILLED" if isinstance(error, PreemptedError) else "FAILED"
    run.tracker.finish(status)
    record = {"step": name, "message": str(error), "exit_code": error.exit_code, "job": run.job}
    try:
        run.store.put_json(run.key(ERROR), record)
    except HjepaError as problem:  # the step's own error is the one to raise
        warn(f"the reason is not stored in S3: {problem}")


def report_error(name: str, error: HjepaError) -> None:
    """Leave the reason where a parent process finds it."""
    if path := os.environ.get("HJEPA_ERROR_FILE"):
        content = {"step": name, "kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        Path(path).write_text(json.dumps(content), "utf-8")


def code_version() -> str:
    """Package version and, in a checkout, the commit; ``-dirty`` and a hash of the code if files differ from it."""
    if fixed := os.environ.get("HJEPA_CODE_VERSION"):
        return fixed
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    try:
        sha = _git(root, "rev-parse", "--short=12", "HEAD")
        dirty = f"-dirty.{_code_hash()}" if _git(root, "status", "--porcelain", "--", "src") else ""
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+{sha}{dirty}"


def _code_hash() -> str:
    """Of every source file and configuration of the package, so that two edits are two versions."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(item for item in package.rglob("*") if item.suffix in {".py", ".yaml", ".css", ".j2"}):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# -- what a step starts from -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of the pipeline, as ``resolve_config`` fixed it."""

    name: str
    config: Config
    mlflow_run_id: str
    tracking_uri: str
    job: str = ""  # id of the KFP run

    @classmethod
    def read(cls, path: str | Path) -> Run:
        content = read_manifest(path, "resolved")
        run, config = content["run"], validate(content["config"])
        # From another machine the same server may have another address.
        here = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        return cls(run["name"], config, run["mlflow_run_id"], here or run["tracking_uri"], run.get("job", ""))

    @functools.cached_property
    def store(self) -> S3Store:
        return S3Store.from_config(self.config.storage)

    @functools.cached_property
    def images(self) -> S3Store:
        """The same store for the loaders, which fork: no thread of another purpose may hold its lock at that moment."""
        return S3Store.from_config(self.config.storage, read_timeout_seconds=IMAGE_TIMEOUT_SECONDS)

    @functools.cached_property
    def tracker(self) -> Tracker:
        return Tracker.attach(self.tracking_uri, self.mlflow_run_id)

    def has_checkpoints(self) -> bool:
        """Whether it has trained, as S3 knows it."""
        return next(iter(self.store.list(self.key("checkpoints/"))), None) is not None

    def key(self, name: str) -> str:
        return f"runs/{self.name}/{name}"

    @property
    def uri(self) -> str:
        """Where everything of this run is stored; ``--run-uri`` takes it."""
        return self.store.uri(f"runs/{self.name}")

    def finished(self, name: str, inputs: Json) -> Json | None:
        """The recorded result of a step of this run, if it was made from the same inputs."""
        result = self.recorded(name, inputs)
        if result is not None:
            say(f"{name}: already done for run {self.name}, nothing to do")
        return result

    def recorded(self, name: str, inputs: Json) -> Json | None:
        try:
            record = self.store.get_json(self.key(f"steps/{name}.json"))
        except ObjectNotFoundError:
            return None
        result: Json = record["result"]
        return result if record["inputs"] == sha256_json(inputs) else None

    def hand_over(self, kind: str, path: str | Path, manifest: Mapping[str, Any]) -> None:
        """Write a manifest for the next step, here and in S3, where a step on another machine finds it."""
        write_manifest(path, manifest)
        self.store.put_json(self.key(f"manifests/{kind}.json"), manifest)

    def record(self, name: str, inputs: Json, result: Json) -> None:
        self.store.put_json(self.key(f"steps/{name}.json"), {"inputs": sha256_json(inputs), "result": result})


def read_manifest(path: str | Path, kind: str) -> Json:
    """A manifest that an earlier step wrote.

    Raises:
        UserError: it is missing or was written by a newer version.
    """
    try:
        content: Json = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the {kind} manifest {path}: {error}. Run the step that makes it first: "
            f"hjepa {MANIFESTS[kind]}"
        ) from None
    if content.get("schema") != SCHEMA:
        raise UserError(f"the {kind} manifest {path} has schema {content.get('schema')}, this version reads {SCHEMA}")
    return content


def write_manifest(path: str | Path, content: Mapping[str, Any]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Every rank of a node may fetch the same manifest, so a reader must never meet half of one.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1), "utf-8")
    partial.replace(path)


def fetch_manifests(store: S3Store, run: str, files: Mapping[str, str]) -> list[str]:
    """Bring manifests of a run from S3 to this machine.

    Args:
        files: Kind -> where to write it.

    Returns:
        The kinds that S3 has.
    """
    found = []
    for kind, path in files.items():
        with contextlib.suppress(ObjectNotFoundError):
            write_manifest(path, store.get_json(f"runs/{run}/manifests/{kind}.json"))
            found.append(kind)
    return found


def check_run_name(name: str, given: str = "run ") -> str:
    """``name``, which becomes part of S3 keys, folders and labels.

    Args:
        given: What the user wrote before it, for the message.

    Raises:
        UserError: it is no such name.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
        raise UserError(
            f"{given}{name}: expected lower-case letters, digits, '.', '_' and '-', at most 63 of them, the first a "
            "letter or digit"
        )
    return name


def split_run_uri(uri: str) -> tuple[S3Store, str]:
    """The store and the name of the run that ``s3://bucket/prefix/runs/NAME`` names.

    Raises:
        UserError: it is no such URI.
    """
    base, runs, name = uri.rstrip("/").rpartition("/runs/")
    if not runs or not name or "/" in name:
        raise UserError(f"run URI {uri!r}: expected s3://BUCKET/PREFIX/runs/NAME, as `hjepa job render` prints it")
    return S3Store(base, region=os.environ.get("AWS_REGION", "us-east-1")), name


def profile_settings(source: str) -> list[str]:
    """The overrides that a cluster profile stands for: YAML text, or a file, with nothing but a ``cluster`` section.

    Raises:
        UserError: it cannot be read, or has other sections.
    """
    name, text = read_source(source, "profile")
    try:
        tree = parse_yaml(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"profile {name} is not valid YAML: {error}") from None
    cluster = tree.get("cluster") or {} if isinstance(tree, dict) else None
    if not isinstance(cluster, dict) or set(tree) - {"cluster"}:
        raise UserError(f"profile {name}: expected one section, cluster; other settings belong in --config or --set")
    validate({"cluster": cluster}, source=f"profile {name}")  # its mistakes are told as its own
    # A date is a text, as it is in every other configuration.
    return [f"cluster.{key}={json.dumps(value, default=str)}" for key, value in cluster.items()]


# -- resolve_config --------------------------------------------------------------------------------------------------


@step
def resolve_config(
    *,
    config: str,
    overrides: Sequence[str],
    settings: Mapping[str, str],
    run: str,
    resolved_path: str,
    profile: str = "",
    job: str = "",
    pipeline_ui: str = "",
) -> Json:
    """Validate the configuration, check that the run can succeed, and create its MLflow run.

    Args:
        config: A packaged configuration's name, a file, or YAML text.
        overrides: ``section.key=value`` strings.
        settings: Dotted key -> text, laid over the overrides; an empty text keeps what the configuration says.
        run: Name of the run; the same name goes on with the same run.
        resolved_path: Where the resolved run is written.
        profile: The cluster's, as YAML; ``overrides`` outrank it.
        job: Id of the KFP run.
        pipeline_ui: Address of the KFP UI, for the link from MLflow.

    Returns:
        The resolved run's identity: name, MLflow run id and URL, S3 URI.

    Raises:
        UserError: for every mistake in the configuration, or every failed preflight check, at once; or for the name.
    """
    check_run_name(run)
    tree = _load(config, overrides, settings, profile)
    preflight.require(preflight.check(tree, source=_trains_here(), trains_here=_trains_here()))
    known = _opened(tree, run)
    if known is not None and _stored(known, "manifests/sweep.json"):
        raise UserError(f"run {run} is a sweep; give this run another name (--run NAME, in a pipeline run=NAME)")
    if obstacle := _trained_otherwise(run, tree):
        raise UserError(obstacle)
    return _open_run(tree, run, resolved_path, job=job, pipeline_ui=pipeline_ui)


def _trains_here() -> bool:
    """In an image of its own the first step has neither the GPUs nor the volumes of the steps that need them."""
    return "KUBERNETES_SERVICE_HOST" not in os.environ and find_spec("torch") is not None


def _trained_otherwise(run: str, tree: Config) -> str:
    """Why a run of this name cannot go on with this configuration; empty if it can. ``train`` would find out too, but
    only after the images are prepared.
    """
    known = _opened(tree, run)
    if known is None or not (different := _changed(known.config, tree)) or not known.has_checkpoints():
        return ""
    return "\n    ".join(
        [
            f"run {run} was trained with other settings, and going on would mix two experiments. Use the settings it "
            "was trained with, or another name of the run (--run NAME, in a pipeline run=NAME)",
            *different,
        ]
    )


def _changed(theirs: Config, ours: Config) -> list[str]:
    """What of a training has changed, in words; nothing if it is one on other images, which begins anew."""
    images = [{key: value for key, value in flatten(each).items() if prepares(key)} for each in (theirs, ours)]
    return differences(lineage(theirs), lineage(ours)) if images[0] == images[1] else []


def _open_run(
    tree: Config, run: str, resolved_path: str, *, job: str, pipeline_ui: str, parent: Run | None = None
) -> Json:
    """Create the run's row in MLflow, or find it, and fix the run as it is; see ``resolve_config``.

    Args:
        parent: The sweep whose branch it is.
    """
    uri = parent.tracking_uri if parent else tracking_uri(tree.tracking.uri)
    tags = {"hjepa.config_digest": tree.digest, "hjepa.code_version": code_version()}
    if digest := os.environ.get("IMAGE_DIGEST"):
        tags["hjepa.image_digest"] = digest
    if parent:
        tags |= {"hjepa.sweep": parent.name, "mlflow.parentRunId": parent.mlflow_run_id}
    if job and (pipeline_ui or not _trains_here()):
        tags["hjepa.kfp_run_id"] = job
    if job and pipeline_ui:
        tags["hjepa.kfp_run_url"] = link = f"{pipeline_ui.rstrip('/')}/#/runs/details/{job}"
        tags["mlflow.note.content"] = f"Pipeline run: [{run}]({link})"
    known = _opened(tree, run)
    tracker = Tracker.create_or_resume(
        tree.tracking.model_copy(update={"uri": uri}),
        experiment=tree.logging.experiment_name,
        run_name=run,
        tags=tags,
        params={key: value for key, value in flatten(tree).items() if not key.startswith("cluster.")},
        injected=parent is None,
        # What has not trained yet can still become another run; MLflow itself changes no parameter.
        anew=known is not None and bool(_changed(known.config, tree)) and not known.has_checkpoints(),
    )
    say(f"MLflow run: {tracker.url}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(tree), "utf-8")
        tracker.log_artifact(path)
    identity = {"name": run, "mlflow_run_id": tracker.run_id, "mlflow_url": tracker.url, "tracking_uri": uri}
    write_manifest(
        resolved_path,
        {
            "schema": SCHEMA,
            "run": {**identity, "job": job},
            "config": tree.model_dump(mode="json"),
            "config_digest": tree.digest,
        },
    )
    resolved = Run.read(resolved_path)
    if resolved.store.head(resolved.key(ERROR)) is not None:  # of an earlier try
        tracker.set_tags({"hjepa.failed_step": "", "hjepa.failure": ""})
        resolved.store.delete(resolved.key(ERROR))
    resolved.hand_over("resolved", resolved_path, read_manifest(resolved_path, "resolved"))
    return {**identity, "uri": resolved.uri}


def _load(config: str, overrides: Sequence[str], settings: Mapping[str, str], profile: str) -> Config:
    plain = {"cluster.nodes", "cluster.gpus_per_node", "tracking.champion_margin"}  # numbers; the rest are texts
    given = [f"{key}={value if key in plain else json.dumps(value)}" for key, value in settings.items() if value]
    return load_config(config, [*(profile_settings(profile) if profile else []), *overrides, *given])


# -- a sweep ---------------------------------------------------------------------------------------------------------


@step
def resolve_sweep(
    *,
    config: str,
    overrides: Sequence[str],
    settings: Mapping[str, str],
    sets: Sequence[Any],
    run: str,
    resolved_path: str,
    sweep_path: str,
    profile: str = "",
    job: str = "",
    pipeline_ui: str = "",
) -> Json:
    """Validate every branch of a sweep, check that they can succeed, and create the MLflow run that holds them.

    Args:
        sets: Override sets, one per branch, laid over ``overrides``; ``hjepa.sweep.plan`` says in which forms.
        sweep_path: Where the sweep is written: its branches with their names, runs and configurations.

    The others are those of ``resolve_config``; ``run`` names the sweep.

    Returns:
        The sweep's identity, with ``branches``, their names.

    Raises:
        UserError: for every mistake in every set at once, or every failed preflight check.
    """
    check_run_name(run)
    tree = _load(config, overrides, settings, profile)
    branches = plan_sweep(run, config, overrides, settings, sets, profile)
    findings = preflight.check(tree, source=_trains_here(), trains_here=_trains_here())
    for branch in branches:
        found = preflight.check(branch.config, source=False, trains_here=False, servers=False)
        findings += [replace(finding, name=f"{branch.name}: {finding.name}") for finding in found]
    preflight.require(findings)
    known = _opened(tree, run)
    if known is not None and not _stored(known, "manifests/sweep.json") and known.has_checkpoints():
        raise UserError(f"run {run} is no sweep, and has trained; give the sweep another name")
    obstacles = [text for branch in branches if (text := _trained_otherwise(branch.run, branch.config))]
    obstacles += [
        f"run {earlier.name} is a branch that has trained, and is not among them"
        for earlier in (_branches(known) if known else [])
        if earlier.name not in {branch.run for branch in branches} and earlier.has_checkpoints()
    ]
    if obstacles:
        remedy = "The same sets, and more beside them, go on where it was; for others give the sweep another name"
        raise UserError("\n  ".join([f"sweep {run} cannot go on with these sets. {remedy}.", *obstacles]))
    identity = _open_run(tree, run, resolved_path, job=job, pipeline_ui=pipeline_ui)
    opened = Run.read(resolved_path)
    content = {"schema": SCHEMA, "name": run, "job": job, "pipeline_ui": pipeline_ui}
    opened.hand_over("sweep", sweep_path, {**content, "branches": [branch.to_json() for branch in branches]})
    for branch in branches:
        say(f"branch {branch.name}: {', '.join(branch.overrides) or 'nothing is changed'}")
    return {**identity, "branches": [branch.name for branch in branches]}


def plan_sweep(
    run: str,
    config: str,
    overrides: Sequence[str],
    settings: Mapping[str, str],
    sets: Sequence[Any],
    profile: str = "",
    where: str = "sets",
) -> list[sweep.Branch]:
    """The branches, as ``resolve_sweep`` makes them; see ``hjepa.sweep.plan`` for ``sets`` and ``where``.

    Raises:
        UserError: for every mistake at once.
    """

    def load(more: Sequence[str]) -> Config:
        return _load(config, [*overrides, *more], settings, profile)

    return sweep.plan(run, load(()), sets, load, check_run_name, where)


@step
def resolve_branch(
    *, resolved_sweep_path: str, sweep_path: str, dataset_path: str, branch: str, gpus: str, resolved_path: str
) -> Json:
    """Create the MLflow run of one branch, below that of its sweep.

    Args:
        branch: Its name.
        gpus: cluster.gpus_per_node; empty keeps what the configuration says.
        resolved_path: Where the resolved run of the branch is written.

    Returns:
        Its identity, as ``resolve_config`` does.
    """
    parent = Run.read(resolved_sweep_path)
    content = read_manifest(sweep_path, "sweep")
    dataset = read_manifest(dataset_path, "dataset")
    planned = next(item for item in content["branches"] if item["name"] == branch)
    tree = planned["config"]
    if gpus:
        tree = {**tree, "cluster": {**tree["cluster"], "gpus_per_node": int(gpus)}}
    identity = _open_run(
        validate(tree),
        planned["run"],
        resolved_path,
        job=content["job"],
        pipeline_ui=content["pipeline_ui"],
        parent=parent,
    )
    run = Run.read(resolved_path)
    _track_dataset(run, dataset)
    # Where a step of the branch that is started by hand finds it.
    run.store.put_json(run.key("manifests/dataset.json"), dataset)
    return identity


@step
def compare_branches(
    *,
    resolved_sweep_path: str,
    sweep_path: str,
    dataset_path: str,
    comparison_path: str,
    resolved_path: str,
    model_path: str,
    evaluation_path: str,
    summary_path: str,
    report_path: str,
) -> Json:
    """Compare the branches of a sweep in one report, and hand the best of them on to the gate.

    Args:
        comparison_path: Where the comparison is written.
        resolved_path, model_path, evaluation_path: Where the best branch's manifests are written.
        summary_path: Where the comparison is written too, as Markdown.
        report_path: Where the report is written, one HTML page; it is always kept in S3 and MLflow.

    Returns:
        The comparison, see ``hjepa.sweep.compare``, with ``report`` and ``compare_url``.
    """
    parent = Run.read(resolved_sweep_path)
    content = read_manifest(sweep_path, "sweep")
    dataset = read_manifest(dataset_path, "dataset")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # From S3, where each branch left them: of a list of artifacts KFP's launcher fetches not every file.
        runs: dict[str, Run] = {}
        found: dict[str, tuple[Json, Json]] = {}
        for branch in content["branches"]:
            files = {kind: str(folder / f"{branch['name']}.{kind}") for kind in ("resolved", "model", "evaluation")}
            missing = set(files) - set(fetch_manifests(parent.store, branch["run"], files))
            if missing:
                raise HjepaError(f"branch {branch['name']} left no {' and no '.join(sorted(missing))} manifest in S3")
            runs[branch["name"]] = Run.read(files["resolved"])
            found[branch["name"]] = (
                read_manifest(files["model"], "model"),
                read_manifest(files["evaluation"], "evaluation"),
            )
        comparison: Json = {"schema": SCHEMA, "sweep": parent.name, **sweep.compare(content["branches"], found)}
        comparison["mlflow_runs"] = {name: run.mlflow_run_id for name, run in runs.items()}
        comparison["compare_url"] = parent.tracker.compare_url(list(comparison["mlflow_runs"].values()))
        comparison["report"] = parent.store.uri(parent.key(REPORT))
        page = folder / REPORT
        page.write_text(_sweep_page(parent, dataset, content, comparison, runs, found, folder), "utf-8")
        parent.store.put_file(parent.key(REPORT), page, sha256=file_sha256(page))
        _track_comparison(parent, comparison, page)
        shutil.copyfile(page, report_path)
    best = comparison["best"]
    for branch_name, run in runs.items():
        if branch_name != best:  # the best one's row is closed by its registration
            run.tracker.finish()
    parent.tracker.finish()
    parent.hand_over("comparison", comparison_path, comparison)
    write_manifest(model_path, found[best][0])
    write_manifest(evaluation_path, {**found[best][1], "best_of": comparison["best_of"]})
    write_manifest(resolved_path, parent.store.get_json(runs[best].key("manifests/resolved.json")))
    text = sweep.in_words(comparison)
    links = {"MLflow, side by side": comparison["compare_url"], "report": comparison["report"]}
    facts = "".join(f"\n[{name}]({address})\n" for name, address in links.items())
    Path(summary_path).write_text(f"{text}\n\n{sweep.table(comparison)}{facts}", "utf-8")
    say(text)
    say(f"report: {comparison['report']}")
    return comparison


def _sweep_page(
    parent: Run,
    dataset: Json,
    content: Json,
    comparison: Json,
    runs: Mapping[str, Run],
    found: Mapping[str, tuple[Json, Json]],
    folder: Path,
) -> str:
    from hjepa.report.sweep import Branch, Sweep, render_sweep

    sets = yaml.safe_dump({item["name"]: item["set"] for item in content["branches"]}, sort_keys=False)
    branches, differences = [], {}
    for planned, row in zip(content["branches"], comparison["branches"], strict=True):
        name = planned["name"]
        model, evaluation = found[name]
        branches.append(
            Branch(
                name=name,
                settings=planned["settings"],
                run=planned["run"],
                evaluation=evaluation,
                checkpoint=model["checkpoint"],
                curves=_journal(runs[name], folder / f"{name}.jsonl"),
                links={**evaluation["links"], "report": evaluation["report"], "model": model["uri"]},
            )
        )
        if "difference" in row:
            ends = {end: row[f"difference_{end}"] for end in ("low", "high") if f"difference_{end}" in row}
            differences[name] = {"difference": row["difference"], **ends}
    return render_sweep(
        Sweep(
            name=parent.name,
            made_at=_now(),
            dataset=dataset,
            branches=branches,
            best=comparison["best"],
            comparisons=differences,
            config=dump_yaml(parent.config),
            links={"MLflow, side by side": comparison["compare_url"], "report": comparison["report"]},
            reproduce="hjepa run --config FILE --sweep SETS  # FILE: the configuration below, SETS:\n\n" + sets,
            confidence=comparison["confidence"],
        )
    )


def _track_comparison(parent: Run, comparison: Json, page: Path) -> None:
    rows = comparison["branches"]
    metric = comparison["primary_metric"].rpartition("/")[2]
    best = next(row for row in rows if row["name"] == comparison["best"])
    parent.tracker.log_metrics_now({f"best/{metric}": best["value"]}, 0)
    parent.tracker.set_tags({"hjepa.best_branch": comparison["best"]})
    columns = {
        "branch": [row["name"] for row in rows],
        **{key: [row["settings"][key] for row in rows] for key in best["settings"]},
        **{key: [row.get(key, "") for row in rows] for key in ("value", "low", "high", "difference", "obstacle")},
    }
    parent.tracker.log_table("sweep.json", columns)
    parent.tracker.log_artifact(page)


# -- prepare_data ----------------------------------------------------------------------------------------------------


@step
def prepare_data(*, resolved_path: str, dataset_path: str) -> None:
    """Turn the source into verified shards in S3, or find that they are there already.

    Raises:
        UserError: no such source, or too many of its files cannot be read.
    """
    from hjepa.data import prepare

    run = Run.read(resolved_path)
    started, sent_before = time.monotonic(), run.store.bytes_sent
    source = _source(run)
    # Recognised by its images, not by the run: files added since the last time make another data set.
    key = prepare.prepared_key(source, run.config.data)[:16]
    manifest = _prepared_before(run, source, key)
    if manifest is None:
        try:
            manifest = _prepare_and_upload(run, source, key)
        except ObjectNotFoundError:
            # Somebody who prepares the same images was faster, and has tidied up the parts of both.
            manifest = _prepared_before(run, source, key)
            if manifest is None:
                raise
    for item in list(run.store.list(f"{_parts_folder(source, key)}/")):
        run.store.delete(item.key)
    manifest |= {
        "bytes_uploaded": run.store.bytes_sent - sent_before,
        "seconds": round(time.monotonic() - started, 1),
    }
    _track_dataset(run, manifest)
    run.hand_over("dataset", dataset_path, manifest)
    for note in manifest["source"]["notes"]:
        say(f"note: {note}")
    counts = ", ".join(f"{split['samples']:,} {name}" for name, split in manifest["splits"].items())
    quarantine = manifest["quarantine"]["total"]
    say(
        f"data set {manifest['name']} {manifest['digest'][:16]}: {counts} images, {quarantine} quarantined, "
        f"{manifest['bytes_uploaded']:,} bytes uploaded"
    )


def _prepared_before(run: Run, source: Source, key: str) -> Json | None:
    """The manifest of these images, if they are prepared, with what is said of this source.

    Raises:
        UserError: more of the source's files cannot be used than is allowed now.
    """
    from hjepa.data import prepare

    found = datasets.by_recipe(run.store, _recipe(source, key))
    if found is None:
        return None
    if absent := datasets.absent(run.store, found):
        warn(
            f"{run.store.uri(found.key)}: {counted(len(absent), 'file')} no longer whole, such as {absent[0]}; the "
            "set is made anew"
        )
        return None
    try:
        prepare.check_quarantine(found.manifest, run.config.data, Path(prepare.REPORT))
    except prepare.QuarantineError as error:
        raise UserError(f"{error}\nThe report: {datasets.report_of(run.store, found)}") from None
    say("prepare_data: already done for these images, nothing to do")
    return found.manifest


def _track_dataset(run: Run, manifest: Json) -> None:
    run.tracker.set_tags({"hjepa.dataset": manifest["name"], "hjepa.dataset_digest": manifest["digest"]})
    run.tracker.log_dataset(manifest["name"], manifest["digest"][:16], manifest["uri"], "training")


def _prepare_and_upload(run: Run, source: Source, key: str) -> Json:
    """Make the parts that are not in S3 yet, and put all of them together.

    A data set that is there already, with the same images and labels from other files, stays as it is: runs use it.

    Args:
        key: Of the source and its recipe; a large source takes seconds to hash.
    """
    from hjepa.data import parts, prepare

    config, store = run.config, run.store
    wanted = parts.parts_of(source, config.data.part_images)
    base = _make_parts(run, source, key, wanted)
    with prepare.scratch(_block_cache(config).folder.parent) as workdir:
        made = [parts.PartResult.from_json(store.get_json(f"{base}/{part.name}.json"), workdir) for part in wanted]
        for each in made:
            for kind, checksum in each.sidecars.items():
                name = each.part.file(kind)
                store.download(f"{base}/{name}", workdir / name, sha256=checksum)

        def fetch(shard: StoredFile) -> Path:
            store.download(f"{base}/{shard.origin}", shard.path, sha256=shard.sha256)
            return shard.path

        try:
            prepared = prepare.merge(source, config.data, workdir, made, fetch=fetch)
        except prepare.QuarantineError as error:
            # The report names the files to mend, so it must outlive this folder.
            stored = run.key(prepare.REPORT)
            store.put_bytes(stored, error.report.read_bytes())
            kept = Path(config.logging.log_dir).expanduser() / run.name / prepare.REPORT
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(error.report, kept)
            raise UserError(f"{error}\nThe report: {kept}, {store.uri(stored)}") from None
        folder = f"datasets/{source.name}/{prepared.manifest['digest'][:16]}"
        manifest: Json = {**prepared.manifest, "uri": store.uri(folder)}
        own = {name: manifest[name] for name in datasets.OF_THE_SOURCE}
        there = datasets.whole(store, folder)
        if there is not None and any(there.manifest[name] != own[name] for name in own):
            say(f"these images and labels are in {manifest['uri']} already, from other files; it stays as it is")
            report = f"{_recipe(source, key).removesuffix('.json')}-{prepare.REPORT}"
            store.put_file(report, workdir / prepare.REPORT, sha256=own["quarantine"]["sha256"])
            own["quarantine"] = own["quarantine"] | {"report": store.uri(report)}
            manifest = there.manifest | own
        elif there is None:
            store.delete(
                f"{folder}/{datasets.MANIFEST}"
            )  # of a set that is not whole; its files may be other ones soon
            for file in prepared.files:
                if file.path.exists():
                    store.put_file(f"{folder}/{file.key}", file.path, sha256=file.sha256)
                else:
                    store.copy(f"{base}/{file.origin}", f"{folder}/{file.key}", sha256=file.sha256)
            datasets.put_manifest(store, folder, manifest)
    # Written after the data set is complete: whoever finds the recipe finds all of it.
    store.put_json(_recipe(source, key), {"dataset": f"{folder}/{datasets.MANIFEST}", **own})
    return manifest


def _recipe(source: Source, key: str) -> str:
    """The object that leads from a source and its recipe to the data set, once that is complete."""
    return f"datasets/{source.name}/recipes/{key}.json"


def _parts_folder(source: Source, key: str) -> str:
    """Where the parts of a preparation lie until they are put together, whoever makes them."""
    return f"datasets/{source.name}/parts/{key}"


def _make_parts(run: Run, source: Source, key: str, wanted: Sequence[Part]) -> str:
    """Have these parts in S3; those that are there already, from a try that was killed, are not made again."""
    from concurrent.futures import Future, ThreadPoolExecutor

    from hjepa.data import prepare
    from hjepa.data.parts import SIDECARS

    store, cache, base = run.store, _block_cache(run.config), _parts_folder(source, key)
    todo = [part for part in wanted if store.head(f"{base}/{part.name}.json") is None]
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} parts are prepared already")
    if not todo:
        return base

    def upload(shard: StoredFile) -> None:
        sent = store.put_file(f"{base}/{shard.key}", shard.path, sha256=shard.sha256)
        say(f"uploaded {shard.key}: {sent:,} bytes")
        # What was just made need not be downloaded by the next step on this machine.
        cache.adopt(shard.path, shard.sha256)
        shard.path.unlink(missing_ok=True)  # it did not fit

    with prepare.scratch(cache.folder.parent) as workdir, ThreadPoolExecutor(UPLOADS, "hjepa-upload") as uploads:
        pending: list[Future[None]] = []

        def send(shard: StoredFile) -> None:
            pending.append(uploads.submit(upload, shard))
            while len(pending) > 2 * UPLOADS:  # or a slow network would fill the disk
                pending.pop(0).result()

        progress = prepare.prepare_parts(
            source, run.config.data, workdir, todo, progress=lambda state: say(str(state)), on_shard=send
        )
        for made in progress:
            while pending:
                pending.pop(0).result()
            for kind in SIDECARS:
                path = workdir / made.part.file(kind)
                store.put_file(f"{base}/{path.name}", path, sha256=made.sidecars[kind])
                path.unlink()
            store.put_json(f"{base}/{made.part.name}.json", made.to_json())
    return base


@step
def plan_preparation(*, resolved_path: str, pods: int) -> list[int]:
    """How many pods can share the work of preparing the data set: the numbers of those that have something to do.

    Args:
        pods: How many there are.

    Raises:
        UserError: fewer than one, or no such source.
    """
    from hjepa.data.parts import parts_of

    if pods < 1:
        raise UserError(f"pods={pods}: expected at least 1")
    run = Run.read(resolved_path)
    source = _source(run)
    parts = parts_of(source, run.config.data.part_images)
    used = min(pods, len(parts))
    say(f"{len(parts)} parts of at most {run.config.data.part_images:,} images for {used} pods")
    return list(range(used))


@step
def prepare_parts(*, resolved_path: str, pod: int, pods: int) -> None:
    """Make the share of one of several pods; ``prepare_data`` puts all shares together.

    Args:
        pod: Number of this one, from 0.
        pods: How many share the work.
    """
    from hjepa.data import prepare
    from hjepa.data.parts import parts_of

    run = Run.read(resolved_path)
    source = _source(run)
    key = prepare.prepared_key(source, run.config.data)[:16]
    if run.store.head(_recipe(source, key)) is not None:
        say("prepare_parts: the data set is prepared already, nothing to do")
        return
    _make_parts(run, source, key, parts_of(source, run.config.data.part_images)[pod::pods])


def _source(run: Run) -> Source:
    from hjepa.data.datasets import open_source

    open_store = functools.partial(S3Store.from_config, run.config.storage)
    source = open_source(run.config.data, open_store, datasets.TarIndexes(run.store))
    say(f"source: {source.name}, {source.detail}")
    return source


def _block_cache(config: Config) -> BlockCache:
    from hjepa.data.cache import BlockCache

    folder = Path(config.data.cache_dir).expanduser() / "shards"
    return BlockCache(folder, limit_bytes=int(config.data.cache_gb * 1e9), warn=warn)


def _open_split(run: Run, manifest: Json, split: str) -> ShardDataset:
    """A data set whose shards are read from S3, block by block as they are needed, through a cache on this machine."""
    from hjepa.data.cache import Remote
    from hjepa.data.loader import ShardDataset

    cache, folder, store = _block_cache(run.config), run.store.key_of(manifest["uri"]), run.images

    def index(key: str) -> Path:
        facts = manifest["splits"][split]["index"]
        checksum: str = facts["sha256"]
        path = cache.folder / checksum
        if not cache.has(checksum, facts["bytes"]) or file_sha256(path) != checksum:
            if path.exists():
                warn(f"the cached copy of {key} is damaged and is fetched again")
            store.download(f"{folder}/{key}", path, sha256=checksum)
        return path

    remote = Remote(
        get=lambda key, first, length: store.get_bytes(f"{folder}/{key}", start=first, length=length),
        name=lambda key: store.uri(f"{folder}/{key}"),
        cache=cache,
        block_bytes=run.config.data.block_mb * 1_000_000,
    )
    return ShardDataset(manifest, split, index, remote=remote)


# -- train -----------------------------------------------------------------------------------------------------------


@step
def train(
    *, resolved_path: str, dataset_path: str, checkpoint_path: str, resume: str = "auto", device: str | None = None
) -> None:
    """Train, or go on from the run's newest checkpoint, here or in S3; the chosen checkpoint ends up in S3.

    Args:
        resume: A checkpoint's path, or ``auto`` for the newest one.
        device: Instead of ``training.device``; it is no part of the experiment.

    Started by torchrun it is one of several ranks, and the main one does what is done once.

    Raises:
        PreemptedError: told to stop; the state is saved here and in S3.
        FutileRetryError: collapsed or diverged.
    """
    from hjepa import distributed

    run = Run.read(resolved_path)
    dataset = read_manifest(dataset_path, "dataset")
    device = device or run.config.training.device
    inputs = {"config": run.config.digest, "dataset": dataset["digest"]}
    world = distributed.World.from_environment()
    distributed.init(world, distributed.pick_device(device, world))
    if resume == "auto":
        distributed.on_main(lambda: _refuse_futile_retry(run), world)
    manifest = run.finished("train", inputs) if resume == "auto" and world.is_main else None
    manifest = distributed.broadcast_object(manifest, world)
    if manifest is None:
        try:
            manifest = _train(run, dataset, resume, device, world)
        except (PreemptedError, FutileRetryError, KeyboardInterrupt):
            distributed.leave()  # the others wait here until the main rank has uploaded: the first exit ends all
            raise
        if world.is_main:
            run.record("train", inputs, manifest)
    distributed.close()
    if world.is_main:
        run.hand_over("checkpoint", checkpoint_path, manifest)
        say(f"checkpoint: step {manifest['step']}, {manifest['images_seen']:,} images seen, {manifest['uri']}")


def _train(run: Run, dataset: Json, resume: str, device: str, world: World) -> Json:
    """The chosen checkpoint's manifest, on the main rank; S3 and MLflow are the main rank's alone."""
    from hjepa import training
    from hjepa.data.loader import build_train_loader
    from hjepa.distributed import pick_device
    from hjepa.utils import MetricsLogger

    images = _open_split(run, dataset, "train")
    labelled = dataset["splits"]["train"]["per_class"] is not None
    # The MLflow run tells apart runs of one name on different servers, the digest those on images that have changed.
    place = f"{run.name}-{run.mlflow_run_id[:8]}-{dataset['digest'][:8]}"
    folder = Path(run.config.checkpoint.checkpoint_dir).expanduser() / place
    config = training.choose_metric(training.with_checkpoint(run.config, checkpoint_dir=str(folder)), labelled=labelled)
    loader = build_train_loader(config, images, world, pin_memory=pick_device(device, world).type == "cuda")
    probe = training.make_probe(config, images, dataset, labelled)
    logs = Path(config.logging.log_dir).expanduser() / place
    if world.is_main and loader.order != "random":
        say(f"these images are more than data.cache_gb={config.data.cache_gb:g} holds: their order is {loader.order}")
    if not world.is_main:
        silent = MetricsLogger(run.name, logs, use_tensorboard=False)
        training.build_trainer(config, loader, device=device, resume=resume, probe=probe, logger=silent).train()
        return {}
    uploads = CheckpointUploads(run, dataset, folder, keep_best_n=config.checkpoint.keep_best_n)
    uploads.fetch_newer()
    stream = MetricStream(run.tracking_uri, run.mlflow_run_id, logs / JOURNAL)
    logger = MetricsLogger(
        run.name,
        logs / "tensorboard",
        config,
        use_wandb=config.logging.wandb.enabled,
        use_tensorboard=config.logging.tensorboard.enabled,
        wandb_project=config.logging.wandb.project,
        sinks=[NewOnly(stream, logs / JOURNAL)],
    )
    trainer = training.build_trainer(
        config, loader, device=device, resume=resume, probe=probe, logger=logger, on_saved=uploads.upload
    )
    try:
        trainer.train()
    except BaseException:
        uploads.close(timeout_seconds=15)  # within the grace period of a pod that is told to stop
        raise
    finally:
        _close_stream(stream, logs / JOURNAL, run)
        _upload_logs(run, logs)
    for picture in sorted((logs / "pictures").glob("*.png")):
        run.tracker.log_artifact(picture)
    uploads.finish([step for _, _, step in trainer.checkpoints.ranking])
    return uploads.best(config.checkpoint.metric, config.checkpoint.mode)


@step
def launch_training(
    *, resolved_path: str, dataset_path: str, checkpoint_path: str, overrides: Sequence[str] = ()
) -> None:
    """Train in a job of its own, over as many nodes as ``cluster`` says, and follow it to its end.

    The pods of the job run ``train`` on the manifests in S3. A job that an earlier try left running is followed.

    Args:
        overrides: Of the section ``cluster``, such as cluster.nodes=4.

    Raises:
        UserError: the cluster refuses the job, or can never run it.
        FutileRetryError: training collapsed or diverged.
        PreemptedError: told to stop.
        HjepaError: the job failed, with its cause, or ended without a result.
    """
    from hjepa.adapters.cluster import launcher

    run = Run.read(resolved_path)
    dataset = read_manifest(dataset_path, "dataset")
    inputs = {"config": run.config.digest, "dataset": dataset["digest"]}
    if (manifest := run.finished("train", inputs)) is None:
        _refuse_futile_retry(run)
        # What the pods read; S3 may still hold those of an earlier try.
        run.hand_over("resolved", resolved_path, read_manifest(resolved_path, "resolved"))
        run.hand_over("dataset", dataset_path, dataset)
        spec = training_job(run, overrides)
        cluster = spec.cluster
        if cluster.backend != "local":  # for ``report``, which stops what a killed launcher leaves
            run.store.put_json(run.key(JOB), {"name": spec.name, "namespace": cluster.namespace})
        say(f"job {spec.name}: nodes {cluster.nodes}, ranks {spec.ranks}, image {spec.image}")
        manifest = launcher.launch(
            spec,
            backend=cluster.backend,
            namespace=cluster.namespace,
            result=lambda: run.recorded("train", inputs),
            run=run.name,
        )
    run.hand_over("checkpoint", checkpoint_path, manifest)
    say(f"checkpoint: step {manifest['step']}, {manifest['images_seen']:,} images seen, {manifest['uri']}")


def _refuse_futile_retry(run: Run) -> None:
    """End a retry of KFP's at once if the try before it ended with 13: KFP has no exit code that stops retries.

    Raises:
        FutileRetryError: that of the try before.
    """
    record = _stored(run, ERROR)
    if run.job and record.get("job") == run.job and record.get("exit_code") == FutileRetryError.exit_code:
        say("an earlier try of this pipeline run ended with 13; start the pipeline again to train all the same")
        raise FutileRetryError(record["message"])


def training_job(run: Run, overrides: Sequence[str] = ()) -> TrainSpec:
    """The training job of a run, as ``launch_training`` starts it.

    Raises:
        UserError: ``overrides`` change more than the section ``cluster``; or its pods would look for S3 or MLflow in
            themselves.
    """
    from hjepa.adapters.cluster import spec

    config = load_config(dump_yaml(run.config), overrides)
    if config.digest != run.config.digest:
        raise UserError("a job takes other settings of the section cluster alone; for the rest, resolve a new run")
    env = spec.job_env(config, run=run.name, mlflow_run_id=run.mlflow_run_id, tracking_uri=run.tracking_uri)
    if config.cluster.backend != "local":
        spec.check_addresses(config, env)
    # What KFP's MLflow plug-in sets beside the run's id. A token is not among it: that comes from a Secret.
    forwarded = {name: os.environ[name] for name in MLFLOW_FORWARDED if name in os.environ}
    # Nothing that differs between two tries, such as the id of the KFP run: the second would not know the job again.
    return spec.TrainSpec(
        name=spec.job_name(run.name),
        image=spec.train_image(config.cluster),
        args=("train", "--run-uri", run.uri),
        cluster=config.cluster,
        env=forwarded | env,
        labels={"hjepa.dev/run": label_value(run.name)},
    )


def label_value(text: str) -> str:
    """``text`` as Kubernetes takes it for a label: at most 63 of A-Z a-z 0-9 ``-_.``, no sign at either end."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.")


class CheckpointUploads:
    """The run's checkpoints in S3: ``runs/<run>/checkpoints/<step>/``, each visible once its manifest is written.

    Uploads run on a thread of their own, so that a slow store holds up neither training nor the next local write; if
    several checkpoints wait, only the newest goes. ``finish`` sends what is still missing.
    """

    def __init__(self, run: Run, dataset: Json, folder: Path, *, keep_best_n: int):
        self.run, self.dataset, self.folder, self.keep_best_n = run, dataset, folder, keep_best_n
        self._waiting: SavedCheckpoint | None = None
        self._ready = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._send_waiting, name="checkpoint-uploads", daemon=True)
        self._thread.start()

    def manifests(self) -> list[Json]:
        """Of all complete uploads made from this data set, oldest first."""
        found = [item.key for item in self.run.store.list(self.run.key("checkpoints/")) if item.key.endswith(".json")]
        manifests = [self.run.store.get_json(key) for key in found]
        ours = [item for item in manifests if item["dataset_digest"] == self.dataset["digest"]]
        return sorted(ours, key=lambda item: int(item["step"]))

    def fetch_newer(self) -> None:
        """Download the newest checkpoint if what this machine has is older or damaged: the pod moved, or its disk."""
        from hjepa.utils.checkpoint import LATEST, good_checkpoints

        step = next((content["step"] for _, content in good_checkpoints(self.folder, warn)), -1)
        for manifest in reversed(self.manifests()):
            if manifest["step"] <= step:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.run.store.download(
                    self.run.store.key_of(manifest["uri"]), self.folder / LATEST, sha256=manifest["sha256"]
                )
            except HjepaError as error:
                warn(f"{error}; trying the one before")
                continue
            say(f"fetched the checkpoint of step {manifest['step']} from {manifest['uri']}")
            return

    def upload(self, saved: SavedCheckpoint) -> None:
        """Take over a checkpoint that is durable here; returns at once."""
        with self._ready:
            self._waiting = saved
            self._ready.notify()

    def _send_waiting(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting is not None or self._closed)
                saved, self._waiting = self._waiting, None
            if saved is None:
                return
            try:
                self._send(saved)
            except (HjepaError, OSError) as error:
                warn(f"the checkpoint of step {saved.step} stays on this machine for now: {error}")

    def close(self, timeout_seconds: float | None = None) -> None:
        """Let the upload in flight and the one that waits end."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join(timeout_seconds)

    def finish(self, ranking: Sequence[int]) -> None:
        """Send every good checkpoint of this machine that S3 does not have yet.

        Raises:
            HjepaError: the store refuses or cannot be reached; the files stay here, and the next try sends them.
        """
        from hjepa.utils.checkpoint import SavedCheckpoint, good_checkpoints

        self.close()
        present = {manifest["step"] for manifest in self.manifests()}
        for path, content in good_checkpoints(self.folder, warn):
            if content["step"] not in present:
                present.add(content["step"])
                self._send(
                    SavedCheckpoint(path, content["epoch"], content["step"], content["metrics"], False, tuple(ranking))
                )

    def _send(self, saved: SavedCheckpoint) -> None:

        store, config = self.run.store, self.run.config
        key = self.run.key(f"checkpoints/{saved.step}/checkpoint.pth")
        sha256 = saved.sha256 or file_sha256(saved.path)
        store.put_file(key, saved.path, sha256=sha256)
        manifest = {
            "schema": SCHEMA,
            "uri": store.uri(key),
            "sha256": sha256,
            "step": saved.step,
            "epoch": saved.epoch,
            "images_seen": saved.step * config.training.batch_size,
            "metrics": saved.metrics,
            "config_digest": config.digest,
            "dataset_digest": self.dataset["digest"],
            "mlflow_run_id": self.run.mlflow_run_id,
            "run": self.run.name,
            "code_version": code_version(),
        }
        store.put_json(self.run.key(f"checkpoints/{saved.step}/checkpoint.json"), manifest)
        self._prune(saved.ranking)

    def _prune(self, ranking: Sequence[int]) -> None:
        """Keep the best N steps and the newest."""
        *older, _ = self.manifests()
        for manifest in older:
            if manifest["step"] not in ranking[: self.keep_best_n]:
                folder = self.run.key(f"checkpoints/{manifest['step']}")
                # The manifest goes first, so that nobody finds a checkpoint that is half gone.
                self.run.store.delete(f"{folder}/checkpoint.json")
                self.run.store.delete(f"{folder}/checkpoint.pth")

    def best(self, metric: str, mode: str) -> Json:
        """The manifest to go on with: the best by ``metric``, the newest where none has it."""
        manifests = self.manifests()
        ranked = [item for item in manifests if not math.isnan(item["metrics"].get(metric, math.nan))]
        if not ranked:
            warn(f"no checkpoint has the metric {metric}; the newest one is taken")
            return manifests[-1]
        return (max if mode == "max" else min)(ranked, key=lambda item: (item["metrics"][metric], item["step"]))


class NewOnly:
    """Passes metrics on unless a killed predecessor has logged that step already: no point is drawn twice.

    Pictures are kept beside the journal, the newest of each name.
    """

    def __init__(self, stream: MetricStream, journal: Path):
        self.stream, self.pictures = stream, journal.parent / "pictures"
        self.logged: set[tuple[int, str]] = set()
        for line in journal.read_text("utf-8").splitlines() if journal.exists() else []:
            with contextlib.suppress(ValueError, KeyError):  # a line that the kill cut short
                record = json.loads(line)
                self.logged |= {(record["s"], name) for name in record["m"]}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        new = {name: value for name, value in metrics.items() if (step, name) not in self.logged}
        if new:
            self.logged |= {(step, name) for name in new}  # training may go back to a checkpoint
            self.stream.log(new, step)

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        from PIL import Image

        self.pictures.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(self.pictures / f"{name.replace('/', '-')}.png")


def _close_stream(stream: MetricStream, journal: Path, run: Run) -> None:
    undelivered = stream.close()
    if undelivered:
        warn(
            f"{undelivered} metric records did not reach MLflow; they are in {journal}. "
            f"Send them with: hjepa sync {journal} --run-id {run.mlflow_run_id} --uri {run.tracking_uri}"
        )


def _upload_logs(run: Run, logs: Path) -> None:
    """TensorBoard events and the metrics journal, next to the checkpoints; missing them fails nothing."""

    for path in sorted(item for item in logs.rglob("*") if item.is_file()):
        try:
            run.store.put_file(run.key(str(path.relative_to(logs))), path, sha256=file_sha256(path))
        except HjepaError as error:
            warn(f"{path} is not uploaded: {error}")


# -- export ----------------------------------------------------------------------------------------------------------


@step
def export_checkpoint(*, resolved_path: str, dataset_path: str, checkpoint_path: str, model_path: str) -> None:
    """Turn the chosen checkpoint into an export in S3, read it back, and check it against the training code.

    Raises:
        HjepaError: the export's embeddings differ from the checkpoint's by more than ``export.tolerance``.
    """
    run = Run.read(resolved_path)
    dataset = read_manifest(dataset_path, "dataset")
    checkpoint = read_manifest(checkpoint_path, "checkpoint")
    inputs = {"checkpoint": checkpoint["sha256"], "export": run.config.export.model_dump(mode="json")}
    if (manifest := run.finished("export_checkpoint", inputs)) is None:
        with tempfile.TemporaryDirectory() as folder:
            manifest = _export(run, dataset, checkpoint, Path(folder))
        run.record("export_checkpoint", inputs, manifest)
    run.hand_over("model", model_path, manifest)
    say(f"export {manifest['digest'][:16]}: {manifest['uri']}, largest difference {manifest['max_abs_difference']:.1e}")


def _export(run: Run, dataset: Json, checkpoint: Json, folder: Path) -> Json:
    from hjepa import export, training

    config, store, statistics = run.config, run.store, dataset["statistics"]
    local = folder / "checkpoint.pth"
    store.download(store.key_of(checkpoint["uri"]), local, sha256=checkpoint["sha256"])
    encoder = export.encoder_of_checkpoint(local, config, **statistics)
    provenance = {
        "run": run.name,
        "mlflow_run_id": run.mlflow_run_id,
        "dataset": dataset["name"],
        "dataset_digest": dataset["digest"],
        "config_digest": config.digest,
        "step": checkpoint["step"],
        "images_seen": checkpoint["images_seen"],
        "code_version": checkpoint["code_version"],
        "weights": config.export.weights,
    }
    batch, _ = next(training.eval_batches(config, _open_split(run, dataset, "train"), 64))
    made = export.save_export(
        encoder, folder / "made", config=config, provenance=provenance, sample=batch, dataset=dataset
    )
    name = config.tracking.registered_model
    key = f"models/{name}/{made['digest'][:16]}"
    for file, facts in made["files"].items():
        store.put_file(f"{key}/{file}", folder / "made" / file, sha256=facts["sha256"])
        store.download(f"{key}/{file}", folder / "back" / file, sha256=facts["sha256"])
    difference = export.max_abs_difference(encoder, export.load_export(folder / "back"), batch)
    if not difference <= config.export.tolerance:
        raise HjepaError(
            f"the exported encoder differs from the checkpoint by {difference:.2e}, "
            f"more than export.tolerance={config.export.tolerance:g}"
        )
    manifest: Json = {
        "schema": SCHEMA,
        "uri": store.uri(key),
        **made,
        "checkpoint": checkpoint,
        "max_abs_difference": difference,
        "packages": {name: version(name) for name in ("torch", "numpy", "safetensors")},
    }
    store.put_json(f"{key}/model.json", manifest)
    return manifest


# -- evaluate --------------------------------------------------------------------------------------------------------


@step
def evaluate(
    *,
    resolved_path: str,
    dataset_path: str,
    model_path: str,
    evaluation_path: str,
    summary_path: str | None = None,
    report_path: str | None = None,
) -> Json:
    """Judge the exported encoder beside an untrained one of the same shape and seed, and raw pixels, on one split.

    Args:
        summary_path: Where the table and the links are written too, as Markdown.
        report_path: Where the report is written too, one HTML page; it is always kept in S3 and MLflow.

    Returns:
        The manifest, with ``decisive``: the few metrics that two runs are compared by.
    """
    run = Run.read(resolved_path)
    dataset = read_manifest(dataset_path, "dataset")
    model = read_manifest(model_path, "model")
    inputs = {
        "model": model["digest"],
        "dataset": dataset["digest"],
        "evaluation": run.config.evaluation.model_dump(mode="json"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / REPORT
        if (manifest := run.finished("evaluate", inputs)) is None:
            manifest = _evaluate(run, dataset, model, folder)
            _track_evaluation(run, manifest, page)
            run.record("evaluate", inputs, manifest)
        elif report_path is not None:
            run.store.download(run.key(REPORT), page)
        if report_path is not None:
            shutil.copyfile(page, report_path)
    if summary_path is not None:
        Path(summary_path).write_text(evaluation_summary(manifest), "utf-8")
    run.hand_over("evaluation", evaluation_path, manifest)
    say(f"report: {manifest['report']}")
    return manifest


def _track_evaluation(run: Run, manifest: Json, page: Path) -> None:
    # Step 0 makes MLflow draw them as bars beside each other; at the last step each would be a lonely dot.
    # The compare page shows the first few names of the alphabet without scrolling: those that decide belong there.
    run.tracker.log_metrics_now(manifest["metrics"] | manifest["decisive"], 0)
    columns = _columns(manifest["table"])
    run.tracker.log_table(
        "evaluation.json", {name: [row.get(name, "") for row in manifest["table"]] for name in columns}
    )
    run.tracker.log_artifact(page)


def _columns(table: Sequence[Json]) -> list[str]:
    """The union of the rows' columns, in order: not every protocol fits every row."""
    return list(dict.fromkeys(name for row in table for name in row))


def evaluation_summary(manifest: Json) -> str:
    """The table of the evaluation, with 95 % intervals, and its links, as Markdown."""
    table = manifest["table"]
    ends = ("_low", "_high", "_std")
    columns = [name for name in _columns(table) if not name.endswith(ends)]

    def cell(row: Json, name: str) -> str:
        value = row.get(name, "")
        if not isinstance(value, float):
            return str(value)
        interval = f" ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})" if f"{name}_low" in row else ""
        return f"{value:.3f}{interval}"

    lines = [columns, ["---"] * len(columns), *([cell(row, name) for name in columns] for row in table)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    facts = [f"collapse: {manifest['collapse']}"] if manifest["collapse"] else []
    facts += [f"note: {note}" for note in manifest["notes"]]
    facts += [f"[{name}]({address})" for name, address in manifest["links"].items()]
    return text + "".join(f"\n{fact}\n" for fact in facts)


def _evaluate(run: Run, dataset: Json, model: Json, folder: Path) -> Json:
    """The manifest; the report lies in ``folder`` and in S3."""
    from hjepa import export, judging, training
    from hjepa.distributed import World, pick_device
    from hjepa.report import Report, render

    config = run.config
    key = run.store.key_of(model["uri"])
    for file, facts in model["files"].items():
        run.store.download(f"{key}/{file}", folder / file, sha256=facts["sha256"])
    journal = _journal(run, folder / JOURNAL)
    # A pod that evaluates need not have the GPUs that training had.
    device = pick_device("cpu" if config.training.device == "cpu" else "auto", World())
    encoders = {
        "trained": export.load_export(folder),
        "random init": export.untrained_encoder(config, **dataset["statistics"]),
    }
    images = {
        name: _open_split(run, dataset, name)
        for name in ("train", "test")
        if dataset["splits"].get(name, {}).get("samples")
    }
    checkpoint, notes = model["checkpoint"], []
    whole = None
    try:
        local = folder / "checkpoint.pth"
        run.store.download(run.store.key_of(checkpoint["uri"]), local, sha256=checkpoint["sha256"])
    except ObjectNotFoundError:  # pruned since: the encoder lives on in its export, the predictor does not
        notes.append(f"the checkpoint {checkpoint['uri']} is gone, so the errors of its predictions are not shown")
    else:
        whole = training.model_of_checkpoint(local, config, name=checkpoint["uri"])
        local.unlink()
    judged = judging.judge(
        config, dataset, encoders, images, device=str(device), model=whole, journal=journal, notes=notes
    )
    metrics = judged.manifest["metrics"]
    manifest = {
        "schema": SCHEMA,
        "model_digest": model["digest"],
        **judged.manifest,
        "decisive": {f"best/{name}": metrics[f"eval/{name}"] for name in DECISIVE if f"eval/{name}" in metrics},
        "report": run.store.uri(run.key(REPORT)),
        "links": _links(run),
    }
    page = render(
        Report(
            run=run.name,
            made_at=_now(),
            dataset=dataset,
            checkpoint=model["checkpoint"],
            model=model,
            evaluation=manifest,
            config=dump_yaml(config),
            curves=journal,
            links=manifest["links"] | {"report": manifest["report"], "model": model["uri"]},
            reproduce=f"hjepa run --config FILE --run {run.name}-again  # FILE: the configuration below",
            pictures=judged.pictures,
        )
    )
    (folder / REPORT).write_text(page, "utf-8")
    run.store.put_file(run.key(REPORT), folder / REPORT, sha256=file_sha256(folder / REPORT))
    return manifest


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _journal(run: Run, path: Path) -> list[Json]:
    """What training logged, by way of ``path``; a run whose logs could not be uploaded has no curves."""
    from hjepa.report import read_journal

    try:
        run.store.download(run.key(JOURNAL), path)
    except ObjectNotFoundError:
        return []
    return read_journal(path)


def _links(run: Run) -> dict[str, str]:
    """The MLflow run's page, if the server says which it is: without it the numbers are no worse."""
    try:
        return {"MLflow run": run.tracker.url}
    except HjepaError as error:
        warn(f"the report has no link to MLflow: {error}")
        return {}


# -- register --------------------------------------------------------------------------------------------------------


@step
def register_model(*, resolved_path: str, model_path: str, evaluation_path: str, registration_path: str) -> Json:
    """Register a version of the model, and make it the champion if it is better by more than the margin.

    Returns:
        The registration: name, version, alias, reason, URL.

    Raises:
        HjepaError: MLflow cannot be reached; unlike tracking, registration fails loudly.
    """
    from hjepa.adapters import registry
    from hjepa.model_card import model_card

    run = Run.read(resolved_path)
    model = read_manifest(model_path, "model")
    evaluation = read_manifest(evaluation_path, "evaluation")
    with tempfile.TemporaryDirectory() as folder:
        key = run.store.key_of(model["uri"])
        for file, facts in model["files"].items():
            run.store.download(f"{key}/{file}", Path(folder) / file, sha256=facts["sha256"])
        registration = registry.register(
            run.tracker,
            name=run.config.tracking.registered_model,
            export_dir=Path(folder),
            model=model,
            evaluation=evaluation,
            margin=run.config.tracking.champion_margin,
            primary_metric=evaluation["primary_metric"]["name"],
        )
        card = Path(folder) / CARD
        card.write_text(model_card(model, None, evaluation, license=run.config.export.license), "utf-8")
        run.tracker.log_artifact(card)
    run.tracker.finish()
    result = {"schema": SCHEMA, **asdict(registration), "mlflow_run_url": run.tracker.url}
    rival = registry.run_of_champion(run.tracker, registration)
    if rival and rival != run.mlflow_run_id:
        result["compare_url"] = run.tracker.compare_url([rival, run.mlflow_run_id])
    run.hand_over("registration", registration_path, result)
    say(f"{registration.name} version {registration.version} is {registration.alias}: {registration.reason}")
    return result


# -- report ----------------------------------------------------------------------------------------------------------


@step
def report(
    *,
    config: str,
    overrides: Sequence[str],
    settings: Mapping[str, str],
    profile: str,
    run: str,
    job: str,
    state: str,
    message: str,
    summary_path: str,
) -> None:
    """Say how a pipeline ended; after a failure name its cause in the log and in MLflow, and stop what still runs.

    The last step, whatever happened before: it has the pipeline's parameters and no other step's output.

    Args:
        config, overrides, settings, profile, run, job: As ``resolve_config`` got them.
        state: SUCCEEDED, FAILED or CANCELLED, as KFP sees it.
        message: What KFP says about it.
        summary_path: Where the same is written as Markdown.
    """
    if state == "SUCCEEDED":
        text = f"run {run}: succeeded"
        opened = _opened(_load(config, overrides, settings, profile), run)
        if opened is not None:  # a pipeline without a registration leaves its row open
            opened.tracker.finish_if_running()
    else:
        try:
            tree = _load(config, overrides, settings, profile)
            check_run_name(run)
        except HjepaError as error:  # the mistake that stopped the pipeline's first step too
            step, cause = "resolve_config", str(error)
        else:
            step, cause = _cause(tree, run, job, message or "no reason was given")
        text = f"run {run}: {state.lower()}" + (f" in {step}" if step else "") + f": {cause}"
    say(text)
    Path(summary_path).write_text(text + "\n", "utf-8")


def close_stopped(config: str, overrides: Sequence[str], run: str) -> None:
    """Mark the MLflow rows of a run that was told to stop, and of its branches, as ended; resuming opens them again."""
    opened = _opened(_load(config, overrides, {}, ""), run)
    for each in [opened, *_branches(opened)] if opened else []:
        each.tracker.finish_if_running("KILLED")


def _cause(tree: Config, run: str, job: str, message: str) -> tuple[str, str]:
    """(step, reason) of a failed try, whose job is stopped; without a step where none could say it, as when killed."""
    from hjepa.adapters.cluster.spec import job_name

    try:
        opened = _opened(tree, run)
        if opened is None or opened.job != job:
            file = Path(os.environ.get("HJEPA_ERROR_FILE", "none"))  # where all steps are on one machine
            reason = json.loads(file.read_text("utf-8"))["message"] if file.exists() else "its log has the reason"
            return "its first step, before the run was opened", reason
        runs = [opened, *_branches(opened)]
        launched = [found for each in runs if (found := _stored(each, JOB))]
        records = [_stored(each, ERROR) for each in runs]
    except HjepaError as error:
        if tree.cluster.backend != "local":  # whether there is a job, only the cluster can still tell
            _stop_job(job_name(run), tree.cluster.namespace)
        return "", f"S3 cannot be asked: {error}; KFP says: {message}"
    for item in launched:
        _stop_job(item["name"], item["namespace"])
    told = [(each, record) for each, record in zip(runs, records, strict=True) if record.get("job") == job]
    for each, record in told:
        each.tracker.set_tags({"hjepa.failed_step": record["step"], "hjepa.failure": record["message"]})
    for each in runs:
        if each is opened or not _stored(each, "manifests/evaluation.json"):
            codes = [record["exit_code"] for other, record in told if each in (opened, other)]
            each.tracker.finish("KILLED" if codes and set(codes) == {PreemptedError.exit_code} else "FAILED")
    if len(told) == 1 and told[0][0] is opened:
        return told[0][1]["step"], told[0][1]["message"]
    steps = ", ".join(f"{record['step']} of {each.name}" for each, record in told)
    return (steps, "; ".join(record["message"] for _, record in told)) if told else ("", message)


def _branches(sweep_run: Run) -> list[Run]:
    """The runs of a sweep that have begun; none for a run that is no sweep."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for branch in _stored(sweep_run, "manifests/sweep.json").get("branches", []):
            path = str(Path(folder) / branch["name"])
            if fetch_manifests(sweep_run.store, branch["run"], {"resolved": path}):
                found.append(Run.read(path))
        return found


def _opened(tree: Config, run: str) -> Run | None:
    """The run as S3 knows it."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "resolved.json")
        known = fetch_manifests(S3Store.from_config(tree.storage), run, {"resolved": path})
        return Run.read(path) if known else None


def _stored(run: Run, name: str) -> Json:
    """An object of the run; empty where there is none."""
    found: Json = {}
    with contextlib.suppress(ObjectNotFoundError):
        found = run.store.get_json(run.key(name))
    return found


def _stop_job(name: str, namespace: str | None) -> None:
    """A launcher that was killed leaves its job running, on GPUs that nobody waits for."""
    from hjepa.adapters.cluster import jobs, launcher

    try:
        if jobs.is_active(name, namespace=namespace):
            for deleted in launcher.cancel(name, namespace=namespace):
                say(f"{deleted}: was still running, and is stopped")
    except HjepaError as error:  # the report itself is what matters
        warn(f"job {name} could not be looked at; the janitor ends it if it still runs: {error}")
