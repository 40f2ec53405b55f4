"""The pretraining pipeline. ``python -m pipelines.pretrain`` compiles it to ``pipelines/compiled/pretrain.yaml``."""

import sys
from pathlib import Path

from kfp import compiler, dsl, kubernetes

from components.evaluate import evaluate
from components.export_checkpoint import export_checkpoint
from components.prepare_data import prepare_data
from components.register_model import register_model
from components.resolve_config import resolve_config
from components.train import train

COMPILED = Path(__file__).with_name("compiled") / "pretrain.yaml"

S3_SECRET = "hjepa-s3"
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MLFLOW_SECRET = "hjepa-mlflow"  # only where MLflow asks for a login
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
HOUR = 3600


def in_cluster(task: dsl.PipelineTask, *, timeout_seconds: int, retries: int = 2) -> None:
    """What every task gets: credentials by name, a time limit, retries, and no KFP cache.

    KFP's cache does not see our code, and the steps return stored results themselves.
    """
    task.set_caching_options(False)
    if retries:
        task.set_retry(num_retries=retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")
    kubernetes.set_timeout(task, timeout_seconds)
    kubernetes.use_secret_as_env(task, S3_SECRET, {key: key for key in S3_KEYS})
    kubernetes.use_secret_as_env(task, MLFLOW_SECRET, {key: key for key in MLFLOW_KEYS}, optional=True)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")


@dsl.pipeline(name="hjepa-pretrain")
def pretrain(
    config: str = "default",
    overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
    data_name: str = "",
    data_root: str = "",
    storage_uri: str = "",
    storage_endpoint_url: str = "",
    tracking_uri: str = "",
    registered_model: str = "",
    run: str = "",
    gpus: str = "1",
) -> None:
    """From raw images to a registered encoder: prepare, pretrain, export, evaluate, register.

    Args:
        config: Name of a packaged configuration, or YAML text.
        overrides: Settings in the form section.key=value, such as training.lr=3e-4; later ones win.
        data_name: Data set to use; empty keeps what the configuration says.
        data_root: Folder of its images; empty keeps what the configuration says.
        storage_uri: Bucket and prefix for everything that is stored; empty keeps what the configuration says.
        storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
        tracking_uri: MLflow server; empty keeps what the configuration says.
        registered_model: Name in the model registry; empty keeps what the configuration says.
        run: Name of the run; a name used before resumes that run. Empty takes the id of the KFP run.
        gpus: How many GPUs the training task gets; 0 trains on CPUs. On a laptop training.device decides.
    """
    resolved = resolve_config(
        config=config,
        overrides=overrides,
        data_name=data_name,
        data_root=data_root,
        storage_uri=storage_uri,
        storage_endpoint_url=storage_endpoint_url,
        tracking_uri=tracking_uri,
        registered_model=registered_model,
        run=run,
        job=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )
    prepared = prepare_data(resolved=resolved.output)
    trained = train(resolved=resolved.output, dataset=prepared.output)
    exported = export_checkpoint(resolved=resolved.output, dataset=prepared.output, checkpoint=trained.output)
    evaluated = evaluate(resolved=resolved.output, dataset=prepared.output, model=exported.output)
    registered = register_model(
        resolved=resolved.output, model=exported.output, evaluation=evaluated.outputs["evaluation"]
    )

    # No retry here: what this step refuses, it would refuse again.
    in_cluster(resolved, timeout_seconds=HOUR // 4, retries=0)
    in_cluster(prepared, timeout_seconds=24 * HOUR)
    in_cluster(trained, timeout_seconds=14 * 24 * HOUR, retries=5)
    in_cluster(exported, timeout_seconds=HOUR)
    in_cluster(evaluated, timeout_seconds=12 * HOUR)
    in_cluster(registered, timeout_seconds=HOUR)
    # The count is a text: KFP's driver takes a number for an empty one, and the pod would get no GPU.
    trained.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)
    kubernetes.add_toleration(trained, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    for loading in (prepared, trained, evaluated):
        # Loader processes hand over images through shared memory; a pod's default of 64 MiB is too small.
        kubernetes.empty_dir_mount(loading, volume_name="dshm", mount_path="/dev/shm", medium="Memory")


def compile_to(path: Path) -> None:
    """Write the pipeline as YAML; the same source and the same kfp give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pretrain, str(path))


if __name__ == "__main__":
    compile_to(Path(sys.argv[1]) if len(sys.argv) > 1 else COMPILED)
