"""What a training job is, before any backend writes it down in its own terms."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from hjepa import __version__
from hjepa.config import ClusterConfig, Config, sha256_json
from hjepa.errors import UserError

# Operators append -worker-N or -node-0-N-xxxxx to it, and a pod's name has at most 63 characters.
NAME_LIMIT = 40
MANAGED_BY = "app.kubernetes.io/managed-by"
LABELS = {
    "app.kubernetes.io/name": "hjepa",
    "app.kubernetes.io/component": "train",
    "app.kubernetes.io/part-of": "hjepa",
    MANAGED_BY: "hjepa",
}
SPEC_HASH = "hjepa.dev/spec-hash"


@dataclass(frozen=True)
class Owner:
    """The object whose deletion takes the job with it: the Workflow of the pipeline run."""

    api_version: str
    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class TrainSpec:
    """One training job.

    Args:
        name: Of the job; a DNS-1035 label of at most ``NAME_LIMIT`` characters.
        image: Of the training pods.
        args: For the image's entrypoint, such as ("train", "--run-uri", "s3://bucket/prefix/runs/NAME").
        cluster: Where and on what.
        env: Plain variables; secrets come by name from ``cluster.s3_secret`` and ``cluster.mlflow_secret``.
        labels: Beside ``LABELS``, on the job and on its pods.
        owner: None for a job that is applied by hand.
    """

    name: str
    image: str
    args: tuple[str, ...]
    cluster: ClusterConfig
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    owner: Owner | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", self.name) or len(self.name) > NAME_LIMIT:
            raise UserError(
                f"job name {self.name!r}: expected at most {NAME_LIMIT} lower-case letters, digits and '-', starting "
                "with a letter; the operators make the pods' names from it"
            )

    @property
    def processes(self) -> int:
        """Ranks per node."""
        return self.cluster.processes_per_node or max(self.cluster.gpus_per_node, 1)

    @property
    def ranks(self) -> int:
        return self.cluster.nodes * self.processes


def spec_hash(manifests: Sequence[Mapping[str, Any]]) -> str:
    """Of what the job is, not of whom it belongs to: a retry by another pod finds the same hash."""
    return sha256_json([manifest["spec"] for manifest in manifests])[:16]


def job_name(run: str, task: str = "train") -> str:
    """The same for every try of one task of one run."""
    return f"hjepa-{hashlib.sha256(f'{run}/{task}'.encode()).hexdigest()[:10]}"


def train_image(cluster: ClusterConfig) -> str:
    name = cluster.image or f"hjepa-train:{__version__}"
    return f"{cluster.registry.rstrip('/')}/{name}" if cluster.registry and cluster.image is None else name


def job_env(config: Config, *, run: str, mlflow_run_id: str | None, tracking_uri: str | None) -> dict[str, str]:
    """What the training pods need to know beside their arguments; credentials are not among it."""
    env = {
        "AWS_ENDPOINT_URL": config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL", ""),
        "AWS_REGION": config.storage.region,
        "MLFLOW_TRACKING_URI": tracking_uri or "",
        "MLFLOW_RUN_ID": mlflow_run_id or "",
        "HJEPA_RUN": run,
    }
    return {key: value for key, value in env.items() if value} | dict(config.cluster.env)


def check_addresses(config: Config, env: Mapping[str, str]) -> None:
    """Refuse servers of this machine alone, which a pod would look for in itself.

    An address that ``cluster.env`` names is the user's own word, as for a server beside every pod.

    Raises:
        UserError: S3's address or MLflow's is a loopback address.
    """
    for name, key, configured in (
        ("AWS_ENDPOINT_URL", "storage.endpoint_url", config.storage.endpoint_url),
        ("MLFLOW_TRACKING_URI", "tracking.uri", config.tracking.uri),
    ):
        used = configured or env.get(name, "")  # in the pods too, the configuration outranks the variable
        if _is_loopback(used) and used != config.cluster.env.get(name):
            leave = f", and leave {key} null" if configured else ""
            raise UserError(
                f"{name if configured is None else key} is {used}, which in a pod leads to the pod itself. Name the "
                f"address that pods reach: --set cluster.env.{name}=http://SERVICE.NAMESPACE:PORT, or in the profile "
                f"cluster.env: {{{name}: http://SERVICE.NAMESPACE:PORT}}{leave}"
            )


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # no address at all, which the client of the server says better
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
