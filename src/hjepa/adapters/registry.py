"""The model registry: every export becomes a version, the best one of a data set becomes the champion.

A version holds the export itself (safetensors and JSON), ``model.json`` with the sha256 of each file, and the code of
``pyfunc.py`` by which ``mlflow.pyfunc.load_model`` opens it. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hjepa
from hjepa.adapters.gate import (
    CHALLENGER,
    CHAMPION,
    CHECKS_TAG,
    COLLAPSE_TAG,
    GATE_TAGS,
    INTERVAL_TAG,
    OUTCOMES_TAG,
    Candidate,
    Outcomes,
    Score,
    Verdict,
    decide,
    describe_check,
    interval_tag,
)
from hjepa.adapters.tracking import (
    RUN_TAG,
    Tracker,
    http_patience,
    log_metrics,
    server_errors,
    tracking_uri,
)
from hjepa.config import sha256_json
from hjepa.errors import HjepaError, UserError
from hjepa.files import file_sha256

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

_EXPORT = "artifacts/export"  # where an MLflow model directory holds the export
_MANIFEST = "model.json"
_OUTCOMES = "outcomes.json"  # beside it in the MLflow model: what the next version is compared with
_MODEL_NAME = "encoder"
_EXAMPLE_PIXELS = 32
_TAG_CHARACTERS = 5000  # the longest tag that MLflow servers of every version take

_EXPORT_TAG = "hjepa.export_digest"
_DECISION_TAG = "hjepa.decision"
_REASON_TAG = "hjepa.reason"
_CLAIM_TAG = "hjepa.claim"  # set before the alias is moved: registrations at the same time see each other by it
PREVIOUS_TAG = "hjepa.previous_champion"  # on a champion: the version that was it before
MARGIN_TAG = "hjepa.gate.margin"


@dataclass(frozen=True)
class Registration:
    name: str
    version: int
    alias: str  # "champion" or "challenger": what this version became
    reason: str
    champion_version: int | None
    url: str


# -- registering -------------------------------------------------------------------------------------------------------


def register(
    tracker: Tracker,
    *,
    name: str,
    export_dir: Path,
    model: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    margin: float,
    primary_metric: str,
) -> Registration:
    """Makes the export a version of the registered model ``name``, and the champion if it deserves it.

    Doing it again for the same run and export returns the version that is there, with what was decided about it;
    after an evaluation with another result it is decided anew.

    Args:
        export_dir: Holds every file that ``model["files"]`` lists.
        model: The manifest model.json.
        evaluation: evaluation.json.
        margin: The primary metric must exceed the champion's by more than this.

    Raises:
        HjepaError: if a file of the export is missing or damaged.
        TrackingError: if the server does not take it. Nothing is half registered: a version appears at the end.
        UserError: if ``primary_metric`` was not measured, or the registered model cannot have this name.
    """
    if not name or re.search(r"[/:.%\"'@]", name):
        raise UserError(f"tracking.registered_model must be a name without / : . % @ or quotes, got {name!r}")
    new = Candidate.of_manifests(model, evaluation, primary_metric)
    tags = {**new.tags, INTERVAL_TAG: interval_tag(evaluation, primary_metric), OUTCOMES_TAG: _digest(new.outcomes)}
    verify_files(export_dir, model)
    action = f"register the encoder as {name!r}"
    with http_patience(timeout_seconds=120, retries=5), server_errors(tracker.uri, action):
        client = tracker.client
        run = client.get_run(tracker.run_id)
        run_name = run.data.tags.get(RUN_TAG) or run.info.run_name or tracker.run_id
        version = _version_of(client, name, tracker.run_id, str(model["digest"]))
        if version is None:
            model_id = _log_model(client, tracker, run_name=run_name, export_dir=export_dir, model=model)
            _log_evaluation(client, tracker, model_id, new.outcomes, model=model, evaluation=evaluation)
            _create_name(client, name)
            version = client.create_model_version(
                name,
                source=f"models:/{model_id}",
                run_id=tracker.run_id,
                model_id=model_id,
                tags={RUN_TAG: run_name, _EXPORT_TAG: str(model["digest"]), **tags},
                await_creation_for=0,
            )
        elif any(version.tags.get(tag, "") != value for tag, value in tags.items()):
            _log_evaluation(client, tracker, model_id_of(version), new.outcomes, model=model, evaluation=evaluation)
            version = _rescored(client, version, tags)
        number = int(version.version)
        if _DECISION_TAG not in version.tags:
            verdict = _decided(client, tracker.uri, version, new, margin)
            text = describe(run_name, model, evaluation, verdict=verdict, name=name, version=number)
            client.update_model_version(name, str(number), description=text)
            # Last, so that a kill before this decides and describes anew.
            client.set_model_version_tag(name, str(number), _DECISION_TAG, verdict.alias)
        else:
            verdict = Verdict(version.tags[_DECISION_TAG], version.tags[_REASON_TAG])
        present = champion_of(client, name)
    return Registration(
        name=name,
        version=number,
        alias=verdict.alias,
        reason=verdict.reason,
        champion_version=int(present.version) if present else None,
        url=f"{tracker.uri}/#/models/{name}/versions/{number}?workflowType=machine_learning",
    )


def _digest(outcomes: Outcomes | None) -> str:
    return hashlib.sha256(outcomes.text.encode()).hexdigest() if outcomes else ""


def _log_evaluation(
    client: MlflowClient,
    tracker: Tracker,
    model_id: str,
    outcomes: Outcomes | None,
    *,
    model: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> None:
    """Metrics and outcomes, beside the model. Outcomes count once the version has a tag with their digest."""
    step = int(model["checkpoint"]["images_seen"])
    log_metrics(client, tracker.run_id, evaluation["metrics"], step, model_id=model_id)
    if outcomes:
        with tempfile.TemporaryDirectory(prefix="hjepa-register-") as temporary:
            path = Path(temporary) / _OUTCOMES
            path.write_text(outcomes.text, "utf-8")
            client.log_model_artifact(model_id, str(path))


def _rescored(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> ModelVersion:
    """The version with the scores of another evaluation, and no longer with a decision."""
    # The decision goes first: a kill must not leave the old one beside the new scores.
    for tag in (_DECISION_TAG, _REASON_TAG, _CLAIM_TAG, *GATE_TAGS):
        if tag in version.tags:
            client.delete_model_version_tag(version.name, version.version, tag)
    for tag, value in tags.items():
        client.set_model_version_tag(version.name, version.version, tag, value)
    return client.get_model_version(version.name, version.version)


def candidate_of(client: MlflowClient, server: str, version: ModelVersion) -> Candidate | None:
    """What the gate knows of a version that is registered; None if something else registered it."""
    score = Score.of_version(version)
    if score is None:
        return None
    tags = version.tags
    return Candidate(
        score=score,
        outcomes=_stored_outcomes(client, server, version),
        collapse=tags.get(COLLAPSE_TAG, ""),
        checks=json.loads(tags.get(CHECKS_TAG) or "{}"),
    )


def _stored_outcomes(client: MlflowClient, server: str, version: ModelVersion) -> Outcomes | None:
    """None where there are none, or those of another evaluation than the version's scores, as after a kill."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    expected = version.tags.get(OUTCOMES_TAG)
    if not expected:
        return None
    base = str(client.get_model_version_download_uri(version.name, version.version))
    if _OUTCOMES not in {Path(item.path).name for item in list_artifacts(artifact_uri=base, tracking_uri=server)}:
        return None
    with tempfile.TemporaryDirectory(prefix="hjepa-register-") as temporary:
        found = download_artifacts(artifact_uri=f"{base}/{_OUTCOMES}", dst_path=temporary, tracking_uri=server)
        data = Path(found).read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        return None
    return Outcomes.of_json(json.loads(data))


def _decided(client: MlflowClient, server: str, version: ModelVersion, new: Candidate, margin: float) -> Verdict:
    """The verdict on a version, written to the server."""
    name, number, score = version.name, str(version.version), new.score
    # Before the champion is read: what is decided by now has moved the alias, and is done.
    done = {str(other.version) for other in versions_of(client, name) if _DECISION_TAG in other.tags}
    present = champion_of(client, name)
    if present is not None and str(present.version) == number:
        # A kill came after the alias was moved, or the champion was evaluated again.
        reason = version.tags.get(_REASON_TAG) or (
            f"{new.obstacle or f'{score.metric} {score.value:.4f}'} in another evaluation; "
            "it was the champion already and stays it"
        )
        numbers = {tag: version.tags[tag] for tag in GATE_TAGS if tag in version.tags}
        verdict = Verdict(CHAMPION, reason, {MARGIN_TAG: repr(margin), **numbers})
    else:
        verdict = decide(
            new,
            candidate_of(client, server, present) if present else None,
            champion_version=int(present.version) if present else None,
            margin=margin,
        )
    for tag, value in {**verdict.numbers, _REASON_TAG: verdict.reason}.items():
        client.set_model_version_tag(name, number, tag, value[:_TAG_CHARACTERS])
    if verdict.alias == CHAMPION:
        if present is not None and str(present.version) != number:
            client.set_model_version_tag(name, number, PREVIOUS_TAG, str(present.version))
        client.set_model_version_tag(name, number, _CLAIM_TAG, CHAMPION)
        client.set_registered_model_alias(name, CHAMPION, number)
        lost = _settle(client, name, version, score, done=done)
        if lost is None:
            return verdict
        verdict = Verdict(CHALLENGER, lost, verdict.numbers)
        client.set_model_version_tag(name, number, _REASON_TAG, lost)
        if present is not None:
            _leave_out(client, name, number, before=str(present.version))
    client.set_registered_model_alias(name, CHALLENGER, number)
    return verdict


def _leave_out(client: MlflowClient, name: str, number: str, *, before: str) -> None:
    """Takes a version that had the alias for a moment alone out of the champions that a rollback goes back to."""
    client.delete_model_version_tag(name, number, PREVIOUS_TAG)
    present = champion_of(client, name)
    if present is not None and present.tags.get(PREVIOUS_TAG) == number:
        client.set_model_version_tag(name, present.version, PREVIOUS_TAG, before)


def _settle(client: MlflowClient, name: str, version: ModelVersion, score: Score, *, done: set[str]) -> str | None:
    """Makes the best of those the champion that claimed it at the same time; the reason if that is not ``version``.

    MLflow cannot move an alias on a condition, so the last of two writers wins, whatever its score. But each claims
    before it moves the alias and looks for other claims afterwards, so the later of the two sees both. Only a version
    that the gate let through claims; which of two such is better is then a matter of the score alone, so that both
    come to the same answer.
    """
    number = str(version.version)
    best, best_score = number, score
    for rival in versions_of(client, name):
        rival_score = Score.of_version(rival)
        if _CLAIM_TAG not in rival.tags or str(rival.version) in done or rival_score is None:
            continue
        if rival_score.comparable(score):
            first = (rival_score.value, -int(rival.version)) > (best_score.value, -int(best))
            best, best_score = (str(rival.version), rival_score) if first else (best, best_score)
    present = champion_of(client, name)
    if present is None or str(present.version) != best:
        client.set_registered_model_alias(name, CHAMPION, best)
    if best == number:
        return None
    return (
        f"{score.metric} {score.value:.4f}; version {best}, registered at the same time, has {best_score.value:.4f} "
        "and is the champion"
    )


def model_id_of(version: ModelVersion) -> str:
    """The logged model behind a version that hjepa registered; the server does not always say it in so many words."""
    return str(version.model_id or str(version.source).removeprefix("models:/"))


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """In no order. The server's pages are read to their end."""
    found: list[ModelVersion] = []
    page = None
    while True:
        part = client.search_model_versions(f"name = '{name}'", page_token=page)
        found += part
        page = part.token
        if not page:
            return found


def champion_of(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that has the alias now. Raises MlflowException if there is no such name, or its version is gone."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, number) if number is not None else None


def _version_of(client: MlflowClient, name: str, run_id: str, digest: str) -> ModelVersion | None:
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get(_EXPORT_TAG) == digest:
            return client.get_model_version(name, version.version)
    return None


def _create_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Image encoders pretrained by hjepa.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_model(
    client: MlflowClient, tracker: Tracker, *, run_name: str, export_dir: Path, model: Mapping[str, Any]
) -> str:
    """Uploads the export as an MLflow model that loads itself; returns the id of the logged model."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    pixels = min(_EXAMPLE_PIXELS, int(model["preprocessing"]["image_size"]))
    channels = int(model["preprocessing"]["channels"])
    colour = () if channels == 1 else (channels,)
    ramp = np.add.outer(np.arange(pixels), np.arange(pixels)) * 255 // max(1, 2 * pixels - 2)
    example = np.broadcast_to(ramp.reshape(1, pixels, pixels, *([1] * len(colour))), (1, pixels, pixels, *colour))
    signature = ModelSignature(
        # Of type object, since the column may be arrays or encoded files; pyfunc.py checks what is in it.
        inputs=Schema([TensorSpec(np.dtype("object"), (-1,), name="image")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1))]),
        params=ParamSchema([ParamSpec("level", "string", "all")]),
    )
    logged = _begun(client, tracker, str(model["digest"]))
    if logged is None:
        logged = client.create_logged_model(
            tracker.experiment_id,
            name=_MODEL_NAME,
            source_run_id=tracker.run_id,
            tags={RUN_TAG: run_name, _EXPORT_TAG: str(model["digest"])},
            model_type="encoder",
        )
    if logged.status == LoggedModelStatus.READY:
        return str(logged.model_id)
    with tempfile.TemporaryDirectory(prefix="hjepa-register-") as temporary:
        staged = Path(temporary) / "export"
        staged.mkdir()
        for file in model["files"]:
            shutil.copyfile(export_dir / file, staged / file)
        (staged / _MANIFEST).write_text(json.dumps(model, indent=2, sort_keys=True) + "\n")
        folder = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"export": str(staged)},
            signature=signature,
            input_example=np.ascontiguousarray(example, dtype=np.uint8),
            pip_requirements=_requirements(model),
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=tracker.run_id,
            ),
        )
        client.log_model_artifacts(logged.model_id, str(folder))
    known = client.get_run(tracker.run_id).outputs
    if logged.model_id not in {item.model_id for item in (known.model_outputs if known else [])}:
        client.log_outputs(tracker.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return str(logged.model_id)


def _begun(client: MlflowClient, tracker: Tracker, digest: str) -> LoggedModel | None:
    """The logged model of this run and export that an attempt which died has left, whole (READY) or in part."""
    found = client.search_logged_models([tracker.experiment_id], f"source_run_id = '{tracker.run_id}'")
    begun = [item for item in found if item.tags.get(_EXPORT_TAG) == digest]
    return min(begun, key=lambda item: int(item.creation_timestamp), default=None)


def _requirements(model: Mapping[str, Any]) -> list[str]:
    """Spelt out, since MLflow would otherwise load the model in a child process to find them by import.

    Those of the export, as this process may have no torch of its own.
    """
    packages = model.get("packages") or {name: installed_version(name) for name in ("torch", "numpy", "safetensors")}
    pins = [f"{package}=={version.partition('+')[0]}" for package, version in packages.items()]
    return [f"hjepa=={hjepa.__version__}", *pins]


def describe(
    run_name: str,
    model: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    verdict: Verdict,
    name: str,
    version: int,
) -> str:
    """What the version's page says, in Markdown."""
    levels = "; ".join(
        f"level {item['level']}: {item['grid']}x{item['grid']} cells, {item['embedding_dim']} numbers"
        for item in model["levels"]
    )
    preprocessing, checkpoint = model["preprocessing"], model["checkpoint"]
    colours = "grey" if preprocessing["channels"] == 1 else "RGB"
    split = evaluation["split"]
    keys = dict.fromkeys(key for row in evaluation["table"] for key in row)  # the union, in order
    measures = [key for key in keys if not (key.rpartition("_")[0] in keys and key.endswith(("_low", "_high", "_std")))]
    checks = "; ".join(describe_check(*item) for item in (model.get("checks") or {}).items())
    rows = [
        f"| {' | '.join(measures)} |",
        "|---" * len(measures) + "|",
        *(f"| {' | '.join(_cell(row, key) for key in measures)} |" for row in evaluation["table"]),
    ]
    return "\n".join(
        [
            f"**{verdict.alias}: {verdict.reason}**",
            "",
            f"Collapse: {evaluation.get('collapse') or 'no sign'}. Export checks: {checks or 'none recorded'}.",
            "",
            f"Encoder of run `{run_name}` after {int(checkpoint['images_seen']):,} images "
            f"({preprocessing['image_size']} pixels, {colours}). {levels[0].upper()}{levels[1:]}.",
            "",
            f"Measured on dataset `{str(split['dataset_digest'])[:12]}`, {split['train']:,} training and "
            f"{split.get('test', 0):,} test images:",
            "",
            *rows,
            "",
            "```python",
            f'encoder = hjepa.load_encoder("models:/{name}/{version}")',
            "```",
            f"Exported to `{model['uri']}`.",
        ]
    )


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    interval = f" [{row[f'{key}_low']:.4f}, {row[f'{key}_high']:.4f}]" if row.get(f"{key}_low") is not None else ""
    return f"{value:.4f}{interval}"


# -- fetching ----------------------------------------------------------------------------------------------------------


def run_of_champion(tracker: Tracker, registration: Registration) -> str | None:
    """The MLflow run id behind the champion that a registration found or made, None without one."""
    if registration.champion_version is None:
        return None
    with server_errors(tracker.uri, "read the champion"):
        version = tracker.client.get_model_version(registration.name, str(registration.champion_version))
    return str(version.run_id) if version.run_id else None


def fetch_export(uri: str) -> Path:
    """The folder of an export, verified against its manifest; remote ones are kept in the user's cache.

    Args:
        uri: ``models:/name@alias``, ``models:/name/version``, ``runs:/run_id/encoder`` (all of the MLflow server that
            ``MLFLOW_TRACKING_URI`` names), ``s3://bucket/models/...``, or a folder.

    Raises:
        UserError: if there is no export at ``uri``.
        HjepaError: if a file is missing or damaged, or the server does not answer.
    """
    if uri.startswith("s3://"):
        return _into_cache(_s3_reader(uri))
    if uri.startswith(("models:/", "runs:/")):
        return _into_cache(_mlflow_reader(uri))
    if re.match(r"[a-z][a-z0-9+.-]+:/", uri):
        raise UserError(
            f"cannot fetch {uri!r}: expected models:/name@alias, models:/name/1, runs:/..., s3://... or a folder"
        )
    from hjepa.export import WEIGHTS  # brings torch, which registering does without

    folder = Path(uri).expanduser()
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"no exported encoder in {folder}: expected a folder with {WEIGHTS}, as `hjepa export` makes it"
        )
    if (folder / _MANIFEST).is_file():
        verify_files(folder, read_manifest(folder))
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """model.json of an export. Raises HjepaError if it is damaged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
    except ValueError as error:
        raise HjepaError(f"{folder / _MANIFEST} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise HjepaError(f"{folder / _MANIFEST} is not a model manifest: it has no list of files")
    return manifest


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises HjepaError unless every file that the manifest lists is there, whole and unchanged."""
    for name, expected in _files(manifest):
        path = folder / name
        if not path.is_file():
            raise HjepaError(f"{folder} is not complete: {name} is missing; export or fetch it again")
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            raise HjepaError(
                f"{path} is damaged: expected {expected['bytes']} bytes with sha256 {expected['sha256']}; "
                "export or fetch it again"
            )


def _files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, expected in manifest["files"].items():
        if name != Path(name).name:
            raise HjepaError(f"a model manifest lists {name!r}, which is not a plain file name")
        yield name, expected


def _into_cache(read: Callable[[str, Path], None]) -> Path:
    """``read(name, folder)`` fetches one file. The folder's name is the digest of its contents, so it never changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hjepa" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        read(_MANIFEST, folder)
        manifest = read_manifest(folder)
        kept = cache / sha256_json(manifest)
        if kept.is_dir():
            try:
                verify_files(kept, manifest)
            except HjepaError:
                shutil.rmtree(kept)
            else:
                return kept
        for name, _ in _files(manifest):
            read(name, folder)
        verify_files(folder, manifest)
        try:
            folder.rename(kept)
        except OSError:
            if not kept.is_dir():  # else another process was faster, with the same bytes
                raise
    return kept


def _s3_reader(uri: str) -> Callable[[str, Path], None]:
    from hjepa.adapters.s3 import ObjectNotFoundError, S3Store

    store = S3Store(uri)

    def read(name: str, folder: Path) -> None:
        try:
            store.download(name, folder / name)
        except ObjectNotFoundError:
            raise UserError(f"no exported encoder at {uri}: {name} is missing there") from None

    return read


def _mlflow_reader(uri: str) -> Callable[[str, Path], None]:
    server = tracking_uri()
    with http_patience(timeout_seconds=30, retries=3), server_errors(server, f"find {uri}"):
        base = _artifacts_of(server, uri)

    def read(name: str, folder: Path) -> None:
        from mlflow.artifacts import download_artifacts

        with (
            tempfile.TemporaryDirectory(dir=folder) as temporary,
            http_patience(timeout_seconds=120, retries=3),
            server_errors(server, f"fetch {name} of {uri}"),
        ):
            found = download_artifacts(artifact_uri=f"{base}/{_EXPORT}/{name}", dst_path=temporary, tracking_uri=server)
            Path(found).replace(folder / name)

    return read


def _artifacts_of(server: str, uri: str) -> str:
    """Where MLflow keeps the files of a model: an alias may move between two reads, this does not."""
    from mlflow import MlflowClient
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=server, registry_uri=server)
    alias = re.fullmatch(r"models:/([^/@]+)@([^/@]+)", uri)
    version = re.fullmatch(r"models:/([^/@]+)/(\d+)", uri)
    logged = re.fullmatch(r"models:/(m-\w+)", uri)
    try:
        if alias:
            name, number = alias[1], client.get_model_version_by_alias(alias[1], alias[2]).version
            base = str(client.get_model_version_download_uri(name, number))
        elif version:
            base = str(client.get_model_version_download_uri(version[1], version[2]))
        elif logged:
            base = str(client.get_logged_model(logged[1]).artifact_location)
        elif re.fullmatch(r"runs:/\w+/.+", uri):
            base = uri
        else:
            raise UserError(f"cannot read {uri!r}: expected models:/name@alias, models:/name/1 or runs:/run_id/encoder")
        files = list_artifacts(artifact_uri=f"{base}/{_EXPORT}", tracking_uri=server)
    except MlflowException as error:
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise UserError(f"MLflow at {server} has no {uri}: {error.message}") from error
        raise
    if _MANIFEST not in {Path(item.path).name for item in files}:
        raise UserError(f"{uri} is no encoder that hjepa registered: it has no {_EXPORT}/{_MANIFEST}")
    return base
