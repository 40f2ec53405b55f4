"""Say how the pipeline ended and why, in MLflow, in the KFP UI and in the log, and clean up after a failure."""

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def report(
    status: dsl.PipelineTaskFinalStatus,
    summary: dsl.Output[dsl.Markdown],
    config: str = "default",
    overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
    storage_uri: str = "",
    storage_endpoint_url: str = "",
    tracking_uri: str = "",
    nodes: str = "",
    gpus: str = "",
    backend: str = "",
    profile: str = "",
    run: str = "",
    job: str = "",
) -> None:
    """Say how the pipeline ended and why, in MLflow, in the KFP UI and in the log, and clean up after a failure.

    Args:
        status: How the tasks ended; KFP fills it in.
        summary: The end and its cause, to read in the KFP UI.
        config: As resolve_config got it.
        overrides: As resolve_config got them.
        storage_uri: As resolve_config got it.
        storage_endpoint_url: As resolve_config got it.
        tracking_uri: As resolve_config got it.
        nodes: As resolve_config got it.
        gpus: As resolve_config got it.
        backend: As resolve_config got it.
        profile: As resolve_config got it.
        run: As resolve_config got it.
        job: Id of the KFP run, which is unique.
    """
    from hjepa import steps

    settings = {
        "storage.uri": storage_uri,
        "storage.endpoint_url": storage_endpoint_url,
        "tracking.uri": tracking_uri,
        "cluster.nodes": nodes,
        "cluster.gpus_per_node": gpus,
        "cluster.backend": backend,
    }
    steps.report(
        config=config,
        overrides=overrides,
        settings=settings,
        profile=profile,
        run=run or job,
        job=job,
        state=status.state,
        message=status.error_message or "",
        summary_path=summary.path,
    )
