"""Validate the configuration, check S3 and MLflow, and open the MLflow run."""

from kfp import dsl

from components.images import TOOLS


@dsl.component(base_image=TOOLS, install_kfp_package=False)
def resolve_config(
    resolved: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    config: str = "default",
    overrides: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
    data_name: str = "",
    data_root: str = "",
    storage_uri: str = "",
    storage_endpoint_url: str = "",
    tracking_uri: str = "",
    registered_model: str = "",
    champion_margin: str = "",
    nodes: str = "",
    gpus: str = "",
    backend: str = "",
    profile: str = "",
    pipeline_ui: str = "",
    run: str = "",
    job: str = "",
) -> None:
    """Validate the configuration, check S3 and MLflow, and open the MLflow run.

    Args:
        resolved: The resolved configuration and the run's identity, as JSON.
        summary: The run and its page in MLflow, to read in the KFP UI.
        config: Name of a packaged configuration, or YAML text.
        overrides: Settings in the form section.key=value; later ones win.
        data_name: Data set to use; empty keeps what the configuration says.
        data_root: Folder of its images; empty keeps what the configuration says.
        storage_uri: S3 bucket and prefix; empty keeps what the configuration says.
        storage_endpoint_url: S3 endpoint; empty keeps what the configuration says.
        tracking_uri: MLflow server; empty keeps what the configuration says.
        registered_model: Name in the model registry; empty keeps what the configuration says.
        champion_margin: Rise of the primary metric that makes a champion; empty keeps what the configuration says.
        nodes: Of a training job; empty keeps what profile and configuration say.
        gpus: Per node of a training job; empty keeps what profile and configuration say.
        backend: Of a training job; empty keeps what profile and configuration say.
        profile: The cluster's profile as YAML, a section cluster alone; overrides outrank it.
        pipeline_ui: Address of the KFP UI, for the link from the MLflow run; empty writes none.
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
        "tracking.champion_margin": champion_margin,
        "cluster.nodes": nodes,
        "cluster.gpus_per_node": gpus,
        "cluster.backend": backend,
    }
    opened = steps.resolve_config(
        config=config,
        overrides=overrides,
        settings=settings,
        profile=profile,
        run=run or job,
        job=job,
        pipeline_ui=pipeline_ui,
        resolved_path=resolved.path,
    )
    resolved.metadata.update({key: opened[key] for key in ("name", "mlflow_run_id", "mlflow_url", "uri")})
    with open(summary.path, "w", encoding="utf-8") as file:
        file.write("Run **{name}**: [MLflow]({mlflow_url}), stored in `{uri}`\n".format(**opened))
