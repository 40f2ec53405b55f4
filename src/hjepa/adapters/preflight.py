"""What can be known to be wrong before any long work: servers, disks, device, images. Also `hjepa doctor`."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hjepa.adapters.s3 import S3Store
from hjepa.adapters.tracking import TrackingError, http_patience, server_errors, tracking_uri
from hjepa.config import Config
from hjepa.errors import HjepaError, UserError
from hjepa.masks import MultiBlockMasking

_SPARE_BYTES = 2**30  # free space wanted on top of what can be foreseen
_TIMEOUT_SECONDS = 5
_OTHER_REGION = re.compile(r"AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint|\b301\b")


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str  # what was found; the cause, if it is not ok
    remedy: str = ""  # empty where nothing has to be done, or the detail says it


def check(
    config: Config, *, source: bool = True, trains_here: bool = True, servers: bool = True, masks: bool = True
) -> list[Finding]:
    """Every check, whatever the others say.

    Args:
        source: Look at the images too.
        trains_here: False leaves out what only the machine that trains needs: device, shared memory, local disks.
        servers: Ask S3 and MLflow.
        masks: Whether the masks leave something to see.
    """
    checks: list[tuple[str, Callable[[Config], Finding]]] = [("masks", _masks)] if masks else []
    if servers:
        checks += [("S3", _storage), ("MLflow", _tracking)]
    if trains_here:
        checks += [("device", _device), ("export", _export)]
        checks += [("checkpoint disk", _checkpoint_disk), ("cache disk", _cache_disk), ("logs", _logs)]
    if source:
        checks.append(("images", _source))
    findings = []
    for name, run in checks:
        try:
            findings.append(run(config))
        except HjepaError as error:  # its message is written for the user: it names cause and remedy
            findings.append(Finding(name, False, str(error)))
    return findings


def require(findings: Iterable[Finding]) -> None:
    """
    Raises:
        UserError: with every finding that is not ok.
    """
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        count = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
        lines = [f"  {finding.name}: {' '.join(filter(None, (finding.detail, finding.remedy)))}" for finding in failed]
        raise UserError("\n".join([f"{count} failed before any long work:", *lines]))


def _storage(config: Config) -> Finding:
    store = S3Store(
        config.storage.uri,
        endpoint_url=config.storage.endpoint_url,
        region=config.storage.region,
        attempts=2,
        connect_timeout_seconds=_TIMEOUT_SECONDS,
        read_timeout_seconds=_TIMEOUT_SECONDS,
    )
    begin = time.monotonic()
    key, sent = f"preflight/{uuid.uuid4().hex}", os.urandom(64)
    try:
        store.put_bytes(key, sent)
    except HjepaError as error:
        if _OTHER_REGION.search(str(error)):
            remedy = f"The bucket is not in storage.region={config.storage.region}: set it to the bucket's region."
            return Finding("S3", False, str(error), remedy)
        raise
    try:
        received = store.get_bytes(key)
    finally:
        store.delete(key)
    if received != sent:
        return Finding(
            "S3",
            False,
            f"{store.uri(key)} came back as other bytes than were written.",
            f"The server at {store.endpoint} (or a cache before it) is not fit to keep data: use another one.",
        )
    milliseconds = 1000 * (time.monotonic() - begin)
    return Finding("S3", True, f"wrote, read and deleted an object in {store.uri()} in {milliseconds:.0f} ms")


def _tracking(config: Config) -> Finding:
    from mlflow import MlflowClient  # takes seconds

    uri = tracking_uri(config.tracking.uri)
    begin = time.monotonic()
    # A search, because the health page is green even where every request of the API is refused.
    try:
        with http_patience(timeout_seconds=_TIMEOUT_SECONDS, retries=0), server_errors(uri, "answer a search"):
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except TrackingError as error:
        if "Invalid Host header" in str(error.__cause__):
            host = uri.partition("//")[2].partition("/")[0]
            remedy = f"It answers only the names it knows: start it with MLFLOW_SERVER_ALLOWED_HOSTS containing {host}."
            return Finding("MLflow", False, f"MLflow at {uri} refuses the name {host} (Invalid Host header).", remedy)
        raise
    return Finding("MLflow", True, f"{uri} answered a search in {1000 * (time.monotonic() - begin):.0f} ms")


def _device(config: Config) -> Finding:
    import torch  # here, so that an image without it can run the other checks

    wanted = config.training.device
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and present == 0):
        return Finding("device", True, f"training.device={wanted}: trains on the CPU, {os.cpu_count()} cores")
    if wanted != "auto" and not re.fullmatch(r"cuda(:\d+)?", wanted):
        return Finding("device", False, f"training.device={wanted!r}: expected auto, cpu, cuda or cuda:N.")
    index = int(wanted.partition(":")[2] or 0)
    if index >= present:
        found = f"{present} GPUs" if present != 1 else "1 GPU, cuda:0"
        return Finding(
            "device",
            False,
            f"training.device={wanted}, but PyTorch {torch.__version__} finds {found}.",
            "Set training.device=auto or cpu, or mend the driver, the GPU limit of the task, or the PyTorch build.",
        )
    properties = torch.cuda.get_device_properties(index)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return Finding("device", True, f"training.device={wanted}: {present} x {properties.name}, {memory}")


def _checkpoint_disk(config: Config) -> Finding:
    kept = config.checkpoint.keep_best_n + 2  # the latest, and the one being written
    return _disk(
        "checkpoint disk",
        "checkpoint.checkpoint_dir",
        config.checkpoint.checkpoint_dir,
        kept * _checkpoint_bytes(config) + _SPARE_BYTES,
    )


def _cache_disk(config: Config) -> Finding:
    return _disk("cache disk", "data.cache_dir", config.data.cache_dir, 2 * _SPARE_BYTES)


def _logs(config: Config) -> Finding:
    return _disk("logs", "logging.log_dir", config.logging.log_dir, 0)


def _checkpoint_bytes(config: Config) -> int:
    """Roughly: the weights of the blocks, in float32, with two moments for what is trained."""
    model = config.model
    per_width = 4 + 2 * model.mlp_ratio  # attention and MLP matrices of a block, in units of width^2
    encoder = model.depth * per_width * model.embed_dim**2
    predictor = model.predictor.depth * per_width * model.predictor.embed_dim**2
    return int(4 * (4 * encoder + 3 * predictor))  # target encoder + (weights, 2 moments) of the trained ones


def _disk(name: str, key: str, folder: str, wanted: int) -> Finding:
    path = Path(folder).expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written to" if existing.is_dir() else "is not a folder"
        return Finding(name, False, f"{key}={folder}: {existing} {what}.", f"Point {key} at a folder of yours.")
    free = shutil.disk_usage(existing).free
    if free < wanted:
        return Finding(
            name,
            False,
            f"{key}={folder}: only {_gib(free)} free, {_gib(wanted)} wanted.",
            f"Free some space, or point {key} at a larger disk.",
        )
    return Finding(name, True, f"{key}={folder}: {_gib(free)} free")


def _export(config: Config) -> Finding:
    from hjepa.export import require_packages

    require_packages(config)
    return Finding("export", True, ", ".join(["safetensors", *config.export.formats]))


def _masks(config: Config) -> Finding:
    MultiBlockMasking(config)  # refuses blocks that leave no context
    return Finding("masks", True, f"{config.masking.num_targets} target blocks on {config.model.num_levels} levels")


def _source(config: Config) -> Finding:
    from hjepa.data.datasets import check_source

    return Finding("images", True, "; ".join(check_source(config.data, partial(S3Store.from_config, config.storage))))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
