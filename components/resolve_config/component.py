"""Validate the configuration, check S3 and MLflow, and open the MLflow run."""

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def resolve_config(
    resolved: dsl.Output[dsl.Artifact],
    config: str = "default",
    overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
    data_name: str = "",
    data_root: str = "",
    storage_uri: str = "",
    storage_endpoint_url: str = "",
    tracking_uri: str = "",
    registered_model: str = "",
    run: str = "",
    job: str = "",
) -> None:
    """Validate the configuration, check S3 and MLflow, and open the MLflow run.

    Args:
        resolved: The resolved configuration and the run's identity, as JSON.
        config: Name of a packaged configuration, or YAML text.
        overrides: Settings in the form section.key=value; later ones win.
        data_name: Data set to use; empty keeps what the configuration says.
        data_root: Folder of its images; empty keeps what the configuration says.
        storage_uri: S3 bucket and prefix; empty keeps what the configuration says.
        storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
        tracking_uri: MLflow server; empty keeps what the configuration says.
        registered_model: Name in the model registry; empty keeps what the configuration says.
        run: Name of the run; a name used before resumes that run. Empty takes the id of the KFP run.
        job: Id of the KFP run, which is unique.
    """
    from hjepa import steps

    settings = {
        "data.name": data_name,
        "data.root": data_root,
        "storage.uri": storage_uri,
        "storage.endpoint_url": storage_endpoint_url,
        "tracking.uri": tracking_uri,
        "tracking.registered_model": registered_model,
    }
    steps.resolve_config(
        config=config, overrides=overrides, settings=settings, run=run or job, resolved_path=resolved.path
    )
