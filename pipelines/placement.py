"""Where and on what each task runs: everything about the cluster that the pipelines know, from one profile.

A profile is the section ``cluster`` of a configuration in a file of its own (``pipelines/profiles/``), one per cluster.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl, kubernetes

if TYPE_CHECKING:  # importing a pipeline needs kfp alone
    from hjepa.config import ClusterConfig

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
WANDB_KEYS = ("WANDB_API_KEY",)
# What of a profile can be said of a task; the rest is for a training job, which pretrain-distributed starts.
OF_TASKS = {
    "registry", "image", "image_pull_secrets", "gpus_per_node", "processes_per_node", "gpu_resource", "cpu", "memory",
    "shm", "node_selector", "tolerations", "queue", "s3_secret", "mlflow_secret", "env",
}  # fmt: skip
IMAGES = "/data"  # where the claim with the images is mounted: data_root=/data
BRANCHES_AT_ONCE = 2  # of a sweep; each takes the GPUs of its training
HOUR = 3600
DAY = 24 * HOUR


class Placement:
    """Gives tasks what a cluster's profile says.

    Args:
        profile: A file with a section ``cluster``; None takes the defaults.
        images_claim: PersistentVolumeClaim with the images, which prepare_data reads at ``IMAGES``; None mounts none.
        branches_at_once: How many branches of a sweep train at the same time.

    Raises:
        hjepa.errors.UserError: for every mistake in the profile, or for a claim that can have no such name.
    """

    def __init__(
        self,
        profile: Path | None = None,
        images_claim: str | None = None,
        *,
        branches_at_once: int = BRANCHES_AT_ONCE,
    ):
        from hjepa import steps
        from hjepa.config import load_config
        from hjepa.errors import UserError

        label = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
        if images_claim and not (re.fullmatch(rf"{label}(\.{label})*", images_claim) and len(images_claim) <= 253):
            raise UserError(
                f"--images-claim {images_claim}: expected the name of a PersistentVolumeClaim: lower-case letters, "
                "digits, '-' and '.', as `kubectl get pvc` prints it"
            )
        self.images_claim = images_claim
        self.branches_at_once = branches_at_once
        settings = steps.profile_settings(str(profile)) if profile else []
        self.cluster: ClusterConfig = load_config("default", settings).cluster
        given = {item.partition("=")[0].removeprefix("cluster.") for item in settings}
        self.of_jobs_alone = sorted(given - OF_TASKS - ({"nodes"} if self.cluster.nodes == 1 else set()))
        # What a run's tasks get of it. On one line: KFP writes defaults into comments.
        self.text = json.dumps({"cluster": self.cluster.model_dump(mode="json", include=given)}) if given else ""

    def everywhere(self, task: dsl.PipelineTask, *, timeout_seconds: int, retries: int = 2) -> None:
        """What every task gets: credentials by name, a time limit, retries, and no KFP cache.

        KFP's cache does not see our code, and the steps return stored results themselves.
        """
        task.set_caching_options(False)
        if retries:
            task.set_retry(num_retries=retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
        kubernetes.set_timeout(task, timeout_seconds)
        kubernetes.use_secret_as_env(task, self.cluster.s3_secret, {key: key for key in S3_KEYS})
        # Only where MLflow asks for a login.
        kubernetes.use_secret_as_env(task, self.cluster.mlflow_secret, {key: key for key in MLFLOW_KEYS}, optional=True)
        kubernetes.set_image_pull_policy(task, "IfNotPresent")
        if self.cluster.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(self.cluster.image_pull_secrets))
        kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "hjepa")

    def reads_source(self, task: dsl.PipelineTask) -> None:
        if self.images_claim:
            kubernetes.mount_pvc(task, self.images_claim, IMAGES)

    def loads_images(self, task: dsl.PipelineTask) -> None:
        """Loader processes hand over images through shared memory; a pod's default of 64 MiB is too small."""
        kubernetes.empty_dir_mount(
            task, volume_name="dshm", mount_path="/dev/shm", medium="Memory", size_limit=self.cluster.shm
        )

    def trains(self, task: dsl.PipelineTask, *, gpus: str) -> None:
        """A node of the profile's kind for this task's own pod.

        Args:
            gpus: How many; a text, because KFP's driver takes a number for an empty one, and the pod gets no GPU.
        """
        cluster = self.cluster
        task.set_accelerator_type(cluster.gpu_resource).set_accelerator_limit(gpus)
        task.set_cpu_request(cluster.cpu).set_memory_request(cluster.memory).set_memory_limit(cluster.memory)
        for name, value in cluster.node_selector.items():
            kubernetes.add_node_selector(task, name, value)
        for toleration in cluster.tolerations:
            kubernetes.add_toleration(
                task,
                key=toleration.key,
                operator=toleration.operator,
                value=toleration.value,
                effect=toleration.effect,
            )
        if cluster.image is not None:
            task.set_container_image(cluster.image)
        for name, value in cluster.env.items():
            task.set_env_variable(name, value)
        if cluster.processes_per_node is not None:
            task.set_env_variable("HJEPA_PROCESSES", str(cluster.processes_per_node))
        if cluster.queue is not None:
            kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", cluster.queue)
        # A training job gets all keys of its Secrets; here each is named.
        kubernetes.use_secret_as_env(task, cluster.mlflow_secret, {key: key for key in WANDB_KEYS}, optional=True)
        self.loads_images(task)
