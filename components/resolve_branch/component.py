"""Open the MLflow run of one branch of a sweep."""

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def resolve_branch(
    resolved_sweep: dsl.Input[dsl.Artifact],
    sweep: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    resolved: dsl.Output[dsl.Artifact],
    branch: str,
    gpus: str = "",
) -> None:
    """Open the MLflow run of one branch of a sweep.

    Args:
        resolved_sweep: Output resolved of resolve_sweep.
        sweep: Output sweep of resolve_sweep.
        dataset: Output of prepare_data, the same for all branches.
        resolved: The branch's configuration and its run's identity, as JSON.
        branch: Its name.
        gpus: Of its training; empty keeps what the configuration says.
    """
    from hjepa import steps

    opened = steps.resolve_branch(
        resolved_sweep_path=resolved_sweep.path,
        sweep_path=sweep.path,
        dataset_path=dataset.path,
        branch=branch,
        gpus=gpus,
        resolved_path=resolved.path,
    )
    resolved.metadata.update({key: opened[key] for key in ("name", "mlflow_run_id", "mlflow_url", "uri")})
